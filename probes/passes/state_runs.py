"""Run corrupted queries with one state after another put back: the loop behind `probe_causal_trace`.

A trial is one query that is priced three ways: clean, with its evidence replaced by another fact's (corrupted), and by
a third fact's. A place is a layer, a head of it or all it has, and a part of the query. In each run one trial's
corrupted query gets one donor's state (the clean query's, or for the control the third's) at one place; all of these
runs are rows of ordinary batches, each changed in its own row alone.

Shapes below: trial, place, donor (CLEAN, THIRD).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...hooks.states import StateSite, change_states, record_states
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel
from ...progress import Progress
from ..pairs.query import Query
from .alone import in_equal_lengths_if_need_be
from .batches import in_batches, make_batch
from .likelihood import price, readout

CLEAN, THIRD = 0, 1
PARTS = ("target", "evidence", "template", "all")


class Trial(NamedTuple):
    """One query as it is, with another fact's evidence, and with a third fact's (None: without a control)."""

    clean: Query
    corrupted: Query
    third: Query | None


class Place(NamedTuple):
    """Where a state is put back; head None: the whole state of the layer."""

    layer: int
    head: int | None
    part: str


class _Job(NamedTuple):
    """One row of a batch; `member` counts the trials of a group."""

    member: int
    place: int
    donor: int


def part_positions(query: Query, part: str, logit_shift: int) -> tuple[int, ...]:
    """The positions of a part of a query, ascending; none where it has no such token.

    "target" is the rows that the target is read from, "evidence" the evidence, "template" what is neither, "all"
    everything. With shift 1 the row before a target may hold evidence: it then belongs to both.
    """
    rows = {position - logit_shift for position in query.target_positions}
    evidence, everything = set(query.evidence_positions), set(range(len(query.token_ids)))
    named = {"target": rows, "evidence": evidence, "template": everything - rows - evidence, "all": everything}
    return tuple(sorted(named[part]))


@dataclass
class StateResult:
    """Log-probabilities of the target in nats, NaN where nothing was run; and how many sequences were run.

    Shapes: `clean`, `corrupted`: `trial`; `patched`: `trial place donor`.
    """

    clean: np.ndarray
    corrupted: np.ndarray
    patched: np.ndarray
    forwards: int = 0


@dataclass
class StateRuns:
    """The state of the loop. `sites`: layer -> its site, of every layer that a place names."""

    model: ProbedModel
    sites: Mapping[int, StateSite]
    trials: Sequence[Trial]
    places: Sequence[Place]
    batch_size: int
    progress: Progress | bool | None = None

    def run(self) -> StateResult:
        """Every trial's three queries as they are, then every place and donor; the model comes out as it went in.

        Raises: RevprobeError, for NaN logits, and as `passes.alone` does where a query alone has other numbers.
        """
        return in_equal_lengths_if_need_be(self.model, self._run)

    def _run(self) -> StateResult:
        count = len(self.trials)
        patched = np.full((count, len(self.places), 2), np.nan)
        result = StateResult(np.full(count, np.nan), np.full(count, np.nan), patched)
        total = sum(2 + (trial.third is not None) + self._runs_of(trial) for trial in self.trials)
        with untouched(self.model.module), torch.no_grad():
            length = lambda at: len(self.trials[at].clean.token_ids)  # noqa: E731
            for group in in_batches(self.model, range(count), self.batch_size, length):
                for ran in _Group(self, group).fill(result):
                    result.forwards += ran
                    if callable(self.progress):
                        self.progress(result.forwards, total)
        return result

    def _runs_of(self, trial: Trial) -> int:
        there = [part for part in PARTS if part_positions(trial.clean, part, self.model.logit_shift)]
        return sum(place.part in there for place in self.places) * (1 if trial.third is None else 2)


class _Group:
    """Some trials whose donors' states are held at once. `at`: member -> part -> its positions."""

    def __init__(self, runs: StateRuns, numbers: Sequence[int]) -> None:
        self.model, self.sites, self.places, self.batch_size = runs.model, runs.sites, runs.places, runs.batch_size
        self.numbers, self.trials = numbers, [runs.trials[number] for number in numbers]
        shift = self.model.logit_shift
        self.at = [{part: part_positions(trial.clean, part, shift) for part in PARTS} for trial in self.trials]
        self.states: dict[int, dict[StateSite, Tensor]] = {}  # donor -> site -> `row seq ...`
        self.row_of: dict[int, dict[int, int]] = {}  # donor -> member -> its row there

    def fill(self, result: StateResult) -> Iterator[int]:
        """The queries once as they are, and then the places; yields how many sequences each batch had."""
        everyone = range(len(self.trials))
        result.clean[self.numbers] = self._plain([trial.clean for trial in self.trials], CLEAN, everyone)
        yield len(everyone)
        result.corrupted[self.numbers] = self._plain([trial.corrupted for trial in self.trials])
        yield len(everyone)
        thirds = {member: trial.third for member, trial in enumerate(self.trials) if trial.third is not None}
        if thirds:
            self._plain(list(thirds.values()), THIRD, list(thirds))
            yield len(thirds)
        jobs = self._jobs()
        while some := list(islice(jobs, self.batch_size)):
            index = tuple(np.array([(self.numbers[job.member], job.place, job.donor) for job in some]).T)
            result.patched[index] = self._patched(some)
            yield len(some)

    def _jobs(self) -> Iterator[_Job]:
        for member in range(len(self.trials)):
            for number, place in enumerate(self.places):
                if self.at[member][place.part]:
                    yield from (_Job(member, number, donor) for donor in self.row_of if member in self.row_of[donor])

    def _plain(self, queries: Sequence[Query], donor: int | None = None, members: Sequence[int] = ()) -> np.ndarray:
        """Log-probabilities of the targets without a change; the states are kept where they are a donor's."""
        batch = make_batch(self.model, queries)
        with record_states(self.model.module, [] if donor is None else list(self.sites.values())) as found:
            log_probabilities = readout(self.model, batch)
        if donor is not None:
            self.states[donor], self.row_of[donor] = found, {member: row for row, member in enumerate(members)}
        return price(log_probabilities, batch.targets, batch.is_target)[0].cpu().numpy()

    def _patched(self, jobs: Sequence[_Job]) -> np.ndarray:
        """Log-probabilities of the targets of corrupted queries, each with the state of its own job put in."""
        batch = make_batch(self.model, [self.trials[job.member].corrupted for job in jobs], changed=True)
        rows: dict[int, list[tuple[int, _Job]]] = {}
        for row, job in enumerate(jobs):
            rows.setdefault(self.places[job.place].layer, []).append((row, job))
        with change_states(self.model.module, {self.sites[layer]: self._change(layer, rows[layer]) for layer in rows}):
            log_probabilities = readout(self.model, batch)
        return price(log_probabilities, batch.targets, batch.is_target)[0].cpu().numpy()

    def _change(self, layer: int, rows: Sequence[tuple[int, _Job]]) -> Callable[[Tensor], Tensor]:
        """What puts the donors' states in at one layer. Shapes: `batch seq width` or `batch seq heads dim`."""
        site = self.sites[layer]
        puts: list[tuple[tuple[Tensor, ...], Tensor]] = []
        for donor, row_of in self.row_of.items():
            into = [
                (row, row_of[job.member], position, self.places[job.place].head or 0)
                for row, job in rows
                if job.donor == donor
                for position in self.at[job.member][self.places[job.place].part]
            ]
            if into:
                to, taken, *where = torch.tensor(into).unbind(1)
                where = where if site.kind == "head" else where[:1]
                puts.append(((to, *where), self.states[donor][site][(taken, *where)]))

        def change(state: Tensor) -> Tensor:
            changed = state.clone()
            for index, value in puts:
                changed[index] = value.to(changed)
            return changed

        return change
