"""The true answer as a decoder would write it: which of its tokens each denoising step reveals.

Nothing is drawn and nothing wrong is written: each step runs the model on what is revealed so far, takes the positions
that the decoder's own schedule and confidence choose, and puts the true tokens there. The product of the steps'
probabilities is that of the whole answer being written in this order by a decoder that samples at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...hooks.untouched import untouched
from ...models.probed import ProbedModel
from ..pairs.query import Query
from ..passes.alone import in_equal_lengths_if_need_be
from ..passes.batches import in_batches, make_batch
from ..passes.likelihood import readout
from .masked import ALGORITHMS, Unmasking, schedule_of


def forced_steps(
    model: ProbedModel, queries: Sequence[Query], how: Unmasking, batch_size: int
) -> tuple[list[list[Query]], int]:
    """For each query one query per step, whose targets are what that step reveals; and how many sequences were run.

    Raises: RevprobeError, for fewer steps than blocks, and as `passes.alone` where a query alone has other numbers.
    """
    schedules = [schedule_of(model, how, query.target_positions) for query in queries]
    steps = in_equal_lengths_if_need_be(model, lambda: _forced(model, queries, how, schedules, batch_size))
    return steps, sum(len(schedule) for schedule in schedules)


def _forced(
    model: ProbedModel,
    queries: Sequence[Query],
    how: Unmasking,
    schedules: Sequence[Sequence[tuple[int, int, int]]],
    batch_size: int,
) -> list[list[Query]]:
    """The queries of every step, in the order that the model itself takes."""
    steps: list[list[Query]] = [[] for _ in queries]
    hidden = [list(query.target_positions) for query in queries]
    with untouched(model.module), torch.no_grad():
        for step in range(max(len(schedule) for schedule in schedules)):
            now = [q for q, schedule in enumerate(schedules) if step < len(schedule)]
            for some in in_batches(model, now, batch_size, lambda q: len(queries[q].token_ids)):
                canvases = [_asked_at(queries[q], hidden[q]) for q in some]
                allowed = [queries[q].target_positions[slice(*schedules[q][step][:2])] for q in some]
                counts = [schedules[q][step][2] for q in some]
                for q, revealed in zip(some, _surest(model, canvases, allowed, counts, how), strict=True):
                    hidden[q] = [position for position in hidden[q] if position not in revealed]
                    steps[q].append(_as_shown(model, queries[q], revealed, hidden[q]))
    return steps


def _surest(
    model: ProbedModel,
    canvases: Sequence[Query],
    allowed: Sequence[Sequence[int]],
    counts: Sequence[int],
    how: Unmasking,
) -> Iterator[list[int]]:
    """The positions that one step reveals in each canvas: the `counts` surest of the hidden ones that are allowed."""
    batch = make_batch(model, canvases)
    log_probabilities = model.without_mask(readout(model, batch)).log_softmax(-1)
    for found, canvas, inside, count in zip(log_probabilities, canvases, allowed, counts, strict=True):
        places = [at for at, position in enumerate(canvas.target_positions) if position in inside]
        sure = ALGORITHMS[how.algorithm](found[places], found[places].argmax(-1))
        best = sure.argsort(descending=True, stable=True)[:count].tolist()
        yield sorted(canvas.target_positions[places[at]] for at in best)


def _asked_at(query: Query, positions: Sequence[int]) -> Query:
    """The query with these of its target's positions as the whole target."""
    return Query.unchecked(query.token_ids, positions, query.evidence_positions)


def _as_shown(model: ProbedModel, query: Query, revealed: Sequence[int], hidden: Sequence[int]) -> Query:
    """What a step runs on: its own tokens are its targets, those that are still hidden after it are masks."""
    assert model.mask_token_id is not None, "a masked model names its mask token when wrapped"
    shown = [model.mask_token_id if at in hidden else token for at, token in enumerate(query.token_ids)]
    return Query.unchecked(shown, revealed, query.evidence_positions)
