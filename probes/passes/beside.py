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
from ..statistics.paired import OF_PAIR
from .alone import in_equal_lengths_if_need_be
from .asked import asked_pairs, in_sight, out_of_sight
from .batches import QueryBatch, in_batches, make_batch, prepare_queries, queries_per_batch
from .likelihood import readout
from .plan import PassResult, Plan

NEIGHBOUR, SINK = "neighbour", "sink"
# Pairs of which one query has nothing to read are left out, and counted with these words.
LEFT_OUT = {
    NEIGHBOUR: "pairs have no other tokens in sight beside it, and are left out",
    SINK: "pairs have no position in sight but the evidence, and are left out",
}


def neighbours(query: Query, beside: Sequence[int], allowed: Iterable[int]) -> tuple[int, ...]:
    """As many allowed positions as `beside` has, those nearest to it, neither target nor evidence; later ones first.

    Empty where there are not so many.
    """
    taken = {*query.target_positions, *query.evidence_positions}
    free = [p for p in allowed if p not in taken]
    nearest = sorted(free, key=lambda p: (min(abs(p - q) for q in beside), -p))
    return tuple(sorted(nearest[: len(beside)])) if len(nearest) >= len(beside) else ()


def beside_evidence(model: ProbedModel, pairs: ReversalPairs, plan: Plan) -> dict[str, PassResult | None]:
    """Scores and weights as at the evidence, read at its neighbour and at each head's sink, from one run of each query.

    The neighbour of evidence of several tokens is as many tokens, the nearest to it on both sides that are neither
    evidence nor target; offsets and groups of its pairs are its own. The sink of a query, layer and head is the
    position with the largest weight, averaged over readout rows, of those that every readout row sees and that are not
    evidence; it may be another in the other query. Virtual tokens of an adapter are none of the query's, nor what a
    canvas holds behind it; of a model of random tokens, scores and weights are means over its draws.
    Returns: for each of the two the pairs that have it, and what was read; None where none has.
    Raises: RevprobeError, as `run_pass`.
    """
    return in_equal_lengths_if_need_be(model, lambda: _read_beside(model, pairs, plan))


def _read_beside(model: ProbedModel, pairs: ReversalPairs, plan: Plan) -> dict[str, PassResult | None]:
    pairs = asked_pairs(model, pairs, plan.reader)
    queries = prepare_queries(model, pairs.queries)
    seen = [in_sight(model, query) for query in queries]
    moved = [neighbours(q, q.evidence_positions, sight) for q, sight in zip(queries, seen, strict=True)]
    others = [len({*sight} - {*q.evidence_positions}) > 0 for q, sight in zip(queries, seen, strict=True)]
    at = [_moved(q, q.target_positions, there or q.evidence_positions) for q, there in zip(queries, moved, strict=True)]
    asked = {NEIGHBOUR: _among(pairs, at, list(map(bool, moved))), SINK: _among(pairs, queries, others)}
    lone, attention = np.full(len(pairs), -1), attention_of(model)
    # What is read of a query is in sight; of a pair whose evidence is not there is no number to hold it against.
    unseen = out_of_sight(model, queries)
    found = {name: None if own is None else PassResult(own, lone, [], unseen=unseen) for name, own in asked.items()}
    size, done = queries_per_batch(model, queries, plan.batch_size), 0
    with untouched(model.module), torch.no_grad():
        for numbers in in_batches(model, range(len(queries)), size, lambda q: len(queries[q].token_ids)):
            batch = make_batch(model, [queries[q] for q in numbers], in_draws=True)
            everywhere = torch.arange(batch.input_ids.shape[1], device=batch.rows.device).expand_as(batch.input_ids)
            keys = batch.attention_rows, everywhere + batch.ahead[1]
            with tap_attention(model.module, *keys, attention, batch.size) as tap:
                readout(model, batch)
            places = _places(batch, [moved[q] for q in numbers], [seen[q] for q in numbers])
            for result in (result for result in found.values() if result is not None):
                result.without_attention |= dict(tap.attention.without) | tap.missing()
                result.left_out |= dict(tap.attention.left_out) | tap.left_out
            for layer, call in tap.layers(model.name).items():
                score, weight = _over_rows(call.score, batch), _over_rows(call.weight, batch)
                cells = {name: there[:, None].expand_as(weight) for name, there in places.items()}
                cells[SINK] = _most_attended(weight, cells[SINK] & score.isfinite())
                for name, kept in found.items():
                    if kept is not None:
                        _keep(kept, layer, numbers, len(queries), score, weight, cells[name])
            done += len(numbers)
            if callable(plan.progress):
                plan.progress(done, len(queries))
    return found


def neighbour_targets(model: ProbedModel, pairs: ReversalPairs) -> ReversalPairs | None:
    """The pairs whose reverse query asks for the tokens next to its target instead, the target itself shown.

    As many tokens as the target has, of those that the model may be asked for; pairs without so many are left out.
    Returns: the pairs, None without any.
    """
    queries = prepare_queries(model, pairs.queries)
    others = [_other_target(model, query) for query in queries]
    asked = [other or query for other, query in zip(others, queries, strict=True)]
    # Each query twice: as it is, and asking for the neighbour.
    both = replace(pairs, queries=(*queries, *asked), reverse=pairs.reverse + len(queries))
    found = _among(both, both.queries, [True] * len(queries) + [other is not None for other in others])
    return None if found is None else found.take(np.arange(len(found)))


def _other_target(model: ProbedModel, query: Query) -> Query | None:
    """The query asking for its target's neighbours; tokens that hide others, or have no row, are not asked for."""
    first = model.logit_shift if model.canvas_length is None else query.canvas_start
    shown = [p for p, token in enumerate(query.token_ids) if p >= first and token != model.mask_token_id]
    asked = [p for p in shown if not out_of_sight(model, [_moved(query, (p,), query.evidence_positions)])[0]]
    at = neighbours(query, query.target_positions, asked)
    return _moved(query, at, query.evidence_positions) if at else None


def _moved(query: Query, target: tuple[int, ...], evidence: tuple[int, ...]) -> Query:
    return Query.unchecked(query.token_ids, target, evidence, query.canvas_start)


def _among(pairs: ReversalPairs, queries: Sequence[Query], fit: Sequence[bool]) -> ReversalPairs | None:
    """The pairs with other queries at the old numbers, those of which both fit, saying which; None without any."""
    kept = np.array(fit)[pairs.forward] & np.array(fit)[pairs.reverse]
    if not kept.any():
        return None
    flags = {name: values[kept] for name, values in pairs.flags.items()} | {OF_PAIR: np.flatnonzero(kept)}
    columns = {"forward": pairs.forward[kept], "reverse": pairs.reverse[kept], "facts": pairs.facts[kept]}
    return replace(pairs, queries=tuple(queries), flags=flags, **columns)


def _places(batch: QueryBatch, moved: Sequence[tuple[int, ...]], seen: Sequence[range]) -> dict[str, Tensor]:
    """Where the neighbour stands, and where a sink may. Shapes: `-> batch seq` (bool)."""
    neighbour = torch.zeros_like(batch.input_ids[:: batch.draws], dtype=torch.bool)
    for row, at in enumerate(moved):
        neighbour[row, list(at)] = True
    ends = torch.tensor([len(sight) for sight in seen], device=batch.input_ids.device)
    free = torch.arange(batch.input_ids.shape[1], device=ends.device) < ends[:, None]
    evidence = torch.where(batch.is_evidence, batch.columns, batch.columns[:, :1])
    free.scatter_(1, evidence[:: batch.draws], False)
    return {NEIGHBOUR: neighbour, SINK: free}


def _most_attended(weight: Tensor, free: Tensor) -> Tensor:
    """The free position with the largest weight, where there is one. Shapes: `batch heads seq` each, bool."""
    largest = weight.masked_fill(~free, -torch.inf).argmax(-1, keepdim=True)
    return torch.zeros_like(free).scatter_(2, largest, True) & free


def _over_rows(values: Tensor, batch: QueryBatch) -> Tensor:
    """The mean over a query's readout rows and draws. Shapes: `(batch draw) heads rows seq -> batch heads seq`."""
    asked = batch.is_target[:, None, :, None]
    by_row = values.masked_fill(~asked, 0.0).sum(2) / asked.sum(2)
    return by_row if batch.draws == 1 else by_row.unflatten(0, (-1, batch.draws)).mean(1)


def _keep(
    result: PassResult, layer: int, numbers: Sequence[int], count: int, score: Tensor, weight: Tensor, cell: Tensor
) -> None:
    """Scores averaged and weights summed over a cell; NaN without weight where it is empty.

    Shapes: `batch heads seq` each.
    """
    mean = score.masked_fill(~cell, 0.0).sum(-1) / cell.sum(-1)
    total = weight.masked_fill(~cell, 0.0).sum(-1)
    for kept, values in ((result.score, mean), (result.weight, total)):
        table = kept.setdefault(layer, np.full((count, values.shape[1]), np.nan))
        table[list(numbers)] = values.double().cpu().numpy()
