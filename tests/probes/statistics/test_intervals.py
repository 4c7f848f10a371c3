"""Intervals of means and proportions over facts: closed forms, scipy's, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from revprobe.probes.statistics.coverage import FEWEST, caution
from revprobe.probes.statistics.intervals import (
    COSINE,
    FRACTION,
    Estimate,
    at_least_over_facts,
    difference_over_facts,
    mean_over_facts,
    proportion,
    proportion_over_facts,
    ratio_over_facts,
    reach_of_shares,
)


def exact(right: float, questions: float) -> tuple[float, float]:
    """Clopper and Pearson's interval, from scipy for whole numbers, else by its beta quantiles."""
    if right == int(right) and questions == int(questions):
        found = stats.binomtest(int(right), int(questions)).proportion_ci(method="exact")
        return found.low, found.high
    return stats.beta.ppf(0.025, right, questions - right + 1), stats.beta.ppf(0.975, right + 1, questions - right)


def names(count: int, copies: int = 1) -> np.ndarray:
    return np.repeat(np.arange(count), copies).astype(str)


@pytest.mark.parametrize(("right", "facts"), [(0, 20), (20, 20), (0, 1), (1, 1), (1, 26), (13, 26), (25, 26)])
def test_one_question_for_each_fact_is_clopper_pearson(right: int, facts: int) -> None:
    """Resampling facts gave [0, 0] for none of 20, and [1, 1] for all of them."""
    found = proportion_over_facts(np.arange(facts) < right, names(facts))
    assert (found.low, found.high) == pytest.approx(exact(right, facts), abs=1e-9)
    assert (found.n, found.facts) == (facts, facts)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_at_0_and_100_per_cent_facts_count_and_not_their_questions(value: float) -> None:
    found = proportion_over_facts(np.full(26 * 45, value), names(26, 45))
    assert (found.low, found.high) == pytest.approx(exact(26 * value, 26))
    assert (found.n, found.facts) == (1170, 26)


def test_facts_of_one_mind_count_once_and_facts_that_all_differ_alike_count_every_question() -> None:
    """Intra-fact correlation 1: 45 questions are one. No variance between facts: all 1,170 are questions."""
    agreed = proportion_over_facts(np.repeat(np.arange(26) < 13, 45), names(26, 45))
    assert (agreed.low, agreed.high) == pytest.approx(exact(13, 26), abs=0.01)
    mixed = proportion_over_facts(np.tile(np.arange(44) % 2, 26), names(26, 44))
    assert (mixed.low, mixed.high) == pytest.approx(exact(572, 1144))


def test_between_them_the_size_is_that_of_korn_and_graubard() -> None:
    """n / design effect x (t of n - 1 / t of facts - 1) squared, by the formula; no fact here stands out."""
    rates, questions = np.array([0.3, 0.7] * 10), 30
    variance = rates.var(ddof=1) / 20
    size = 0.5 * 0.5 / variance * (stats.t.ppf(0.975, 599) / stats.t.ppf(0.975, 19)) ** 2
    found = proportion(rates, np.full(20, questions))
    assert 20 < size < 600 and (found.low, found.high) == pytest.approx(exact(size / 2, size))


def test_over_seeds_rates_are_fractions_and_three_of_three_is_not_certain() -> None:
    claims = proportion(np.ones(3))
    assert (claims.low, claims.high, claims.facts) == (pytest.approx(0.025 ** (1 / 3)), 1.0, 3)
    spread = proportion(np.array([0.40, 0.43, 0.46]), np.full(3, 1170))
    student = 0.43 + stats.t.ppf(0.975, 2) * 0.03 / 3**0.5 * np.array([-1, 1])
    assert (spread.low, spread.high) == pytest.approx(student, abs=0.01)


def test_seeds_that_agree_are_not_surer_of_other_facts_than_each_is() -> None:
    """Two seeds at 1 of 240 questions about 24 facts: [0.05, 1.5] % over seeds, where each alone has [0.0, 11.6] %."""
    rates, low, high = np.array([0.004, 0.004]), np.array([0.0001, 0.0001]), np.array([0.116, 0.116])
    found = at_least_over_facts(proportion(rates, np.full(2, 240)), (rates, low, high))
    assert (found.low, found.high) == pytest.approx((0.0001, 0.116), abs=1e-6) and found.n == 480
    wide = proportion(np.array([0.2, 0.8]), np.full(2, 240))
    assert at_least_over_facts(wide, (np.array([0.2, 0.8]), np.full(2, 0.15), np.full(2, 0.85))).low == wide.low
    unknown = np.full(2, np.nan)
    assert at_least_over_facts(wide, (np.array([0.2, 0.8]), unknown, unknown)) == wide
    half = at_least_over_facts(proportion(rates, np.full(2, 240)), (rates, np.array([np.nan, 0.0]), np.array([1, 0.2])))
    assert half.high == pytest.approx(0.2), "a seed without an interval widens nothing"
    lost = at_least_over_facts(Estimate.undefined(), (rates, low, high))
    assert math.isnan(lost.low) and math.isnan(lost.high)


def test_over_seeds_of_the_same_facts_the_interval_covers() -> None:
    """Facts far apart, seeds hardly: of other facts three seeds know no more than one, by simulation."""
    generator, logistic = np.random.default_rng(0), lambda x: 1 / (1 + np.exp(-x))
    seeds, facts, each, draws = 3, 24, 10, 300
    truth, seen = 0.5, np.zeros(2)
    for _ in range(draws):
        hard = 2.0 * generator.standard_normal(facts)[:, None] + np.zeros(each)
        chances = [logistic(hard + 0.1 * generator.standard_normal()) for _ in range(seeds)]
        own = [proportion_over_facts((generator.random(p.shape) < p).ravel(), names(facts, each)) for p in chances]
        value, low, high = np.array([(one.value, one.low, one.high) for one in own]).T
        alone = proportion(value, np.full(seeds, facts * each))
        both = at_least_over_facts(alone, (value, low, high))
        seen += [alone.low <= truth <= alone.high, both.low <= truth <= both.high]
    assert seen[0] / draws < 0.75 and 0.94 < seen[1] / draws < 1


def answers(generator: np.random.Generator, share: float, together: float, facts: int, each: int) -> np.ndarray:
    """Right or wrong, `fact question`, with an intra-fact correlation."""
    if together == 1:
        return np.repeat(generator.random(facts) < share, each)
    if together == 0:
        return generator.random(facts * each) < share
    scale = (1 - together) / together
    rates = generator.beta(share * scale, (1 - share) * scale, facts)
    return (generator.random((facts, each)) < rates[:, None]).reshape(-1)


@pytest.mark.parametrize("together", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("share", "facts"), [(0.03, 26), (0.5, 8), (0.9, 13)])
def test_proportions_cover_whatever_the_questions_of_a_fact_have_in_common(
    share: float, facts: int, together: float
) -> None:
    """Correlation 1 makes twenty questions one; Wilson on all of them would take them for twenty."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(300):
        found = proportion_over_facts(answers(generator, share, together, facts, 20), names(facts, 20))
        held += found.low <= share <= found.high
        assert found.low < found.high
    assert held / 300 >= 0.90


@pytest.mark.parametrize("facts", [2, 3, 5, 8, 26])
@pytest.mark.parametrize("bounds", [None, FRACTION])
def test_means_cover_from_two_facts_on(facts: int, bounds: tuple[float, float] | None) -> None:
    """Resampling two facts covered 0.47, five 0.83."""
    generator, held = np.random.default_rng(1), 0
    for _ in range(300):
        values = np.repeat(generator.beta(4, 4, facts), 3)
        found = mean_over_facts(values, names(facts, 3), bounds=bounds)
        held += found.low <= 0.5 <= found.high
    assert held / 300 >= 0.91


def test_an_unbounded_mean_of_even_facts_is_students() -> None:
    values = 5 + np.tile([-0.9, 1.1, -1.1, 0.9], 3)
    found = mean_over_facts(np.repeat(values, 4), names(12, 4))
    expected = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.facts) == (48, 12)


def test_unequal_facts_weigh_by_their_rows_as_the_linearised_ratio_does() -> None:
    values, facts = np.array([1.0, 3.0, 2.0, 8.0, 5.0]), np.array(list("aabcc"))
    found = mean_over_facts(values, facts)
    residual = np.array([4.0, 2.0, 13.0]) - found.value * np.array([2, 1, 2])
    error = np.sqrt(3 / 2 * (residual**2).sum()) / 5
    contributing = 1.5 * (residual**2).sum() ** 2 / (residual**4).sum()
    assert found.value == pytest.approx(3.8)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, min(contributing, 2)) * error)


def test_what_is_the_same_for_every_fact_has_an_interval_where_it_has_bounds_and_none_elsewhere() -> None:
    """Float32 ones, as ALiBi's cosines are: 26 facts can miss 13 % of others, which could be at -1."""
    ones = 1 - np.random.default_rng(0).random(26) * 1e-8
    found = mean_over_facts(ones, names(26), bounds=COSINE)
    assert found.low == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / 26)), abs=1e-6) and found.high <= 1
    assert np.isnan(mean_over_facts(ones, names(26)).low)
    half = mean_over_facts(np.full(26, 0.5), names(26), bounds=FRACTION)
    assert half.high - half.low == pytest.approx(1 - 0.025 ** (1 / 26))


@pytest.mark.parametrize("binary", [True, False])
def test_a_difference_of_opposite_certainties_is_not_certain(binary: bool) -> None:
    found = difference_over_facts(np.ones(26), np.zeros(26), names(26), bounds=FRACTION, binary=binary)
    missed = 1 - 0.025 ** (1 / 26)
    low = 1 - 2**0.5 * missed if binary else 1 - 2 * missed
    assert (found.value, found.high) == (1, 1 if binary else pytest.approx(1, abs=0.3))
    assert found.low == pytest.approx(low, abs=0.15) and found.low < 0.9


def test_a_difference_within_facts_is_the_paired_one_and_covers() -> None:
    """Value and control share the fact: what they share does not widen their difference."""
    generator, held, widths = np.random.default_rng(2), 0, []
    for _ in range(300):
        shared = generator.beta(4, 4, 13) * 0.5
        own, null = shared + 0.4 * generator.random(13), shared
        found = difference_over_facts(own, null, names(13), bounds=FRACTION)
        held += found.low <= 0.2 <= found.high
        widths.append(found.high - found.low)
    assert held / 300 >= 0.91
    assert np.median(widths) < 1.4 * 2 * stats.t.ppf(0.975, 12) * 0.4 / 12**0.5 / 13**0.5


def by_the_formulas(gained: list[float], lost: list[float], each: int) -> tuple[float, float]:
    """What facts gain less what they lose, slowly: Korn and Graubard's size of both, and Zou and Donner's limits."""

    def share(rates: list[float]) -> tuple[float, float, float]:
        value, facts = float(np.mean(rates)), len(rates)
        apart = [rate - value for rate in rates]
        squares = sum(one**2 for one in apart)
        if not squares:
            return value, *exact(value * facts, facts)
        freedom = min(max(1.5 * squares**2 / sum(one**4 for one in apart), 1), facts - 1)
        size = value * (1 - value) / (squares / (facts - 1) / facts)
        size *= (stats.t.ppf(0.975, facts * each - 1) / stats.t.ppf(0.975, freedom)) ** 2
        size = min(max(size, facts), facts * each)
        return value, *exact(value * size, size)

    (won, won_low, won_high), (left, left_low, left_high) = share(gained), share(lost)
    together = 0.0 if np.ptp(gained) == 0 or np.ptp(lost) == 0 else float(np.corrcoef(gained, lost)[0, 1])

    def reach(one: float, other: float) -> float:
        return (one**2 + other**2 - 2 * together * one * other) ** 0.5

    value = won - left
    return value - reach(won - won_low, left_high - left), value + reach(won_high - won, left - left_low)


@pytest.mark.parametrize("each", [1, 10])
def test_a_difference_of_shares_is_what_facts_gain_less_what_they_lose(each: int) -> None:
    """Fact by fact, whatever the two shares are where they agree."""
    generator = np.random.default_rng(4)
    for _ in range(20):
        own = (generator.random((12, each)) < 0.6).astype(float)
        null = np.where(generator.random((12, each)) < 0.7, own, generator.random((12, each)) < 0.4)
        apart = (own.mean(1) - null.mean(1)).tolist()
        expected = by_the_formulas([max(one, 0) for one in apart], [max(-one, 0) for one in apart], each)
        found = difference_over_facts(own.ravel(), null.ravel(), names(12, each), bounds=FRACTION, binary=True)
        assert found.value == pytest.approx(np.mean(apart))
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("each", [1, 45])
@pytest.mark.parametrize("right", [0, 10, 20])
def test_the_same_answers_differ_by_what_their_facts_can_miss(right: int, each: int) -> None:
    """Half of 20 right and a control that is right in the same: [0, 0], when the two shares were combined."""
    answers = np.repeat(np.arange(20) < right, each).astype(float)
    found = difference_over_facts(answers, answers, names(20, each), bounds=FRACTION, binary=True)
    missed = 1 - 0.025 ** (1 / 20)
    assert found.value == 0 and (found.low, found.high) == (pytest.approx(-missed), pytest.approx(missed))
    rounded = difference_over_facts(answers * 0.3, answers * (0.1 + 0.2), names(20, each), bounds=FRACTION, binary=True)
    assert rounded.high == pytest.approx(missed), "what differs by its last bit is alike"


def test_the_reach_of_many_readings_is_that_of_each() -> None:
    generator = np.random.default_rng(6)
    apart, weights = generator.integers(-3, 4, (9, 5)) / 3, generator.integers(1, 6, (9, 5)).astype(float)
    down, up = reach_of_shares(apart, weights, most=2.0)
    for cell in range(5):
        one = reach_of_shares(apart[:, [cell]], weights[:, [cell]], most=2.0)
        assert (one[0][0], one[1][0]) == pytest.approx((down[cell], up[cell]), abs=1e-12)


def test_ratios_are_least_squares_through_zero() -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=60)
    y = 2 * x + generator.normal(size=60)
    found = ratio_over_facts(x * y, x * x, names(30, 2))
    assert found.value == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    assert found.low < 2 < found.high
    assert np.isnan(ratio_over_facts(np.zeros(3), np.zeros(3), names(3)).value)


def test_undefined_means_say_so() -> None:
    nothing = mean_over_facts(np.array([np.nan, np.nan]), np.array(["a", "b"]))
    assert np.isnan(nothing.value) and nothing.n == nothing.facts == 0
    single = mean_over_facts(np.array([1.0, 3.0]), np.array(["a", "a"]))
    assert single.value == 2 and np.isnan(single.low) and single.facts == 1
    assert np.isnan(proportion_over_facts(np.array([np.nan]), np.array(["a"])).value)


def test_few_facts_carry_a_caution_and_need_be_the_more_the_more_questions_each_has() -> None:
    for statistic, limits in FEWEST.items():
        for most, fewest in limits.items():
            each = 10**6 if math.isinf(most) else int(most)
            assert caution(statistic, fewest, fewest * each) == ""
            assert f"({fewest - 1})" in caution(statistic, fewest - 1, (fewest - 1) * each)
    assert caution("proportion", 3) == caution("proportion", 3, 3) == caution("proportion", 3, 30) == ""
    seeds = caution("proportion", 3, 600, of="seeds")
    assert seeds.startswith("few seeds (3) of 200 questions each: 95 % intervals of a proportion")
    assert "facts" not in seeds and caution("mean", 13, 10**6) == ""


def test_the_questions_of_a_proportion_are_all_counted() -> None:
    """Six clusters of 4/3 questions are eight: their sum is 7.99999 in floating point."""
    assert proportion(np.full(6, 0.5), np.full(6, 8 / 6)).n == 8
