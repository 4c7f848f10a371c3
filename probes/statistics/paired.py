"""Two models on the facts that both were asked about: how much one's number differs from the other's.

A fact that is hard for one model is as a rule hard for the other, so the difference is known better than two intervals
side by side suggest. What is drawn at random is the fact, and a drawn fact brings all its pairs of both models:

    means, correlations   facts drawn with replacement, both models' numbers worked out anew from each draw; the ends
                          are percentiles, further out than 2.5 % where facts are few (Hesterberg 2015, The American
                          Statistician 69: the expanded percentile interval)
    shares of 0 and 1     the two intervals combined as far as their facts go together (Zou & Donner 2008): of answers
                          that are nearly all alike, draws tell too little
    all facts alike       what is still possible if the share of facts that n of them can miss were otherwise

How often they hold the truth is measured by `examples/benchmarks/coverage.py --paired`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import pandas as pd
from scipy import stats

from .by_head import score_table
from .coverage import caution
from .estimators import Control, Measured, missing_interval, pair_cosines
from .group_correlation import LEAST_FACTS, Layout, Moments, null_correlations
from .intervals import (
    ALIKE,
    COSINE,
    FRACTION,
    Bounds,
    Estimate,
    all_alike,
    difference_over_facts,
    proportion_over_facts,
    reach_apart,
    student,
)

DRAWS, _CHUNK = 2000, 1000
POOLED = "small groups are pooled in one model and not in the other"
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

    def under(self, weights: np.ndarray) -> np.ndarray:
        return np.asarray((weights @ self.sums) / (weights @ self.pairs))


@dataclass(frozen=True)
class Correlations:
    """The within-group correlation of `group_correlation`, of some facts.

    Which groups are large enough for a correlation of their own is told from the facts, not anew from each draw.
    Shapes: `forward`, `reverse`: `pair head`; `fact_of`, `groups`: `pair`.
    """

    forward: np.ndarray
    reverse: np.ndarray
    fact_of: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Correlations:
        """The scores of an attention reading's frame; pairs without one are left out."""
        _, (forward, reverse), facts, groups = score_table(frame)
        there = (np.isfinite(forward) & np.isfinite(reverse)).any(1)
        return cls(forward[there], reverse[there], facts[there], groups[there])

    def among(self, facts: np.ndarray) -> Correlations:
        """Of these facts alone."""
        kept = np.isin(self.fact_of, facts)
        return Correlations(self.forward[kept], self.reverse[kept], self.fact_of[kept], self.groups[kept])

    @cached_property
    def facts(self) -> np.ndarray:
        return np.unique(self.fact_of)

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.fact_of, self.groups)

    @property
    def pairs(self) -> np.ndarray:
        return np.bincount(self.layout.fact).astype(np.float64)

    @cached_property
    def large(self) -> np.ndarray:
        """The groups of each head that have a correlation of their own; where there is none, all are pooled."""
        return self.layout.defined_facts(self.forward, self.reverse) >= LEAST_FACTS

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
    drawn = np.concatenate([own.under(weights) - other.under(weights) for weights in _draws(facts, seed)])
    level = float(stats.norm.cdf(-np.sqrt(facts / (facts - 1)) * student(facts - 1)))
    low = float(np.quantile(np.where(np.isnan(drawn), -reach, drawn), level))
    high = float(np.quantile(np.where(np.isnan(drawn), reach, drawn), 1 - level))
    if high - low <= ALIKE * max(map(abs, values)):
        low, high = (float(end) for end in all_alike(np.asarray(value), np.asarray(facts), (-reach, reach)))
    return Estimate(value, low, high, n, facts)


def _draws(facts: int, seed: int) -> Iterator[np.ndarray]:
    """How often each fact is drawn, some draws at a time. Shapes: `-> draw fact`."""
    generator, even = np.random.default_rng(seed), np.full(facts, 1 / facts)
    for _ in range(DRAWS // _CHUNK):
        yield generator.multinomial(facts, even, size=_CHUNK).astype(np.float64)


@dataclass(frozen=True)
class Answers:
    """One model's values of a measure with their controls (None without). Shapes: `values`, `null`, `facts`: `pair`."""

    values: np.ndarray
    null: np.ndarray | None
    facts: np.ndarray
    bounds: Bounds
    binary: bool = False

    def among(self, facts: np.ndarray) -> Answers:
        """Of these facts alone."""
        kept = np.isin(self.facts, facts)
        null = None if self.null is None else self.null[kept]
        return replace(self, values=self.values[kept], null=null, facts=self.facts[kept])


def side_of(measure: str, frame: pd.DataFrame) -> Correlations | Answers:
    """What a reading's frame says of one of its measures, pair by pair."""
    if measure == "attention_correlation":
        return Correlations.of(frame)
    if measure.endswith("gradient_cosine"):  # of an adapter's parameters alone, too
        table = pair_cosines(frame)
        null = table["cosine_control"].to_numpy() if "cosine_control" in table else None
        return Answers(table["cosine"].to_numpy(), null, table["fact"].to_numpy().astype(str), COSINE)
    direction, _, kind = measure.partition("_")
    column = {"probability": "probability", "accuracy": "argmax_match"}[kind]
    rows = frame[frame["direction"] == direction]
    values, null = (rows[name].to_numpy(np.float64) if name in rows else None for name in (column, f"{column}_control"))
    assert values is not None, "a reading of probabilities has both columns"
    return Answers(values, null, rows["fact"].to_numpy().astype(str), FRACTION, kind == "accuracy")


def facts_with_value(side: Correlations | Answers) -> np.ndarray:
    """The facts of which some pair has a value, by label."""
    return side.facts if isinstance(side, Correlations) else np.unique(side.facts[np.isfinite(side.values)])


def measured_difference(
    own: Correlations | Answers, other: Correlations | Answers, *, seed: int = 0, control: bool = True
) -> Measured:
    """One model's measure less another's over the facts on which both have a value, with that of their controls."""
    shared = np.intersect1d(facts_with_value(own), facts_with_value(other))
    if not len(shared):
        return Measured(Estimate.undefined())
    if isinstance(own, Correlations) and isinstance(other, Correlations):
        found = _of_correlations(own.among(shared), other.among(shared), seed, control)
    else:
        assert isinstance(own, Answers) and isinstance(other, Answers), "both are of one measure"
        found = _of_answers(own.among(shared), other.among(shared), seed, control)
    lacking = {missing_interval(part): part.n for part in (found.estimate, found.excess) if part is not None}
    return replace(found, undefined={reason: count for reason, count in lacking.items() if reason})


def _of_correlations(own: Correlations, other: Correlations, seed: int, control: bool) -> Measured:
    estimate = paired_difference(own, other, COSINE, seed=seed)
    cautions = [caution("correlation", estimate.facts, apart=True), POOLED if own.pooled != other.pooled else ""]
    cautions.append(_uneven(own, other))
    measured = Measured(estimate, statistic="difference of correlations", caution="; ".join(filter(None, cautions)))
    nulls = [side.null(seed) for side in (own, other)] if control else [np.array([])] * 2
    null = nulls[0] - nulls[1] if len(nulls[0]) == len(nulls[1]) else np.array([])
    null = null[np.isfinite(null)]
    if not len(null):
        return measured
    middle = round(float(null.mean()), 12) + 0.0  # as of each model's own: a round of shuffles averages 0
    low, high = (float(edge) for edge in np.percentile(null, [2.5, 97.5]))
    beside = Control(middle, (low, high), estimate.n, f"{len(null)} shuffles, {SHUFFLED}", estimate.facts)
    excess = replace(estimate, value=estimate.value - middle, low=estimate.low - middle, high=estimate.high - middle)
    return replace(measured, control=beside, excess=excess)


def _uneven(own: Sample, other: Sample) -> str:
    """A word of caution where the two numbers are of other mixtures of the same facts; else empty."""
    return "" if np.allclose(own.pairs / own.pairs.sum(), other.pairs / other.pairs.sum()) else UNEVEN


def _of_answers(own: Answers, other: Answers, seed: int, control: bool) -> Measured:
    kind = "proportion" if own.binary else "mean"
    estimate = _apart(own, other, seed)
    uneven = _uneven(*(Means.of(side.values, side.facts) for side in (own, other)))
    cautions = [caution(kind, estimate.facts, apart=True), uneven]
    measured = Measured(estimate, statistic=f"difference of {kind}s", caution="; ".join(filter(None, cautions)))
    if not control or own.null is None or other.null is None:
        return measured
    floor = _apart(replace(own, values=own.null), replace(other, values=other.null), seed)
    if not floor.n:
        return measured
    excess = _apart(own, other, seed, excess=True)
    beside = Control(floor.value, (floor.low, floor.high), floor.n, "a derangement of facts in each model", floor.facts)
    cautions[0] = caution(kind, min(estimate.facts, floor.facts, excess.facts), apart=True)
    return replace(measured, control=beside, excess=excess, caution="; ".join(filter(None, cautions)))


def _apart(own: Answers, other: Answers, seed: int, *, excess: bool = False) -> Estimate:
    """The one mean less the other, of the values or of their excess over the controls, over facts that have both."""
    sides = [Means.of(side.values - side.null if excess else side.values, side.facts) for side in (own, other)]
    shared = np.intersect1d(sides[0].facts, sides[1].facts)
    one, two = (side.among(shared) for side in sides)
    if not own.binary or not len(shared):
        least, most = (own.bounds[0] - own.bounds[1], own.bounds[1] - own.bounds[0]) if excess else own.bounds
        return paired_difference(one, two, (least, most), seed=seed)
    first, second = (_share(side.among(shared), excess) for side in (own, other))
    left = one.sums - first.value * one.pairs, two.sums - second.value * two.pairs
    value, (down, up) = first.value - second.value, reach_apart(first, second, *left)
    return Estimate(value, value - down, value + up, min(first.n, second.n), len(shared))


def _share(side: Answers, excess: bool) -> Estimate:
    if not excess:
        return proportion_over_facts(side.values, side.facts)
    assert side.null is not None, "an excess is over a control"
    return difference_over_facts(side.values, side.null, side.facts, bounds=FRACTION, binary=True)
