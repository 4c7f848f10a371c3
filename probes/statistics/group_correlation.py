"""Correlation of forward and reverse scores within groups, its interval over facts and its null.

Everything rests on one table of sufficient statistics, `Moments`: sums of each fact in each group for each head. By
head and by distance (`by_head`, `by_distance`) are views of it. The slow, obvious versions stand in the tests. Facts
that share prompts (`resampling.Facts`) are one fact to all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from scipy import sparse

from .intervals import ALIKE, perfect, student, two_way_error
from .resampling import Facts, each_shuffle

# A within-group correlation over fewer facts than this is mostly noise; smaller groups are pooled.
LEAST_FACTS = 8
# Scores that vary by less than this share of their size are constant up to float32 rounding.
CONSTANT = 1e-6
# Cells per block, to bound memory on models with many heads.
_BLOCK = 2_000_000


@dataclass(frozen=True)
class GroupCorrelation:
    """Correlation of forward and reverse scores within groups, over all heads.

    `value`, `low`, `high`: the mean over cells (a cell is a group in one head); `null`: its value under each
    shuffle of facts; `cells`: `group head` correlations; `statistic`: how small groups were treated; `n`, `facts`:
    pairs and facts behind the value, those of a cell that has a part in it (without a value, those asked about);
    `prompts`: in how many sets facts stand together that share prompts, where these are fewer, else 0;
    `small`: pairs left out because their group is small; `constant`: cells without variance; `alone`: pairs that are
    the only one of their group; `lonely`: pairs of groups of one fact.
    """

    value: float
    low: float
    high: float
    n: int
    facts: int
    null: np.ndarray
    cells: np.ndarray
    statistic: str
    small: int = 0
    constant: int = 0
    alone: int = 0
    lonely: int = 0
    prompts: int = 0


def group_correlation(
    forward: np.ndarray,
    reverse: np.ndarray,
    facts: np.ndarray | Facts,
    groups: np.ndarray,
    *,
    control: bool = True,
    seed: int = 0,
) -> GroupCorrelation:
    """Mean over groups of the within-group Pearson correlation, or the pooled within-group one for small groups.

    Pooling without centring is never done: a position bias alone would correlate. Groups of at least
    LEAST_FACTS facts give one correlation each; if there is none, deviations from group means are pooled.
    Shapes: `forward`, `reverse`: `pair head`; `facts`, `groups`: `pair`. NaN scores are left out.
    """
    facts = Facts.of(facts)
    ways = facts.ways or (facts.unit,)
    layout = Layout.of(ways[0], groups)
    large = facts_of_groups(facts, groups, forward, reverse) >= LEAST_FACTS
    pooled = not large.any()
    blocks = list(layout.blocks(forward, reverse, large))
    cells = np.concatenate([_pearson(moments.groups) for moments, _ in blocks], axis=1)
    value = _mean(np.concatenate([moments.correlations(part, pooled) for moments, part in blocks], axis=None))
    defined = np.isfinite(forward) & np.isfinite(reverse)
    asked = (defined & (large[layout.group] | pooled)).any(1)
    counting = np.concatenate([moments.counting(part, pooled) for moments, part in blocks], axis=1)
    used = (defined & counting[layout.group]).any(1) if np.isfinite(value) else asked
    jackknives = [_left_out(layout, blocks, used, pooled)]
    for way in ways[1:]:
        other = Layout.of(way, groups)
        jackknives.append(_left_out(other, other.blocks(forward, reverse, large), used, pooled))
    low, high = jackknife_intervals(np.array([value]), *jackknives[0], further=jackknives[1:])
    del blocks
    lonely = layout.fact_counts[layout.group] < 2
    null = null_correlations(layout, forward, reverse, large, pooled, seed) if control else np.array([])
    averaged = "pooled within-group r" if pooled else f"mean within-group r over groups of at least {LEAST_FACTS} facts"
    return GroupCorrelation(
        value=value,
        low=float(low[0]),
        high=float(high[0]),
        n=int(used.sum()),
        **facts[used].sizes,
        null=null[np.isfinite(null)],
        cells=cells,
        statistic=averaged,
        small=int((defined.any(1) & ~asked).sum()),
        constant=int((np.isnan(cells) & (large | pooled) & (layout.counts(defined) > 1)).sum()),
        alone=int((asked & (layout.counts(defined.any(1)[:, None])[layout.group, 0] == 1)).sum()),
        lonely=int((asked & lonely).sum()),
    )


def facts_of_groups(facts: Facts, groups: np.ndarray, forward: np.ndarray, reverse: np.ndarray) -> np.ndarray:
    """Facts of each group with both scores defined; of facts in chains, the sets of the direction that has fewer there.

    Shapes: `pair, pair, pair head, pair head -> group head`.
    """
    found = [Layout.of(way, groups).defined_facts(forward, reverse) for way in facts.counted]
    return np.asarray(np.minimum.reduce(found))


def _left_out(
    layout: Layout, blocks: Iterable[tuple[Moments, np.ndarray]], used: np.ndarray, pooled: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The value without each fact in turn, and whether it rests on it. Shapes: `-> fact 1, fact 1`."""
    left_out = [moments.left_out(part, pooled).reshape(layout.n_facts, -1) for moments, part in blocks]
    present = np.bincount(layout.fact[used], minlength=layout.n_facts) > 0
    return _row_means(np.concatenate(left_out, axis=1))[:, None], present[:, None]


def jackknife_intervals(
    value: np.ndarray,
    left_out: np.ndarray,
    present: np.ndarray,
    *,
    further: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of correlations, from what they are without each fact in turn: Fisher's z, and Student's t.

    NaN for one fact alone; from -1 to 1 where a fact less leaves nothing to correlate (three facts in one group).
    Args:
        further: the same by another way to join facts, no coarser, and by both at once; see `two_way_error`.
    Shapes: `cell, fact cell, fact cell -> cell, cell`; `present` marks the facts that a cell rests on.
    Source: Efron & Tibshirani 1993, ch. 11 (the jackknife over clusters).
    """
    facts, edge = present.sum(0), 1 - ALIKE / 2
    found = [_jackknife_error(*one) for one in ((left_out, present), *further)]
    nothing = np.logical_or.reduce([one[1] for one in found])
    width = found[0][0] if not further else two_way_error(*(one[0] for one in found))
    own = np.arctanh(np.clip(value, -edge, edge))
    width = width * np.array([student(int(count) - 1) for count in facts])
    low, high = np.tanh(own - width), np.tanh(own + width)
    low, high = np.where(nothing, -1.0, low), np.where(nothing, 1.0, high)
    whole = np.abs(value) >= 1 - ALIKE
    low, high = (np.where(whole, same, edge) for same, edge in zip(perfect(value, facts), (low, high), strict=True))
    known = (facts > 1) & np.isfinite(value)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def _jackknife_error(left_out: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of Fisher's z, and where a fact less leaves nothing. Shapes: `-> cell, cell`."""
    facts, edge, shown = present.sum(0), 1 - ALIKE / 2, np.where(present, left_out, 0.0)
    nothing = np.asarray(~np.isfinite(shown).all(0) | (np.abs(shown) >= 1 - ALIKE).any(0))
    z = np.arctanh(np.clip(np.nan_to_num(shown), -edge, edge))
    with np.errstate(invalid="ignore", divide="ignore"):
        about = np.where(present, z - np.where(present, z, 0).sum(0) / facts, 0.0)
        return np.sqrt((facts - 1) / facts * (about**2).sum(0)), nothing


def null_correlations(
    layout: Layout, forward: np.ndarray, reverse: np.ndarray, large: np.ndarray, pooled: bool, seed: int
) -> np.ndarray:
    """The value under each shuffle of facts within groups; empty when no group has two facts. Shapes: `-> null`."""
    lonely = layout.fact_counts[layout.group] < 2
    if lonely.all():
        return np.array([])
    partners = partial(each_shuffle, layout.fact, layout.group, seed=seed)  # again and again: held, many are much
    whole = np.isfinite(forward).all() and np.isfinite(reverse).all() and not lonely.any()
    own = np.arange(len(forward))
    if whole and all((np.sort(partner) == own).all() for partner in partners()):
        return layout.moments(forward, reverse).permuted(partners(), large, pooled)
    # Each forward score meets the reverse score of its partner; a fact alone in its group has none.
    others = (np.where(lonely[:, None], np.nan, reverse[partner]) for partner in partners())
    return np.array([_mean(layout.moments(forward, other).correlations(large, pooled)) for other in others])


@dataclass(frozen=True)
class Layout:
    """Which fact and group each pair belongs to, as sparse summing matrices."""

    fact: np.ndarray
    group: np.ndarray
    n_facts: int
    n_groups: int
    by_group: sparse.csr_matrix
    by_fact_group: sparse.csr_matrix

    @classmethod
    def of(cls, facts: np.ndarray, groups: np.ndarray) -> Layout:
        fact = np.unique(facts, return_inverse=True)[1]
        group = np.unique(groups, return_inverse=True)[1].reshape(-1)
        n_facts, n_groups = int(fact.max()) + 1, int(group.max()) + 1
        ones, column = np.ones(len(fact)), np.arange(len(fact))
        by_group = sparse.csr_matrix((ones, (group, column)), shape=(n_groups, len(fact)))
        by_both = sparse.csr_matrix((ones, (fact * n_groups + group, column)), shape=(n_facts * n_groups, len(fact)))
        return cls(fact, group, n_facts, n_groups, by_group, by_both)

    @cached_property
    def fact_counts(self) -> np.ndarray:
        """Facts of each group. Shapes: `-> group`."""
        return np.bincount(np.unique(self.group * self.n_facts + self.fact) // self.n_facts, minlength=self.n_groups)

    def counts(self, defined: np.ndarray) -> np.ndarray:
        """Defined pairs of each group. Shapes: `pair head -> group head`."""
        return np.asarray(self.by_group @ defined.astype(float))

    def defined_facts(self, forward: np.ndarray, reverse: np.ndarray) -> np.ndarray:
        """Facts of each group with both scores defined. Shapes: `-> group head`."""
        defined = (np.isfinite(forward) & np.isfinite(reverse)).astype(float)
        return ((self.by_fact_group @ defined).reshape(self.n_facts, self.n_groups, -1) > 0).sum(0)

    def moments(self, forward: np.ndarray, reverse: np.ndarray) -> Moments:
        """What correlations rest on, for some heads. Shapes: `pair head, pair head ->`."""
        defined = np.isfinite(forward) & np.isfinite(reverse)
        x, y = (self._centred(v, defined) for v in (forward, reverse))
        return Moments(self, np.stack([defined.astype(float), x, y, x * x, y * y, x * y]))

    def blocks(
        self, forward: np.ndarray, reverse: np.ndarray, large: np.ndarray
    ) -> Iterator[tuple[Moments, np.ndarray]]:
        """The moments of so many heads at a time as memory allows, with their part of `large` (`group head`)."""
        step = max(1, _BLOCK // max(self.n_facts * self.n_groups, 1))
        for head in range(0, forward.shape[1], step):
            part = slice(head, head + step)
            yield self.moments(forward[:, part], reverse[:, part]), large[:, part]

    def _centred(self, values: np.ndarray, defined: np.ndarray) -> np.ndarray:
        values = np.where(defined, values.astype(np.float64), 0.0)
        count = np.maximum(self.by_group @ defined.astype(float), 1)
        centred = np.where(defined, values - ((self.by_group @ values) / count)[self.group], 0.0)
        size = np.sqrt((self.by_group @ values**2) / count)[self.group]
        spread = np.sqrt((self.by_group @ centred**2) / count)[self.group]
        return np.where(spread > CONSTANT * size, centred, 0.0)  # a constant group has no variance, not a tiny one


@dataclass(frozen=True)
class Moments:
    """n, x, y, xx, yy, xy of some heads' scores, centred by group and zero where undefined.

    Shapes: `pairs`: `6 pair head`.
    """

    layout: Layout
    pairs: np.ndarray

    @cached_property
    def groups(self) -> np.ndarray:
        """Their sums by group. Shapes: `-> 6 group head`."""
        return np.stack([self.layout.by_group @ moment for moment in self.pairs])

    def facts(self, keep: np.ndarray) -> list[np.ndarray]:
        """Their sums by fact in the groups to keep. Shapes: `group -> 6 x (fact group head)`."""
        shape = (self.layout.n_facts, self.layout.n_groups, -1)
        return [(self.layout.by_fact_group @ moment).reshape(shape)[:, keep] for moment in self.pairs]

    def correlations(self, large: np.ndarray, pooled: bool) -> np.ndarray:
        """What is averaged: r of the large groups, or one pooled r per head. Shapes: `-> group|1 head`."""
        return _combine(self.groups, large, pooled)

    def counting(self, large: np.ndarray, pooled: bool) -> np.ndarray:
        """The groups that have a part in what is averaged: not those without variance. Shapes: `-> group head`."""
        if not pooled:
            return np.asarray(large & np.isfinite(_pearson(self.groups)))
        xx, yy, _ = deviations(self.groups)
        return np.asarray(((xx > 0) | (yy > 0)) & np.isfinite(self.correlations(large, pooled)))

    def left_out(self, large: np.ndarray, pooled: bool) -> np.ndarray:
        """The same without each fact in turn. Shapes: `-> fact group|1 head`."""
        keep = np.asarray(pooled | large.any(1))
        rest = np.stack([whole[keep] - part for whole, part in zip(self.groups, self.facts(keep), strict=True)])
        return _pooled(rest, axis=1)[:, None] if pooled else np.where(large[keep], _pearson(rest), np.nan)

    def weighted(self, weights: np.ndarray, large: np.ndarray, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
        """Sum and number of what is averaged, where each fact counts as often as its weight says.

        Group by group, since a fact stands in few of them. Shapes: `draw fact -> draw, draw`.
        """
        total, number = np.zeros(len(weights)), np.zeros(len(weights))
        shape = (len(weights), self.pairs.shape[2])
        together, free = np.zeros((3, *shape)), np.zeros(shape)
        for group in np.flatnonzero(pooled | large.any(1)):
            rows = np.flatnonzero(self.layout.group == group)
            sums = weights[:, self.layout.fact[rows]] @ self.pairs[:, rows]
            xx, yy, xy = deviations(sums)
            # One fact alone, drawn time and again, leaves rounding where there is no variance.
            xx, yy = (np.where(part > ALIKE**2 * raw, part, 0.0) for part, raw in ((xx, sums[3]), (yy, sums[4])))
            if pooled:
                together += np.stack([xx, yy, xy])
                free += np.maximum(np.rint(sums[0]) - 1, 0)
            else:
                found = np.where(large[group], _ratio(xx, yy, xy), np.nan)
                total, number = total + np.nansum(found, axis=1), number + np.isfinite(found).sum(1)
        if pooled:
            found = np.where(free > 1, _ratio(*together), np.nan)
            total, number = np.nansum(found, axis=1), np.isfinite(found).sum(1)
        return total, number

    def permuted(self, partners: Iterable[np.ndarray], large: np.ndarray, pooled: bool) -> np.ndarray:
        """The value under many shuffles at once, where each permutes whole groups and every score is defined.

        Then only the products change: the sums and squares of a group are those of its true pairing.
        Shapes: `partners`: `null pair`; returns `null`.
        """
        sums, values = self.groups.copy(), []
        for partner in partners:
            sums[5] = self.layout.by_group @ (self.pairs[1] * self.pairs[2][partner])
            values.append(_mean(_combine(sums, large, pooled)))
        return np.array(values)


def _combine(sums: np.ndarray, large: np.ndarray, pooled: bool) -> np.ndarray:
    return _pooled(sums, axis=0)[None] if pooled else np.where(large, _pearson(sums), np.nan)


def _pearson(sums: np.ndarray) -> np.ndarray:
    """r from n, x, y, xx, yy, xy along the first axis; NaN without variance."""
    return _ratio(*deviations(sums))


def _pooled(sums: np.ndarray, axis: int) -> np.ndarray:
    """One r from the deviations of all groups, which stand along `axis` of each sum; NaN of a single free deviation.

    Two pairs correlate with 1 or -1 whatever they are.
    """
    free = np.maximum(np.rint(sums[0]) - 1, 0).sum(axis)
    return np.where(free > 1, _ratio(*(part.sum(axis) for part in deviations(sums))), np.nan)


def deviations(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squares and products about the mean from n, x, y, xx, yy, xy along the first axis."""
    n, x, y, xx, yy, xy = sums
    n = np.maximum(n, 1)
    return np.maximum(xx - x * x / n, 0), np.maximum(yy - y * y / n, 0), xy - x * y / n


def _ratio(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    scale = np.sqrt(xx) * np.sqrt(yy)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, np.clip(xy / scale, -1.0, 1.0), np.nan)


def _mean(values: np.ndarray) -> float:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _row_means(values: np.ndarray) -> np.ndarray:
    """Each row's mean over its defined cells; NaN where none is. Shapes: `fact cell -> fact`."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, values, 0.0).sum(1) / defined.sum(1))
