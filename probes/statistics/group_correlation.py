"""From rows to numbers with their uncertainty: bootstrap over facts, within-group correlation, derangements.

Pairs about one fact are not independent (they share letters, names, weights), so intervals resample facts, not
rows. Every routine works on whole arrays; the slow, obvious versions stand in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import sparse

RESAMPLES = 1000
DERANGEMENTS = 200
# A within-group correlation over fewer facts than this is mostly noise; smaller groups are pooled.
LEAST_FACTS = 8
# Scores that vary by less than this share of their size are constant up to float32 rounding.
CONSTANT = 1e-6
# Cells per block, to bound memory on models with many heads.
_BLOCK = 2_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean or correlation with its 95 % interval and the number of pairs behind it; NaN when undefined."""

    value: float
    low: float
    high: float
    n: int


def mean_over_facts(values: np.ndarray, facts: np.ndarray, *, seed: int = 0) -> Estimate:
    """Mean over defined values, its interval by resampling facts. Shapes: `row, row ->`.

    One fact alone has no interval (NaN).
    """
    defined = np.isfinite(values)
    n = int(defined.sum())
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    index = np.unique(facts[defined], return_inverse=True)[1]
    sums, counts = np.bincount(index, values[defined]), np.bincount(index)
    low, high = float("nan"), float("nan")
    if len(sums) > 1:
        draws = resampled_facts(len(sums), seed=seed)
        low, high = np.percentile((draws @ sums) / (draws @ counts), [2.5, 97.5])
    return Estimate(float(values[defined].mean()), float(low), float(high), n)


@lru_cache(maxsize=32)  # every number of a checkpoint resamples the same facts
def resampled_facts(count: int, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each fact is drawn in each resample. Shapes: `-> resample fact`."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    draws.flags.writeable = False
    return draws


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
    layout = _Layout.of(facts, groups)
    large = layout.defined_facts(forward, reverse) >= LEAST_FACTS
    pooled = not large.any()
    draws = resampled_facts(layout.n_facts, seed=seed)
    step = max(1, _BLOCK // max(layout.n_facts * layout.n_groups, 1))
    blocks = [slice(h, h + step) for h in range(0, forward.shape[1], step)]
    cells = np.concatenate([layout.cells(forward[:, b], reverse[:, b]) for b in blocks], axis=1)
    values = [layout.correlations(forward[:, b], reverse[:, b], large[:, b], pooled) for b in blocks]
    resampled = [layout.resampled(forward[:, b], reverse[:, b], draws, large[:, b], pooled) for b in blocks]
    low, high = float("nan"), float("nan")
    if layout.n_facts > 1:
        low, high = _percentiles(_row_means(np.concatenate(resampled, axis=1)))
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
    layout: _Layout,
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
        return layout.permuted(forward, reverse, partners, large, pooled)
    return np.array([layout.deranged(forward, reverse, partner, large, pooled) for partner in partners])


def derangements(facts: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """DERANGEMENTS derangements with seeds from `seed` on; kept for the next checkpoint's reading of the same pairs.

    Shapes: `pair, pair -> null pair`.
    """
    fact, group = (np.unique(values, return_inverse=True)[1].reshape(-1) for values in (facts, groups))
    return _derangements(fact.astype(np.int32).tobytes(), group.astype(np.int32).tobytes(), seed)


@lru_cache(maxsize=4)
def _derangements(facts: bytes, groups: bytes, seed: int) -> np.ndarray:
    fact, group = (np.frombuffer(codes, dtype=np.int32) for codes in (facts, groups))
    return np.stack([derangement(fact, group, seed=seed + k) for k in range(DERANGEMENTS)]).astype(np.int32)


@dataclass(frozen=True)
class _Layout:
    """Which fact and group each pair belongs to, as sparse summing matrices."""

    fact: np.ndarray
    group: np.ndarray
    n_facts: int
    n_groups: int
    by_group: sparse.csr_matrix
    by_fact_group: sparse.csr_matrix

    @classmethod
    def of(cls, facts: np.ndarray, groups: np.ndarray) -> _Layout:
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

    def moments(self, forward: np.ndarray, reverse: np.ndarray) -> np.ndarray:
        """Per row n, x, y, xx, yy, xy of scores centred by group; zero where undefined. Shapes: `-> 6 pair head`."""
        defined = np.isfinite(forward) & np.isfinite(reverse)
        x, y = (self._centred(v, defined) for v in (forward, reverse))
        return np.stack([defined.astype(float), x, y, x * x, y * y, x * y])

    def _centred(self, values: np.ndarray, defined: np.ndarray) -> np.ndarray:
        values = np.where(defined, values.astype(np.float64), 0.0)
        count = np.maximum(self.by_group @ defined.astype(float), 1)
        centred = np.where(defined, values - ((self.by_group @ values) / count)[self.group], 0.0)
        size = np.sqrt((self.by_group @ values**2) / count)[self.group]
        spread = np.sqrt((self.by_group @ centred**2) / count)[self.group]
        return np.where(spread > CONSTANT * size, centred, 0.0)  # a constant group has no variance, not a tiny one

    def cells(self, forward: np.ndarray, reverse: np.ndarray) -> np.ndarray:
        """Pearson r of every group and head. Shapes: `-> group head`."""
        return _pearson(np.stack([self.by_group @ m for m in self.moments(forward, reverse)]))

    def correlations(self, forward: np.ndarray, reverse: np.ndarray, large: np.ndarray, pooled: bool) -> np.ndarray:
        """What is averaged: r of the large groups, or one pooled r per head. Shapes: `-> group|1 head`."""
        sums = np.stack([self.by_group @ m for m in self.moments(forward, reverse)])
        return _combine(sums, large, pooled)

    def resampled(
        self, forward: np.ndarray, reverse: np.ndarray, draws: np.ndarray, large: np.ndarray, pooled: bool
    ) -> np.ndarray:
        """The same under each resample of facts. Shapes: `-> resample cell`."""
        keep = np.ones(self.n_groups, dtype=bool) if pooled else large.any(1)
        sums = [
            (self.by_fact_group @ m).reshape(self.n_facts, self.n_groups, -1)[:, keep]
            for m in self.moments(forward, reverse)
        ]
        drawn = np.stack([np.tensordot(draws, s, axes=1) for s in sums])
        values = _pooled(drawn, axis=1) if pooled else np.where(large[keep], _pearson(drawn), np.nan)
        return values.reshape(len(draws), -1)

    def deranged(
        self, forward: np.ndarray, reverse: np.ndarray, partner: np.ndarray, large: np.ndarray, pooled: bool
    ) -> float:
        """The value when each forward score meets the reverse score of its partner."""
        other = np.where((partner >= 0)[:, None], reverse[partner], np.nan)
        return _mean(self.correlations(forward, other, large, pooled))

    def permuted(
        self, forward: np.ndarray, reverse: np.ndarray, partners: np.ndarray, large: np.ndarray, pooled: bool
    ) -> np.ndarray:
        """`deranged` for many partners at once, where each permutes whole groups and every score is defined.

        Then only the products change: the sums and squares of a group are those of its true pairing.
        Shapes: `partners`: `null pair`; returns `null`.
        """
        true = self.moments(forward, reverse)
        sums = np.stack([self.by_group @ m for m in true])
        values = []
        for partner in partners:
            sums[5] = self.by_group @ (true[1] * true[2][partner])
            values.append(_mean(_combine(sums, large, pooled)))
        return np.array(values)


def _combine(sums: np.ndarray, large: np.ndarray, pooled: bool) -> np.ndarray:
    return _pooled(sums, axis=0)[None] if pooled else np.where(large, _pearson(sums), np.nan)


def _pearson(sums: np.ndarray) -> np.ndarray:
    """r from n, x, y, xx, yy, xy along the first axis; NaN without variance."""
    return _ratio(*_deviations(sums))


def _pooled(sums: np.ndarray, axis: int) -> np.ndarray:
    """One r from the deviations of all groups, which stand along `axis` of each sum."""
    return _ratio(*(part.sum(axis) for part in _deviations(sums)))


def _deviations(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    defined = np.isfinite(values)
    count = defined.sum(1)
    return np.where(count > 0, np.where(defined, values, 0.0).sum(1) / np.maximum(count, 1), np.nan)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    defined = values[np.isfinite(values)]
    if not defined.size:
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)
