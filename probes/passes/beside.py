"""What stands beside the evidence: its neighbour in the query, and the position that a head attends to most.

A score at the evidence is read against these: the same row, head and query at another position.

Shapes below: query (distinct queries), batch (some of them), heads, rows (readout rows), seq.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...hooks.attention import tap_attention
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel
from ...models.structure import attention_of
from ..pairs.pairs import ReversalPairs
from ..pairs.query import Query
from .asked import asked_pairs, out_of_sight
from .batches import QueryBatch, in_batches, make_batch, prepare_queries, queries_per_batch
from .likelihood import readout
from .plan import PassResult, Plan

NEIGHBOUR, SINK = "neighbour", "sink"


def neighbours(query: Query, beside: Sequence[int], count: int, allowed: Iterable[int]) -> tuple[int, ...]:
    """The `count` allowed positions nearest to those of `beside`, neither target nor evidence; later ones first.

    Empty where there are not so many.
    """
    taken = {*query.target_positions, *query.evidence_positions}
    free = [p for p in allowed if p not in taken]
    nearest = sorted(free, key=lambda p: (min(abs(p - q) for q in beside), -p))
    return tuple(sorted(nearest[:count])) if len(nearest) >= count else ()


def beside_evidence(model: ProbedModel, pairs: ReversalPairs, plan: Plan) -> dict[str, PassResult]:
    """Scores and weights as at the evidence, read at its neighbour and at each head's sink, from one run of each query.

    The neighbour of evidence of several tokens is as many tokens, the nearest to it on both sides that are neither
    evidence nor target. The sink of a query, layer and head is the position with the largest weight, averaged over
    readout rows, that is not evidence; it may be another in the other query.
    Raises: RevprobeError, as `run_pass`.
    """
    pairs = asked_pairs(model, pairs, plan.reader)
    queries = prepare_queries(model, pairs.queries)
    moved = [neighbours(q, q.evidence_positions, len(q.evidence_positions), range(len(q.token_ids))) for q in queries]
    attention = attention_of(model)
    lone = np.full(len(pairs), -1)
    unseen = out_of_sight(model, queries)
    beside = PassResult(pairs, lone, [], unseen=unseen | _unseen_neighbours(model, queries, moved))
    found = {NEIGHBOUR: beside, SINK: PassResult(pairs, lone, [], unseen=unseen)}
    size, done = queries_per_batch(model, queries, plan.batch_size), 0
    with untouched(model.module), torch.no_grad():
        for numbers in in_batches(model, range(len(queries)), size, lambda q: len(queries[q].token_ids)):
            batch = make_batch(model, [queries[q] for q in numbers])
            everywhere = torch.arange(batch.input_ids.shape[1], device=batch.rows.device).expand_as(batch.input_ids)
            at = batch.attention_rows, everywhere + batch.ahead[1]
            with tap_attention(model.module, *at, attention, batch.size) as tap:
                readout(model, batch)
            for result in found.values():
                result.without_attention |= dict(tap.attention.without) | tap.missing()
                result.left_out |= dict(tap.attention.left_out) | tap.left_out
            cells = _cells(batch, [moved[q] for q in numbers])
            for layer, call in tap.layers(model.name).items():
                score, weight = _over_rows(call.score, batch), _over_rows(call.weight, batch)
                largest = weight.masked_fill(~cells[SINK][:, None], -torch.inf).argmax(-1, keepdim=True)
                neighbour = cells[NEIGHBOUR][:, None].expand_as(weight)
                sink = torch.zeros_like(neighbour).scatter_(2, largest, True) & cells[SINK].any(1)[:, None, None]
                for name, cell in ((NEIGHBOUR, neighbour), (SINK, sink)):
                    _keep(found[name], layer, numbers, len(queries), score, weight, cell)
            done += len(numbers)
            if plan.progress is not None:
                plan.progress(done, len(queries))
    return found


def neighbour_targets(model: ProbedModel, pairs: ReversalPairs) -> tuple[ReversalPairs | None, int]:
    """The pairs whose reverse query asks for the tokens next to its target instead, the target itself shown.

    As many tokens as the target has, where the query has so many beside it that the model may be asked for.
    Returns: the pairs, None without any; and how many were left out.
    """
    queries = list(pairs.queries)
    places = {q: _other_target(model, queries[q]) for q in {int(q) for q in pairs.reverse}}
    index = {q: len(queries) + n for n, q in enumerate(q for q, other in places.items() if other is not None)}
    queries += [other for other in places.values() if other is not None]
    kept = np.array([int(q) in index for q in pairs.reverse])
    if not kept.any():
        return None, len(pairs)
    some = pairs.take(np.flatnonzero(kept))
    asked = replace(some, reverse=np.array([index[int(q)] for q in pairs.reverse[kept]]), queries=tuple(queries))
    return asked, int((~kept).sum())


def _other_target(model: ProbedModel, query: Query) -> Query | None:
    allowed = [
        p
        for p in range(len(query.token_ids))
        if p >= model.logit_shift and not out_of_sight(model, [_asking(query, (p,))])[0]
    ]
    at = neighbours(query, query.target_positions, len(query.target_positions), allowed)
    return _asking(query, at) if at else None


def _asking(query: Query, at: tuple[int, ...]) -> Query:
    return Query.unchecked(query.token_ids, at, query.evidence_positions)


def _unseen_neighbours(model: ProbedModel, queries: Sequence[Query], moved: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Which queries have a neighbour in a later block than a readout row."""
    there = [Query.unchecked(q.token_ids, q.target_positions, at or (0,)) for q, at in zip(queries, moved, strict=True)]
    return out_of_sight(model, there)


def _cells(batch: QueryBatch, moved: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    """Where the neighbour stands, and where a sink may. Shapes: `-> batch seq` (bool)."""
    neighbour = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for row, at in enumerate(moved):
        neighbour[row, list(at)] = True
    padding = batch.attention_mask
    free = torch.ones_like(neighbour) if padding is None else padding.bool().clone()
    free.scatter_(1, torch.where(batch.is_evidence, batch.columns, batch.columns[:, :1]), False)
    return {NEIGHBOUR: neighbour, SINK: free}


def _over_rows(values: Tensor, batch: QueryBatch) -> Tensor:
    """The mean over a query's readout rows. Shapes: `batch heads rows seq -> batch heads seq`."""
    asked = batch.is_target[:, None, :, None]
    return values.masked_fill(~asked, 0.0).sum(2) / asked.sum(2)


def _keep(
    result: PassResult, layer: int, numbers: Sequence[int], count: int, score: Tensor, weight: Tensor, cell: Tensor
) -> None:
    """Scores averaged and weights summed over a cell; NaN where it is empty. Shapes: `batch heads seq` each."""
    there = cell.sum(-1)
    mean = score.masked_fill(~cell, 0.0).sum(-1) / there
    total = weight.masked_fill(~cell, 0.0).sum(-1).masked_fill(there == 0, torch.nan)
    for kept, values in ((result.score, mean), (result.weight, total)):
        table = kept.setdefault(layer, np.full((count, values.shape[1]), np.nan))
        table[list(numbers)] = values.double().cpu().numpy()
