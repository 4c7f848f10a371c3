"""Differences over facts that two models share: by hand, by a slow version, and how often they hold the truth."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from revprobe.probes.statistics.coverage import FEWEST, caution
from revprobe.probes.statistics.group_correlation import group_correlation
from revprobe.probes.statistics.intervals import COSINE, FRACTION
from revprobe.probes.statistics.paired import (
    NO_PART,
    POOLED,
    UNEVEN,
    Answers,
    Correlations,
    Means,
    facts_with_value,
    measured_difference,
    paired_difference,
    side_of,
)

FACTS = 26


def names(count: int, copies: int = 1) -> np.ndarray:
    return np.repeat([f"fact {place:03d}" for place in range(count)], copies)


def scores(x: np.ndarray, y: np.ndarray, facts: np.ndarray, groups: np.ndarray | None = None) -> Correlations:
    """One head's forward and reverse scores."""
    groups = np.zeros(len(facts), dtype=int) if groups is None else groups
    return Correlations(x[:, None], y[:, None], facts, groups)


def attention_frame(side: Correlations) -> pd.DataFrame:
    """The same as a reading's frame, with one layer and one head."""
    columns = {"pair": range(len(side.fact_of)), "fact": side.fact_of, "group": side.groups, "layer": 0, "head": 0}
    return pd.DataFrame(columns | {"score_forward": side.forward[:, 0], "score_reverse": side.reverse[:, 0]})


# ---- by hand ----


def test_four_facts_by_hand() -> None:
    """0.2 - 0.1, 0.4 - 0.2, 0.6 - 0.3, 0.8 - 0.4: their mean is 0.25.

    Of four facts t is 3.18, so the level is Phi(-3.18 x sqrt(4 / 3)) = 0.00012. One fact drawn four times, 1 in 256, is
    likelier than that, so the ends are the least and the largest difference there is.
    """
    one, other = Means.of(np.array([0.2, 0.4, 0.6, 0.8]), names(4)), Means.of(np.array([0.1, 0.2, 0.3, 0.4]), names(4))
    found = paired_difference(one, other, FRACTION)
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.1, 0.4), abs=1e-12)
    assert (found.n, found.facts) == (4, 4)


def test_facts_are_joined_by_label_and_not_by_place() -> None:
    """The same rows in another order are the same models; joined by place, the interval would be wide."""
    own, other = np.linspace(0.1, 0.9, FACTS), np.linspace(0.1, 0.9, FACTS) - 0.05 + 0.001 * np.arange(FACTS) % 0.003
    order = np.random.default_rng(3).permutation(FACTS)
    straight = measured_difference(
        Answers(own, None, names(FACTS), FRACTION), Answers(other, None, names(FACTS), FRACTION)
    )
    mixed = measured_difference(
        Answers(own, None, names(FACTS), FRACTION), Answers(other[order], None, names(FACTS)[order], FRACTION)
    )
    assert mixed.estimate == straight.estimate
    assert straight.estimate.high - straight.estimate.low < 0.01


def test_only_facts_with_a_value_in_both_count() -> None:
    own = Answers(np.array([0.1, 0.5, np.nan, 0.9]), None, np.array(["a", "b", "c", "d"]), FRACTION)
    other = Answers(np.array([0.3, np.nan, 0.4, 0.2]), None, np.array(["a", "b", "c", "e"]), FRACTION)
    assert list(facts_with_value(own)) == ["a", "b", "d"] and list(facts_with_value(other)) == ["a", "c", "e"]
    found = measured_difference(own, other).estimate
    assert found.value == pytest.approx(0.1 - 0.3) and found.facts == 1
    assert math.isnan(found.low), "one fact has no interval"


def test_several_pairs_of_a_fact_come_and_go_together() -> None:
    """Copies of every pair know no more than the pairs: drawn one by one, they would halve the interval."""
    rng = np.random.default_rng(0)
    own, other = rng.random((2, FACTS))
    once = paired_difference(Means.of(own, names(FACTS)), Means.of(other, names(FACTS)), FRACTION)
    four = paired_difference(
        Means.of(np.repeat(own, 4), names(FACTS, 4)), Means.of(np.repeat(other, 4), names(FACTS, 4)), FRACTION
    )
    assert (four.value, four.low, four.high) == pytest.approx((once.value, once.low, once.high))
    assert (four.n, four.facts) == (104, FACTS)


# ---- against slow versions ----


@pytest.mark.parametrize("groups", [1, 3, 13], ids=["one group", "large groups", "groups of two, pooled"])
def test_a_weighted_correlation_is_that_of_the_facts_repeated(groups: int) -> None:
    """Each fact as often as it is drawn, written out pair by pair, group by group."""
    rng = np.random.default_rng(groups)
    group = np.arange(FACTS) % groups
    forward = rng.standard_normal((FACTS, 2))
    reverse = 0.5 * forward + rng.standard_normal((FACTS, 2))
    side = Correlations(forward, reverse, names(FACTS), group)
    whole = group_correlation(forward, reverse, names(FACTS), group, control=False)
    assert side.under(np.ones((1, FACTS)))[0] == pytest.approx(whole.value, abs=1e-12)
    weights = rng.multinomial(FACTS, np.full(FACTS, 1 / FACTS), size=5).astype(float)
    for row, found in zip(weights, side.under(weights), strict=True):
        drawn = np.repeat(np.arange(FACTS), row.astype(int))
        expected = []
        for head in (0, 1):
            parts = [drawn[group[drawn] == one] for one in np.unique(group)]
            apart = [np.stack([v[p, head] - v[p, head].mean() for v in (forward, reverse)]) for p in parts if len(p)]
            sums = np.array([[(x * x).sum(), (y * y).sum(), (x * y).sum()] for x, y in apart])
            sums = sums.sum(0, keepdims=True) if groups == 13 else sums
            expected += (sums[:, 2] / np.sqrt(sums[:, 0] * sums[:, 1])).tolist()
        assert found == pytest.approx(np.mean(expected), abs=1e-9)


def test_a_correlation_is_worked_out_anew_in_every_draw() -> None:
    """The interval is that of numpy's correlations over the same draws, taken one by one."""
    rng = np.random.default_rng(1)
    x, y, z = rng.standard_normal((3, FACTS))
    y, z = 0.8 * x + 0.6 * y, 0.3 * x + z
    found = paired_difference(scores(x, y, names(FACTS)), scores(x, z, names(FACTS)), COSINE, seed=5)
    generator, drawn = np.random.default_rng(5), []
    for _ in range(2000):
        fact = np.repeat(np.arange(FACTS), generator.multinomial(FACTS, np.full(FACTS, 1 / FACTS)))
        drawn.append(np.corrcoef(x[fact], y[fact])[0, 1] - np.corrcoef(x[fact], z[fact])[0, 1])
    level = stats.norm.cdf(-math.sqrt(FACTS / (FACTS - 1)) * stats.t.ppf(0.975, FACTS - 1))
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [level, 1 - level]), abs=1e-9)
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1] - np.corrcoef(x, z)[0, 1], abs=1e-12)


# ---- what it covers ----


def twins(facts: int, runs: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Probabilities of two models, of which facts are hard for both: means 0.5 and 0.45."""
    rng = np.random.default_rng(11)
    for _ in range(runs):
        hard = rng.normal(0, 1.0, facts)
        yield tuple(  # type: ignore[misc]
            stats.norm.cdf(hard + rng.normal(0, 0.4, facts) + shift) for shift in (0.0, -0.15)
        )


def test_the_interval_of_a_mean_covers_and_is_narrower_than_that_of_models_drawn_apart() -> None:
    """About 95 % of 300. Two intervals put together as if each model had its own facts would be twice as wide."""
    spread = math.sqrt(1 + 1 + 0.4**2)
    truth = stats.norm.cdf(0.0) - stats.norm.cdf(-0.15 / spread)
    held, paired, apart = 0, 0.0, 0.0
    for own, other in twins(FACTS, 300):
        found = paired_difference(Means.of(own, names(FACTS)), Means.of(other, names(FACTS)), FRACTION)
        held += found.low <= truth <= found.high
        paired += found.high - found.low
        apart += 2 * stats.t.ppf(0.975, FACTS - 1) * math.sqrt((own.var(ddof=1) + other.var(ddof=1)) / FACTS)
    assert 0.92 <= held / 300 <= 0.985
    assert paired < 0.6 * apart


def test_the_interval_of_a_correlation_covers_and_is_narrower_than_that_of_models_drawn_apart() -> None:
    rng = np.random.default_rng(12)
    held, paired, apart, runs = 0, 0.0, 0.0, 150
    ones = np.ones((1, FACTS))
    for _ in range(runs):
        x, shared, *own = rng.standard_normal((4, FACTS))
        # Correlations of 0.8 and 0.6, whose noise is mostly the same.
        noise = [0.95 * shared + math.sqrt(1 - 0.95**2) * one for one in own]
        y, z = 0.8 * x + 0.6 * noise[0], 0.6 * x + 0.8 * noise[1]
        sides = scores(x, y, names(FACTS)), scores(x, z, names(FACTS))
        found = paired_difference(*sides, COSINE)
        assert found.value == pytest.approx(float(sides[0].under(ones)[0] - sides[1].under(ones)[0]))
        held += found.low <= 0.2 <= found.high
        paired += found.high - found.low
        one, two = (group_correlation(s.forward, s.reverse, s.fact_of, s.groups, control=False) for s in sides)
        apart += math.hypot(one.high - one.low, two.high - two.low)
    assert 0.90 <= held / runs <= 0.99
    assert paired < 0.7 * apart


def statistic_of(row: str) -> tuple[str, int]:
    """The statistic of a row of the table, and how many questions each fact has: "proportion, 1,000 questions"."""
    statistic, _, questions = row.partition(", ")
    return statistic, int(questions.partition(" ")[0].replace(",", "")) if questions else 1


def test_where_the_committed_table_is_under_90_percent_a_difference_carries_a_caution(root: Path) -> None:
    """docs/statistics.md, as `examples/benchmarks/coverage.py --paired` printed it: there, and nowhere else."""
    text = (root / "docs" / "statistics.md").read_text(encoding="utf-8")
    section = text.partition("## Differences between models")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    rows = [row for row in rows if row[0].partition(",")[0] in FEWEST]
    assert {(statistic_of(row[0])[0], row[1]) for row in rows} == {
        (name, part) for name in FEWEST for part in ("difference", "excess")
    }
    for name in dict.fromkeys(row[0] for row in rows):
        statistic, questions = statistic_of(name)
        lowest = np.min([[float(cell) for cell in row[3:]] for row in rows if row[0] == name], axis=0)
        for place, facts in enumerate((3, 5, 8, 13, 26, 60)):
            few = caution(statistic, facts, facts * questions, apart=True)
            assert bool(few) == bool((lowest[place:] < 0.9).any()), (name, facts)


def test_an_accuracy_of_few_errors_is_not_drawn_to_certainty() -> None:
    """One error in 26: draws of facts would end at 0, as if the other model could not be the worse one."""
    own, other = np.ones(FACTS), np.ones(FACTS)
    other[3] = 0.0
    found = measured_difference(*(Answers(v, None, names(FACTS), FRACTION, binary=True) for v in (own, other))).estimate
    assert found.value == pytest.approx(1 / FACTS)
    assert found.low < -0.02 and found.high > 0.1


# ---- nothing of no width, and no NaN without a reason ----


def test_a_model_against_itself_differs_by_nothing_that_its_facts_can_show() -> None:
    """26 facts can miss 13 % of others, which might differ by as much as there is; the difference itself is 0."""
    missed = 1 - 0.025 ** (1 / FACTS)
    values = np.random.default_rng(0).random(FACTS)
    mean = paired_difference(Means.of(values, names(FACTS)), Means.of(values, names(FACTS)), FRACTION)
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.0, -missed, missed))
    side = scores(values, np.roll(values, 1), names(FACTS))
    same = measured_difference(side, side)
    assert (same.estimate.value, same.estimate.low, same.estimate.high) == pytest.approx((0.0, -2 * missed, 2 * missed))
    assert same.control is not None and same.control.value == 0 and same.control.interval == (0, 0)


def test_too_few_facts_are_told() -> None:
    few = measured_difference(*(Answers(np.array(v), None, names(2), FRACTION) for v in ([0.1, 0.2], [0.3, 0.9])))
    assert "few facts (2)" in few.caution and few.estimate.low < few.estimate.value < few.estimate.high
    one = measured_difference(*(Answers(np.array(v), None, names(1), FRACTION) for v in ([0.1], [0.3])))
    assert one.undefined == {"of one fact, so without an interval": 1}
    none = measured_difference(*(Answers(np.ones(1), None, np.array([fact]), FRACTION) for fact in "ab"))
    assert math.isnan(none.estimate.value) and none.estimate.n == 0


def test_draws_without_a_correlation_widen_the_interval_and_do_not_vanish() -> None:
    """Three facts: one draw in nine is of one fact alone and could be anything."""
    x = np.array([0.0, 1.0, 2.0])
    found = paired_difference(scores(x, np.array([0.0, 1.0, 2.5]), names(3)), scores(x, -(x**2), names(3)), COSINE)
    assert (found.low, found.high) == (-2.0, 2.0)


def test_other_weights_and_other_statistics_carry_a_caution() -> None:
    own = Answers(np.linspace(0, 1, 30), None, names(15, 2), FRACTION)
    even = Answers(np.linspace(0, 1, 15), None, names(15), FRACTION)
    odd = Answers(np.linspace(0, 1, 16), None, np.append(names(15), names(1)), FRACTION)
    assert measured_difference(own, even).caution == ""  # twice as many pairs of every fact weigh the same
    assert measured_difference(own, odd).caution == UNEVEN
    x, y = np.random.default_rng(0).standard_normal((2, FACTS))
    small = scores(x, y, names(FACTS), np.arange(FACTS) % 13)
    assert measured_difference(scores(x, y, names(FACTS)), small).caution == POOLED
    more = scores(np.append(x, 0.3), np.append(y, 0.1), np.append(names(FACTS), names(1)))
    assert measured_difference(scores(x, y, names(FACTS)), more).caution == UNEVEN


# ---- controls ----


def test_the_control_and_the_excess_are_differences_too() -> None:
    rng = np.random.default_rng(2)
    values, nulls = rng.random((2, FACTS)), rng.random((2, FACTS)) / 4
    own, other = (Answers(values[i], nulls[i], names(FACTS), FRACTION) for i in (0, 1))
    found = measured_difference(own, other)
    assert found.control is not None and found.excess is not None
    assert found.control.value == pytest.approx(nulls[0].mean() - nulls[1].mean())
    assert found.excess.value == pytest.approx(found.estimate.value - found.control.value)
    assert found.excess.low < found.excess.value < found.excess.high
    assert measured_difference(own, other, control=False).control is None
    shares = (Answers(values[i].round(), nulls[i].round(), names(FACTS), FRACTION, binary=True) for i in (0, 1))
    assert (excess := measured_difference(*shares).excess) is not None and excess.low < excess.value < excess.high


def test_facts_without_a_partner_have_a_difference_and_no_control() -> None:
    values, null = np.linspace(0.1, 0.9, FACTS), np.full(FACTS, 0.05)
    null[:20] = np.nan
    own, other = Answers(values, null, names(FACTS), FRACTION), Answers(values**2, null, names(FACTS), FRACTION)
    found = measured_difference(own, other)
    assert found.estimate.facts == FACTS and found.control is not None and found.control.facts == 6
    assert "few facts (6)" in found.caution


def test_correlations_are_shuffled_together() -> None:
    """Models whose scores go together have shuffles that do; apart, the nulls would differ by more than each varies."""
    rng = np.random.default_rng(4)
    x, y, noise = rng.standard_normal((3, FACTS))
    own, other = scores(x, y, names(FACTS)), scores(x, y + 0.1 * noise, names(FACTS))
    found = measured_difference(own, other)
    assert found.control is not None and found.control.value == 0
    low, high = found.control.interval
    single = group_correlation(own.forward, own.reverse, own.fact_of, own.groups)
    assert 0 < high - low < 0.3 * np.ptp(np.percentile(single.null, [2.5, 97.5]))


# ---- from frames ----


def test_sides_are_what_the_readings_estimators_see() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, FACTS))
    side = scores(x, y, names(FACTS))
    read = side_of("attention_correlation", attention_frame(side))
    assert read.facts.tolist() == side.facts.tolist()
    assert isinstance(read, Correlations) and np.array_equal(read.forward, side.forward)
    columns = {"pair": [0, 1, 0, 1], "fact": list("abab"), "direction": ["forward"] * 2 + ["reverse"] * 2}
    columns |= {"probability": [0.1, 0.2, 0.3, 0.4], "argmax_match": [True, False, True, True]}
    frame = pd.DataFrame(columns)
    reverse, right = side_of("reverse_probability", frame), side_of("forward_accuracy", frame)
    assert isinstance(reverse, Answers) and reverse.values.tolist() == [0.3, 0.4] and reverse.null is None
    assert isinstance(right, Answers) and right.values.tolist() == [1.0, 0.0] and right.binary


# ---- the same pairs ----


def test_two_numbers_of_the_same_pairs_differ_over_the_groups_that_both_have() -> None:
    """One side has no variance in half of the groups, in which the other is unlike its other half."""
    generator = np.random.default_rng(5)
    facts, groups = np.tile(names(12), 4), np.repeat(np.arange(4), 12)
    x = generator.normal(size=(48, 2))
    y = np.where(groups[:, None] < 2, x, -x) + 0.3 * generator.normal(size=(48, 2))
    own = sided(x, y, facts, groups)
    flat = np.where((groups >= 2)[:, None], 1.0, x + generator.normal(size=(48, 2)))
    flat[groups == 1, 1] = 3.0  # and one group more in one head
    other = sided(flat, y, facts, groups)
    found = measured_difference(own, other, control=False, same_pairs=True)
    cells = [(0, 0), (1, 0), (0, 1)]  # group, head

    def by_hand(x: np.ndarray) -> float:
        return float(np.mean([np.corrcoef(x[groups == g, h], y[groups == g, h])[0, 1] for g, h in cells]))

    assert found.estimate.value == pytest.approx(by_hand(x) - by_hand(flat), abs=1e-12)
    assert (found.estimate.n, found.estimate.facts) == (24, 12) and NO_PART not in found.caution
    apart = measured_difference(own, other, control=False)
    assert abs(apart.estimate.value - found.estimate.value) > 0.5, "the groups' difference stood in it"
    assert NO_PART in apart.caution, "two models have no groups in common: it is said"


def test_pairs_are_joined_by_the_number_they_were_asked_under() -> None:
    """A control that lost pairs counts its own anew, and says which they were."""
    values = np.array([0.1, 0.9, 0.4, 0.6, 0.2])
    own = Answers(values, None, names(5), FRACTION, pair=np.arange(5))
    kept = np.array([4, 1, 2])
    other = Answers(np.array([0.1, np.nan, 0.2]), None, names(5)[kept], FRACTION, pair=kept)
    found = measured_difference(own, other, same_pairs=True).estimate
    assert found.value == pytest.approx((0.2 + 0.4) / 2 - (0.1 + 0.2) / 2) and found.n == 2


def test_a_group_that_loses_pairs_to_the_other_side_may_lose_its_correlation() -> None:
    """Nine facts, of which the other side has seven: fewer than a correlation of their own takes."""
    facts, groups = np.concatenate([names(9), names(9)]), np.repeat([0, 1], 9)
    x, y = np.random.default_rng(0).normal(size=(2, 18, 1))
    own, there = sided(x, y, facts, groups), np.ones((18, 1), dtype=bool)
    there[:2] = False
    other = sided(x + y, y, facts, groups).where(there)
    found = measured_difference(own, other, control=False, same_pairs=True).estimate
    last = slice(9, None)
    by_hand = [float(np.corrcoef(a[last, 0], y[last, 0])[0, 1]) for a in (x, x + y)]
    assert found.value == pytest.approx(by_hand[0] - by_hand[1]) and found.n == 9


def sided(x: np.ndarray, y: np.ndarray, facts: np.ndarray, groups: np.ndarray) -> Correlations:
    return Correlations(x, y, facts, groups, np.arange(len(facts)), np.array([[0, n] for n in range(x.shape[1])]))
