"""The objective taken apart for a model whose gradients do not fit many times: one direction, carried forward.

The gradient of the mean reverse loss is taken once; the slope of every training term along it is that term's product
with it, by forward-mode differentiation, so no class's own gradient is ever formed. What needs one (its norm, hence
cosines, products by role or by fact, an optimizer's step) is not there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.pairs.query import Query
from ...probes.passes.alone import in_equal_lengths_if_need_be
from ...probes.passes.batches import in_batches, make_batch, prepare_queries, queries_per_batch
from ...probes.passes.likelihood import mean_nll, readout
from ...probes.passes.slopes import Direction, carrying, slope_of
from ...probes.storage import control_partners
from ...progress import Progress, counted
from .class_gradients import TermClass, class_weights, priced_terms
from .masked_samples import REPLICATES, Objective, samples
from .one_step import with_target
from .reverse_gradients import Candidates, trained_parameters
from .term_rows import RowTable


@dataclass
class ClassSlopes:
    """Of each class its loss, its product with the direction, and how that deviates by replicate."""

    losses: dict[TermClass, float] = field(default_factory=dict)
    slopes: dict[TermClass, float] = field(default_factory=dict)
    deviations: dict[TermClass, np.ndarray] = field(default_factory=dict)
    sequences: int = 0
    enumerated: bool = True


@torch.no_grad()
def class_slopes(
    model: ProbedModel,
    tables: Sequence[RowTable],
    objective: Objective,
    along: Direction,
    *,
    draws: int,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> ClassSlopes:
    """Take the objective apart along one direction; equal seeds draw equal masks. The caller keeps the module."""
    found = ClassSlopes()
    for sample in counted(list(samples(tables, objective, draws, seed)), progress):
        found.enumerated &= sample.enumerated
        found.sequences += sample.sequences
        sums: dict[TermClass, np.ndarray] = {}
        for replicate, some in sample.batches():
            with carrying(model, along) as moved:
                terms = priced_terms(moved, some)
                values = torch.stack([terms.detach(), slope_of(terms)])
            for one, weight in class_weights(sample.state, some, objective.dial):
                own = sums.setdefault(one, np.zeros((2, sample.replicates)))
                own[:, replicate] += (values * weight.to(values)).sum((1, 2)).cpu().numpy()
        for one, (loss, slope) in sums.items():
            found.losses[one] = found.losses.get(one, 0.0) + float(loss.mean())
            found.slopes[one] = found.slopes.get(one, 0.0) + float(slope.mean())
            apart = slope - slope.mean() if len(slope) > 1 else np.zeros(REPLICATES)
            found.deviations[one] = found.deviations.get(one, np.zeros(REPLICATES)) + apart
    return found


def reverse_direction(
    model: ProbedModel,
    pairs: ReversalPairs,
    part: str,
    names: Collection[str] | None = None,
    *,
    batch_size: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Tensor], float, tuple[int, int]]:
    """The gradient of the mean reverse loss over facts, that loss, and how many queries and facts it is of.

    The caller keeps the module untouched.
    Args:
        part: "loss", its "letters", or "control" (the same targets under other facts' reverse queries).
        names: the parameters the gradient is of; all when None.
    Returns: an empty direction and NaN where no fact has a control.
    """
    queries = prepare_queries(model, pairs.queries)
    asked = {pair: queries[index] for pair, index in enumerate(pairs.reverse)}
    candidates = Candidates(model, list(asked.values())) if part == "letters" else None
    if part == "control":
        partner = control_partners(pairs, model.logit_shift, seed=seed)
        asked = {
            pair: with_target(asked[int(partner[pair])], query.target)
            for pair, query in asked.items()
            if partner[pair] >= 0
        }
    facts = pairs.facts.astype(str)[list(asked)]
    distinct, fact, counts = np.unique(facts, return_inverse=True, return_counts=True)
    weighted = [(query, 1 / counts[one] / len(distinct)) for query, one in zip(asked.values(), fact, strict=True)]
    if not weighted:
        return {}, float("nan"), (0, 0)
    found = in_equal_lengths_if_need_be(model, lambda: _gradient(model, weighted, candidates, names, batch_size))
    return *found, (len(weighted), len(distinct))


def _gradient(
    model: ProbedModel,
    weighted: list[tuple[Query, float]],
    candidates: Candidates | None,
    names: Collection[str] | None,
    batch_size: int | None,
) -> tuple[dict[str, Tensor], float]:
    named = trained_parameters(model.module, names)
    for parameter in named.values():
        parameter.requires_grad_(True)
    along: dict[str, Tensor] = {}
    whole, size = 0.0, queries_per_batch(model, [query for query, _ in weighted], batch_size)
    for some in in_batches(model, weighted, size, lambda one: len(one[0].token_ids)):
        batch = make_batch(model, [query for query, _ in some])
        with torch.enable_grad():
            found = readout(model, batch)
            found = found if candidates is None else candidates.only(found, batch)
            weights = torch.tensor([weight for _, weight in some]).to(found)
            loss = (mean_nll(found, batch) * weights).sum()
            # Not backward(): optimizers that step in it are the caller's.
            parts = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, part in zip(named, parts, strict=True):
            if part is not None:
                along[name] = along[name] + part if name in along else part
        whole += loss.item()
    return along, whole
