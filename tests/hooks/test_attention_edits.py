"""Single attention scores are moved, and nothing else: against slow attention, explicit masks and other kernels."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BloomConfig,
)

import tiny
from revprobe import ProbedModel, RaddForMaskedLM, RevprobeError, edit_attention, load_model
from revprobe.hooks.attention_calls import sdpa_call
from revprobe.hooks.attention_edits import edit_scores
from revprobe.hooks.attention_sites import Attention, AttentionSite
from revprobe.models.bases.configs import POSITION_ENCODINGS
from revprobe.models.structure import attention_of
from tiny import FIXTURES, bridged, causal, drawn, gpt2, llama, tapped

CUT = float("-inf")
IDS = torch.tensor([[4, 0, 53, 30, 0, 7], [4, 9, 31, 53, 55, 55]])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
radd = partial(tiny.radd, n_layers=2, n_heads=2)


MODELS = {
    **{e: (lambda e=e: radd(e)) for e in POSITION_ENCODINGS},
    **{f"{e} bridged": (lambda e=e: bridged(radd(e))) for e in ("rope", "alibi")},
    "gpt2": gpt2,
    "gpt2 eager": lambda: gpt2("eager"),
    "gpt2 bridged": lambda: bridged(gpt2()),
    "llama (grouped keys)": llama,
    "llama eager": lambda: llama("eager"),
    "llama bridged": lambda: bridged(llama()),
    "bloom": lambda: causal(BloomConfig(vocab_size=56, hidden_size=16, n_layer=2, n_head=2, pad_token_id=55)),
    "llada": lambda: load_model(FIXTURES / "llada-tiny"),
    "dream": lambda: load_model(FIXTURES / "dream-tiny"),
}


def logits(model: ProbedModel, mask: torch.Tensor | None = PADDED) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(IDS, mask)[PADDED.bool()].nan_to_num(neginf=0.0)  # RADD's mask token has logit -inf


# --- one call, against slow attention -------------------------------------------------------------------------------


class Call(nn.Module):
    """One SDPA call, whatever its arguments."""

    def forward(self, call: dict) -> torch.Tensor:
        return F.scaled_dot_product_attention(**call)


class ByHand(nn.Module):
    """The same by a softmax of its own."""

    def forward(self, call: dict) -> torch.Tensor:
        return torch.softmax(slow_scores(call).float(), dim=-1) @ repeated(call["value"], call)


def repeated(states: torch.Tensor, call: dict) -> torch.Tensor:
    return states.repeat_interleave(call["query"].shape[1] // states.shape[1], dim=1)


def slow_scores(call: dict) -> torch.Tensor:
    """Scores in float64 with every mask applied, row by row and key by key."""
    query, key = call["query"].double(), repeated(call["key"], call).double()
    scores = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    mask = call.get("attn_mask")
    for i in range(query.shape[2]):
        for j in range(key.shape[2]):
            scores[:, :, i, j] = (query[:, :, i] * key[:, :, j]).sum(-1) * (
                call.get("scale") or query.shape[-1] ** -0.5
            )
            if call.get("is_causal") and j > i:
                scores[:, :, i, j] = CUT
    if mask is None:
        return scores
    return scores.masked_fill(~mask, CUT) if mask.dtype == torch.bool else scores + mask.double()


def draw_call(kv_heads: int = 2, heads: int = 2, dtype: torch.dtype = torch.float32, **extra) -> dict:
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(3, count, 5, 4, generator=generator).to(dtype)  # noqa: E731
    return {"query": draw(heads), "key": draw(kv_heads), "value": draw(kv_heads), **extra}


PADDING = torch.tensor([1, 1, 1, 1, 0]).bool()[None, None, None].expand(3, 1, 5, 5)
CALLS = {
    "no mask": {},
    "causal": {"is_causal": True},
    "boolean padding": {"attn_mask": PADDING},
    "float32 padding": {"attn_mask": torch.zeros(3, 1, 5, 5).masked_fill(~PADDING, CUT)},
    "broadcast over rows": {"attn_mask": PADDING[:, :, :1]},
    "additive per head": {"attn_mask": torch.linspace(-1, 0, 50).reshape(1, 2, 5, 5)},
    "two-dimensional": {"attn_mask": torch.ones(5, 5).tril().bool()},
    "scale": {"scale": 0.7},
    "grouped keys": {"kv_heads": 2, "heads": 4, "enable_gqa": True},
    "grouped keys, causal": {"kv_heads": 1, "heads": 4, "enable_gqa": True, "is_causal": True},
    "bfloat16": {"dtype": torch.bfloat16, "is_causal": True},
}
ROWS, COLUMN = torch.tensor([[1], [2], [4]]), 1
CHANGES = {
    "cut": lambda scores: CUT,
    "shifted": lambda scores: 1.5,
    "set": lambda scores: 0.25 - scores[..., COLUMN],
}


def alone(site: AttentionSite) -> Attention:
    """A model that makes this one call."""
    return Attention((site,), {site.path: 1}, {})


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CALLS)
def test_an_edited_call_is_the_softmax_of_the_edited_scores_and_no_other_row_or_head_moves(case, change):
    """Any row, head or mask that the edit loses or adds turns this red."""
    call = draw_call(**CALLS[case])
    model, heads = Call(), call["query"].shape[1]
    scores = slow_scores(call)
    for b, row in enumerate(ROWS[:, 0]):
        scores[b, 0, row, COLUMN] += CHANGES[change](scores[b, 0, row])
    expected = scores.softmax(-1) @ repeated(call["value"], call).double()

    def added(layer: int, seen: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros_like(seen)
        bias[:, 0, 0, COLUMN] = CHANGES[change](seen[:, 0, 0])
        return bias

    plain = model(call)
    with edit_scores(model, alone(AttentionSite(0, "", heads, "sdpa")), ROWS, added, layers=[0]):
        edited = model(call)
    exact = call["query"].dtype == torch.float32
    torch.testing.assert_close(edited.double(), expected, atol=1e-6 if exact else 2e-2, rtol=0)
    moved = torch.zeros(plain.shape[:3], dtype=torch.bool)
    moved[torch.arange(3), 0, ROWS[:, 0]] = True
    assert torch.equal(edited[~moved], plain[~moved]), "a row or head that was not edited moved"
    assert not torch.allclose(edited[moved], plain[moved], atol=1e-3), "the edited rows did not move"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", ["no mask", "causal", "boolean padding", "additive per head"])
def test_a_softmax_by_hand_is_edited_like_an_sdpa_call(case, change):
    call, added = draw_call(**CALLS[case]), lambda layer, scores: _at_column(scores, CHANGES[change](scores))
    outputs = []
    for model, source in ((Call(), "sdpa"), (ByHand(), "softmax")):
        with edit_scores(model, alone(AttentionSite(0, "", 2, source)), ROWS, added, layers=[0]):
            outputs.append(model(call))
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)
    assert (outputs[0] - Call()(call)).abs().max() > 1e-2


def _at_column(scores: torch.Tensor, bias: torch.Tensor | float) -> torch.Tensor:
    added = torch.zeros_like(scores)
    added[..., COLUMN] = bias
    return added


def test_a_row_that_would_be_emptied_stays_and_is_logged_and_so_does_a_meaningless_one():
    call = draw_call(is_causal=True)
    model, rows = Call(), torch.tensor([[0, 2], [0, 2], [0, 2]])
    plain, site = model(call), AttentionSite(0, "", 2, "sdpa")
    cut_first = lambda layer, scores: torch.zeros_like(scores).index_fill(-1, torch.tensor([0]), CUT)  # noqa: E731
    with edit_scores(model, alone(site), rows, cut_first, layers=[0]) as log:
        edited = model(call)
    assert torch.equal(edited[:, :, 0], plain[:, :, 0]) and not torch.allclose(edited[:, :, 2], plain[:, :, 2])
    assert log.emptied[0][..., 0].all() and not log.emptied[0][..., 1].any() and not log.meaningless[0].any()
    nonsense = lambda layer, scores: torch.full_like(scores, float("inf"))  # noqa: E731
    with edit_scores(model, alone(site), rows, nonsense, layers=[0]) as log:
        assert torch.equal(model(call), plain)
    assert log.meaningless[0].all()


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_zero_edit_changes_nothing_and_a_cut_moves_rows_that_may_see_it(name):
    model = MODELS[name]()
    plain = logits(model)
    rows, columns = [[2], [2]], [[0], [1]]
    with edit_attention(model, rows, columns, 0.0):
        assert (logits(model) - plain).abs().max() == 0.0
    with edit_attention(model, rows, columns, layers=[1]):
        moved = (logits(model) - plain).abs().amax(-1) > 1e-6
    # An edit of the last layer reaches the logits of its own row alone.
    assert moved.nonzero().flatten().tolist() == [2, 6 + 2], "rows 2 of both sequences"
    assert torch.equal(logits(model), plain), "the edit outlived its block"


@pytest.mark.parametrize("name", MODELS)
def test_the_tap_reads_the_scores_that_were_set(name):
    """In every layer and head, under padding: weights are those of the edited scores."""
    model = MODELS[name]()
    rows, columns = torch.tensor([[3], [3]]), torch.tensor([[1], [0]])
    everything = torch.arange(4)[None].expand(2, -1)
    set_score = lambda layer, scores: 0.5 - scores.gather(-1, columns[:, None, None].expand(*scores.shape[:3], -1))  # noqa: E731
    found = []
    for bias in (0.0, set_score):
        seen = tapped(model, rows, everything, 6)
        with torch.no_grad(), edit_attention(model, rows, columns, bias), seen as tap:
            model.logits(IDS, PADDED)
        found.append(tap.layers())
    assert list(found[1]) == [0, 1]
    for layer, call in found[1].items():
        for b in range(2):
            score = call.score[b, :, 0]
            torch.testing.assert_close(score[:, columns[b, 0]], torch.full((score.shape[0],), 0.5), atol=1e-5, rtol=0)
            if layer == 0:  # deeper, the keys themselves have changed
                others = [c for c in range(4) if c != columns[b, 0]]
                torch.testing.assert_close(score[:, others], found[0][0].score[b, :, 0][:, others], atol=1e-5, rtol=0)
        torch.testing.assert_close(call.mass, torch.ones_like(call.mass), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["rope", "llama eager", "rope bridged"])
def test_a_tap_sees_the_edited_scores_whichever_was_opened_first(name):
    model, rows, columns = MODELS[name](), torch.tensor([[3], [3]]), torch.tensor([[1], [1]])
    tap = tapped(model, rows, columns, 6)
    edit = edit_scores(model.module, attention_of(model), rows, cut_one, layers=[1])
    with torch.no_grad(), tap as seen, edit:
        model.logits(IDS, PADDED)
    assert [bool((call.weight == 0).all()) for call in seen.layers().values()] == [False, True]


def cut_one(layer: int, scores: torch.Tensor) -> torch.Tensor:
    return _at_column(scores, CUT)


def four_dimensional(causal: bool) -> torch.Tensor:
    """The whole mask of IDS with the routes 2 <- 0 and 2 <- 1 cut, as an additive float mask."""
    seen = PADDED.bool()[:, None, None, :].expand(2, 1, 6, 6).clone()
    if causal:
        seen &= torch.ones(6, 6).tril().bool()
    seen[0, 0, 2, 0] = seen[1, 0, 2, 1] = False
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("name", ["gpt2", "gpt2 eager", "llama (grouped keys)", "llama eager", "llada", "dream"])
def test_a_cut_everywhere_equals_the_model_run_with_an_explicit_mask(name):
    model = MODELS[name]()
    reference = copy.deepcopy(model)
    if model.objective == "causal":
        reference.module.set_attn_implementation("eager")
    with edit_attention(model, [[2], [2]], [[0], [1]]):
        edited = logits(model)
    expected = logits(reference, four_dimensional(model.objective == "causal"))
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=0)
    assert (edited - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_a_cut_in_radd_equals_its_attention_run_with_an_explicit_bias(encoding, monkeypatch):
    model = radd(encoding)
    with edit_attention(model, [[2], [2]], [[0], [1]]):
        edited = logits(model)
    own = RaddForMaskedLM._attention_bias
    cut = four_dimensional(causal=False).masked_fill(four_dimensional(causal=False) < 0, CUT)
    biased = lambda *a: cut if own(*a) is None else own(*a) + cut  # noqa: E731
    monkeypatch.setattr(RaddForMaskedLM, "_attention_bias", biased)
    torch.testing.assert_close(edited, logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_sdpa_eager_and_bridge_agree_on_one_edited_head(make):
    options = {"layers": [0], "heads": [1]}
    found = []
    for model in (make("sdpa"), make("eager"), bridged(make("sdpa"))):
        with edit_attention(model, [[3], [2]], [[1], [0]], 0.8, **options):
            found.append(logits(model))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)
    assert (found[0] - logits(make("sdpa"))).abs().max() > 1e-4


def test_one_head_of_a_one_layer_model_equals_the_pattern_recomputed_by_hand():
    """Attention output from q, k and v of the weights, in float64, the cut head's row renormalised without it."""
    model = radd("alibi", n_layers=1)
    module, block = model.module, model.module.blocks[0]
    seen = {}
    handle = block.attention.register_forward_hook(lambda m, a, out: seen.update(out=out[0]))
    with torch.no_grad(), edit_attention(model, [[2]], [[0]], heads=[1]):
        model.logits(IDS[:1])
    handle.remove()
    with torch.no_grad():
        normed = block.attention_norm(module.embed_tokens(IDS[:1]))[0].double()
        project = lambda name: (normed @ getattr(block.attention, name).weight.double().T).view(6, 2, 8)  # noqa: E731
        q, k, v = (project(f"{letter}_proj") for letter in "qkv")
        mixed = torch.zeros(6, 2, 8, dtype=torch.float64)
        for head in range(2):
            for i in range(6):
                keys = [j for j in range(6) if not (head == 1 and i == 2 and j == 0)]
                slope = 2.0 ** (-4 * (head + 1))
                scores = torch.stack([q[i, head] @ k[j, head] / 8**0.5 - slope * abs(i - j) for j in keys])
                mixed[i, head] = scores.softmax(0) @ v[keys, head]
        expected = mixed.reshape(6, 16) @ block.attention.o_proj.weight.double().T
    torch.testing.assert_close(seen["out"][0].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", [CUT, 0.7, lambda layer, scores: 0.3 - scores[..., [1]]], ids=["cut", "shift", "set"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_gradient_checkpointing_are_those_without(reentrant, bias):
    """A recomputation without the edit gives wrong gradients (reentrant) or a CheckpointError."""
    gradients = []
    for checkpointing in (False, True):
        module = llama().module
        if checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = ProbedModel(module, objective="causal")
        module.train()
        with edit_attention(model, [[3], [3]], [[1], [1]], bias):
            loss = model.logits(IDS, PADDED).square().mean()
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    # The same sums, reentrant in another order: 5e-8 of values around 0.1.
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
    plain = llama()
    plain.logits(IDS, PADDED).square().mean().backward()
    moved = torch.cat([p.grad.flatten() for p in plain.module.parameters()])
    assert (moved - gradients[0]).norm() > 1e-3 * moved.norm(), "the edit did not reach the gradient"


def test_the_gradient_passes_through_a_bias_and_through_the_scores_it_is_made_of():
    """Against central differences; with a set score the query of that row has no say in it."""
    model = radd("rope")
    model.module.double()
    bias = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def value(at: torch.Tensor) -> torch.Tensor:
        with edit_attention(model, [[2]], [[0]], lambda layer, scores: at.expand(*scores.shape[:3], 1), layers=[0]):
            return model.logits(IDS[:1])[0, 2, :50].square().sum()

    (gradient,) = torch.autograd.grad(value(bias), bias)
    step = 1e-5
    with torch.no_grad():
        slope = (value(bias + step) - value(bias - step)) / (2 * step)
    assert float(gradient) == pytest.approx(float(slope), rel=1e-6) and abs(float(slope)) > 1e-4


def test_under_autocast_and_in_bfloat16_the_cut_has_the_same_effect_up_to_rounding():
    model = llama()
    with edit_attention(model, [[3], [3]], [[1], [1]]):
        exact = logits(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = logits(model)
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()
    half = ProbedModel(copy.deepcopy(model.module).bfloat16(), objective="causal")
    effect = exact - logits(model)
    with edit_attention(half, [[3], [3]], [[1], [1]]):
        edited = logits(half).float()
    assert (edited - exact).abs().max() < 0.05 * exact.abs().max()
    assert effect.abs().max() > 0.05


def test_a_module_shared_by_all_layers_is_edited_in_the_layer_asked_for():
    """ALBERT runs one attention module three times."""
    config = AlbertConfig(
        vocab_size=56,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = ProbedModel(drawn(lambda: AlbertForMaskedLM(config)), objective="masked", mask_token_id=53, logit_shift=0)
    rows, columns = torch.tensor([[2]]), torch.tensor([[0]])
    with (
        torch.no_grad(),
        edit_attention(model, rows, columns, layers=[1]),
        tapped(model, rows, columns, IDS.shape[1]) as tap,
    ):
        for _ in range(2):
            model.logits(IDS[:1])
    weights = [float(call.weight.max()) for _, call in tap.calls]
    assert [weight == 0.0 for weight in weights] == [False, True, False] * 2


class Shapes(TorchFunctionMode):
    """The query shapes of all SDPA calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append(tuple(sdpa_call(args, kwargs or {})["query"].shape))
        return func(*args, **(kwargs or {}))


def test_the_packed_query_of_a_decoding_step_is_edited_head_by_head():
    """transformers packs grouped queries when one token decodes: the edit must find each head's row in the pack."""
    model, mask = llama(), torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    attention = attention_of(model)
    with torch.no_grad(), Shapes() as shapes:
        cached = model.module(IDS[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
        with edit_scores(model.module, attention, torch.tensor([[0], [0]]), cut_head, layers=[1]):
            step = model.module(IDS[:, 5:], attention_mask=mask, past_key_values=cached, use_cache=True).logits[:, 0]
        with edit_scores(model.module, attention, torch.tensor([[5], [5]]), cut_head, layers=[1]):
            whole = model.module(IDS, attention_mask=mask, use_cache=False).logits[:, 5]
        plain = model.module(IDS, attention_mask=mask, use_cache=False).logits[:, 5]
    assert (2, 2, 2, 8) in shapes.seen, "no packed query (batch 2, 2 groups of 2 heads, dim 8) came by"
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=0)
    assert (whole - plain).abs().max() > 1e-3


def cut_head(layer: int, scores: torch.Tensor) -> torch.Tensor:
    """Cut column 2 in head 1 of 4, which lies in the first group of two."""
    added = torch.zeros_like(scores)
    added[:, 1, :, 2] = CUT
    return added


# --- no trace, and errors that say what to do -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rope", "gpt2 eager", "rope bridged"])
def test_only_our_hooks_are_removed_also_when_the_model_raises(name):
    model = MODELS[name]()
    theirs = [m.register_forward_hook(lambda *_: None) for m in model.module.modules()]
    logits(model)  # a bridge adds hooks of its own when it first runs
    before = hooks_of(model.module)
    with pytest.raises(KeyError), edit_attention(model, [[2], [2]], [[0], [1]]):
        logits(model)
        raise KeyError("the caller's own")
    broken = lambda layer, scores: 1 / 0  # noqa: E731
    with pytest.raises(ZeroDivisionError), edit_attention(model, [[2], [2]], [[0], [1]], broken):
        logits(model)
    assert hooks_of(model.module) == before and len(theirs) > 0
    assert not torch.overrides._get_current_function_mode_stack(), "a mode outlived the edit"


def hooks_of(module: nn.Module) -> list[tuple[int, ...]]:
    return [(*m._forward_hooks, *m._forward_pre_hooks) for m in module.modules()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [7]}, "no layer 7 to edit in .*expected some of 0, 1"),
        ({"heads": [2]}, "no head 2 to edit in .*expected some of 0, 1"),
        ({"layers": []}, r"no layer list \[\] to edit"),
        ({"layers": 1}, r"layers=1: expected a list of whole numbers or None, such as layers=\[1\]"),
        ({"columns": [[0]]}, "rows for 2 sequences and columns for 1"),
        ({"columns": [[0, 0], [1, 2]]}, "name a position twice or below 0"),
        ({"columns": [0, 1]}, "expected a Tensor or a list of a list of whole numbers"),
        ({"columns": [[0, 1], [1]]}, "equally long list"),
    ],
)
def test_a_wrong_edit_says_what_was_expected(options, message):
    arguments = {"rows": [[2], [2]], "columns": [[0], [1]], **options}
    with pytest.raises(RevprobeError, match=message), edit_attention(radd("rope"), **arguments):
        pass


def test_an_edit_that_never_ran_and_another_batch_are_errors():
    model = radd("rope")
    with pytest.raises(RevprobeError, match="layer 0 was never reached"), edit_attention(model, [[2]], [[0]]):
        pass
    another = pytest.raises(RevprobeError, match="scores of 2 sequences, but the edit's rows are given for 1")
    with another, edit_attention(model, [[2]], [[0]]):
        logits(model)


@pytest.mark.parametrize("name", ["rope", "llama eager", "rope bridged"])
def test_a_position_outside_the_sequence_that_is_run_is_named(name):
    model = MODELS[name]()
    for options, message in (
        ({"rows": [[99], [0]]}, "rows name position 99, but .* attends from 6 tokens; expected 0 to 5"),
        ({"columns": [[0], [99]]}, "columns name position 99, but layer 0 attends over 6 tokens; expected 0 to 5"),
    ):
        arguments = {"rows": [[2], [2]], "columns": [[0], [1]], **options}
        with pytest.raises(RevprobeError, match=message), edit_attention(model, **arguments):
            logits(model)


def test_gradient_checkpointing_of_shared_layers_is_refused():
    class Shared(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Shared()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = torch.utils.checkpoint.checkpoint(self.one, x, use_reentrant=False)
            return x

    model, x = Model(), torch.randn(1, 1, 3, 4, requires_grad=True)
    attention = Attention([AttentionSite(layer, "one", 1, "sdpa", turn=layer) for layer in range(2)], {"one": 2}, {})
    shift = lambda layer, scores: torch.ones_like(scores[..., :1])  # noqa: E731
    with edit_scores(model, attention, torch.tensor([[1]]), shift, layers=[1]):
        output = model(x)
        with pytest.raises(RevprobeError, match="without gradient checkpointing"):
            output.sum().backward()
