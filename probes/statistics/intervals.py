"""95 % intervals over facts: of means, of proportions, of differences; none of them is of no width.

Pairs about one fact are not independent (they share letters, names, weights): what is drawn at random is the fact. So
every interval rests on the variance between facts, linearised (Cochran 1977, ch. 6), and on Student's t. Facts that
share prompts are drawn as one (`resampling.Facts`); where they do so in chains, which shared forward and shared reverse
prompts make of them, the variances by the one and by the other are added (`two_way_error`).

    an unbounded mean   value ± t x standard error
    a bounded mean      Clopper-Pearson at its effective sample size: that at which a coin of this mean would vary as
                        much (Korn & Graubard 1998, Survey Methodology 24); it leans away from the bounds
    a proportion        the same, of no more than all questions; at 0 and 100 %, where the size is 0/0, of n facts
    two proportions     their difference is what facts gain less what facts lose: two such proportions, combined
    all facts alike     what is still possible if the share of facts that n of them can miss were otherwise
    a mean over seeds   as over facts, the seeds being drawn; but seeds are asked about the same facts, so that it is
                        never narrower than each seed's own interval over these, on average

How often they hold the truth is measured in `coverage.py`; the slow, obvious versions stand in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from .resampling import Facts

Bounds = tuple[float, float]
# Values with the low and high ends of their intervals.
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]

FRACTION: Bounds = (0.0, 1.0)
COSINE: Bounds = (-1.0, 1.0)
# Facts that differ by less than this share of their size are alike up to float32 rounding.
ALIKE = 1e-6
_TAIL = 0.025
# Where few facts make up the variance, it is known as badly as from few facts; in simulation this share of their number
# covers where facts are skewed and costs nothing where they are not (theory for normal facts allows 3).
_FREEDOM = 1.5


@dataclass(frozen=True)
class Estimate:
    """A mean or correlation with its 95 % interval, the pairs (or questions) and facts behind it; NaN if undefined.

    `prompts`: in how many sets facts stand together that share prompts, directly or through others; 0 where none do.
    """

    value: float
    low: float
    high: float
    n: int
    facts: int = 0
    prompts: int = 0

    @property
    def drawn(self) -> int:
        """How many independent draws the interval rests on."""
        return self.prompts or self.facts

    @classmethod
    def undefined(cls, n: int = 0, facts: int = 0) -> Estimate:
        """No number."""
        return cls(float("nan"), float("nan"), float("nan"), n, facts)


def mean_over_facts(values: np.ndarray, facts: np.ndarray | Facts, *, bounds: Bounds | None = None) -> Estimate:
    """Mean over defined values; the interval keeps to `bounds`, where the values have some. Shapes: `row, row ->`.

    One fact alone has no interval (NaN), nor have facts that all say the same, without bounds.
    """
    defined = np.isfinite(values)
    if not defined.any():
        return Estimate.undefined()
    own = Facts.of(facts)[defined]
    if (ways := own.ways) is None:
        sums, counts = _by_fact(values[defined], own)
        edges = mean_intervals(sums[:, None], counts[:, None], bounds=bounds)
    else:
        edges = two_way_intervals(values[defined][:, None], ways, bounds=bounds)
    value, low, high = (float(edge[0]) for edge in edges)
    return Estimate(value, low, high, int(defined.sum()), **own.sizes)


def proportion_over_facts(values: np.ndarray, facts: np.ndarray | Facts) -> Estimate:
    """Share of the defined values (1 or 0, or rates between) that is 1. Shapes: `row, row ->`."""
    defined = np.isfinite(values)
    own = Facts.of(facts)[defined]
    sums, counts = _by_fact(values[defined], own)
    return replace(proportion(sums / counts, counts), **own.sizes)


def proportion(rates: np.ndarray, questions: np.ndarray | None = None) -> Estimate:
    """A proportion from the rates of clusters, be they facts or seeds, each over so many questions.

    >>> found = proportion(np.array([1, 1, 1]))  # three of three seeds
    >>> round(found.low, 3), found.high
    (0.292, 1.0)

    Args:
        rates: each cluster's share, a fraction; it need not be 0 or 1.
        questions: how many each rests on; one each when None.
    Shapes: `cluster, cluster ->`. In the result, n counts questions and facts clusters. One cluster alone counts as one
    question.
    Source: Korn & Graubard 1998; the floor is that of clusters which are each of one mind.
    """
    rates = np.asarray(rates, dtype=np.float64)
    counts = np.ones(len(rates)) if questions is None else np.asarray(questions, dtype=np.float64)
    if not len(rates):
        return Estimate.undefined()
    value, low, high = (float(edge[0]) for edge in proportion_intervals(rates[:, None], counts[:, None]))
    return Estimate(value, low, high, round(float(counts.sum())), len(rates))


def proportion_intervals(rates: np.ndarray, questions: np.ndarray) -> Edges:
    """The same of many cells at once. Shapes: `cluster cell, cluster cell -> cell, cell, cell`."""
    total, clusters = questions.sum(0), len(rates)
    value = np.clip((rates * questions).sum(0) / total, 0, 1)
    size = np.full(value.shape, float(clusters))
    if clusters > 1:
        spread = _spread((rates - value) * questions, questions)
        # Clusters of equal rates have no variance: all questions count.
        size = np.fmin(_effective_size(value, *spread, questions, of=total), total)
    return value, *_clopper_pearson(value, size)


def at_least_over_facts(over_seeds: Estimate, singles: Edges) -> Estimate:
    """An interval over seeds, on each side at least as wide as their own over facts on average, within 0 and 1.

    Seeds that are asked about the same facts say nothing of other facts: rates that agree over seeds have no variance,
    however few facts they rest on. Each seed's interval over facts has what facts and its draw of them together do.

    Args:
        singles: value, low and high of each seed; NaN where it has none, which widens nothing. Shapes: `seed`.
    """
    value, low, high = (np.asarray(edge, dtype=np.float64) for edge in singles)
    there = np.isfinite(low) & np.isfinite(high)
    if not there.any() or np.isnan(over_seeds.low):
        return over_seeds
    down, up = float((value - low)[there].mean()), float((high - value)[there].mean())
    return replace(
        over_seeds,
        low=max(0.0, min(over_seeds.low, over_seeds.value - down)),
        high=min(1.0, max(over_seeds.high, over_seeds.value + up)),
    )


def difference_over_facts(
    values: np.ndarray,
    null: np.ndarray,
    facts: np.ndarray | Facts,
    *,
    bounds: Bounds | None = None,
    binary: bool = False,
) -> Estimate:
    """Mean of `values` less `null` over the rows that have both, as a rule a measure less its control.

    Between bounds it combines the intervals of the two as far as their facts go apart or together (Zou & Donner 2008,
    Statistics in Medicine 27), so that it leans as they lean; of `binary` values, those of what facts gain and lose.
    Shapes: `row, row, row ->`.
    """
    both = np.isfinite(values) & np.isfinite(null)
    values, null, facts = values[both], null[both], Facts.of(facts)[both]
    apart = mean_over_facts(values - null, facts)
    if bounds is None or not apart.n or facts.ways is not None or (apart.drawn < 2 and not binary):
        return apart
    (sums, counts), (others, _) = _by_fact(values, facts), _by_fact(null, facts)
    if binary:
        reaches = reach_of_shares(((sums - others) / counts)[:, None], counts[:, None])
        down, up = (float(one_way[0]) for one_way in reaches)
        return replace(apart, low=apart.value - down, high=apart.value + up)
    size = float(max(np.abs(sums / counts).max(), np.abs(others / counts).max()))
    if np.ptp((sums - others) / counts) <= ALIKE * size:
        reach = bounds[1] - bounds[0]
        low, high = all_alike(np.asarray(apart.value), np.asarray(apart.drawn), (-reach, reach))
        return replace(apart, low=float(low), high=float(high))
    own, other = (mean_intervals(part[:, None], counts[:, None], bounds=bounds) for part in (sums, others))
    residuals = ((part - edges[0] * counts)[:, None] for part, edges in ((sums, own), (others, other)))
    down, up = (float(one_way[0]) for one_way in reach_apart(own, other, *residuals))
    return replace(apart, low=apart.value - down, high=apart.value + up)


def reach_of_shares(apart: np.ndarray, weights: np.ndarray, *, most: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """How far below and above its value the difference of two shares reaches, both over the same facts.

    It is the share that facts gain less the share that they lose. Intervals of the two shares themselves say nothing
    where all facts agree: two models of the same answers would differ by nothing for certain.
    Args:
        apart: by how much each fact's shares differ.
        weights: how many questions each fact has.
        most: the most that a fact's can differ by.
    Shapes: `fact cell, fact cell -> cell, cell`.
    """
    # What differs by rounding alone is a fact that agrees, and would count as one whose questions all do.
    apart = np.where(np.abs(apart) <= ALIKE * most, 0.0, apart / most)
    # A question whose answers can differ by 2 is as two of them.
    gained, lost, weights = np.maximum(apart, 0), np.maximum(-apart, 0), weights * most
    own, other = proportion_intervals(gained, weights), proportion_intervals(lost, weights)
    down, up = reach_apart(own, other, (gained - own[0]) * weights, (lost - other[0]) * weights)
    return most * down, most * up


def reach_of_mixture(further: np.ndarray, rates: np.ndarray) -> float:
    """How far what facts weigh further in one number than in the other moves their difference. Shapes: `fact, fact ->`.

    The difference is that of each fact's two rates, at what it weighs on average, and this.
    """
    facts, parts = len(rates), further * (rates - rates.mean())
    return student(facts - 1) * float(np.sqrt(facts / (facts - 1) * (parts**2).sum()))


def reach_apart(
    own: Edges, other: Edges, residual: np.ndarray, other_residual: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far below and above its value one estimate less another reaches, as far as their facts go together.

    Args:
        residual, other_residual: by how much each fact's sum differs from what the estimate says. Shapes: `fact cell`.
    Source: Zou & Donner 2008.
    """
    (value, low, high), (against, least, most) = own, other
    together = _together(residual, other_residual)
    return _combined(value - low, most - against, together), _combined(high - value, against - least, together)


def ratio_over_facts(parts: np.ndarray, wholes: np.ndarray, facts: np.ndarray | Facts) -> Estimate:
    """Sum of `parts` over sum of `wholes`, over the rows that have both. Shapes: `row, row, row ->`."""
    both = np.isfinite(parts) & np.isfinite(wholes)
    own = Facts.of(facts)[both]
    (sums, _), (bases, _) = (_by_fact(each[both], own) for each in (parts, wholes))
    if not bases.sum():
        return Estimate.undefined(int(both.sum()), own.sizes["facts"])
    value, low, high = (float(edge[0]) for edge in mean_intervals(sums[:, None], bases[:, None]))
    return Estimate(value, low, high, int(both.sum()), **own.sizes)


def two_way_error(one: np.ndarray, other: np.ndarray, both: np.ndarray) -> np.ndarray:
    """The standard error over facts that two ways join, from those by each way and by the two at once.

    Never below either: the difference of variances is itself an estimate.
    Source: Cameron, Gelbach & Miller 2011 (J. Bus. Econ. Stat. 29), eq. 2.13.
    """
    return np.sqrt(np.maximum(one**2 + other**2 - both**2, np.maximum(one, other) ** 2))


def two_way_intervals(values: np.ndarray, ways: Sequence[np.ndarray], *, bounds: Bounds | None = None) -> Edges:
    """Means of many cells with their intervals, where facts share prompts in chains (`Facts.ways`).

    Shapes: `row cell, (row, row, row) -> cell, cell, cell`; NaN where a cell lacks a row.
    """
    defined, found = np.isfinite(values), []
    for way in ways:
        sums, counts = np.zeros((2, int(way.max()) + 1, values.shape[1]))
        np.add.at(sums, way, np.where(defined, values, 0.0))
        np.add.at(counts, way, defined)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((sums, counts, *_spread(sums - sums.sum(0) / counts.sum(0) * counts, counts)))
    spread = two_way_error(*(one[2] for one in found)), np.minimum(found[0][3], found[1][3])
    return mean_intervals(*found[0][:2], bounds=bounds, spread=spread)


def mean_intervals(
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    bounds: Bounds | None = None,
    spread: tuple[np.ndarray, np.ndarray] | None = None,
) -> Edges:
    """Means of many cells at once with their intervals, from each fact's sum and count in each cell.

    Args:
        spread: standard errors and degrees of freedom, where they are not those over these facts. Shapes: `cell, cell`.
    Shapes: `fact cell, fact cell -> cell, cell, cell`; a count of 0 is a fact that the cell lacks.
    """
    there = counts != 0
    facts = there.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = sums.sum(0) / counts.sum(0)
        own = np.where(there, sums / counts, value)
    error, freedom = _spread(sums - value * counts, counts) if spread is None else spread
    alike = np.ptp(own, axis=0) <= ALIKE * np.abs(own).max(0)
    if bounds is None:
        width = np.where(alike, np.nan, stats.t.ppf(1 - _TAIL, freedom) * error)  # nothing says how facts would vary
        return value, value - width, value + width
    least, most = bounds
    share = np.clip((value - least) / (most - least), 0, 1)
    size = _effective_size(share, error / (most - least), freedom, counts)
    edges = _clopper_pearson(share, np.where(np.isfinite(size), size, 1.0))
    within = [least + (most - least) * edge for edge in edges]
    low, high = (
        np.where(alike, same, edge) for same, edge in zip(all_alike(value, facts, bounds), within, strict=True)
    )
    return value, np.where(facts > 1, low, np.nan), np.where(facts > 1, high, np.nan)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; NaN without a degree of freedom."""
    return float(stats.t.ppf(1 - _TAIL, freedom)) if freedom > 0 else float("nan")


def perfect(value: np.ndarray, facts: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """The interval of a correlation of exactly 1 or -1, all facts alike. Shapes: `cell, cell -> cell, cell`."""
    return all_alike(np.asarray(value), np.asarray(facts), COSINE)


def all_alike(value: np.ndarray, facts: np.ndarray, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """What remains possible if the share of facts that n of them miss with 2.5 % were at either bound."""
    missed = 1 - _TAIL ** (1 / np.maximum(facts, 1))
    return value + missed * (bounds[0] - value), value + missed * (bounds[1] - value)


def _spread(residual: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A ratio's standard error over facts, and its degrees of freedom. Shapes: `fact cell, fact cell -> cell, cell`."""
    facts, squares = (counts != 0).sum(0), (residual**2).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(facts / (facts - 1) * squares) / np.abs(counts.sum(0))
        contributing = squares**2 / (residual**4).sum(0)
        freedom = np.clip(np.nan_to_num(_FREEDOM * contributing, nan=1.0), 1, facts - 1)
    return error, np.where(facts > 1, freedom, np.nan)


def _effective_size(
    share: np.ndarray, error: np.ndarray, freedom: np.ndarray, counts: np.ndarray, *, of: np.ndarray | float = np.inf
) -> np.ndarray:
    """Questions of a simple sample that would vary as much, as well known; at 0 and 100 % the number of facts.

    Never fewer than the (equally large) facts, as if all questions of each had one answer: no share varies more.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        facts = (counts != 0).sum(0)
        floor = counts.sum(0) ** 2 / (counts**2).sum(0)
        known = (stats.t.ppf(1 - _TAIL, of - 1) / stats.t.ppf(1 - _TAIL, freedom)) ** 2
        size = np.maximum(share * (1 - share) / error**2 * known, floor)
    return np.where((share <= 0) | (share >= 1), facts, size)


def _clopper_pearson(share: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clopper-Pearson for `share` of `size` questions, whole numbers or not. Shapes: `cell, cell -> cell, cell`."""
    right, wrong = share * size, (1 - share) * size
    low = np.where(right > 0, stats.beta.ppf(_TAIL, np.where(right > 0, right, 1), wrong + 1), 0.0)
    high = np.where(wrong > 0, stats.beta.ppf(1 - _TAIL, right + 1, np.where(wrong > 0, wrong, 1)), 1.0)
    return low, high


def _combined(own: np.ndarray, other: np.ndarray, together: np.ndarray) -> np.ndarray:
    """How far a difference reaches, from how far its two parts do."""
    return np.sqrt(np.maximum(own**2 + other**2 - 2 * together * own * other, 0.0))


def _together(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation over facts of two residuals; 0 where one has no variance. Shapes: `fact cell, fact cell -> cell`."""
    scale = np.sqrt((own**2).sum(0) * (other**2).sum(0))
    return (own * other).sum(0) / np.where(scale > 0, scale, 1.0)


def _by_fact(values: np.ndarray, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    index = np.unique(facts.unit, return_inverse=True)[1]
    return np.bincount(index, values), np.bincount(index).astype(np.float64)
