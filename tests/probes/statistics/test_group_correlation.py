"""Intervals, correlations and derangements against slow, obvious versions."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from revprobe.probes.statistics.by_distance import distance_correlations, unit_correlations
from revprobe.probes.statistics.by_head import head_correlations
from revprobe.probes.statistics.group_correlation import LEAST_FACTS, group_correlation
from revprobe.probes.statistics.resampling import derangement, mean_over_facts, resampled_facts


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


def test_the_interval_is_the_bootstrap_that_redraws_whole_facts():
    """One resample at a time, with every pair of a drawn fact repeated as often as it was drawn."""
    forward, reverse, facts, groups = scores(facts=9, groups=2, heads=1)
    names = np.unique(facts)
    means = []
    for draw in resampled_facts(len(names), seed=3)[:]:
        rows = np.concatenate(
            [np.tile(np.flatnonzero(facts == name), int(times)) for name, times in zip(names, draw, strict=True)]
        )
        means.append(
            np.mean(
                [
                    np.corrcoef(forward[rows[groups[rows] == g], 0], reverse[rows[groups[rows] == g], 0])[0, 1]
                    for g in range(2)
                ]
            )
        )
    found = group_correlation(forward, reverse, facts, groups, seed=3)
    np.testing.assert_allclose([found.low, found.high], np.percentile(means, [2.5, 97.5]), atol=1e-9)


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
    """Eight facts of which two have scores: no correlation over two points passes for one over eight."""
    forward, reverse, facts, groups = scores(facts=8, groups=1, heads=1)
    forward[2:] = np.nan
    found = group_correlation(forward, reverse, facts, groups)
    assert found.statistic == "pooled within-group r" and found.n == 2


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
def test_the_null_of_deranged_facts_holds_zero_while_the_true_pairing_does_not(seed):
    found = group_correlation(*scores(facts=26, seed=seed), seed=seed)
    low, high = np.percentile(found.null, [2.5, 97.5])
    assert low < 0 < high < found.low


def test_the_null_is_the_value_of_each_deranged_pairing():
    """The quick way, which keeps sums and squares, against rearranged scores; a gap takes the slow way."""
    forward, reverse, facts, groups = scores(facts=12)
    for gap in (False, True):
        if gap:
            forward[3, 1] = np.nan
        found = group_correlation(forward, reverse, facts, groups, seed=5)
        for k in (0, 7):
            partner = derangement(facts, groups, seed=5 + k)
            again = group_correlation(forward, reverse[partner], facts, groups, control=False)
            assert found.null[k] == pytest.approx(again.value, abs=1e-12)


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


def test_mean_over_facts_widens_with_dependence_between_pairs_of_a_fact():
    """100 rows of 5 facts are 5 draws, not 100: resampling rows would give an interval four times too narrow."""
    rng = np.random.default_rng(0)
    levels = rng.normal(size=5)
    values, facts = np.repeat(levels, 20), np.repeat(np.arange(5), 20).astype(str)
    found = mean_over_facts(values, facts)
    rows = [rng.choice(values, 100).mean() for _ in range(500)]
    assert found.value == pytest.approx(levels.mean())
    assert found.high - found.low > 2.5 * np.subtract(*np.percentile(rows, [97.5, 2.5]))


def test_mean_over_facts_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        values = np.repeat(rng.normal(size=30), 2) + 0.1 * rng.normal(size=60)
        found = mean_over_facts(values, np.repeat(np.arange(30), 2).astype(str), seed=trial)
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_undefined_means_say_so():
    nothing = mean_over_facts(np.array([np.nan, np.nan]), np.array(["a", "b"]))
    assert np.isnan(nothing.value) and nothing.n == 0
    single = mean_over_facts(np.array([1.0, 3.0]), np.array(["a", "a"]))
    assert single.value == 2 and np.isnan(single.low)


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
