"""Correlation of forward and reverse scores within groups, its interval over facts and its null.

Everything rests on one table of sufficient statistics, `Moments`: sums of each fact in each group for each head. By
head and by distance (`by_head`, `by_distance`) are views of it. The slow, obvious versions stand in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from .resampling import derangements, resampled_facts

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
    derangement; `cells`: `group head` correlations; `statistic`: how small groups were treated; `n`: pairs behind
    the value; `small`: pairs left out because their group is small; `constant`: cells without variance.
    """

    value: float
    low: float
    high: float
    n: int
    null: np.ndarray
    cells: np.ndarray
    statistic: str
    small: int = 0
    constant: int = 0


def group_correlation(
    forward: np.ndarray,
    reverse: np.ndarray,
    facts: np.ndarray,
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
    layout = Layout.of(facts, groups)
    large = layout.defined_facts(forward, reverse) >= LEAST_FACTS
    pooled = not large.any()
    draws = resampled_facts(layout.n_facts, seed=seed)
    blocks = list(layout.blocks(forward, reverse, large))
    cells = np.concatenate([_pearson(moments.groups) for moments, _ in blocks], axis=1)
    values = [moments.correlations(part, pooled) for moments, part in blocks]
    resampled = [moments.resampled(draws, part, pooled) for moments, part in blocks]
    low, high = float("nan"), float("nan")
    if layout.n_facts > 1:
        low, high = _interval(np.concatenate(resampled, axis=1))
    null = _null(layout, forward, reverse, facts, groups, large, pooled, seed) if control else np.array([])
    defined = np.isfinite(forward) & np.isfinite(reverse)
    used = defined & (large[layout.group] | pooled)
    averaged = "pooled within-group r" if pooled else f"mean within-group r over groups of at least {LEAST_FACTS} facts"
    return GroupCorrelation(
        value=_mean(np.concatenate(values, axis=None)),
        low=low,
        high=high,
        n=int(used.any(1).sum()),
        null=null[np.isfinite(null)],
        cells=cells,
        statistic=averaged,
        small=int((defined.any(1) & ~used.any(1)).sum()),
        constant=int((np.isnan(cells) & (large | pooled) & (layout.counts(defined) > 1)).sum()),
    )


def _null(
    layout: Layout,
    forward: np.ndarray,
    reverse: np.ndarray,
    facts: np.ndarray,
    groups: np.ndarray,
    large: np.ndarray,
    pooled: bool,
    seed: int,
) -> np.ndarray:
    """The value under each of DERANGEMENTS derangements; empty when no group has two facts. Shapes: `-> null`."""
    if layout.n_groups == len(facts):
        return np.array([])
    partners = derangements(facts, groups, seed=seed)
    whole = np.isfinite(forward).all() and np.isfinite(reverse).all()
    if whole and (np.sort(partners, axis=1) == np.arange(len(facts))).all():
        return layout.moments(forward, reverse).permuted(partners, large, pooled)
    # Each forward score meets the reverse score of its partner.
    others = (np.where((partner >= 0)[:, None], reverse[partner], np.nan) for partner in partners)
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

    def resampled(self, draws: np.ndarray, large: np.ndarray, pooled: bool) -> np.ndarray:
        """The same under each resample of facts. Shapes: `-> resample cell`."""
        keep = np.asarray(pooled | large.any(1))
        drawn = np.stack([np.tensordot(draws, part, axes=1) for part in self.facts(keep)])
        values = _pooled(drawn, axis=1) if pooled else np.where(large[keep], _pearson(drawn), np.nan)
        return values.reshape(len(draws), -1)

    def permuted(self, partners: np.ndarray, large: np.ndarray, pooled: bool) -> np.ndarray:
        """The value under many derangements at once, where each permutes whole groups and every score is defined.

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
    """One r from the deviations of all groups, which stand along `axis` of each sum."""
    return _ratio(*(part.sum(axis) for part in deviations(sums)))


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


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    """95 % of the resamples' means over their defined cells; NaN where none is defined. Shapes: `resample cell ->`."""
    defined = np.isfinite(resampled)
    count = defined.sum(1)
    means = np.where(defined, resampled, 0.0).sum(1)[count > 0] / count[count > 0]
    low, high = np.percentile(means, [2.5, 97.5]) if means.size else (np.nan, np.nan)
    return float(low), float(high)
