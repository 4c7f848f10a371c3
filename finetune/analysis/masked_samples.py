"""Masked sequences to take an objective apart with: all there are, or as many as are drawn, with their weights.

Sequences that hide as many units, and of target and evidence as much, run together. Few strata (letters) each get the
same number of draws. Where there are more strata than draws (text, whose rows differ in shape) each is drawn as often
as its weight asks, a Poisson number of times, so that strata stay independent of each other.

Shapes below: row, seq.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import RevprobeError
from .mask_sets import MaskLaw, Stratum, strata
from .term_rows import RowTable

ENUMERATED = 5  # rows of so many units have all their sets enumerated
REPLICATES = 8
_TOKENS = 8192  # of one batch


@dataclass(frozen=True)
class Objective:
    """What a run minimises: the law of its masks, its divisor ("token" or "sequence"), and what its dial leaves out.

    `dropped_weight` is what a dropped term's cross-entropy is multiplied by.
    """

    law: MaskLaw = field(default_factory=MaskLaw)
    per: str = "token"
    dial: str = "keep"
    dropped_weight: float = 0.0


class State(NamedTuple):
    """What is seen of target and evidence ("visible", "hidden", "partly"), and how many units are hidden."""

    target: str
    evidence: str
    masks: int


class Masked(NamedTuple):
    """Clean rows, the part of each token, what is hidden, and each row's weight. Shapes: `row seq` thrice, `row`."""

    token_ids: Tensor
    part: Tensor
    hidden: Tensor
    weight: Tensor

    def split(self) -> Iterator[Masked]:
        """As many rows at a time as one run takes."""
        size = max(1, _TOKENS // self.token_ids.shape[1])
        for first in range(0, len(self.token_ids), size):
            yield Masked(*(part[first : first + size] for part in self))


@dataclass
class Sample:
    """Sequences of one state and length, by replicate: each replicate's weighted sum is an estimate of its own."""

    state: State
    parts: dict[int, list[Masked]]
    enumerated: bool

    @property
    def replicates(self) -> int:
        return 1 if self.enumerated else REPLICATES

    @property
    def sequences(self) -> int:
        return sum(len(part.token_ids) for parts in self.parts.values() for part in parts)

    def batches(self) -> Iterator[tuple[int, Masked]]:
        """Some rows at a time, with the number of their replicate."""
        for replicate, parts in self.parts.items():
            for some in Masked(*(torch.cat(column) for column in zip(*parts, strict=True))).split():
                yield replicate, some


class _Weighed(NamedTuple):
    """A stratum of a table of rows, with the weight of one of its sets in the objective."""

    table: RowTable
    stratum: Stratum
    weight: float

    @property
    def whole(self) -> int:
        """How many masked sequences it holds."""
        return len(self.table) * self.stratum.sets

    @property
    def state(self) -> State:
        stratum = self.stratum
        target = _visibility(stratum.in_target, stratum.shape.of_target)
        return State(target, _visibility(stratum.in_evidence, stratum.shape.of_evidence), stratum.hidden)

    def masked(self, rows: np.ndarray, sets: np.ndarray, weight: float) -> Masked:
        table = self.table
        weights = torch.full((len(rows),), weight, dtype=torch.float64)
        return Masked(table.token_ids[rows], table.part[rows], table.hidden(rows, sets), weights)

    def all(self) -> Masked:
        sets = self.stratum.listed()
        rows = np.repeat(np.arange(len(self.table)), len(sets))
        return self.masked(rows, np.tile(sets, (len(self.table), 1)), self.weight)

    def drawn(self, count: int, expected: float, generator: np.random.Generator) -> Masked:
        """`count` sequences, where `expected` are drawn on average."""
        rows = generator.integers(len(self.table), size=count)
        return self.masked(rows, self.stratum.drawn(count, generator), float(self.weight * self.whole / expected))


def samples(tables: Sequence[RowTable], objective: Objective, draws: int, seed: int) -> Iterator[Sample]:
    """The objective's masked sequences, all of them or about as many as are drawn; equal seeds draw the same.

    Raises: RevprobeError, when no row has as many tokens as are to be hidden.
    """
    generator, rows = np.random.default_rng(seed), sum(map(len, tables))
    listed = [
        _Weighed(table, stratum, weight / rows / (table.counted if objective.per == "token" else 1))
        for table in tables
        for stratum, weight in strata(table.shape, objective.law)
    ]
    if not listed:
        raise RevprobeError(f"masks {objective.law.masks!r}: no row has so many tokens to hide; expected fewer")
    share = round(draws / len(listed) / REPLICATES)
    drawn = []
    for one in listed:
        if one.table.shape.units <= ENUMERATED or one.whole <= REPLICATES * share:
            yield Sample(one.state, {0: [one.all()]}, True)
        elif share:
            parts = {replicate: [one.drawn(share, share, generator)] for replicate in range(REPLICATES)}
            yield Sample(one.state, parts, False)
        else:
            drawn.append(one)
    yield from _by_weight(drawn, max(1, draws // REPLICATES), generator)


def _by_weight(listed: Sequence[_Weighed], count: int, generator: np.random.Generator) -> Iterator[Sample]:
    """About `count` sequences a replicate, each stratum as often as its share of the terms' weight."""
    mass = np.array([float(one.weight * one.whole * one.stratum.hidden) for one in listed])
    expected = count * mass / max(mass.sum(), np.finfo(float).tiny)
    groups: dict[tuple[State, int], dict[int, list[Masked]]] = defaultdict(lambda: defaultdict(list))
    for replicate in range(REPLICATES):
        for place in np.flatnonzero(times := generator.poisson(expected)).tolist():
            one = listed[place]
            found = one.drawn(int(times[place]), float(expected[place]), generator)
            groups[one.state, one.table.token_ids.shape[1]][replicate].append(found)
    for (state, _), parts in groups.items():
        yield Sample(state, parts, False)


def _visibility(hidden: int, of: int) -> str:
    return "visible" if not hidden else "hidden" if hidden == of else "partly"
