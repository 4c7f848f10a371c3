"""Models with layers that do not attend, windows and masks; and no trace left, on one thread or two."""

import random
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch._dynamo import eval_frame

from revprobe import (
    ProbedModel,
    ReversalPairs,
    RevprobeError,
    load_model,
    probe,
    probe_attention_correlation,
    probe_gradient_cosine,
)
from revprobe.hooks.layer_numbers import LayerNumbers
from revprobe.models import structure
from revprobe.models.contract.called import uncompiled
from revprobe.probes.attention import EVIDENCE_HIDDEN
from tiny import FIXTURES, GROUPED, causal, pairs_at


def joined(*groups: ReversalPairs) -> ReversalPairs:
    return ReversalPairs.from_pairs([pair for group in groups for pair in group])


# --- what has no score is NaN, with its reason, counted -------------------------------------------------------------


def linear_and_softmax() -> ProbedModel:
    """Qwen3.5: three linear layers, one of softmax attention, twice."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_hidden_layers": 8}
    return causal(transformers.Qwen3_5TextConfig(**GROUPED | heads | sizes))


def test_layers_without_softmax_attention_are_named_in_an_otherwise_good_reading():
    model, pairs = linear_and_softmax(), pairs_at((2, 5), (1, 6))
    reading = probe_attention_correlation(model, pairs)
    linear = [0, 1, 2, 4, 5, 6]
    assert sorted(reading.frame.layer.unique()) == list(range(8))
    assert reading.undefined == {f"layer {n} has no softmax attention": 4 * len(pairs) for n in linear}
    scores = reading.frame[["score_forward", "score_reverse", "weight_forward", "weight_reverse"]]
    has_scores = scores.notna().all(axis=1).groupby(reading.frame.layer).agg(["all", "any"])
    assert not has_scores["any"][linear].any() and has_scores["all"][[3, 7]].all()
    alone = probe_attention_correlation(model, pairs, layers=[3, 7])
    assert reading.value == pytest.approx(alone.value, abs=1e-9) and np.isfinite(reading.value)
    nothing = probe_attention_correlation(model, pairs, layers=[4])
    assert np.isnan(nothing.value) and nothing.undefined == {"layer 4 has no softmax attention": 4 * len(pairs)}


def test_a_silent_layer_that_is_not_noticed_turns_this_red(monkeypatch):
    """The planted fault: without the search the linear layers would be missing from the frame, unsaid."""
    monkeypatch.setattr(structure, "_silent", lambda module, attention, numbers: {})
    reading = probe_attention_correlation(linear_and_softmax(), pairs_at((2, 5), (1, 6)))
    assert sorted(reading.frame.layer.unique()) == [3, 7] and not reading.undefined


class Tree(nn.Module):
    """Modules at the given paths, for the search of silent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(nn.ModuleDict({"attn": nn.Identity()}) for _ in range(4))
        self.other = nn.ModuleList(nn.ModuleDict({"attn": nn.Identity()}) for _ in range(4))


@pytest.mark.parametrize(
    ("sites", "silent"),
    [
        (["stack.1.attn", "stack.3.attn"], [0, 2]),
        ([f"stack.{n}.attn" for n in range(4)], []),
        (["stack.1.attn", "stack.1.attn"], [0, 2, 3]),
        (["stack.1.attn", "other.2.attn"], [0, 2, 3, 4, 5, 7]),  # the numbers of the second list go on
        (["attn"], []),
        ([], []),
    ],
)
def test_silent_layers_are_those_of_the_same_lists(sites, silent):
    numbers = LayerNumbers({"stack": 0, "other": 4})
    assert sorted(set(numbers.blocks(Tree(), sites)) - {numbers(site) for site in sites}) == silent


def test_evidence_outside_a_sliding_window_is_nan_with_a_reason():
    """Row 8 sees the last four tokens: evidence at 6 is scored, at 2 it is not."""
    model = causal(transformers.MistralConfig(**GROUPED, sliding_window=4))
    near, far = pairs_at((6, 9), (7, 9)), pairs_at((2, 9), (3, 9))
    reading = probe_attention_correlation(model, joined(near, far))
    outside = reading.frame.pair >= len(near)
    assert (reading.frame.reason[outside] == EVIDENCE_HIDDEN).all() and (reading.frame.reason[~outside] == "").all()
    assert reading.frame.score_forward[outside].isna().all() and reading.frame.score_forward[~outside].notna().all()
    assert reading.undefined[EVIDENCE_HIDDEN] == 2 * 4 * len(far)
    assert reading.value == pytest.approx(probe_attention_correlation(model, near).value, abs=1e-6)


def test_evidence_after_the_target_is_no_question_for_a_causal_model():
    """Ten pairs of twenty: their probability would be that of a guess, averaged in with the others."""
    model = causal(transformers.LlamaConfig(**GROUPED))
    before, after = pairs_at((2, 5), (1, 6)), pairs_at((2, 5), (8, 5))
    with pytest.raises(RevprobeError, match=r"10 of 20 pairs .* target before its evidence.*'swapped'"):
        probe_attention_correlation(model, joined(before, after))


# --- no trace -------------------------------------------------------------------------------------------------------


def state_of(module: nn.Module) -> dict:
    """Everything a probe must leave alone."""
    ids = torch.arange(12)[None]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    with torch.no_grad():
        output = module(ids).logits.clone()
    return {
        "output": output,
        "weights": [p.clone() for p in module.parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "training": [m.training for m in module.modules()],
        "hooks": [len(getattr(m, kind)) for m in module.modules() for kind in kinds],
        "rng": [torch.get_rng_state(), np.random.get_state()[1], random.getstate()],
    }


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def changed(before: dict, after: dict) -> list[str]:
    return [key for key in before if not equal(before[key], after[key])]


def lived_in(name: str) -> ProbedModel:
    """A model in use: training mode in part, some weights frozen, some with a gradient, a hook of the user's."""
    model = load_model(FIXTURES / f"{name}-tiny")
    module = model.module
    module.model.layers[1].train()
    parameters = list(module.parameters())
    parameters[3].requires_grad_(False)
    parameters[0].grad = torch.ones_like(parameters[0])
    module.lm_head.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_probe_leaves_no_trace_also_when_it_raises_in_the_middle(name):
    model, pairs = lived_in(name), pairs_at((2, 5), (6, 3))
    before = state_of(model.module)
    probe(model, pairs)
    assert changed(before, state_of(model.module)) == []

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(model, pairs, batch_size=4, progress=stop)
    handle = model.module.model.norm.register_forward_hook(lambda *_: 1 / 0)  # in the middle of a forward pass
    with pytest.raises(ZeroDivisionError):
        probe_gradient_cosine(model, pairs)
    handle.remove()
    assert changed(before, state_of(model.module)) == []


def test_a_trace_is_seen_where_there_is_one():
    """The planted faults: each kind of trace is noticed by the comparison above."""
    model = lived_in("llada")
    before = state_of(model.module)
    model.module.model.norm.register_forward_hook(lambda *_: None)
    model.module.model.norm.weight.grad = torch.zeros(64)
    model.module.lm_head.weight.requires_grad_(False)
    model.module.lm_head.eval()
    model.module.model.layers[1].eval()
    torch.rand(1)
    assert changed(before, state_of(model.module)) == ["requires_grad", "grad", "training", "hooks", "rng"]


def test_two_threads_probe_two_models_as_if_alone():
    """The taps are per thread and the hooks per model: no call is seen by the other's tap, no reading moves a bit."""
    models, pairs = [lived_in("llada"), lived_in("dream")], pairs_at((2, 5), (6, 3), count=40)
    alone = [probe(model, pairs, batch_size=8) for model in models]
    before = [state_of(model.module) for model in models]
    start = Barrier(2)

    def together(model: ProbedModel) -> list:
        start.wait()
        return [probe(model, pairs, batch_size=8) for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(together, models))
    for readings, repeated in zip(alone, results, strict=True):
        for again in repeated:
            for reading, other in zip(readings, again, strict=True):
                assert reading.frame.equals(other.frame), f"{reading.name} moved"
                assert (reading.value, reading.undefined) == (other.value, other.undefined)
    assert [changed(b, state_of(m.module)) for b, m in zip(before, models, strict=True)] == [[], []]


# --- compiled models are read as they were written ------------------------------------------------------------------


def compiled_layers(module: nn.Module) -> nn.Module:
    for number, layer in enumerate(module.model.layers):
        module.model.layers[number] = torch.compile(layer, backend="eager")
    return module


def compiled_forward(module: nn.Module) -> nn.Module:
    module.forward = torch.compile(module.forward, backend="eager")
    return module


def compiled_and_run(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    module(torch.arange(8)[None])
    return module


COMPILED = {
    "the whole": lambda module: torch.compile(module, backend="eager"),
    "in place, and run": compiled_and_run,
    "layers": compiled_layers,
    "the forward pass": compiled_forward,
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_gives_the_numbers_of_the_plain_one(how):
    """A graph runs past hooks and taps, or breaks on them; torch's stance is what it was afterwards."""
    config, pairs = transformers.LlamaConfig(**GROUPED), pairs_at((1, 4), (1, 5), count=8)
    plain = causal(config)
    with torch.compiler.set_stance("eager_on_recompile"):
        told = probe(ProbedModel(COMPILED[how](causal(config).module), objective="causal"), pairs)
        assert eval_frame._stance.stance == "eager_on_recompile"
    assert eval_frame._stance.stance == "default"
    for ours, theirs in zip(probe(plain, pairs), told, strict=True):
        assert (theirs.value, theirs.n) == (pytest.approx(ours.value, abs=1e-6), ours.n), ours.name


def test_the_compilers_stance_comes_back_when_passes_overlap():
    """Of two threads the one that came in first may leave first: each would put back what it found."""
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager", "the second is still in its pass"
    second.__exit__(None, None, None)
    assert eval_frame._stance.stance == "default"
