"""Two models on the facts that both were asked about: how much one's number differs from the other's.

A fact that is hard for one model is as a rule hard for the other, so the difference is known better than two intervals
side by side suggest. What is drawn at random is the fact (or those that share prompts to one of the models), and
a drawn fact brings all its pairs of both models:

    means, correlations   facts drawn with replacement, both models' numbers worked out anew from each draw; the ends
                          are percentiles, further out than 2.5 % where facts are few (Hesterberg 2015, The American
                          Statistician 69: the expanded percentile interval)
    shares of 0 and 1     the intervals of what facts gain and of what they lose, combined (Zou & Donner 2008): of
                          answers that are nearly all alike, draws tell too little, and of models that are, shares do
    all facts alike       what is still possible if the share of facts that n of them can miss were otherwise

How often they hold the truth is measured by `examples/benchmarks/coverage.py --paired`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
import pandas as pd
from scipy import stats

from .by_head import score_table
from .coverage import caution_of, first_caution, missing_interval
from .estimators import Control, Measured, pair_cosines
from .group_correlation import LEAST_FACTS, Layout, Moments, facts_of_groups, null_correlations
from .intervals import ALIKE, COSINE, FRACTION, Bounds, Estimate, all_alike, reach_of_mixture, reach_of_shares, student
from .resampling import Facts, drawn_alike, draws_of

# The column of a list cut from another that says which pair of that each of its own is.
OF_PAIR = "of_pair"
POOLED = "small groups are pooled in one model and not in the other"
NO_PART = "some groups have no variance in one model and have in the other"
UNEVEN = "facts hold other shares of the pairs in one model than in the other"
SHUFFLED = "the same facts shuffled in both models"


class Sample(Protocol):
    """One model's side of a comparison: its facts, in the order of their labels, and what some of them come to."""

    @property
    def facts(self) -> np.ndarray: ...
    @property
    def pairs(self) -> np.ndarray:
        """How many pairs of each fact have a value. Shapes: `-> fact`."""

    def under(self, weights: np.ndarray) -> np.ndarray:
        """The number where each fact counts as often as its weight says, or NaN. Shapes: `draw fact -> draw`."""


@dataclass(frozen=True)
class Means:
    """Mean over the pairs of some facts. Shapes: labels, sums and numbers of values by fact, `fact`."""

    facts: np.ndarray
    sums: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, facts: np.ndarray) -> Means:
        """Pairs without a value are left out. Shapes: `pair, pair ->`."""
        defined = np.isfinite(values)
        labels, fact = np.unique(facts[defined], return_inverse=True)
        return cls(labels, np.bincount(fact, values[defined]), np.bincount(fact).astype(np.float64))

    def among(self, facts: np.ndarray) -> Means:
        """Of these facts alone."""
        kept = np.isin(self.facts, facts)
        return Means(self.facts[kept], self.sums[kept], self.pairs[kept])

    def drawn(self, units: np.ndarray) -> Means:
        """With what is drawn in the place of facts. Shapes: `fact ->`."""
        labels, unit = np.unique(units, return_inverse=True)
        return Means(labels, np.bincount(unit, self.sums), np.bincount(unit, self.pairs))

    def under(self, weights: np.ndarray) -> np.ndarray:
        return np.asarray((weights @ self.sums) / (weights @ self.pairs))


@dataclass(frozen=True)
class Correlations:
    """The within-group correlation of `group_correlation`, of some facts.

    Which groups are large enough for a correlation of their own is told from the facts, not anew from each draw.
    Shapes: `forward`, `reverse`: `pair head`; `fact_of`, `groups`, `pair` (its number where it was asked), `unit` (what
    is drawn, itself where None), each of `sides` (as of `Facts`): `pair`; `heads` (layer and head): `head 2`.
    """

    forward: np.ndarray
    reverse: np.ndarray
    fact_of: np.ndarray
    groups: np.ndarray
    pair: np.ndarray | None = None
    heads: np.ndarray | None = None
    unit: np.ndarray | None = None
    sides: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Correlations:
        """The scores of an attention reading's frame; pairs without one are left out."""
        heads, (forward, reverse), facts, groups = score_table(frame)
        pair = numbers_of_pairs(frame.drop_duplicates("pair").sort_values("pair"))
        made = cls(forward, reverse, facts.label, groups, pair, heads, facts.unit, facts.sides)
        return made.where(np.isfinite(forward) & np.isfinite(reverse))

    def where(self, kept: np.ndarray) -> Correlations:
        """With these scores alone, and the pairs that have some. Shapes: `pair head ->`."""
        forward, reverse = (np.where(kept, scores, np.nan) for scores in (self.forward, self.reverse))
        return replace(self, forward=forward, reverse=reverse).take(np.flatnonzero(kept.any(1)))

    def take(self, rows: np.ndarray) -> Correlations:
        """Some of the pairs, by their places here."""
        pair, unit = (None if column is None else column[rows] for column in (self.pair, self.unit))
        sides = None if self.sides is None else (self.sides[0][rows], self.sides[1][rows])
        scores = self.forward[rows], self.reverse[rows]
        return Correlations(*scores, self.fact_of[rows], self.groups[rows], pair, self.heads, unit, sides)

    @property
    def drawn(self) -> np.ndarray:
        """What is drawn, of each pair. Shapes: `-> pair`."""
        return self.fact_of if self.unit is None else self.unit

    def among(self, facts: np.ndarray) -> Correlations:
        """Of these facts alone."""
        return self.take(np.flatnonzero(np.isin(self.fact_of, facts)))

    @cached_property
    def counting(self) -> np.ndarray:
        """The scores that have a part in the number: of a group that has a correlation. Shapes: `-> pair head`."""
        if not len(self.fact_of):
            return np.zeros(self.forward.shape, dtype=bool)
        parts = [moments.counting(large, self.pooled) for moments, large in self.blocks]
        defined = np.isfinite(self.forward) & np.isfinite(self.reverse)
        return np.asarray(defined & np.concatenate(parts, axis=1)[self.layout.group])

    @cached_property
    def facts(self) -> np.ndarray:
        return np.unique(self.drawn)

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.drawn, self.groups)

    @property
    def pairs(self) -> np.ndarray:
        return np.bincount(self.layout.fact[self.counting.any(1)], minlength=len(self.facts)).astype(np.float64)

    @cached_property
    def large(self) -> np.ndarray:
        """The groups of each head that have a correlation of their own; where there is none, all are pooled."""
        facts = Facts(self.fact_of, self.drawn, self.sides)
        return facts_of_groups(facts, self.groups, self.forward, self.reverse) >= LEAST_FACTS

    @property
    def pooled(self) -> bool:
        return not self.large.any()

    @cached_property
    def blocks(self) -> list[tuple[Moments, np.ndarray]]:
        """What every draw weighs, some heads at a time."""
        return list(self.layout.blocks(self.forward, self.reverse, self.large))

    def under(self, weights: np.ndarray) -> np.ndarray:
        parts = [moments.weighted(weights, large, self.pooled) for moments, large in self.blocks]
        total, number = (np.sum(part, axis=0) for part in zip(*parts, strict=True))
        with np.errstate(invalid="ignore"):
            return np.asarray(total / number)

    def null(self, seed: int) -> np.ndarray:
        """The correlation under each shuffle of facts; whatever the model, the n-th shuffle is the same."""
        return null_correlations(self.layout, self.forward, self.reverse, self.large, self.pooled, seed)


def paired_difference(own: Sample, other: Sample, bounds: Bounds, *, seed: int = 0) -> Estimate:
    """The first number less the second, over the same facts; n counts the pairs of that which has fewer.

    Draws without a number (of one fact alone, without variance) count against both ends of the interval.
    """
    assert np.array_equal(own.facts, other.facts), "both samples are of the facts that they share"
    facts, n = len(own.facts), int(min(own.pairs.sum(), other.pairs.sum()))
    if not facts:
        return Estimate.undefined()
    values = [float(one.under(np.ones((1, facts)))[0]) for one in (own, other)]
    value, reach = values[0] - values[1], bounds[1] - bounds[0]
    if np.isnan(value) or facts < 2:
        return Estimate(value, float("nan"), float("nan"), n, facts)
    drawn = np.concatenate([own.under(weights) - other.under(weights) for weights in draws_of(facts, seed)])
    level = float(stats.norm.cdf(-np.sqrt(facts / (facts - 1)) * student(facts - 1)))
    low = float(np.quantile(np.where(np.isnan(drawn), -reach, drawn), level))
    high = float(np.quantile(np.where(np.isnan(drawn), reach, drawn), 1 - level))
    if high - low <= ALIKE * max(map(abs, values)):
        low, high = (float(end) for end in all_alike(np.asarray(value), np.asarray(facts), (-reach, reach)))
    return Estimate(value, low, high, n, facts)


@dataclass(frozen=True)
class Answers:
    """One model's values of a measure with their controls (None without).

    Shapes: `values`, `null`, `facts`, `pair` (its number where it was asked), `unit` (what is drawn, the fact itself
    where None): `pair`.
    """

    values: np.ndarray
    null: np.ndarray | None
    facts: np.ndarray
    bounds: Bounds
    binary: bool = False
    pair: np.ndarray | None = None
    unit: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Answers:
        """Some of the pairs, by their places here."""
        columns = (self.null, self.pair, self.unit)
        null, pair, unit = (None if column is None else column[rows] for column in columns)
        return replace(self, values=self.values[rows], null=null, facts=self.facts[rows], pair=pair, unit=unit)

    def among(self, facts: np.ndarray) -> Answers:
        """Of these facts alone."""
        return self.take(np.flatnonzero(np.isin(self.facts, facts)))


Side = TypeVar("Side", Correlations, Answers)


def side_of(measure: str, frame: pd.DataFrame) -> Correlations | Answers:
    """What a reading's frame says of one of its measures, pair by pair."""
    if measure == "attention_correlation":
        return Correlations.of(frame)
    if measure.endswith("gradient_cosine"):  # of an adapter's parameters alone, too
        table = pair_cosines(frame)
        null = table["cosine_control"].to_numpy() if "cosine_control" in table else None
        pair, facts = numbers_of_pairs(frame.drop_duplicates("pair").sort_values("pair")), Facts.of_rows(table)
        return Answers(table["cosine"].to_numpy(), null, facts.label, COSINE, pair=pair, unit=facts.unit)
    direction, _, kind = measure.partition("_")
    column = {"probability": "probability", "accuracy": "argmax_match"}[kind]
    rows = frame[frame["direction"] == direction]
    values, null = (rows[name].to_numpy(np.float64) if name in rows else None for name in (column, f"{column}_control"))
    assert values is not None, "a reading of probabilities has both columns"
    facts = Facts.of_rows(rows)
    return Answers(values, null, facts.label, FRACTION, kind == "accuracy", numbers_of_pairs(rows), facts.unit)


def numbers_of_pairs(rows: pd.DataFrame) -> np.ndarray:
    """The number of each row's pair in the list that was asked about; of a list cut from it, it says so itself."""
    return np.asarray(rows[OF_PAIR if OF_PAIR in rows else "pair"].to_numpy())


def facts_with_value(side: Correlations | Answers) -> np.ndarray:
    """The facts of which some pair has a part in the number, by label."""
    if isinstance(side, Correlations):
        return np.unique(side.fact_of[side.counting.any(1)])
    return np.unique(side.facts[np.isfinite(side.values)])


def on_the_same(own: Side, other: Side) -> tuple[Side, Side]:
    """Both sides of the same pairs, and of the same heads in each, of those that have a part in both numbers.

    Two numbers of one list of pairs are of different groups where one of them has no variance: their difference would
    be partly that of the groups. Sides of other heads are left as they are.
    """
    assert own.pair is not None and other.pair is not None, "both say which pairs they are of"
    _, *rows = np.intersect1d(own.pair, other.pair, return_indices=True)
    if isinstance(own, Answers) or isinstance(other, Answers):
        first, second = (side.take(place) for side, place in zip((own, other), rows, strict=True))
        both = np.flatnonzero(np.isfinite(first.values) & np.isfinite(second.values))
        return first.take(both), second.take(both)
    assert own.heads is not None and other.heads is not None, "a frame says which heads it is of"
    if not np.array_equal(own.heads, other.heads):
        return own, other
    own, other = own.take(rows[0]), other.take(rows[1])
    while True:  # what one side lacks may leave a group of the other too few facts, or no variance
        kept = own.counting & other.counting
        if all(np.array_equal(kept, np.isfinite(side.forward)) for side in (own, other)):
            return own, other
        own, other = own.where(kept), other.where(kept)


def measured_difference(
    own: Correlations | Answers,
    other: Correlations | Answers,
    *,
    seed: int = 0,
    control: bool = True,
    same_pairs: bool = False,
) -> Measured:
    """One model's measure less another's over the facts that have a part in both, with that of their controls.

    Args:
        same_pairs: both sides are of one list of pairs, and are compared on the pairs (and heads) that have a part in
            both, not on the facts alone.
    """
    if isinstance(own, Correlations):
        assert isinstance(other, Correlations), "both are of one measure"
        own, other = _drawn_alike(own, other)
        sides = _on_facts_of_both(*(on_the_same(own, other) if same_pairs else (own, other)))
        found = _of_correlations(*sides, seed, control) if len(sides[0].fact_of) else None
    else:
        assert isinstance(other, Answers), "both are of one measure"
        own, other = _drawn_alike(own, other)
        answers = _on_facts_of_both(*(on_the_same(own, other) if same_pairs else (own, other)))
        found = _of_answers(*answers, seed, control) if len(answers[0].facts) else None
    if found is None:
        return Measured(Estimate.undefined())
    lacking = {missing_interval(part): part.n for part in (found.estimate, found.excess) if part is not None}
    return replace(found, undefined={reason: count for reason, count in lacking.items() if reason})


def _on_facts_of_both(own: Side, other: Side) -> tuple[Side, Side]:
    """Of the facts that have a part in both numbers; without those that a fact less leaves without a group."""
    while True:
        first, second = facts_with_value(own), facts_with_value(other)
        shared = np.intersect1d(first, second)
        own, other = own.among(shared), other.among(shared)
        if len(first) == len(second) == len(shared):
            return own, other


def _drawn_alike(own: Side, other: Side) -> tuple[Side, Side]:
    """Both with one way of drawing their facts: those that share prompts to either model are drawn as one."""
    labels = (side.facts if isinstance(side, Answers) else side.fact_of for side in (own, other))
    sides = zip(labels, (own.unit, other.unit), strict=True)
    first, second = drawn_alike(*(Facts(label, label if unit is None else unit) for label, unit in sides))
    return replace(own, unit=first.unit), replace(other, unit=second.unit)


def _sized(found: Estimate, facts: np.ndarray, units: np.ndarray) -> Estimate:
    """An estimate over what was drawn with its facts told. Shapes: `pair, pair`."""
    return replace(found, **Facts(facts, units).sizes)


def _of_correlations(own: Correlations, other: Correlations, seed: int, control: bool) -> Measured:
    estimate = _sized(paired_difference(own, other, COSINE, seed=seed), own.fact_of, own.drawn)
    cautions = [caution_of("correlation", estimate, apart=True), POOLED if own.pooled != other.pooled else ""]
    cautions += [_uneven(own, other), NO_PART if _lacks_groups(own) != _lacks_groups(other) else ""]
    measured = Measured(estimate, statistic="difference of correlations", caution="; ".join(filter(None, cautions)))
    nulls = [side.null(seed) for side in (own, other)] if control else [np.array([])] * 2
    null = nulls[0] - nulls[1] if len(nulls[0]) == len(nulls[1]) else np.array([])
    null = null[np.isfinite(null)]
    if not len(null):
        return measured
    middle = round(float(null.mean()), 12) + 0.0  # as of each model's own: a round of shuffles averages 0
    low, high = (float(edge) for edge in np.percentile(null, [2.5, 97.5]))
    method = f"{len(null)} shuffles, {SHUFFLED}"
    beside = Control(middle, (low, high), estimate.n, method, estimate.facts, estimate.prompts)
    excess = replace(estimate, value=estimate.value - middle, low=estimate.low - middle, high=estimate.high - middle)
    return replace(measured, control=beside, excess=excess)


def _lacks_groups(side: Correlations) -> bool:
    return bool((~side.counting & np.isfinite(side.forward) & np.isfinite(side.reverse)).any())


def _uneven(own: Sample, other: Sample) -> str:
    """A word of caution where the two numbers are of other mixtures of the same facts; else empty."""
    return "" if np.allclose(own.pairs / own.pairs.sum(), other.pairs / other.pairs.sum()) else UNEVEN


def _of_answers(own: Answers, other: Answers, seed: int, control: bool) -> Measured:
    kind = "proportion" if own.binary else "mean"
    estimate = _apart(own, other, seed)
    uneven = _uneven(*(Means.of(side.values, side.facts) for side in (own, other)))
    cautions = [first_caution(kind, estimate, apart=True), uneven]
    measured = Measured(estimate, statistic=f"difference of {kind}s", caution="; ".join(filter(None, cautions)))
    if not control or own.null is None or other.null is None:
        return measured
    floor = _apart(replace(own, values=own.null), replace(other, values=other.null), seed)
    if not floor.n:
        return measured
    excess = _apart(own, other, seed, excess=True)
    beside = Control.of(floor, "a derangement of facts in each model")
    cautions[0] = first_caution(kind, estimate, floor, excess, apart=True)
    return replace(measured, control=beside, excess=excess, caution="; ".join(filter(None, cautions)))


def _apart(own: Answers, other: Answers, seed: int, *, excess: bool = False) -> Estimate:
    """The one mean less the other, of the values or of their excess over the controls, over facts that have both."""
    sides = [Means.of(side.values - side.null if excess else side.values, side.facts) for side in (own, other)]
    shared = np.intersect1d(sides[0].facts, sides[1].facts)
    unit = shared if own.unit is None else own.unit[np.unique(own.facts, return_index=True)[1]]
    unit = unit[np.isin(np.unique(own.facts), shared)]
    one, two = (side.among(shared).drawn(unit) for side in sides)
    if not own.binary or not len(shared):
        least, most = (own.bounds[0] - own.bounds[1], own.bounds[1] - own.bounds[0]) if excess else own.bounds
        return _sized(paired_difference(one, two, (least, most), seed=seed), shared, unit)
    rates = one.sums / one.pairs, two.sums / two.pairs
    weights = one.pairs / one.pairs.sum(), two.pairs / two.pairs.sum()
    n = int(min(one.pairs.sum(), two.pairs.sum()))
    value = float((weights[0] * rates[0]).sum() - (weights[1] * rates[1]).sum())
    apart, weight = rates[0] - rates[1], n * (weights[0] + weights[1]) / 2
    reach = reach_of_shares(apart[:, None], weight[:, None], most=2.0 if excess else 1.0)
    mixture = reach_of_mixture(weights[0] - weights[1], (rates[0] + rates[1]) / 2) if _uneven(one, two) else 0.0
    down, up = (float(np.hypot(one_way[0], mixture)) for one_way in reach)
    return Estimate(value, value - down, value + up, n, **Facts(shared, unit).sizes)
