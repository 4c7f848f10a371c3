"""Scores of continuations against one plain run each; what begins alike is run once, and no more rows than asked."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from revprobe import ProbedModel, RevprobeError
from revprobe.hooks.untouched import untouched
from revprobe.probes.decoding.continuations import continuation_scores
from revprobe.probes.pairs.query import Query
from revprobe.probes.passes.batches import queries_per_batch
from tiny import drawn, gpt2, language_model, llama

Rows = list[list[tuple[int, ...]]]


def scored(model: ProbedModel, prompts: list[list[int]], rows: Rows, size: int | None = None) -> list[Tensor]:
    with untouched(model.module), torch.no_grad():
        found = list(continuation_scores(model, prompts, rows, size))
    assert sorted(place for place, _ in found) == list(range(len(prompts))), "each prompt once"
    return [scores for _, scores in sorted(found, key=lambda pair: pair[0])]


def slow(model: ProbedModel, prompt: list[int], row: tuple[int, ...]) -> float:
    """One run of all tokens, without a cache, a loop over the continuation."""
    with torch.no_grad():
        logits = model.logits(torch.tensor([[*prompt, *row]]))[0].double()
    return sum(float(logits[len(prompt) + n - 1].log_softmax(-1)[token]) for n, token in enumerate(row))


def adapted() -> ProbedModel:
    """Llama with LoRA weights that count."""
    module = get_peft_model(llama().module, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    return ProbedModel(drawn(module), objective="causal", name="adapted")


def growing() -> ProbedModel:
    """Llama whose angles depend on the length of the sequence, from 4 tokens on: kept keys are turned otherwise."""
    config = llama().module.config
    config.max_position_embeddings = 4
    config.rope_parameters = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
    return ProbedModel(drawn(lambda: language_model(config)), objective="causal", name="growing")


def gemma() -> ProbedModel:
    """Its layers see a window, and its cache keeps no more: a prompt and a continuation are run as a whole."""
    config = transformers.Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=3,
    )
    return ProbedModel(drawn(lambda: language_model(config)), objective="causal", name="gemma")


class Bare(nn.Module):
    """A causal model that has neither `generate` nor a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama().module

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


MODELS: dict[str, Any] = {
    "llama": llama,
    "gpt2": gpt2,
    "gemma": gemma,
    "adapted": adapted,
    "bare": lambda: ProbedModel(Bare(), objective="causal", name="bare"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> ProbedModel:
    return MODELS[request.param]()


TOKEN = st.integers(0, 3)  # few, so that many begin alike
ROWS = st.lists(st.lists(TOKEN, max_size=5).map(tuple), max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
@given(
    asked=st.lists(st.tuples(st.lists(TOKEN, min_size=1, max_size=4), ROWS), min_size=1, max_size=4),
    size=st.sampled_from([None, 1, 2, 3, 7]),
)
def test_scores_are_those_of_one_run_each(model: ProbedModel, asked: Any, size: int | None) -> None:
    """Prompts of several lengths, with no, one and many continuations, some of them empty, equal or begun by others."""
    prompts, rows = [list(prompt) for prompt, _ in asked], [own for _, own in asked]
    for prompt, own, scores in zip(prompts, rows, scored(model, prompts, rows, size), strict=True):
        assert scores.shape == (len(own),) and scores.dtype == torch.float64
        true = torch.tensor([slow(model, prompt, row) for row in own], dtype=torch.float64)
        torch.testing.assert_close(scores, true, rtol=1e-4, atol=1e-4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=8)
@given(rows=ROWS, ends=st.sets(st.integers(0, 9), min_size=1, max_size=3), size=st.sampled_from([None, 2]))
def test_an_end_is_any_of_several_tokens(model: ProbedModel, rows: Any, ends: set[int], size: int | None) -> None:
    with untouched(model.module), torch.no_grad():
        found = dict(continuation_scores(model, [[1, 2], [3]], [rows, rows[:1]], size, ends=ends))
    for place, (prompt, own) in enumerate([([1, 2], rows), ([3], rows[:1])]):
        each = [[slow(model, prompt, (*row, end)) for end in ends] for row in own]
        true = torch.tensor(each, dtype=torch.float64).reshape(len(own), len(ends)).logsumexp(1)
        torch.testing.assert_close(found[place], true, rtol=1e-4, atol=1e-4)


def runs_of(model: ProbedModel) -> tuple[list[tuple[int, int]], Any]:
    """Rows and tokens of every run of the model from now on."""
    seen: list[tuple[int, int]] = []
    table = model.module.get_input_embeddings()
    return seen, table.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))


def test_each_beginning_is_run_once() -> None:
    """Of 3 x 9 continuations of four tokens, in two prompts of one length; the last tokens are only predicted."""
    model = llama()
    rows = [[(5, 6, n, m) for n in range(3) for m in range(9)]] * 2
    seen, handle = runs_of(model)
    scored(model, [[1, 2], [3, 4]], rows)
    handle.remove()
    assert seen == [(2, 2), (2, 1), (2, 1), (6, 1)]


@pytest.mark.parametrize("size", [1, 4, 10])
def test_no_run_has_more_rows_than_were_asked_for(size: int) -> None:
    model = llama()
    rows = [[(n, m, 1) for n in range(5) for m in range(5)], [(n, 2) for n in range(7)], [(3,)]]
    seen, handle = runs_of(model)
    found = scored(model, [[1], [2], [3]], rows, size)
    handle.remove()
    assert max(count for count, _ in seen) <= size
    for prompt, own, scores in zip([[1], [2], [3]], rows, found, strict=True):
        assert scores.tolist() == pytest.approx([slow(model, prompt, row) for row in own], abs=1e-4)


@pytest.mark.parametrize(("length", "prompts", "candidates"), [(100, 300, 2), (400, 1, 300)])
def test_long_prompts_leave_less_room(length: int, prompts: int, candidates: int) -> None:
    """Tokens of a run, and four times fewer of those whose keys and values are held, are those of any batch."""
    model, room = llama(), queries_per_batch(llama(), [Query.unchecked(range(1), (), ())])
    rows = [[(n % 50, n // 50, 1) for n in range(candidates)]] * prompts
    asked = [[3] * length for _ in range(prompts)]
    seen, handle = runs_of(model)
    with untouched(model.module), torch.no_grad():
        for place, scores in continuation_scores(model, asked, rows):
            assert place or scores[1].item() == pytest.approx(slow(model, asked[0], rows[0][1]), abs=1e-4)
    handle.remove()
    assert max(count * tokens for count, tokens in seen) <= room
    assert max(count for count, tokens in seen if tokens == 1) * (length + 3) <= 4 * room + length
    assert len(seen) < 3 * prompts * candidates, "a batch is more than one continuation"


def test_angles_that_grow_with_the_length_are_those_of_the_whole() -> None:
    model, rows = growing(), [(5, 6, 7, 8), (5, 6, 7, 9)]
    found = scored(model, [[1, 2, 3]], [rows])[0]
    assert found.tolist() == pytest.approx([slow(model, [1, 2, 3], row) for row in rows], abs=1e-4)
    cut = [slow(model, [1, 2, 3], row[:1]) for row in rows]
    assert abs(found[0] - cut[0]) > 0.1, "more than one token counts"


def test_a_model_without_a_plain_cache_is_asked_for_one_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gemma()
    asked: list[Any] = []
    forward = model.module.forward
    monkeypatch.setattr(model.module, "forward", lambda *a, **k: asked.append(k.get("use_cache")) or forward(*a, **k))
    scored(model, [[1], [2, 3], [4, 5, 6]], [[(7, 8), (7, 9)]] * 3)
    assert asked.count(True) == 1


@pytest.mark.parametrize("made", [gpt2, gemma])
def test_logits_that_are_not_numbers_are_told(made: Any) -> None:
    """By a token and as a whole."""
    model = made()
    with torch.no_grad():
        model.module.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(RevprobeError, match="NaN"):
        scored(model, [[1]], [[(2, 3)]])
