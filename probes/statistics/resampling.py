"""What is drawn at random: facts, and their derangements and permutations, the null of everything that pairs facts.

A hidden target leaves nothing of itself in its query: "c1 | k3" and "c2 | k3" are shown to a masked model as one input,
and its scores there are the same to the bit. So facts that a model is shown as one prompt are drawn as one (`Facts`).

Every routine works on whole arrays; the slow, obvious versions stand in the tests.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SHUFFLES, DRAWS, _CHUNK = 200, 2000, 1000
# The column of a frame, and the flag of pairs, that names what is drawn; there only where some facts share a prompt.
SHOWN = "shown"
# Pairs up to which the shuffles are held, in 800 bytes a pair, for the next checkpoint's reading.
_KEPT = 20_000


@dataclass(frozen=True, eq=False)
class Facts:
    """The fact of each row by its label, and what is drawn at random: the facts that a model is shown as one prompt.

    Shapes: `label`, `unit`: `row`; rows of one fact are of one unit.
    """

    label: np.ndarray
    unit: np.ndarray

    @classmethod
    def of(cls, facts: np.ndarray | Facts, units: np.ndarray | None = None) -> Facts:
        """Of labels, each fact is drawn by itself, unless `units` says which are one (row by row; empty is itself)."""
        if isinstance(facts, Facts):
            return facts
        if units is None:
            return cls(facts, facts)
        label, own = facts.astype(str), np.asarray(units, dtype=object)
        unit = np.where(pd.isna(own), label, own).astype(str)
        fact = np.unique(label, return_inverse=True)[1]
        together = np.unique(unit, return_inverse=True)[1] * (fact.max(initial=0) + 1) + fact
        # Rows of two readings may give a fact two units, which then are one.
        several = len(np.unique(together)) > len(np.unique(fact))
        return cls(label, kin(label, unit.tolist()) if several else unit)

    @classmethod
    def of_rows(cls, rows: pd.DataFrame) -> Facts:
        """Of a frame's rows. Frames without the column `shown` have facts that are each drawn by itself."""
        return cls.of(rows["fact"].to_numpy().astype(str), rows[SHOWN].to_numpy() if SHOWN in rows else None)

    @classmethod
    def of_pairs(cls, frame: pd.DataFrame) -> Facts:
        """Of a frame's pairs, one row each, in ascending order."""
        return cls.of_rows(frame.drop_duplicates("pair").sort_values("pair"))

    def __getitem__(self, rows: np.ndarray) -> Facts:
        label = self.label[rows]
        return Facts(label, label if self.unit is self.label else self.unit[rows])

    def __len__(self) -> int:
        return len(self.label)

    @property
    def sizes(self) -> dict[str, int]:
        """How many facts, and as how many prompts they are shown: 0 where each has its own."""
        facts, prompts = len(np.unique(self.label)), len(np.unique(self.unit))
        return {"facts": facts, "prompts": prompts if prompts < facts else 0}


def drawn_alike(own: Facts, other: Facts) -> tuple[Facts, Facts]:
    """The rows of two models with one way of drawing their facts: those that either was shown as one are one."""
    if own.unit is own.label and other.unit is other.label:
        return own, other
    labels, count = np.concatenate([own.label, other.label]), len(own)
    # A unit of one model says nothing of the other's rows, which stand apart there.
    apart = [("row", place) for place in range(len(labels))]
    traits = [[*own.unit.tolist(), *apart[count:]], [*apart[:count], *other.unit.tolist()]]
    drawn = kin(labels, *traits)
    return Facts(own.label, drawn[:count]), Facts(other.label, drawn[count:])


def derangement(facts: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """For each pair, a pair of another fact in the same group; -1 where its group has one fact only.

    Facts are put in one random cyclic order; in each group a pair's partner is the next fact of that order that
    the group holds. One order for all groups keeps the dependence between groups in the null.
    Shapes: `pair, pair -> pair` (indices).
    """
    fact = np.unique(facts, return_inverse=True)[1]
    rank = np.random.default_rng(seed).permutation(fact.max() + 1)[fact]
    order = np.lexsort((rank, groups))  # by group, then along the cycle, then as given
    starts = np.flatnonzero(np.r_[True, (np.diff(groups[order]) != 0) | (np.diff(rank[order]) != 0)])
    sizes = np.diff(np.r_[starts, len(order)])
    run_group = groups[order][starts]
    first_run = np.searchsorted(run_group, run_group, side="left")
    last_run = np.searchsorted(run_group, run_group, side="right") - 1
    following = np.where(np.arange(len(starts)) == last_run, first_run, np.arange(len(starts)) + 1)
    run = np.repeat(np.arange(len(starts)), sizes)
    within = np.arange(len(order)) - starts[run]
    target = following[run]
    partner = np.full(len(order), -1)
    chosen = order[starts[target] + within % sizes[target]]
    partner[order] = np.where(target == run, -1, chosen)
    return partner


def kin(facts: np.ndarray, *traits: Sequence[Hashable]) -> np.ndarray:
    """Facts that share one of the traits (a target), directly or through others, under one label: the first of theirs.

    Another fact with the same target is no null of a pair, since what is right there is right here.
    Shapes: `pair, pair... -> pair`.
    """
    names, fact = np.unique(facts.astype(str), return_inverse=True)
    found = np.arange(len(names))
    for trait in traits:
        codes: dict[Hashable, int] = {}
        code = np.array([codes.setdefault(one, len(codes)) for one in trait])
        both = coo_array((np.ones(len(code)), (found[fact], len(names) + code)), shape=(len(names) + len(codes),) * 2)
        joined = connected_components(both, directed=False)[1]
        first, of = np.unique(joined[found], return_index=True, return_inverse=True)[1:]
        found = first[of]
    return names[found[fact]]


def with_shown(frame: pd.DataFrame, *traits: Sequence[Hashable]) -> pd.DataFrame:
    """The frame with the column `shown`, where facts of its rows share one of the traits (a prompt). Shapes: `row`."""
    labels = frame["fact"].to_numpy().astype(str)
    units = kin(labels, *traits)
    return frame if np.array_equal(units, labels) else frame.assign(**{SHOWN: units})


def shuffles(facts: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Permutations of facts within groups, at least SHUFFLES; kept for the next checkpoint's reading of the same pairs.

    A derangement never keeps the true pairing, so a correlation r over n facts averages -r / (n - 1) there. These
    are uniform permutations: a random order of the facts, turned by every number of places, so that over each round of
    turns every fact meets every other equally often (itself included) and the correlation averages exactly 0. One order
    serves all groups, which keeps the dependence between groups in the null.
    Shapes: `pair, pair -> shuffle pair`; a pair's own index where its group has one fact only.
    """
    fact, group = (np.unique(values, return_inverse=True)[1].reshape(-1) for values in (facts, groups))
    return _shuffles(fact.astype(np.int32).tobytes(), group.astype(np.int32).tobytes(), seed)


def each_shuffle(facts: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> Iterator[np.ndarray]:
    """The rows of `shuffles` one after the other; of many pairs they are drawn one by one, and none is kept."""
    if len(facts) <= _KEPT:
        yield from shuffles(facts, groups, seed=seed)
        return
    fact, group = (np.unique(values, return_inverse=True)[1].reshape(-1) for values in (facts, groups))
    yield from _drawn(fact, group, seed)


@lru_cache(maxsize=4)
def _shuffles(facts: bytes, groups: bytes, seed: int) -> np.ndarray:
    fact, group = (np.frombuffer(codes, dtype=np.int32) for codes in (facts, groups))
    return np.stack(list(_drawn(fact, group, seed)))


def _drawn(fact: np.ndarray, group: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    count = int(fact.max()) + 1
    order = np.lexsort((fact, group))  # by group, then by fact, then as given
    starts = np.flatnonzero(np.r_[True, (np.diff(group[order]) != 0) | (np.diff(fact[order]) != 0)])
    runs = _Runs.of(group[order][starts], np.diff(np.r_[starts, len(order)]), starts)
    generator = np.random.default_rng(seed)
    for _ in range(-(-SHUFFLES // min(count, SHUFFLES))):
        rank = generator.permutation(count)[fact[order][starts]]
        for turn in range(min(count, SHUFFLES)):
            partner = np.empty(len(order), dtype=np.int32)
            partner[order] = order[runs.turned(rank, turn)]
            yield partner


@dataclass(frozen=True)
class _Runs:
    """The pairs of one fact in one group, which stand together: each run's group, length and start."""

    group: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    first: np.ndarray  # of the run's group
    facts: np.ndarray  # of the run's group

    @classmethod
    def of(cls, group: np.ndarray, sizes: np.ndarray, starts: np.ndarray) -> _Runs:
        first = np.searchsorted(group, group, side="left")
        return cls(group, sizes, starts, first, np.searchsorted(group, group, side="right") - first)

    def turned(self, rank: np.ndarray, turn: int) -> np.ndarray:
        """For each pair, one of the fact that stands `turn` places after its own place in the order of `rank`."""
        shuffled = np.lexsort((rank, self.group))
        place = np.arange(len(self.group)) - self.first
        target = shuffled[self.first + (place + turn) % self.facts]
        run = np.repeat(np.arange(len(self.group)), self.sizes)
        within = np.arange(len(run)) - self.starts[run]
        return np.asarray(self.starts[target[run]] + within % self.sizes[target[run]])


def draws_of(facts: int, seed: int) -> Iterator[np.ndarray]:
    """How often each fact is drawn with replacement, some of DRAWS draws at a time. Shapes: `-> draw fact`."""
    generator, even = np.random.default_rng(seed), np.full(facts, 1 / facts)
    for _ in range(DRAWS // _CHUNK):
        yield generator.multinomial(facts, even, size=_CHUNK).astype(np.float64)
