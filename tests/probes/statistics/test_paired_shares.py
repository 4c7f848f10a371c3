"""Differences of two models' accuracies: near-identical models, models drawn apart, and sides of other numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from revprobe.probes.statistics.estimators import Measured
from revprobe.probes.statistics.intervals import FRACTION, proportion_over_facts, reach_of_shares
from revprobe.probes.statistics.paired import UNEVEN, Answers, measured_difference

FACTS = 26


def names(count: int, copies: int = 1) -> np.ndarray:
    return np.repeat([f"fact {place:03d}" for place in range(count)], copies)


def accuracies(*models: np.ndarray, null: np.ndarray | None = None) -> Measured:
    """Two models' answers, of one question for each fact or of as many in each row; both have one control."""
    sides = []
    for answers in models:
        answers = answers.reshape(len(answers), -1)
        facts, chance = names(*answers.shape), None if null is None else null.reshape(-1)
        sides.append(Answers(answers.reshape(-1).astype(float), chance, facts, FRACTION, binary=True))
    return measured_difference(*sides)


def test_a_model_that_lost_some_facts_and_gained_none_covers() -> None:
    """Half of the facts are right; of those, 2, 5 or 10 % of all are lost. Two shares that go together covered 0.6."""
    rng = np.random.default_rng(13)
    for facts, lost in ((13, 0.02), (13, 0.1), (26, 0.02), (26, 0.05), (60, 0.02)):
        held = 0
        for _ in range(200):
            own = rng.random(facts) < 0.5
            found = accuracies(own, own & (rng.random(facts) >= lost / 0.5)).estimate
            held += found.low <= lost <= found.high
        assert held / 200 >= 0.94, (facts, lost)


def test_models_drawn_apart_differ_by_about_what_their_intervals_combined_say() -> None:
    """Where nothing is shared, not much wider than the two intervals combined as if nothing were."""
    rng, ratios = np.random.default_rng(14), []
    for _ in range(100):
        own, other = (rng.random((FACTS, 1)) < 0.5 for _ in range(2))
        found = accuracies(own, other).estimate
        single = [proportion_over_facts(side.ravel().astype(float), names(FACTS)) for side in (own, other)]
        value, against = single
        apart = math.hypot(value.value - value.low, against.high - against.value)
        apart += math.hypot(value.high - value.value, against.value - against.low)
        ratios.append((found.high - found.low) / apart)
    assert 0.95 < np.mean(ratios) < 1.1


def test_sides_of_other_numbers_of_questions_differ_by_their_rates_and_their_mixture() -> None:
    """Each fact's two rates at its weight on average, and what it weighs further in one model."""
    rng = np.random.default_rng(15)
    held, pairs = 0, (np.arange(FACTS) % 3 + 1, np.arange(FACTS) % 2 * 3 + 1)
    for _ in range(200):
        hard = rng.standard_normal(FACTS)
        sides = []
        for each in pairs:
            answers = np.repeat(hard, each) + 0.5 * rng.standard_normal(each.sum()) < 0
            sides.append(Answers(answers.astype(float), None, np.repeat(names(FACTS), each), FRACTION, binary=True))
        found = measured_difference(*sides)
        held += found.estimate.low <= 0 <= found.estimate.high
    assert held / 200 >= 0.94 and found.caution == UNEVEN
    assert found.estimate.value == pytest.approx(sides[0].values.mean() - sides[1].values.mean())
    assert found.estimate.n == min(each.sum() for each in pairs)
    rates = [
        np.bincount(np.repeat(np.arange(FACTS), each), s.values) / each for each, s in zip(pairs, sides, strict=True)
    ]
    own, other = (each / each.sum() for each in pairs)
    even = reach_of_shares((rates[0] - rates[1])[:, None], found.estimate.n * ((own + other) / 2)[:, None])
    middle = (rates[0] + rates[1]) / 2
    parts = (own - other) * (middle - middle.mean())
    mixture = stats.t.ppf(0.975, FACTS - 1) * math.sqrt(FACTS / (FACTS - 1) * sum(part**2 for part in parts))
    reach = found.estimate.value - found.estimate.low, found.estimate.high - found.estimate.value
    assert reach == pytest.approx([math.hypot(one[0], mixture) for one in even], abs=1e-12)


@pytest.mark.parametrize("each", [1, 10])
def test_an_accuracy_against_itself_differs_by_what_its_facts_can_miss(each: int) -> None:
    """The same answers of 26 facts, half of them right: [0, 0] would say that no other fact can tell the two apart."""
    missed = 1 - 0.025 ** (1 / FACTS)
    answers = np.repeat(np.arange(FACTS)[:, None] < 13, each, axis=1)
    null = np.repeat(np.arange(FACTS)[:, None] < 2, each, axis=1).astype(float)
    found = accuracies(answers, answers, null=null)
    assert found.excess is not None and found.control is not None
    assert (found.estimate.value, *found.control.interval) == pytest.approx((0.0, -missed, missed))
    assert (found.estimate.low, found.estimate.high) == pytest.approx((-missed, missed))
    assert (found.excess.low, found.excess.high) == pytest.approx((-2 * missed, 2 * missed)), "at most 2 apart"
