"""Stored evidence through a nonlinear prediction head, to first order: against finite differences, in float64.

The reference knows nothing of the engine: up to the last layer it runs the model with every norm's mean and scale,
every MLP and every attention pattern kept from a first run, so that what a head writes reaches the last layer's state
along the residual stream alone. What follows is the model's own, norms too. Steps are a hundred-thousandth each way.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import revprobe as rp
from revprobe.hooks import linearize
from revprobe.probes.passes.batches import make_batch, prepare_queries
from revprobe.probes.passes.decomposition import LinearizedBatch
from revprobe.probes.passes.states import Tail
from tiny import SIZES, drawn, pairs_at, radd

STEP = 1e-5
Bump = tuple[int, Tensor]  # a layer, and what is added to what its heads read: `seq heads x dim`


class Kept:
    """A model whose norms (of its layers), MLPs and patterns are those of one run; `run` tells logits after a change.

    `blocks`, `outs`, `mlps`: the paths of layers, output projections and MLPs by layer.
    """

    def __init__(self, module: nn.Module, blocks: str, outs: str, mlps: str, ids: Tensor) -> None:
        self.module, self.ids = module, ids
        layers = module.config.num_hidden_layers
        self.last = module.get_submodule(blocks.format(layers - 1))
        self.outs = [module.get_submodule(outs.format(layer)) for layer in range(layers)]
        self.mlps = [module.get_submodule(mlps.format(layer)) for layer in range(layers)]
        self.norms: list[tuple[Tensor, Tensor]] = []
        self.read: list[Tensor] = []
        self.wrote: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(F, "layer_norm", self._norm_of_now))
            for out in self.outs:
                stack.callback(out.register_forward_pre_hook(lambda _, args: self.read.append(args[0])).remove)
            for mlp in self.mlps:
                stack.callback(mlp.register_forward_hook(lambda _, __, found: self.wrote.append(found)).remove)
            stack.callback(self.last.register_forward_hook(self._note_norms).remove)
            self.logits = module(ids).logits[0]

    def _note_norms(self, *_: Any) -> None:
        self.inside = len(self.norms)  # those behind the last layer are the model's own tail

    def _norm_of_now(self, states: Tensor, _: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        mean, variance = states.mean(-1, keepdim=True), states.var(-1, keepdim=True, correction=0)
        self.norms.append((mean, (variance + eps).rsqrt()))
        return self._normed(states, weight, bias, self.norms[-1])

    @staticmethod
    def _normed(states: Tensor, weight: Any, bias: Any, norm: tuple[Tensor, Tensor]) -> Tensor:
        found = (states - norm[0]) * norm[1]
        found = found if weight is None else found * weight
        return found if bias is None else found + bias

    @contextmanager
    def changed(self, bumps: list[Bump]) -> Iterator[None]:
        norms, own = iter(self.norms[: self.inside]), F.layer_norm

        def held(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
            norm = next(norms, None)
            return own(x, shape, weight, bias, eps) if norm is None else self._normed(x, weight, bias, norm)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(F, "layer_norm", held))
            for layer, (out, mlp) in enumerate(zip(self.outs, self.mlps, strict=True)):
                more = sum((bump for at, bump in bumps if at == layer), torch.zeros_like(self.read[layer]))
                given = self.read[layer] + more
                stack.callback(out.register_forward_pre_hook(lambda _, __, given=given: (given,)).remove)
                stack.callback(mlp.register_forward_hook(lambda *_, kept=self.wrote[layer]: kept).remove)
            yield

    def run(self, *bumps: Bump) -> Tensor:
        with self.changed(list(bumps)):
            return self.module(self.ids).logits[0]

    def slope(self, layer: int, along: Tensor, row: int, target: int) -> float:
        """The derivative of a logit by how much of `along` is added to what the heads of a layer read."""
        up, down = (self.run((layer, sign * STEP * along))[row, target] for sign in (1, -1))
        return float((up - down) / (2 * STEP))


MLM = transformers.AutoModelForMaskedLM.from_config
DISTIL = {"vocab_size": 56, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
BERT_LIKE = ("{}.attention.output.dense", "{}.intermediate")
HEADS: dict[str, tuple[Callable[[], Any], str, tuple[str, str]]] = {
    "bert": (lambda: transformers.BertConfig(**SIZES), "bert.encoder.layer.", BERT_LIKE),
    **{
        f"bert, {one}": (partial(transformers.BertConfig, **SIZES, **more), "bert.encoder.layer.", BERT_LIKE)
        for one, more in {
            "quick_gelu": {"hidden_act": "quick_gelu"},
            "gelu_fast": {"hidden_act": "gelu_fast"},
            "own norm": {},
        }.items()
    },
    "roberta": (
        lambda: transformers.RobertaConfig(**{**SIZES, "pad_token_id": 1}),
        "roberta.encoder.layer.",
        BERT_LIKE,
    ),
    "electra": (
        lambda: transformers.ElectraConfig(**SIZES, embedding_size=24),
        "electra.encoder.layer.",
        BERT_LIKE,
    ),
    "roformer": (  # queries and keys turned by rows of a table
        lambda: transformers.RoFormerConfig(**SIZES, embedding_size=32),
        "roformer.encoder.layer.",
        BERT_LIKE,
    ),
    "distilbert": (
        lambda: transformers.DistilBertConfig(**DISTIL),
        "distilbert.transformer.layer.",
        ("{}.attention.out_lin", "{}.ffn"),
    ),
    "modernbert": (
        lambda: transformers.ModernBertConfig(**SIZES, global_attn_every_n_layers=1, cls_token_id=54, sep_token_id=54),
        "model.layers.",
        ("{}.attn.Wo", "{}.mlp"),
    ),
}


class HandWrittenNorm(nn.Module):
    """An RMSNorm as many families write it, and a square of one tensor by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, states: Tensor) -> Tensor:
        normed = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * normed + 0.1 * states * states


def with_hand_written_norm(config: Any) -> nn.Module:
    module: Any = MLM(config)
    module.cls.predictions.transform.LayerNorm = HandWrittenNorm(config.hidden_size)
    return module


def probed(module: nn.Module) -> rp.ProbedModel:
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked", mask_token_id=53, logit_shift=0)


def masked(name: str, dtype: torch.dtype = torch.float64) -> tuple[rp.ProbedModel, partial[Kept]]:
    config, prefix, (out, mlp) = HEADS[name]
    made = with_hand_written_norm if name == "bert, own norm" else MLM
    module = drawn(partial(made, config()), scale=0.2, dtype=dtype)
    model = probed(module)
    return model, partial(Kept, module, prefix + "{}", prefix + out, prefix + mlp)


def shown(query: rp.Query) -> Tensor:
    ids = torch.tensor([query.token_ids])
    ids[0, list(query.target_positions)] = 53
    return ids


def first_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


PAIRS = pairs_at((1, 5), (5, 1), count=3)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_what_each_head_adds_is_the_slope_through_the_models_own_prediction_head(name: str) -> None:
    model, keep = masked(name)
    reading = rp.probe_stored_evidence(model, PAIRS, first_order=True)
    frame, query = reading.frame, PAIRS[0].reverse
    (row,), (target,) = query.target_positions, query.target
    kept = keep(shown(query))
    assert torch.allclose(kept.run(), kept.logits, atol=1e-10), "the reference is the model itself"
    by_head = frame[frame["pair"] == 0].groupby(["layer", "head"])["contribution_reverse"].sum()
    assert len(by_head) == 8
    for (layer, head), found in by_head.items():
        along = torch.zeros_like(kept.read[layer])
        along[0, row, 8 * head : 8 * head + 8] = kept.read[layer][0, row, 8 * head : 8 * head + 8]
        assert found == pytest.approx(kept.slope(layer, along, row, target), abs=1e-7, rel=1e-6), (layer, head)
    for side in ("forward", "reverse"):
        parts = frame.groupby("pair")[f"contribution_{side}"].sum()
        assert np.allclose(parts, frame.groupby("pair")[f"logit_{side}"].first(), atol=1e-9), "the logit is their sum"
    tangents = frame[frame["part"] == "tangent"]["contribution_reverse"]
    assert len(tangents) == 3 and tangents.abs().max() > 1e-3, "and the tail is not linear there"
    assert model.module.get_submodule(reading.meta["first_order_behind"]) is kept.last


@torch.no_grad()
def test_s_is_the_slope_by_attention_and_the_remainder_is_what_removing_shows() -> None:
    """BERT, by hand: what is left of the evidence's embedding in each value, and the logit without it."""
    model, keep = masked("bert")
    reading = rp.probe_stored_evidence(model, PAIRS, first_order=True)
    body = model.module.bert
    for pair, side in ((0, "reverse"), (2, "forward")):
        query = getattr(PAIRS[pair], side)
        (row,), (target,), (at,) = query.target_positions, query.target, query.evidence_positions
        kept = keep(shown(query))
        rows = reading.frame[reading.frame["pair"] == pair]
        of_evidence = rows[(rows["part"] == "evidence") & (rows["source"] == "token")].set_index(["layer", "head"])
        token = body.embeddings.word_embeddings.weight[query.token_ids[at]]
        token = token * kept.norms[0][1][0, at] * body.embeddings.LayerNorm.weight
        bumps: list[Bump] = []
        slopes = 0.0
        for layer, block in enumerate(body.encoder.layer):
            value = token @ block.attention.self.value.weight.T
            weight = of_evidence.loc[[(layer, head) for head in range(4)], f"weight_{side}"].to_numpy(dtype=float)
            for head in range(4):
                along = torch.zeros_like(kept.read[layer])
                along[0, row, 8 * head : 8 * head + 8] = value[8 * head : 8 * head + 8]
                slope = kept.slope(layer, along, row, target)
                assert of_evidence[f"stored_{side}"][layer, head] == pytest.approx(slope, abs=1e-7, rel=1e-6)
                bumps.append((layer, float(weight[head]) * along))
                slopes += float(weight[head]) * slope
            for number, norm in ((1, block.attention.output.LayerNorm), (2, block.output.LayerNorm)):
                token = token * kept.norms[2 * layer + number][1][0, at] * norm.weight
        # The last state is affine in what was written, so that taking it out once takes all of it out.
        states: list[Any] = []
        noted = body.encoder.layer[-1].register_forward_hook(lambda _, __, out, into=states: into.append(out))
        kept.run(*[(layer, -bump) for layer, bump in bumps])
        noted.remove()
        without = model.module.cls(first_of(states[-1]))[0, row, target]
        removed = float(kept.logits[row, target] - without)
        first = rows.iloc[0]
        assert first[f"removed_{side}"] == pytest.approx(removed, abs=1e-9)
        assert first[f"remainder_{side}"] == pytest.approx(slopes - removed, abs=1e-7)
        assert abs(slopes - removed) > 1e-5, "a head that is not linear leaves one"


def test_it_has_a_name_of_its_own_and_says_how_much_slopes_miss(tmp_path: Path) -> None:
    model, _ = masked("bert")
    reading = rp.probe_stored_evidence(model, PAIRS, first_order=True)
    assert reading.name == "stored_evidence_first_order" and reading.unit == "logits"
    assert reading.measured.statistic.startswith("mean first-order stored evidence under the reverse query")
    by_pair = reading.frame.groupby("pair").first()
    about = reading.meta["remainder"]
    assert about["mean"] == pytest.approx(by_pair["remainder_reverse"].abs().mean())
    assert about["largest"] == pytest.approx(by_pair["remainder_reverse"].abs().max())
    assert about["removed"] == pytest.approx(by_pair["removed_reverse"].abs().mean())
    told = f"remainder {about['mean']:.2g} (largest {about['largest']:.2g}) of {about['removed']:.2g} logits removed"
    told += " (3 pairs, 3 facts)"
    title = reading.plot().layout.title.text.replace("<br>", " ")
    assert told in repr(reading) and told in reading._repr_html_() and told in title
    assert "(same target)" in title, "weights and kind in the words of the other figures"
    assert "stored evidence, first order" in title and "tangent" in reading.plot().data[0].y
    again = rp.Reading.load(reading.save(tmp_path / "r.parquet"))
    assert repr(again) == repr(reading) and "remainder" not in again.part(again.frame).meta
    table = rp.logit_contributions(reading).set_index("part")
    assert table.loc[["tangent"], "n"].tolist() == [3]


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "bert, own norm", "roberta", "modernbert"])
def test_the_remainder_shrinks_with_the_square_of_what_is_removed(name: str) -> None:
    """A slope that held the head's norms would leave a remainder that shrinks with what is removed itself."""
    model, keep = masked(name)
    batch = make_batch(model, prepare_queries(model, [PAIRS[0].reverse]))
    held = LinearizedBatch.run(model, batch, Tail.of(model).last)
    found = held.decompose(batch.targets)
    chosen = [piece.part == "evidence" and piece.source == "token" for piece in found.pieces]
    slope = float(found.contribution[0, chosen].sum())
    without, state = held.without_evidence()
    query = PAIRS[0].reverse
    (row,), (target,) = query.target_positions, query.target
    last = keep(shown(query)).last

    def left(share: float) -> float:
        """The remainder when this share of the evidence's writes is taken out."""

        def less(_: Any, __: Any, out: Any) -> Any:
            moved = first_of(out).clone()
            moved[0, row] -= share * (state - without)[0, 0]
            return moved if isinstance(out, Tensor) else (moved, *out[1:])

        noted = last.register_forward_hook(less)
        logit = model.module(shown(query)).logits[0, row, target]
        noted.remove()
        return share * slope - float(held.own[0, 0, target] - logit)

    halves = [left(0.02) / left(0.01), left(0.01) / left(0.005)]
    assert abs(left(1.0)) > 1e-6 and halves == pytest.approx([4, 4], rel=0.05), "half of it leaves a quarter"


@pytest.mark.parametrize("size", [1, 5, 33])
def test_batches_of_any_size_hold_the_same_numbers(size: int) -> None:
    """Of 33 queries the tail reads 66 states, 64 at once, so that one query's come alone; five leave one of 36."""
    model, _ = masked("bert")
    pairs = pairs_at((1, 5), (5, 1), count=18)
    whole, some = (rp.probe_stored_evidence(model, pairs, first_order=True, batch_size=b) for b in (36, size))
    assert whole.frame["removed_reverse"].abs().min() > 0
    pd.testing.assert_frame_equal(some.frame, whole.frame, rtol=1e-7, atol=1e-10)
    assert some.meta["first_order_behind"] == whole.meta["first_order_behind"] == "bert.encoder.layer.1"


def test_behind_a_linear_head_it_is_another_reading_than_the_exact_one() -> None:
    """The exact one holds the final norm's scale; a norm's own slope along the state itself is nothing."""
    exact, slopes = (rp.probe_stored_evidence(radd(), PAIRS, first_order=first) for first in (False, True))
    assert abs(slopes.value - exact.value) > 1e-3
    by_part = slopes.frame.groupby(["pair", "part"])["contribution_reverse"].sum().unstack()
    logit = slopes.frame.groupby("pair")["logit_reverse"].first()
    np.testing.assert_allclose(by_part["tangent"], logit, rtol=1e-3)
    assert logit.abs().min() > 0.01


def test_what_layers_are_asked_for_is_what_is_removed() -> None:
    model, _ = masked("bert")
    found = {}
    for layers in ([0], [1], [0, 1], None):
        reading = rp.probe_stored_evidence(model, PAIRS, first_order=True, layers=layers)
        frame = reading.frame
        tokens = frame[(frame["part"] == "evidence") & (frame["source"] == "token")]
        slopes = tokens.groupby("pair")["contribution_reverse"].sum()
        once = frame.groupby("pair").first()
        np.testing.assert_allclose(slopes - once["removed_reverse"], once["remainder_reverse"], atol=1e-12)
        found[str(layers)] = once["removed_reverse"].to_numpy()
        assert reading.meta["remainder"]["mean"] < 0.1 * reading.meta["remainder"]["removed"]
    np.testing.assert_allclose(found["[0, 1]"], found["None"], atol=1e-12)
    assert not np.allclose(found["[0]"], found["None"], atol=1e-4)
    # Writes add up in the state, so that removals of layers add up to first order.
    np.testing.assert_allclose(found["[0]"] + found["[1]"], found["None"], atol=2e-3)


def window(count: int, **positions: int) -> list[rp.ReversalPair]:
    at = positions["evidence"]
    pairs = pairs_at((1, at), (at, 1), count=count, length=16)
    return [rp.ReversalPair(one.forward, one.reverse, fact=f"{at} {one.fact}") for one in pairs]


def test_pairs_without_s_have_no_remainder(tmp_path: Path) -> None:
    """Evidence outside of the window writes nothing: a remainder of 0 there would be no measurement."""
    config = transformers.ModernBertConfig(
        **{**SIZES, "num_hidden_layers": 1}, local_attention=6, cls_token_id=54, sep_token_id=54
    )
    config.layer_types = ["sliding_attention"]
    model = probed(drawn(partial(MLM, config), scale=0.2, dtype=torch.float64))
    near, far = window(4, evidence=3), window(4, evidence=12)
    alone, mixed, none = (
        rp.probe_stored_evidence(model, rp.ReversalPairs.from_pairs(some), first_order=True)
        for some in (near, near + far, far)
    )
    assert alone.meta["remainder"]["n"] == 4
    assert mixed.meta["remainder"] == pytest.approx(alone.meta["remainder"]), "means and n over defined pairs"
    by_pair = mixed.frame.groupby("pair")[["removed_reverse", "remainder_forward"]].first()
    assert by_pair.notna().all(axis=1).tolist() == [True] * 4 + [False] * 4
    assert none.meta["remainder"] == {
        "mean": None, "largest": None, "removed": None, "rounding": None, "n": 0, "facts": 0
    }  # fmt: skip
    again = rp.Reading.load(none.save(tmp_path / "none.parquet"))
    assert "remainder undefined, as S is for every pair" in repr(again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_remainder_of_rounding_is_told_as_such(dtype: torch.dtype) -> None:
    model, _ = masked("bert", dtype)
    pairs = pairs_at((1, 5), (5, 1), count=12)
    coarse = rp.probe_stored_evidence(model, pairs, first_order=True)
    fine = rp.probe_stored_evidence(probed(model.module.double()), pairs, first_order=True)
    removed = [reading.frame.groupby("pair")["removed_reverse"].first() for reading in (coarse, fine)]
    assert (removed[0] - removed[1]).abs().mean() < coarse.meta["remainder"]["rounding"]
    assert ", within the rounding of " in repr(coarse) and "within the rounding" not in repr(fine)
    assert fine.meta["remainder"]["rounding"] < 1e-12


class Capped(nn.Module):
    """Logits in soft caps, and one token ruled out, as RADD rules out its mask."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return 2.0 * torch.tanh(self.inner(input_ids=input_ids, attention_mask=attention_mask).logits / 2.0)


def test_soft_caps_scale_every_slope_by_their_own() -> None:
    """d 2 tanh(z/2) / dz = 1 - tanh(z/2)^2 at the logit itself, so nothing else changes."""
    inner = drawn(radd().module, scale=0.2).double()
    models = [probed(module) for module in (inner, Capped(inner))]
    plain, capped = (rp.probe_stored_evidence(model, PAIRS, first_order=True).frame for model in models)
    plain, capped = (one[one["part"] != "tangent"].reset_index(drop=True) for one in (plain, capped))
    scale = 1 - np.tanh(plain["logit_reverse"] / 2) ** 2
    assert scale.min() < 0.97
    for column in ("contribution_reverse", "stored_reverse"):
        np.testing.assert_allclose(capped[column], plain[column] * scale, atol=1e-6)


def test_what_is_not_held_before_the_tail_is_caught_by_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is worked out from the tail alone, so it does not hide what goes wrong in the layers."""
    model, _ = masked("bert")
    monkeypatch.setattr(linearize, "_LINEAR", linearize._LINEAR | {"gelu"})
    with pytest.raises(rp.RevprobeError, match="the parts add up to"):
        rp.probe_stored_evidence(model, PAIRS, first_order=True)


class Kernel(torch.autograd.Function):
    """A function as custom kernels are: its backward carries no graph."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        return states.relu()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


def test_a_kernel_in_the_tail_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = masked("bert")
    monkeypatch.setattr(model.module.cls.predictions.transform.transform_act_fn, "forward", Kernel.apply)
    with pytest.raises(rp.RevprobeError, match="what follows its last layer cannot be differentiated twice"):
        rp.probe_stored_evidence(model, PAIRS, first_order=True)


def test_without_it_the_refusal_names_it() -> None:
    model, _ = masked("bert")
    with pytest.raises(rp.RevprobeError, match=r"ask it with `probe_stored_evidence\(\.\.\., first_order=True\)`"):
        rp.probe_stored_evidence(model, PAIRS)
