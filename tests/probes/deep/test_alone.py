"""Deep instruments on models that change with the length or the number of rows, beyond what a short trial shows."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor, nn

import revprobe as rp
from revprobe.errors import RevprobeError
from tiny import GROUPED, MASK, drawn, language_model

LENGTHS = (20, 13, 18, 12, 15, 17, 14, 19, 16)


def long_pairs(lengths: tuple[int, ...] = LENGTHS) -> rp.ReversalPairs:
    """Evidence at 1 and the target at 8, whatever comes after."""
    draw, pairs = torch.Generator().manual_seed(1), []
    for fact, length in enumerate(lengths):
        one, other, *words = torch.randperm(50, generator=draw)[: length - 1].tolist()
        both = (one, other), (other, one)
        asked = [rp.Query([7, a, *words[:6], b, *words[6:]], [8], [1]) for a, b in both]
        pairs.append(rp.ReversalPair(*asked, kind="swapped", fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


def longrope() -> rp.ProbedModel:
    """Every row gets the rotary factors of the longest: a short query beside a long one is not itself."""
    factors = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    factors |= {"short_factor": [1.0] * 4, "long_factor": [6.0, 9.0, 20.0, 30.0], "factor": 4.0}
    config = transformers.LlamaConfig(**GROUPED, rope_parameters=factors)
    return rp.ProbedModel(drawn(lambda: language_model(config), scale=0.3), objective="causal")


INSTRUMENTS: dict[str, Callable[..., rp.Reading]] = {
    "lens": rp.probe_logit_lens,
    "stored once": lambda *args, **options: rp.probe_stored_once(*args, untrained=False, **options),
    "trace": lambda *args, **options: rp.probe_causal_trace(*args, positions="all", **options),
    "audit": rp.audit_assumptions,
}
NUMBERS = {"lens": ["log_probability"], "stored once": ["place"], "trace": ["effect", "effect_control"]}
NUMBERS["audit"] = ["correlation"]


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_a_model_that_changes_with_the_length_is_read_at_each_querys_own(name: str) -> None:
    """Without the check the numbers of a batch of many lengths differ from those of each query alone."""
    model, pairs = longrope(), long_pairs()
    assert not model.contract.equal_lengths, "short rows show nothing"
    found = INSTRUMENTS[name](model, pairs)
    assert "one differs from itself alone" in found.meta["batches"]
    alone = INSTRUMENTS[name](longrope(), pairs, batch_size=1)
    pd.testing.assert_frame_equal(found.frame[NUMBERS[name]], alone.frame[NUMBERS[name]], atol=1e-4, rtol=1e-4)


class Crowded(nn.Module):
    """RADD whose rows reach each other where there are more than `most`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        config = rp.RaddConfig(d_model=16, n_layers=2, n_heads=2, position_encoding="rope")
        self.inner, self.most = drawn(lambda: rp.RaddForMaskedLM(config), scale=0.3), most
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        out = self.inner(input_ids, attention_mask=attention_mask)
        if len(input_ids) > self.most:
            out.logits = out.logits + out.logits.mean(0, keepdim=True)
        return out


@pytest.mark.parametrize("name", ["lens", "stored once", "trace"])
def test_rows_that_reach_each_other_in_large_batches_are_refused(name: str) -> None:
    model = rp.ProbedModel(Crowded(5).eval(), objective="masked", mask_token_id=MASK, logit_shift=0)
    with pytest.raises(RevprobeError, match="would depend on the batch; use batch_size=1"):
        INSTRUMENTS[name](model, long_pairs((12,) * 9))


def test_a_batch_of_places_is_held_as_well_where_the_queries_are_few() -> None:
    """Four queries make a batch of four, their states at every place one of many more."""
    pairs = long_pairs((12,) * 4)
    model = rp.ProbedModel(Crowded(8).eval(), objective="masked", mask_token_id=MASK, logit_shift=0)
    with pytest.raises(RevprobeError, match="would depend on the batch"):
        rp.probe_causal_trace(model, pairs)
    assert rp.probe_causal_trace(model, pairs, batch_size=8).n == 4
