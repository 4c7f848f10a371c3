"""Every instrument that runs queries together, on models whose numbers depend on what shares the batch.

Each gives what `batch_size=1` gives, or refuses. A public function that takes `batch_size` is in one of the two tables
below, so that the next one is asked too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from long_cases import rest_long
from torch import Tensor, nn

import revprobe as rp
from revprobe.errors import RevprobeError
from revprobe.finetune.analysis.class_slopes import reverse_direction
from revprobe.finetune.analysis.reverse_gradients import FlatParameters, reverse_gradients
from revprobe.hooks.untouched import untouched
from revprobe.probes.passes.batches import prepare_queries
from revprobe.probes.passes.beside import beside_evidence
from revprobe.probes.passes.plan import Plan
from revprobe.probes.passes.slopes import loss_slopes
from tiny import ROOT, radd

SEATS, WIDE = 60, 16  # tokens of a batch that an MLP has seats for; from how many tokens on logits are scaled
ALIKE, MIXED = (12,) * 6, (14, 19, 14, 18, 20, 13)


class Seated(nn.Module):
    """An MLP with seats for the first tokens of a batch: those beyond pass it by."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        seated = torch.arange(states.shape[0] * states.shape[1], device=states.device) < SEATS
        return self.inner(states) * seated.view(*states.shape[:2], 1)


def seated(layers: int = 2) -> rp.ProbedModel:
    """Rows of large batches are not themselves, padded or not."""
    module = radd(n_layers=layers, n_heads=2, scale=0.4).module
    for block in module.blocks:
        block.mlp = Seated(block.mlp)
    return wrapped(module)


def stretched(layers: int = 2) -> rp.ProbedModel:
    """Keys are scaled by the length of the batch, so short rows beside long ones are not themselves."""
    module = radd(n_layers=layers, n_heads=2, scale=0.4).module
    for block in module.blocks:
        block.attention.k_proj.register_forward_hook(lambda _, __, out: out * (1.0 + (out.shape[1] > WIDE)))
    return wrapped(module)


def wrapped(module: nn.Module) -> rp.ProbedModel:
    model = rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked")
    assert not model.contract.equal_lengths, "a short trial shows nothing"
    return model


def pairs_of(lengths: tuple[int, ...], tokens: int = 1) -> rp.ReversalPairs:
    """Facts that are asked at the same places, with a target of so many tokens; what comes after makes the length."""
    draw, pairs = np.random.default_rng(0), []
    for fact, length in enumerate(lengths):
        one, other = (draw.integers(0, 50, length).tolist() for _ in range(2))
        one[8] = fact  # the evidence tells the facts apart, as do the targets
        one[2] = 10 + fact
        target, evidence = one[2 : 2 + tokens], one[8]
        other[8 : 8 + tokens], other[2] = target, evidence
        asked = rp.Query(one, range(2, 2 + tokens), [8]), rp.Query(other, range(8, 8 + tokens), [2])
        pairs.append(rp.ReversalPair(*asked, kind="same_target", fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


def frame_of(found: Any) -> pd.DataFrame:
    frames = [one.frame for one in found] if isinstance(found, rp.Readings) else [getattr(found, "frame", found)]
    return pd.concat([frame.select_dtypes("number") for frame in frames], ignore_index=True).astype(float)


def asked_of(call: Callable[..., Any], **fixed: Any) -> Callable[..., pd.DataFrame]:
    return lambda model, pairs, **options: frame_of(call(model, pairs, **fixed, **options))


def all_of_a_sweep(model: rp.ProbedModel, pairs: rp.ReversalPairs, **options: Any) -> pd.DataFrame:
    return frame_of(rp.block_sweep(model, pairs, sizes=[4], control=False, **options).frame)


def comparison(model: rp.ProbedModel, pairs: rp.ReversalPairs, **options: Any) -> pd.DataFrame:
    found = rp.compare_models({"a": model, "b": model}, pairs, only=["probability"], control=False, **options)
    return pd.concat([frame_of(reading) for reading in found.readings.values()], ignore_index=True)


def bounds(model: rp.ProbedModel, pairs: rp.ReversalPairs, **options: Any) -> pd.DataFrame:
    reading = rp.probe_attention_correlation(model, pairs, control=False, batch_size=1)
    return frame_of(rp.with_bounds(reading, model, pairs, **options))


def slopes(model: rp.ProbedModel, pairs: rp.ReversalPairs, **options: Any) -> pd.DataFrame:
    along = {"lm_head.weight": torch.ones_like(model.module.lm_head.weight)}
    found = loss_slopes(model, prepare_queries(model, pairs.queries), [along], **options)
    return pd.DataFrame({"loss": found.loss, "slope": found.slope[0]})


def gradients(model: rp.ProbedModel, pairs: rp.ReversalPairs, **options: Any) -> pd.DataFrame:
    with untouched(model.module):
        flat = FlatParameters(model.module)
        flat.require_gradients()
        # One fact: its queries share a batch.
        pairs = rp.ReversalPairs.from_pairs([rp.ReversalPair(p.forward, p.reverse, p.kind, "0") for p in pairs])
        found = reverse_gradients(model, pairs, flat, control=False, **options)
    return pd.DataFrame({"loss": found.loss[0], "norm": found.gradient[0].norm(dim=1).numpy()})


def direction(model: rp.ProbedModel, pairs: rp.ReversalPairs, **options: Any) -> pd.DataFrame:
    with untouched(model.module):
        along, loss, _ = reverse_direction(model, pairs, "loss", **options)
    return pd.DataFrame({"loss": [loss], "norm": [float(sum(g.square().sum() for g in along.values()))]})


def beside(model: rp.ProbedModel, pairs: rp.ReversalPairs, **options: Any) -> pd.DataFrame:
    found = beside_evidence(model, pairs, Plan(attention=True, **options))
    return pd.DataFrame(np.concatenate([one.weight[1] for one in found.values() if one is not None]))


INSTRUMENTS: dict[str, Callable[..., pd.DataFrame]] = {
    "audit_assumptions": asked_of(rp.audit_assumptions, permutations=40),
    "block_sweep": all_of_a_sweep,
    "compare_models": comparison,
    "probe": asked_of(rp.probe, only=["attention", "probability"]),
    "probe_attention_correlation": asked_of(rp.probe_attention_correlation),
    "probe_causal_trace": asked_of(rp.probe_causal_trace, layers=[1]),
    "probe_gradient_cosine": asked_of(rp.probe_gradient_cosine, control=False),
    "probe_logit_lens": asked_of(rp.probe_logit_lens, contributions=True),
    "probe_reverse_probability": asked_of(rp.probe_reverse_probability),
    "probe_route_edit": asked_of(rp.probe_route_edit, scope="all"),
    "probe_stored_evidence": asked_of(rp.probe_stored_evidence),
    "probe_stored_once": asked_of(rp.probe_stored_once, untrained=False),
    "rank_heads": asked_of(rp.rank_heads, top=1),
    "storage_gradient_cosines": asked_of(rp.storage_gradient_cosines),
    "trace_denoising": asked_of(rp.trace_denoising),
    "with_bounds": bounds,
}
# The same instruments asked otherwise, and the passes of those that read the runs of a folder.
OTHERWISE: dict[str, Callable[..., pd.DataFrame]] = {
    "transplanted routes": asked_of(rp.probe_route_edit, edit="transplant", scope="all"),
    "stored to first order": asked_of(rp.probe_stored_evidence, first_order=True),
    "traced in steps": asked_of(rp.probe_causal_trace, layers=[1], positions="target", control=False, steps=1),
    "beside the evidence": beside,
    "slopes": slopes,
    "reverse gradients": gradients,
    "reverse direction": direction,
}
OF_ELSEWHERE = {
    "decode": "prompts, not pairs",
    "decoded_match": "questions, not pairs",
    "rank_candidates": "questions, not pairs",
    "probe_in_parts": "`probe` on some pairs at a time",
    "objective_steps": "slopes",
    "objective_terms": "reverse gradients, reverse direction",
    "one_step": "slopes",
    "pressure": "reverse gradients",
    "placeholder_storage": "probe_stored_evidence",
    "storage_curves": "probe_stored_evidence",
}
ALL = INSTRUMENTS | OTHERWISE
SEVERAL = ("probe_reverse_probability", "probe_route_edit", "probe_causal_trace", "rank_heads", "probe_stored_evidence")


def test_every_public_function_with_a_batch_size_is_asked() -> None:
    functions = {name: found for name in rp.__all__ if inspect.isfunction(found := getattr(rp, name))}
    batched = {name for name, one in functions.items() if "batch_size" in inspect.signature(one).parameters}
    assert batched == {*INSTRUMENTS, *OF_ELSEWHERE}, "an instrument is not held against a query alone in any test"


def made(make: Callable[..., rp.ProbedModel], name: str) -> rp.ProbedModel:
    return make(layers=1 if name == "storage_gradient_cosines" else 2)


@pytest.mark.parametrize("lengths", [MIXED, pytest.param(ALIKE, marks=pytest.mark.long)], ids=["mixed", "alike"])
@pytest.mark.parametrize("name", ALL)
def test_rows_that_reach_each_other_are_refused_or_read_alone(name: str, lengths: tuple[int, ...]) -> None:
    """Experts of a limited capacity: the last rows of a large batch find no seat."""
    refused_or_alone(ALL[name], made(seated, name), made(seated, name), pairs_of(lengths))


@pytest.mark.parametrize("name", ALL)
def test_rows_that_padding_reaches_are_read_in_equal_lengths(name: str) -> None:
    """A refusal would be a loss: lengths apart give every instrument its numbers."""
    pairs = pairs_of(MIXED)
    found = ALL[name](made(stretched, name), pairs)
    alone = ALL[name](made(stretched, name), pairs, batch_size=1)
    pd.testing.assert_frame_equal(found, alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("make", rest_long([seated, stretched]))
def test_targets_of_several_tokens_are_held_as_well(name: str, make: Callable[[], rp.ProbedModel]) -> None:
    """Their chains are batches of their own, larger than those of the queries."""
    pairs = pairs_of(ALIKE[:2] if make is seated else MIXED, tokens=4)
    refused_or_alone(ALL[name], make(), make(), pairs)


def refused_or_alone(
    ask: Callable[..., pd.DataFrame], model: rp.ProbedModel, other: rp.ProbedModel, pairs: rp.ReversalPairs
) -> None:
    try:
        found = ask(model, pairs)
    except RevprobeError as error:
        assert "would depend on the batch; use batch_size=1" in str(error), error
    else:
        pd.testing.assert_frame_equal(found, ask(other, pairs, batch_size=1), atol=1e-4, rtol=1e-3)


def test_chains_in_larger_batches_than_their_queries_are_refused() -> None:
    """Four queries have seats; the rows of their chains have not, and gave log-probabilities off by a nat."""
    with pytest.raises(RevprobeError, match="would depend on the batch"):
        rp.probe_reverse_probability(seated(), pairs_of(ALIKE[:2], tokens=4))


def test_the_last_row_is_held_where_a_short_one_stands_first() -> None:
    """The shortest query has its seat; it is the long ones behind it that have none."""
    pairs = pairs_of((13, 18, 18, 18, 18, 18))
    with pytest.raises(RevprobeError, match="would depend on the batch"):
        rp.probe_reverse_probability(seated(), pairs, control=False)


def test_batches_are_made_and_read_in_one_place() -> None:
    """Code that runs the rows of a batch by itself is not held against anything."""
    found = {}
    for folder in ("probes", "finetune", "report", "relations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            calls = re.findall(r"\.logits\((?:batch|first)\.input_ids.*", path.read_text(encoding="utf-8"))
            if calls:
                found[path.relative_to(ROOT).as_posix()] = len(calls)
    assert found == {
        "probes/diagnose.py": 1,  # one query
        "probes/passes/batches.py": 1,  # where it is held
        "probes/passes/decomposition.py": 1,  # with all held but the logits, beside the same batch as it is
        "probes/passes/run.py": 1,  # one query
    }
