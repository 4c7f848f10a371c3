"""What is drawn at random: facts, and their derangements and permutations, the null of everything that pairs facts.

A hidden target leaves nothing of itself in its query: "c1 | k3" and "c2 | k3" are shown to a masked model as one input,
and its scores there are the same to the bit. So facts that share prompts are drawn as one (`Facts`).

Every routine works on whole arrays; the slow, obvious versions stand in the tests.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SHUFFLES, DRAWS, _CHUNK = 200, 2000, 1000
# The column of a frame, and the flag of pairs, that names what is drawn; there only where some facts share a prompt.
# A number of both directions draws facts that share a prompt in either, a number of one direction those of its own.
SHOWN = "shown"
SHOWN_IN = {"forward": "shown_forward", "reverse": "shown_reverse"}
SHOWN_COLUMNS = (SHOWN, *SHOWN_IN.values())
# Pairs up to which the shuffles are held, in 800 bytes a pair, for the next checkpoint's reading.
_KEPT = 20_000


@dataclass(frozen=True, eq=False)
class Facts:
    """The fact of each row by its label, and what is drawn at random: facts that share prompts, directly or by others.

    Shapes: `label`, `unit`, each of `sides` (what is drawn in the forward and in the reverse direction alone, of a
    number of both): `row`; rows of one fact are of one unit.
    """

    label: np.ndarray
    unit: np.ndarray
    sides: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(
        cls,
        facts: np.ndarray | Facts,
        units: np.ndarray | None = None,
        sides: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Facts:
        """Of labels, each fact is drawn by itself, unless `units` says which are one (row by row; empty is itself)."""
        if isinstance(facts, Facts):
            return facts
        if units is None:
            return cls(facts, facts)
        label = facts.astype(str)
        unit = _drawn(label, units, label)
        if sides is None:
            return cls(label, unit)
        # Rows that do not say by which direction they are joined may be so by either.
        forward, reverse = (_drawn(label, side, unit) for side in sides)
        return cls(label, unit, (forward, reverse))

    @classmethod
    def of_rows(cls, rows: pd.DataFrame, direction: str | None = None) -> Facts:
        """Of a frame's rows. Frames without the column `shown` have facts that are each drawn by itself.

        Args:
            direction: of the number, "forward" or "reverse". Where None, rows that say theirs are drawn by it, and
                others are of both.
        """
        label = rows["fact"].to_numpy().astype(str)
        if not all(name in rows for name in SHOWN_COLUMNS):
            return cls.of(label, rows[SHOWN].to_numpy() if SHOWN in rows else None)
        either = rows[SHOWN].to_numpy(dtype=object)
        named = [rows[name].to_numpy(dtype=object) for name in SHOWN_IN.values()]
        forward, reverse = (np.where(pd.isna(side), either, side) for side in named)  # frames without may be joined
        if direction is None and "direction" in rows:
            own = [rows["direction"].eq(side).to_numpy() for side in SHOWN_IN]
            return cls.of(label, np.select(own, [forward, reverse], either))
        if direction is not None:
            return cls.of(label, forward if direction == "forward" else reverse)
        return cls.of(label, either, (forward, reverse))

    @classmethod
    def of_pairs(cls, frame: pd.DataFrame, direction: str | None = None) -> Facts:
        """Of a frame's pairs, one each, in ascending order; of both directions where it has rows of both."""
        rows = frame.drop_duplicates("pair").sort_values("pair")
        if direction is None and "direction" in frame and frame["direction"].nunique() > 1:
            rows = rows.drop(columns="direction")
        return cls.of_rows(rows, direction)

    def __getitem__(self, rows: np.ndarray) -> Facts:
        label, sides = self.label[rows], self.sides
        unit = label if self.unit is self.label else self.unit[rows]
        return Facts(label, unit, None if sides is None else (sides[0][rows], sides[1][rows]))

    def __len__(self) -> int:
        return len(self.label)

    @property
    def ways(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The sets by the one direction, by the other, and by both at once, where facts hang together in chains.

        None where the sets of either direction are those of one of them: facts that share no prompt with one another
        are then never drawn together. The first way is that of fewer sets. Shapes: `-> row` each, numbers.
        """
        if self.sides is None or not len(self.label):
            return None
        codes = [np.unique(side, return_inverse=True)[1].reshape(-1) for side in self.sides]
        one, other = sorted(codes, key=lambda code: int(code.max()))
        if len(np.unique(self.unit)) > one.max():
            return None
        return one, other, np.unique(one * (other.max() + 1) + other, return_inverse=True)[1].reshape(-1)

    @property
    def counted(self) -> tuple[np.ndarray, ...]:
        """The ways to count these facts, as an interval's degrees of freedom are: those of the fewest are what counts.

        Shapes: `-> row` each.
        """
        ways = self.ways
        return (self.unit,) if ways is None else ways[:2]

    @property
    def sizes(self) -> dict[str, int]:
        """How many facts, and as how many they are drawn by the prompts they share: 0 where each has its own."""
        facts, ways = len(np.unique(self.label)), self.ways
        prompts = len(np.unique(self.unit if ways is None else ways[0]))
        return {"facts": facts, "prompts": prompts if prompts < facts else 0}


def _drawn(label: np.ndarray, units: np.ndarray, unsaid: np.ndarray) -> np.ndarray:
    """What is drawn of each row; that of `unsaid` where it has no unit. Rows of one fact are of one. Shapes: `row`."""
    own = np.asarray(units, dtype=object)
    unit = np.where(pd.isna(own), unsaid, own).astype(str)
    fact = np.unique(label, return_inverse=True)[1]
    together = np.unique(unit, return_inverse=True)[1] * (fact.max(initial=0) + 1) + fact
    # Rows of two readings may give a fact two units, which then are one.
    several = len(np.unique(together)) > len(np.unique(fact))
    return kin(label, unit.tolist()) if several else unit


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


def derangement(facts: np.ndarray, groups: np.ndarray, *, seed: int = 0, rights: Sequence[Rights] = ()) -> np.ndarray:
    """For each pair, a pair of another fact in the same group; -1 where its group has no other that it may meet.

    Facts are put in one random cyclic order; in each group a pair's partner is the next fact of that order that
    the group holds. One order for all groups keeps the dependence between groups in the null.
    Args:
        rights: a partner is the next at which, by none of these, the pair's answers are right, nor its own at the pair.
    Shapes: `pair, pair -> pair` (indices).
    """
    fact = np.unique(facts, return_inverse=True)[1]
    rank = np.random.default_rng(seed).permutation(fact.max() + 1)[fact]
    order = np.lexsort((rank, groups))  # by group, then along the cycle, then as given
    starts = np.flatnonzero(np.r_[True, (np.diff(groups[order]) != 0) | (np.diff(rank[order]) != 0)])
    sizes = np.diff(np.r_[starts, len(order)])
    run_group = groups[order][starts]
    first_run = np.searchsorted(run_group, run_group, side="left")
    count = np.searchsorted(run_group, run_group, side="right") - first_run
    run = np.repeat(np.arange(len(starts)), sizes)
    within = np.arange(len(order)) - starts[run]
    partner, left, turn = np.full(len(order), -1), np.arange(len(order)), 0
    while len(left := left[turn + 1 < count[run[left]]]):
        turn += 1
        first, place = first_run[run[left]], run[left] - first_run[run[left]]
        target = first + (place + turn) % count[run[left]]
        # As a rule the first pair of the next fact is taken; further ones of that fact, and further facts, are rare.
        for further in range(int(sizes[target].max())):
            chosen = order[starts[target] + (within[left] + further) % sizes[target]]
            met = (further >= sizes[target]) | _meet(rights, order[left], chosen)
            partner[order[left[~met]]] = chosen[~met]
            left, target = left[met], target[met]
            if not len(left):
                break
        if turn == 1:
            for one in rights:
                left = left[~one.everywhere(groups)[order[left]]]
    return partner


def _meet(rights: Sequence[Rights], own: np.ndarray, other: np.ndarray) -> np.ndarray:
    met = np.zeros(len(own), dtype=bool)
    for one in rights:
        met |= one.meet(own, other)
    return met


@dataclass(frozen=True)
class Rights:
    """Which answers are right at what is asked: those of every fact that is asked so, evidence or prompt.

    Where the list has "c1 | k1", "c1 | k2" and "c2 | k2", c1 is right at k2: "c2 | k2" is no null of "c1 | k1", though
    it has neither its target nor its evidence.
    Shapes: `fact`, `asked`: `row`; `answers`: of each fact its answers, fact by fact, from `first` on so many as
    `count` says; `known`: sorted, `asked` and answer in one number.
    """

    fact: np.ndarray
    asked: np.ndarray
    answers: np.ndarray
    first: np.ndarray
    count: np.ndarray
    known: np.ndarray
    width: int

    @classmethod
    def of(cls, facts: np.ndarray, answers: Sequence[Collection[Hashable]], asked: Sequence[Hashable]) -> Rights:
        """Of each row its fact, the answers that are right there, and by what it asks for them."""
        fact, place = np.unique(facts, return_inverse=True)[1], _codes(asked)
        listed = _codes([one for some in answers for one in some])
        width, facts_count = int(listed.max(initial=0)) + 1, int(fact.max(initial=0)) + 1
        row = np.repeat(np.arange(len(fact)), [len(some) for some in answers])
        owner, own = np.divmod(np.unique(fact[row] * width + listed), width)
        first = np.searchsorted(owner, np.arange(facts_count))
        found = cls(fact, place, own, first, np.bincount(owner, minlength=facts_count), np.array([]), width)
        by, of = np.divmod(np.unique(place * facts_count + fact), facts_count)
        at, answer = found._answers(of)
        return replace(found, known=np.unique(by[at] * width + answer))

    def meet(self, own: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Whether an answer of the one row's fact is right at the other, or the other way. Shapes: `n, n -> n`."""
        return self._right(own, other) | self._right(other, own)

    def everywhere(self, groups: np.ndarray) -> np.ndarray:
        """Rows one of whose answers is right in all of their group. Shapes: `row -> row`."""
        group = np.unique(groups, return_inverse=True)[1].reshape(-1)
        place, answer = np.divmod(self.known, self.width)
        asked = coo_array((np.ones(len(group), dtype=np.int64), (group, self.asked))).tocsr()
        right = coo_array((np.ones(len(place), dtype=np.int64), (place, answer)), (asked.shape[1], self.width)).tocsr()
        row, own = self._answers(self.fact)
        times = np.asarray((asked @ right)[group[row], own]).reshape(-1)
        return np.bincount(row, times == np.bincount(group)[group[row]], minlength=len(group)) > 0

    def _right(self, own: np.ndarray, at: np.ndarray) -> np.ndarray:
        row, answer = self._answers(self.fact[own])
        code = self.asked[at][row] * self.width + answer
        place = np.minimum(np.searchsorted(self.known, code), len(self.known) - 1)
        return np.bincount(row, self.known[place] == code, minlength=len(own)) > 0

    def _answers(self, facts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The answers of each of these facts, and its place here. Shapes: `n -> m, m`."""
        count = self.count[facts]
        row = np.repeat(np.arange(len(facts)), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        return row, self.answers[self.first[facts][row] + within]


def _codes(values: Iterable[Hashable]) -> np.ndarray:
    codes: dict[Hashable, int] = {}
    return np.array([codes.setdefault(one, len(codes)) for one in values], dtype=np.int64)


def kin(facts: np.ndarray, *traits: Sequence[Hashable]) -> np.ndarray:
    """Facts that share one of the traits (a target), directly or through others, under one label: the first of theirs.

    What is drawn as one (`Facts`) are facts that share a prompt. Shapes: `pair, pair... -> pair`.
    """
    names, fact = np.unique(facts.astype(str), return_inverse=True)
    found = np.arange(len(names))
    for trait in traits:
        code = _codes(trait)
        size = len(names) + int(code.max(initial=-1)) + 1
        both = coo_array((np.ones(len(code)), (found[fact], len(names) + code)), shape=(size, size))
        joined = connected_components(both, directed=False)[1]
        first, of = np.unique(joined[found], return_index=True, return_inverse=True)[1:]
        found = first[of]
    return names[found[fact]]


def with_shown(frame: pd.DataFrame, prompts: Sequence[Hashable]) -> pd.DataFrame:
    """The frame with the column `shown`, where facts share a prompt in a row's own direction. Shapes: `row`."""
    labels, direction = frame["fact"].to_numpy().astype(str), frame["direction"].to_numpy()
    units = labels.astype(object)
    for one in np.unique(direction):
        rows = np.flatnonzero(direction == one)
        units[rows] = kin(labels[rows], [prompts[row] for row in rows.tolist()])
    return frame if np.array_equal(units, labels) else frame.assign(**{SHOWN: units.astype(str)})


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
    yield from _turned(fact, group, seed)


@lru_cache(maxsize=4)
def _shuffles(facts: bytes, groups: bytes, seed: int) -> np.ndarray:
    fact, group = (np.frombuffer(codes, dtype=np.int32) for codes in (facts, groups))
    return np.stack(list(_turned(fact, group, seed)))


def _turned(fact: np.ndarray, group: np.ndarray, seed: int) -> Iterator[np.ndarray]:
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
