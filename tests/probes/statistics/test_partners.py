"""Intervals of controls whose partners are asked about for several facts, against slow versions and the truth."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from revprobe.probes.statistics.coverage import ONE_ASKED
from revprobe.probes.statistics.estimators import direction_mean, with_control
from revprobe.probes.statistics.intervals import mean_over_facts
from revprobe.probes.statistics.partners import PARTNER, over_partners, partner_column, partners_of
from revprobe.probes.statistics.resampling import Facts, Rights, derangement

COMMON, RARE = 52, 8


def partners_where_one_target_is_common(seed: int) -> np.ndarray:
    """Of 52 facts with one target and 8 with another each has one of the other target. Shapes: `-> fact`."""
    generator = np.random.default_rng(seed)
    rare = COMMON + generator.permutation(np.resize(np.arange(RARE), COMMON))
    return np.concatenate([rare, generator.permutation(COMMON)[:RARE]])


def held(seed: int, draw_partners: bool) -> tuple[bool, bool]:
    """Whether the intervals of a control and an excess hold the truth, where a query's own leaning is most of both."""
    generator = np.random.default_rng(seed)
    partner = partners_where_one_target_is_common(seed)
    facts = np.arange(COMMON + RARE).astype(str)
    target, query = generator.normal(0, 0.3, 60), generator.normal(0, 1, 60)
    null = target + query[partner] + generator.normal(0, 0.3, 60)
    values = 1 + target + generator.normal(0, 0.3, 60)
    names = facts[partner] if draw_partners else None
    found = with_control(values, null, facts, {}, "x", partners=names)
    assert found.control is not None and found.excess is not None
    low, high = found.control.interval
    return low < 0 < high, found.excess.low < 1 < found.excess.high


def test_few_partners_of_many_facts_are_drawn_too() -> None:
    apart = np.mean([held(seed, False) for seed in range(300)], axis=0)
    together = np.mean([held(seed, True) for seed in range(300)], axis=0)
    assert (apart < 0.7).all(), apart
    assert (together > 0.88).all(), together


def test_few_partners_of_many_facts_are_drawn_too_where_answers_are_right_or_wrong() -> None:
    """Exact match: each query has its own chance that an answer is said there, and most are said always or never."""
    facts, held_by = np.arange(COMMON + RARE).astype(str), []
    for seed in range(200):
        generator, partner = np.random.default_rng(seed), partners_where_one_target_is_common(seed)
        chance = generator.beta(0.6, 0.6, 60)
        null, values = generator.random(60) < chance[partner], generator.random(60) < 0.8
        row = []
        for names in (None, facts[partner]):
            found = with_control(values * 1.0, null * 1.0, facts, {}, "x", binary=True, partners=names)
            assert found.control is not None and found.excess is not None
            row += [found.control.interval[0] <= 0.5 <= found.control.interval[1]]
            row += [found.excess.low <= 0.3 <= found.excess.high]
        held_by.append(row)
    apart, together = np.mean(held_by, axis=0).reshape(2, 2)
    assert (apart < 0.88).all() and (together > 0.92).all(), (apart, together)


def test_the_two_ways_are_joined_as_variances_are() -> None:
    """A mean without bounds, as many facts and partners: the reach from three sums of squares, by hand."""
    generator = np.random.default_rng(3)
    facts, partners = np.repeat(np.arange(20), 2).astype(str), np.tile(np.arange(10), 4).astype(str)
    values = generator.normal(size=40)
    labels = Facts.of(facts)
    found = over_partners(lambda of: mean_over_facts(values, of), labels, partners, np.ones(40, dtype=bool))

    def reach(names: list[str]) -> float:
        sums = pd.Series(values - values.mean()).groupby(names).sum()
        count, squares = len(sums), (sums**2).sum()
        freedom = np.clip(1.5 * squares**2 / (sums**4).sum(), 1, count - 1)
        return float(stats.t.ppf(0.975, freedom) * np.sqrt(count / (count - 1) * squares) / len(values))

    one, other = reach(list(facts)), reach(list(partners))
    both = reach([f"{a} {b}" for a, b in zip(facts, partners, strict=True)])
    wanted = max(one**2 + other**2 - both**2, one**2, other**2) ** 0.5
    assert found.high - found.value == pytest.approx(wanted) == pytest.approx(found.value - found.low)
    assert (found.value, found.n, found.facts) == (pytest.approx(values.mean()), 40, 20)


@pytest.mark.parametrize("binary", [False, True])
def test_a_partner_each_changes_nothing(binary: bool) -> None:
    generator = np.random.default_rng(1)
    facts = np.repeat(np.arange(15), 2).astype(str)
    values, null = generator.random((2, 30)).round() if binary else generator.random((2, 30))
    partner = derangement(facts, np.zeros(30), seed=4)
    names = {fact: facts[other] for fact, other in zip(facts, partner, strict=True)}
    one = np.array([names[fact] for fact in facts])  # one partner a fact, whatever the group
    kind = {"bounds": (0.0, 1.0), "binary": binary}
    plain, found = (with_control(values, null, facts, {}, "x", partners=who, **kind) for who in (None, one))  # type: ignore[arg-type]
    assert len(set(names.values())) == len(names)
    assert partner_column(facts, np.array([list(facts).index(names[fact]) for fact in facts])) == {}
    assert found.control is not None and plain.control is not None
    np.testing.assert_allclose(found.control.interval, plain.control.interval)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_controls_that_are_all_alike_are_as_many_as_their_partners(share: float) -> None:
    """60 zeros out of 8 prompts say no more than 8 zeros."""
    facts, partners = np.arange(60).astype(str), np.resize(np.arange(8), 60).astype(str)
    found = with_control(np.ones(60), np.full(60, share), facts, {}, "x", binary=True, partners=partners)
    assert found.control is not None
    low, high = found.control.interval
    far = 1 - 0.025 ** (1 / 8)
    assert (low, high) == (pytest.approx(0.0 if share == 0 else 1 - far), pytest.approx(far if share == 0 else 1.0))


def test_partners_that_share_a_prompt_are_one() -> None:
    """Six partners that are shown as two: their answers are two draws, as those of facts that share a prompt are."""
    facts, partners = np.arange(60).astype(str), np.resize(np.arange(6), 60).astype(str)
    shown = np.array([*"aaabbb", *map(str, range(6, 60))])
    values, null = np.random.default_rng(0).random((2, 60))
    alike = Facts.of(facts, shown)
    found = with_control(values, null, alike, {}, "x", bounds=(0.0, 1.0), partners=partners)
    merged = np.resize(np.repeat(["0", "3"], 3), 60)
    wanted = with_control(values, null, alike, {}, "x", bounds=(0.0, 1.0), partners=merged)
    assert found.control is not None and wanted.control is not None
    assert found.control.interval == wanted.control.interval and "(2)" in found.caution
    # Drawn by both directions at once, without chains: still what the number itself draws.
    both = Facts.of(facts, shown, (facts, shown))
    again = with_control(values, null, both, {}, "x", bounds=(0.0, 1.0), partners=partners)
    assert again.control is not None and again.control.interval == found.control.interval


@pytest.mark.parametrize(("prompts", "each"), [(20, 2), (15, 4)])
def test_prompts_that_several_facts_share_are_drawn_as_partners(prompts: int, each: int) -> None:
    """Each fact is partner once, its prompt of several: what is said there stands in all their controls."""
    fact = np.arange(prompts * each)
    shown, facts = fact // each, fact.astype(str)
    held, named = [], 0
    for seed in range(120):
        rights = Rights.of(facts, [(one,) for one in facts], shown.tolist())
        partner = derangement(facts, np.zeros(len(fact)), seed=seed, rights=[rights])
        column = partner_column(facts, partner, shown)
        named += bool(column)
        generator = np.random.default_rng(seed)
        null = generator.normal(size=prompts)[shown[partner]] + 0.1 * generator.normal(size=len(fact))
        found = with_control(null, null, Facts.of(facts, shown.astype(str)), {}, "x", partners=column.get(PARTNER))
        assert found.control is not None
        held.append(found.control.interval[0] < 0 < found.control.interval[1])
    assert named > 100 and np.mean(held) > 0.88, (named, np.mean(held))


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("strays", [0, 1])
def test_controls_that_nearly_all_ask_about_one_fact_have_no_interval(
    bounds: tuple[float, float] | None, binary: bool, strays: int
) -> None:
    facts, partners = np.arange(60).astype(str), np.array(["59"] * 60)
    partners[59 - strays + 1 :] = "0"
    values, null = np.random.default_rng(0).random((2, 60))
    if binary:
        values, null = values.round(), null.round()
    found = with_control(values, null, facts, {}, "x", bounds=bounds, binary=binary, partners=partners)
    assert found.control is not None and found.excess is not None
    assert np.isnan([*found.control.interval, found.excess.low, found.excess.high]).all()
    assert found.undefined == {f"{ONE_ASKED} (control)": 60, ONE_ASKED: 60} and np.isfinite(found.estimate.low)


def test_few_partners_are_said() -> None:
    facts, partners = np.arange(60).astype(str), np.resize(np.arange(4), 60).astype(str)
    values, null = np.random.default_rng(0).random((2, 60))
    found = with_control(values, null, facts, {}, "x", bounds=(0.0, 1.0), partners=partners)
    assert found.caution.startswith("few facts that controls ask about (4): ")
    assert not with_control(values, null, facts, {}, "x", bounds=(0.0, 1.0)).caution


def test_rows_that_do_not_name_their_partner_have_one_each() -> None:
    """As where readings of pairs with and without such partners were joined."""
    generator = np.random.default_rng(2)
    frame = pd.DataFrame({"pair": range(60), "fact": np.arange(60).astype(str), "direction": "reverse"})
    control = np.where(np.arange(60) < 30, 0.7, 0.2) + 0.1 * generator.random(60)
    frame = frame.assign(probability=generator.random(60), probability_control=control)
    own = direction_mean(frame, "reverse", "probability").control
    named = frame.assign(**{PARTNER: np.array([None] * 60, dtype=object)})
    assert partners_of(named) is not None and partners_of(frame) is None
    assert direction_mean(named, "reverse", "probability").control == own
    some = named.copy()
    some.loc[:29, PARTNER] = "3"
    found = direction_mean(some, "reverse", "probability").control
    assert found is not None and own is not None and found.interval != own.interval


def test_a_column_is_there_only_where_a_fact_is_the_partner_of_several() -> None:
    facts = np.array(["a", "a", "b", "c"])
    assert partner_column(facts, np.array([2, 2, 3, 0])) == {}
    assert partner_column(facts, np.array([-1, -1, -1, -1])) == {}
    column = partner_column(facts, np.array([2, 2, -1, 2]))
    assert column[PARTNER].tolist() == ["b", "b", "", "b"]
