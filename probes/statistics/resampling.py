"""Resampling facts: bootstrap intervals of means, and derangements, the null of everything that pairs facts.

Pairs about one fact are not independent (they share letters, names, weights), so intervals resample facts, not
rows. Every routine works on whole arrays; the slow, obvious versions stand in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 1000
DERANGEMENTS = 200


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
