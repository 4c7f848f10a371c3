"""Run queries with one edit after another: the loop behind `probe_route_edit`.

A unit is a query with the query whose route it is given (itself for edits that need none); a cell is the set of
layers and heads edited at once. Each unit runs once per cell and side (0: the evidence, 1: the control's positions),
a multi-token target once per token in chain mode; all of these are rows of ordinary batches.

Shapes below: query (distinct queries), unit, cell, side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...hooks.attention_edits import edit_scores
from ...hooks.attention_sites import Attention
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel
from ...progress import Progress
from ..pairs.query import Query
from .alone import in_equal_lengths_if_need_be
from .batches import QueryBatch, in_batches, make_batch
from .likelihood import price, readout
from .route_changes import RouteChange, StrengthRecorder, VisibilityRecorder, other_positions

EVIDENCE, CONTROL = 0, 1


@dataclass(frozen=True)
class RouteEdit:
    """What is done to a route: "knockout", "transplant" (matching "log_odds" or "score") or "scale" (by a factor)."""

    name: str
    match: str = "log_odds"
    factor: float = 1.0


@dataclass(frozen=True)
class Cell:
    """Layers and heads that are edited at once; layer or head None means all that were chosen."""

    scope: str
    layer: int | None
    head: int | None
    members: frozenset[tuple[int, int]]


class Job(NamedTuple):
    """One row of a batch."""

    unit: int
    step: int
    cell: int
    side: int


@dataclass
class RouteResult:
    """Log-probabilities in nats without and with the edit, and what became of the edit.

    Shapes: `before`: `query`; `after`, `emptied` (a row would have lost its last key), `asked`, `left` (rows x heads x
    layers to edit, and how many had no route to edit): `unit cell side`.
    """

    before: np.ndarray
    after: np.ndarray
    emptied: np.ndarray
    asked: np.ndarray
    left: np.ndarray


@dataclass
class RouteRuns:
    """The state of the loop.

    `steps` holds for each query the queries that price its target (one per token in chain mode), `units` a (query,
    donor) each. `seed` draws each query's control positions, None for no control.
    """

    model: ProbedModel
    attention: Attention
    edit: RouteEdit
    queries: Sequence[Query]
    steps: Sequence[Sequence[Query]]
    units: Sequence[tuple[int, int]]
    cells: Sequence[Cell]
    batch_size: int
    seed: int | None
    progress: Progress | bool | None = None
    strength: dict[tuple[int, int], dict[int, Tensor]] = field(default_factory=dict)  # (query, step) -> layer -> ...
    free: dict[int, np.ndarray] = field(default_factory=dict)  # query -> where its control may stand, `seq`
    elsewhere: list[tuple[int, ...]] = field(default_factory=list)  # query -> its control's positions, if any

    @cached_property
    def heads(self) -> dict[int, list[int]]:
        """All that is edited, layer -> heads."""
        heads: dict[int, list[int]] = {}
        for layer, head in sorted(frozenset[tuple[int, int]]().union(*(cell.members for cell in self.cells))):
            heads.setdefault(layer, []).append(head)
        return heads

    def run(self) -> RouteResult:
        """Every query as it is, then every unit, cell and side; the model comes out as it went in.

        Raises: RevprobeError, for NaN logits, and as `passes.alone` does where a query alone has other numbers.
        """
        return in_equal_lengths_if_need_be(self.model, self._run)

    def _run(self) -> RouteResult:
        self.strength, self.free = {}, {}  # those of a first run may be of queries that others reached
        shape = (len(self.units), len(self.cells), 2)
        zeros = [np.zeros(shape, dtype=kind) for kind in (np.float64, bool, np.int64, np.int64)]
        result = RouteResult(np.zeros(len(self.steps)), *zeros)
        plain = [(q, k) for q, steps in enumerate(self.steps) for k in range(len(steps))]
        sides = 1 if self.seed is None else 2
        edited = sides * len(self.cells) * sum(len(self.steps[q]) for q, _ in self.units)
        total, done = len(plain) + edited, 0
        with untouched(self.model.module), torch.no_grad():
            size, length = self.batch_size, lambda at: len(self.steps[at[0]][at[1]].token_ids)
            for part in in_batches(self.model, plain, size, length):
                self._run_plain(part, result)
                done = self._report(done + len(part), total)
            self._draw_controls()
            done = total - sum(1 for _ in self._jobs())  # a query without a control is that much sooner done
            for part_jobs in in_batches(self.model, self._jobs(), self.batch_size, self._length):
                self._run_edited(part_jobs, result)
                done = self._report(done + len(part_jobs), total)
        return result

    def _report(self, done: int, total: int) -> int:
        if callable(self.progress):
            self.progress(done, total)
        return done

    def _jobs(self) -> Iterator[Job]:
        for unit, (q, _) in enumerate(self.units):
            for step in range(len(self.steps[q])):
                for cell in range(len(self.cells)):
                    yield Job(unit, step, cell, EVIDENCE)
                    if self.elsewhere[q]:
                        yield Job(unit, step, cell, CONTROL)

    def _length(self, job: Job) -> int:
        return len(self.steps[self.units[job.unit][0]][job.step].token_ids)

    def _draw_controls(self) -> None:
        """Each query's control positions, the same in all its steps."""
        mask = self.model.mask_token_id
        self.elsewhere = [
            () if self.seed is None else other_positions(query, self.free[q], self.seed, mask)
            for q, query in enumerate(self.queries)
        ]

    def _run_plain(self, part: Sequence[tuple[int, int]], result: RouteResult) -> None:
        """The queries as they are: their log-probability, what their rows see, and the strength of their routes."""
        batch = make_batch(self.model, [self.steps[q][k] for q, k in part])
        evidence = _evidence(batch)
        strength = StrengthRecorder(evidence, self.edit.match) if self.edit.name == "transplant" else None
        seen = None if self.seed is None else VisibilityRecorder(evidence, batch.is_target, self.heads)

        def watch(layer: int, scores: Tensor) -> None:
            for recorder in (strength, seen):
                if recorder is not None:
                    recorder(layer, scores)

        layers = list(self.heads) if strength or seen else []
        with edit_scores(self.model.module, self.attention, batch.rows, watch, layers=layers):
            log_probabilities = readout(self.model, batch)
        for place, (q, k) in enumerate(part):
            if strength is not None:
                rows = int(batch.is_target[place].sum())
                self.strength[q, k] = {layer: found[place, :, :rows] for layer, found in strength.found.items()}
            if seen is not None and seen.free is not None:
                free = seen.free[place, : len(self.queries[q].token_ids)].numpy()
                self.free[q] = self.free.get(q, np.ones_like(free)) & free
        values = price(log_probabilities, batch.targets, batch.is_target)[0]
        np.add.at(result.before, [q for q, _ in part], values.cpu().numpy())

    def _run_edited(self, jobs: Sequence[Job], result: RouteResult) -> None:
        steps = [self.steps[self.units[job.unit][0]][job.step] for job in jobs]
        batch = make_batch(self.model, steps, changed=True)
        change = self._change(jobs, batch)
        with edit_scores(self.model.module, self.attention, batch.rows, change, layers=list(change.active)) as log:
            log_probabilities = readout(self.model, batch)
        values = price(log_probabilities, batch.targets, batch.is_target)[0]
        index = tuple(np.array([(job.unit, job.cell, job.side) for job in jobs]).T)
        np.add.at(result.after, index, values.cpu().numpy())
        asked = torch.stack([heads.sum(1) for heads in change.active.values()]).sum(0) * batch.is_target.sum(1).cpu()
        np.add.at(result.asked, index, asked.numpy())
        for flags in log.meaningless.values():
            np.add.at(result.left, index, flags.sum((1, 2)).cpu().numpy())
        for flags in log.emptied.values():
            np.logical_or.at(result.emptied, index, flags.flatten(1).any(1).cpu().numpy())

    def _change(self, jobs: Sequence[Job], batch: QueryBatch) -> RouteChange:
        """The edit of each sequence of a batch."""
        evidence = _evidence(batch)
        at = evidence.clone()
        for place, job in enumerate(jobs):
            if job.side == CONTROL:
                there = self.elsewhere[self.units[job.unit][0]]
                padded = [*there, *[there[0]] * (at.shape[1] - len(there))]
                at[place] = torch.tensor(padded, device=at.device)
        layers = {layer for cell in {job.cell for job in jobs} for layer, _ in self.cells[cell].members}
        heads = {layer: most for layer, most in self.attention.heads.items() if layer in layers}
        active = {layer: self._active(jobs, layer, most) for layer, most in heads.items()}
        wanted = {}
        if self.edit.name == "transplant":
            wanted = {layer: self._wanted(jobs, layer, batch.rows.shape[1]) for layer in heads}
        return RouteChange(
            self.edit.name,
            evidence,
            at,
            batch.is_target,
            active,
            factor=self.edit.factor,
            match=self.edit.match,
            wanted=wanted,
        )

    def _active(self, jobs: Sequence[Job], layer: int, heads: int) -> Tensor:
        """Which heads of a layer each sequence edits. Shapes: `-> batch heads`."""
        members = [self.cells[job.cell].members for job in jobs]
        return torch.tensor([[(layer, head) in inside for head in range(heads)] for inside in members])

    def _wanted(self, jobs: Sequence[Job], layer: int, width: int) -> Tensor:
        """The strength each sequence's donor has in a layer, row for row; padded rows get 0.

        Where the two targets differ in length no row of the one belongs to a row of the other; all get the mean.
        Shapes: `-> batch heads width`.
        """
        wanted = torch.zeros(len(jobs), self.attention.heads[layer], width, dtype=torch.float64)
        for place, job in enumerate(jobs):
            q, donor = self.units[job.unit]
            own, theirs = (sum(len(step.target_positions) for step in self.steps[one]) for one in (q, donor))
            if own == theirs:
                rows = self.strength[donor, job.step][layer]
            else:
                everything = [self.strength[donor, k][layer] for k in range(len(self.steps[donor]))]
                rows = torch.cat(everything, dim=1).mean(1, keepdim=True)
                rows = rows.expand(-1, len(self.steps[q][job.step].target_positions))
            wanted[place, :, : rows.shape[1]] = rows
        return wanted


def _evidence(batch: QueryBatch) -> Tensor:
    """The evidence's positions, padded by repeating the first. Shapes: `-> batch columns`."""
    return torch.where(batch.is_evidence, batch.columns, batch.columns[:, :1])
