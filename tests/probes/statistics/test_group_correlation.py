"""Correlations within groups, their intervals and their null, against slow, obvious versions."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from revprobe.probes.statistics.by_distance import distance_correlations, unit_correlations
from revprobe.probes.statistics.by_head import head_correlations
from revprobe.probes.statistics.group_correlation import LEAST_FACTS, group_correlation
from revprobe.probes.statistics.resampling import derangement, shuffles


def scores(facts: int = 12, groups: int = 3, heads: int = 2, slope: float = 1.0, seed: int = 0):
    """`pair head` scores, forward and reverse, related by `slope`; a different level in every group."""
    rng = np.random.default_rng(seed)
    fact, group = np.tile(np.arange(facts), groups), np.repeat(np.arange(groups), facts)
    content = rng.normal(size=(facts, heads))
    forward = content[fact] + 10 * group[:, None] + 0.3 * rng.normal(size=(facts * groups, heads))
    reverse = slope * content[fact] - 7 * group[:, None] + 0.3 * rng.normal(size=(facts * groups, heads))
    return forward, reverse, fact.astype(str), group


def test_the_value_is_the_mean_of_scipys_pearson_over_groups_and_heads():
    forward, reverse, facts, groups = scores()
    expected = [
        stats.pearsonr(forward[groups == g, h], reverse[groups == g, h]).statistic for g in range(3) for h in range(2)
    ]
    found = group_correlation(forward, reverse, facts, groups)
    assert found.value == pytest.approx(np.mean(expected), abs=1e-12)
    np.testing.assert_allclose(found.cells.reshape(-1), expected, atol=1e-12)


def test_the_interval_is_the_jackknife_over_whole_facts_on_fishers_scale():
    """One fact left out at a time, with every pair of it; resampling facts covered too little where they are few."""
    forward, reverse, facts, groups = scores(facts=9, groups=2, heads=1)
    without = []
    for name in np.unique(facts):
        keep = [(groups == g) & (facts != name) for g in range(2)]
        without.append(np.arctanh(np.mean([np.corrcoef(forward[k, 0], reverse[k, 0])[0, 1] for k in keep])))
    found = group_correlation(forward, reverse, facts, groups)
    error = np.sqrt(8 / 9 * np.sum((np.array(without) - np.mean(without)) ** 2))
    expected = np.tanh(np.arctanh(found.value) + stats.t.ppf(0.975, 8) * error * np.array([-1, 1]))
    np.testing.assert_allclose([found.low, found.high], expected, atol=1e-9)
    assert (found.n, found.facts) == (18, 9)


def test_three_facts_in_one_group_bound_nothing_and_an_identity_is_of_n_facts():
    """Without one of three facts r is 1 or -1; where all facts lie on a line, 26 of them can miss 13 % of others."""
    forward, reverse, facts, groups = scores(facts=3, groups=1, heads=1)
    found = group_correlation(forward, reverse, facts, groups)
    assert -1 < found.value < 1 and (found.low, found.high) == (-1, 1)
    forward, _, facts, groups = scores(facts=26, groups=2, heads=1)
    found = group_correlation(forward, 3 * forward + 1, facts, groups)
    assert found.value == pytest.approx(1) and found.high == pytest.approx(1)
    assert found.low == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / 26)))


def test_two_pairs_have_no_correlation_since_theirs_is_1_or_minus_1_whatever_they_are():
    forward, reverse, facts, groups = scores(facts=2, groups=1, heads=1)
    assert np.isnan(group_correlation(forward, reverse, facts, groups).value)
    assert np.isfinite(group_correlation(*scores(facts=2, groups=3, heads=1)).value), "three groups do"


def test_position_bias_alone_does_not_correlate():
    """Levels differ between groups in step; within groups scores are unrelated. Uncentred pooling would give 0.9."""
    forward, reverse, facts, groups = scores(facts=40, groups=5, heads=4, slope=0.0)
    reverse = np.abs(reverse) + forward.mean() + 17 * groups[:, None]
    uncentred = np.corrcoef(forward[:, 0], reverse[:, 0])[0, 1]
    found = group_correlation(forward, reverse, facts, groups)
    assert uncentred > 0.9 and found.low < 0 < found.high


def test_small_groups_are_pooled_after_centring_and_named_so():
    forward, reverse, facts, groups = scores(facts=LEAST_FACTS - 1, groups=4, heads=1)
    centred = [v[:, 0] - np.array([v[groups == g, 0].mean() for g in groups]) for v in (forward, reverse)]
    found = group_correlation(forward, reverse, facts, groups)
    assert found.statistic == "pooled within-group r"
    assert found.value == pytest.approx(np.corrcoef(*centred)[0, 1], abs=1e-12)


def test_pairs_in_small_groups_are_left_out_and_counted():
    """Eight facts in one group and three in another: the three have no correlation of their own, and it is said."""
    forward, reverse, facts, groups = scores(facts=8, groups=2, heads=1)
    keep = (groups == 0) | (np.char.str_len(facts) > 0) & np.isin(facts, ["0", "1", "2"])
    found = group_correlation(forward[keep], reverse[keep], facts[keep], groups[keep])
    assert found.small == 3 and found.n == 8
    assert found.value == pytest.approx(np.corrcoef(forward[groups == 0, 0], reverse[groups == 0, 0])[0, 1])


def test_a_group_is_as_large_as_its_defined_scores():
    """Eight facts of which three have scores: no correlation over three points passes for one over eight."""
    forward, reverse, facts, groups = scores(facts=8, groups=1, heads=1)
    forward[3:] = np.nan
    found = group_correlation(forward, reverse, facts, groups)
    assert found.statistic == "pooled within-group r" and (found.n, found.facts) == (3, 3)


def test_groups_without_a_defined_pair_are_not_called_constant():
    forward, reverse, facts, groups = scores(facts=9, groups=2, heads=1)
    reverse[groups == 1] = np.nan
    assert group_correlation(forward, reverse, facts, groups).constant == 0
    reverse[groups == 1] = 4.0
    assert group_correlation(forward, reverse, facts, groups).constant == 1


def test_undefined_scores_are_left_out_and_constant_groups_are_nan():
    forward, reverse, facts, groups = scores(heads=1)
    forward[0] = np.nan
    forward[groups == 2] = 5.0
    found = group_correlation(forward, reverse, facts, groups)
    keep = (groups == 0) & np.isfinite(forward[:, 0])
    assert found.cells[0, 0] == pytest.approx(stats.pearsonr(forward[keep, 0], reverse[keep, 0]).statistic)
    assert np.isnan(found.cells[2, 0]) and np.isfinite(found.value)


@pytest.mark.parametrize("seed", range(5))
def test_the_null_of_shuffled_facts_holds_zero_while_the_true_pairing_does_not(seed):
    found = group_correlation(*scores(facts=26, seed=seed), seed=seed)
    low, high = np.percentile(found.null, [2.5, 97.5])
    assert low < 0 < high < found.low


def test_the_null_is_the_value_of_each_shuffled_pairing():
    """The quick way, which keeps sums and squares, against rearranged scores; a gap takes the slow way."""
    forward, reverse, facts, groups = scores(facts=12)
    for gap in (False, True):
        if gap:
            forward[3, 1] = np.nan
        found = group_correlation(forward, reverse, facts, groups, seed=5)
        for k in (0, 7):
            partner = shuffles(facts, groups, seed=5)[k]
            again = group_correlation(forward, reverse[partner], facts, groups, control=False)
            assert found.null[k] == pytest.approx(again.value, abs=1e-12)


@pytest.mark.parametrize(("facts", "groups"), [(3, 4), (5, 1), (26, 2), (230, 1)])
def test_the_null_of_a_strong_correlation_is_centred(facts, groups):
    """Derangements never keep the true pairing, so theirs is at -r / (n - 1): -0.5, -0.25 and -0.04 here."""
    forward, _, names, group = scores(facts=facts, groups=groups, heads=2)
    null = group_correlation(forward, forward + 1, names, group).null
    assert np.mean(null) == pytest.approx(0, abs=1e-12 if facts <= 200 else 0.01)
    deranged = [
        group_correlation(forward, forward[derangement(names, group, seed=k)], names, group, control=False).value
        for k in range(40)
    ]
    assert np.mean(deranged) == pytest.approx(-1 / (facts - 1), abs=0.1)


def test_shuffles_of_unequal_groups_stay_centred():
    """Groups that hold other facts, some of one fact alone: the mean over seeds stands within its own error of 0."""
    forward, _, facts, groups = scores(facts=11, groups=3, heads=1)
    keep = (groups == 0) | ((groups == 1) & np.isin(facts, list("012345"))) | ((groups == 2) & (facts == "7"))
    means = []
    for seed in range(40):
        found = group_correlation(forward[keep], forward[keep] + 2, facts[keep], groups[keep], seed=seed)
        means.append(found.null.mean())
    assert abs(np.mean(means)) < 4 * np.std(means) / 40**0.5 + 1e-9
    assert found.small == 7


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_shuffle_stays_in_its_group_and_every_fact_meets_every_other_equally_often(facts, groups, copies, seed):
    fact = np.tile(np.repeat(np.arange(facts), copies), groups)
    group = np.repeat(np.arange(groups), facts * copies)
    found = shuffles(fact, group, seed=seed)
    assert (np.sort(found, axis=1) == np.arange(len(fact))).all() and (group[found] == group).all()
    met = np.zeros((facts, facts))
    np.add.at(met, (np.tile(fact, len(found)), fact[found].reshape(-1)), 1)
    assert (met == met[0, 0]).all()


@given(st.integers(2, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_derangement_stays_in_its_group_and_never_keeps_the_fact(facts, groups, copies, seed):
    fact = np.tile(np.repeat(np.arange(facts), copies), groups).astype(str)
    group = np.repeat(np.arange(groups), facts * copies)
    shuffle = np.random.default_rng(seed).permutation(len(fact))
    fact, group = fact[shuffle], group[shuffle]
    partner = derangement(fact, group, seed=seed)
    assert sorted(partner) == list(range(len(fact)))
    assert (group[partner] == group).all() and (fact[partner] != fact).all()


def test_a_group_of_one_fact_has_no_partner():
    partner = derangement(np.array(["a", "a", "b", "c"]), np.array([0, 0, 1, 1]))
    assert partner.tolist() == [-1, -1, 3, 2]


def test_one_order_of_facts_serves_all_groups():
    """So that the null keeps the dependence between groups."""
    fact, group = np.tile(np.arange(7), 3).astype(str), np.repeat(np.arange(3), 7)
    partner = fact[derangement(fact, group, seed=1)].reshape(3, 7)
    assert (partner[0] == partner[1]).all() and (partner[0] == partner[2]).all()


def test_a_layer_without_attention_neither_stops_nor_moves_the_views():
    """Hybrid models have rows without a head; they stand as undefined, and the other heads keep their numbers."""
    rng = np.random.default_rng(0)
    columns = {"pair": np.repeat(np.arange(20), 2), "fact": np.repeat(np.arange(20).astype(str), 2), "group": 0}
    columns |= {"layer": 0, "head": np.tile([0, 1], 20), "score_forward": rng.normal(size=40)}
    columns |= {"score_reverse": rng.normal(size=40), "offset_forward": 2, "offset_reverse": -2}
    frame = pd.DataFrame(columns | {"distance_forward": 2, "distance_reverse": 2}).astype({"head": "Int64"})
    lacking = frame[frame["head"] == 0].assign(layer=1, head=pd.NA, score_forward=np.nan, score_reverse=np.nan)
    hybrid = pd.concat([frame, lacking], ignore_index=True).astype({"head": "Int64"})
    pd.testing.assert_frame_equal(head_correlations(hybrid), head_correlations(frame))
    units = unit_correlations(hybrid)
    pd.testing.assert_frame_equal(units.iloc[:2], unit_correlations(frame))
    assert pd.isna(units["head"].iloc[2]) and units["reason"].iloc[2] == "fewer than 2 defined scores"
    for place, (_, part) in enumerate(frame.groupby("head")):
        r = np.corrcoef(part["score_forward"], part["score_reverse"])[0, 1]
        assert units["value"].iloc[place] == pytest.approx(r, abs=1e-12)
    whole, alone = distance_correlations(hybrid), distance_correlations(frame)
    assert whole["value"].equals(alone["value"]) and whole["n"].equals(alone["n"])


def test_pairs_of_groups_without_variance_are_not_behind_the_value():
    """n says what the number rests on; facts of a constant group alone would narrow its interval too."""
    forward, reverse, facts, groups = scores(facts=9, groups=3, heads=1)
    facts = np.array(
        [f"{fact} {group}" for fact, group in zip(facts, groups, strict=True)]
    )  # each group has facts of its own
    forward[groups == 2] = 5.0
    found = group_correlation(forward, reverse, facts, groups)
    rest = groups != 2
    alone = group_correlation(forward[rest], reverse[rest], facts[rest], groups[rest])
    assert found.n == rest.sum() and found.facts == 18 and found.constant == 1
    assert (found.value, found.low, found.high) == pytest.approx((alone.value, alone.low, alone.high))
