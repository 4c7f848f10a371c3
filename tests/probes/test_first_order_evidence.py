"""Stored evidence through a nonlinear prediction head, to first order: against finite differences, in float64.

The reference knows nothing of the engine: it runs the model with every norm's mean and scale, every MLP and every
attention pattern kept from a first run, so that what a head writes reaches the logit along the residual stream alone
and through the model's own head, and moves it by a hundred-thousandth each way.
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
from tiny import SIZES, drawn, pairs_at, radd

STEP = 1e-5
Bump = tuple[int, Tensor]  # a layer, and what is added to what its heads read: `seq heads x dim`


class Kept:
    """A model whose norms, MLPs and patterns are those of one run; `run` tells the logits after a change.

    `outs`, `mlps`: the paths of output projections and MLPs by layer.
    """

    def __init__(self, module: nn.Module, outs: str, mlps: str, ids: Tensor) -> None:
        self.module, self.ids = module, ids
        layers = module.config.num_hidden_layers
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
            self.logits = module(ids).logits[0]

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
        norms = iter(self.norms)
        held = lambda x, _, weight=None, bias=None, eps=0.0: self._normed(x, weight, bias, next(norms))  # noqa: E731
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


def masked(name: str) -> tuple[rp.ProbedModel, partial[Kept]]:
    config, prefix, (out, mlp) = HEADS[name]
    module = drawn(partial(MLM, config()), scale=0.2, dtype=torch.float64)
    model = rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked", mask_token_id=53, logit_shift=0)
    return model, partial(Kept, module, prefix + out, prefix + mlp)


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
    assert tangents.abs().max() > 1e-3, "and the head is not linear there"
    assert len(reading.meta["tangents"]) == 1 and "gelu" in reading.meta["tangents"][0]


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
        assert abs(slopes - removed) > 1e-4, "a head that is not linear leaves one"


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
    title = reading.plot().layout.title.text.replace("<br>", " ")
    assert told in repr(reading) and told in reading._repr_html_() and told in title
    assert "(same target)" in title, "weights and kind in the words of the other figures"
    assert "stored evidence, first order" in title and "tangent" in reading.plot().data[0].y
    again = rp.Reading.load(reading.save(tmp_path / "r.parquet"))
    assert repr(again) == repr(reading) and "remainder" not in again.part(again.frame).meta
    table = rp.logit_contributions(reading).set_index("part")
    assert table.loc[["tangent"], "n"].tolist() == [3]


def test_behind_a_linear_head_it_is_the_exact_reading() -> None:
    exact, slopes = (rp.probe_stored_evidence(radd(), PAIRS, first_order=first) for first in (False, True))
    assert slopes.meta["tangents"] == [] and slopes.value == exact.value
    shared = list(exact.frame.columns)
    pd.testing.assert_frame_equal(slopes.frame[shared], exact.frame)
    assert slopes.meta["remainder"]["mean"] > 0, "the final norm's scale is not held when the evidence is taken out"


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
    models = [
        rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked", mask_token_id=53, logit_shift=0)
        for module in (inner, Capped(inner))
    ]
    plain, capped = (rp.probe_stored_evidence(model, PAIRS, first_order=True).frame for model in models)
    capped = capped[capped["part"] != "tangent"].reset_index(drop=True)
    scale = 1 - np.tanh(plain["logit_reverse"] / 2) ** 2
    assert scale.min() < 0.97
    for column in ("contribution_reverse", "stored_reverse"):
        np.testing.assert_allclose(capped[column], plain[column] * scale, atol=1e-6)


def test_a_wrong_tangent_is_caught_by_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = masked("bert")
    monkeypatch.setattr(linearize, "push_forward", lambda output, *_: torch.zeros_like(output))
    with pytest.raises(rp.RevprobeError, match="the parts add up to"):
        rp.probe_stored_evidence(model, PAIRS, first_order=True)


def test_without_it_the_refusal_names_it() -> None:
    model, _ = masked("bert")
    with pytest.raises(rp.RevprobeError, match=r"ask it with `probe_stored_evidence\(\.\.\., first_order=True\)`"):
        rp.probe_stored_evidence(model, PAIRS)
