"""Facts that hang together in chains of forward and reverse prompts: two ways to draw them, and intervals of both."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import revprobe as rp
from revprobe.probes.figures.bounds import large_enough
from revprobe.probes.statistics.by_distance import distance_correlations
from revprobe.probes.statistics.by_head import head_correlations
from revprobe.probes.statistics.by_role import cell_cosines
from revprobe.probes.statistics.group_correlation import group_correlation
from revprobe.probes.statistics.intervals import COSINE, difference_over_facts, mean_over_facts
from revprobe.probes.statistics.paired import Correlations
from revprobe.probes.statistics.resampling import Facts, kin
from tiny import gpt2


def ring(sets: int, times: int = 2) -> tuple[Facts, list[np.ndarray]]:
    """Each forward prompt is shared by `times` facts, each reverse prompt by others; all hang together."""
    forward = np.tile(np.arange(sets), times)
    reverse = np.concatenate([np.roll(np.arange(sets), -turn) for turn in range(times)])
    label = np.array([f"f{place:03}" for place in range(len(forward))])
    sides = tuple(np.array([f"f{one:03}" for one in side]) for side in (forward, reverse))
    return Facts.of(label, np.full(len(label), "f000"), (sides[0], sides[1])), [forward, reverse]


def slow_error(residual: np.ndarray, ways: list[np.ndarray]) -> tuple[float, float]:
    """Every two facts that share a prompt, one after the other; with the degrees of freedom."""
    count, variances, freedoms = len(residual), [], []
    both = np.array([10_000 * one + other for one, other in zip(*ways, strict=True)])
    for way in (*ways, both):
        number, total = len(set(way)), 0.0
        for i in range(count):
            for j in range(count):
                total += residual[i] * residual[j] if way[i] == way[j] else 0.0
        variances.append(number / (number - 1) * total / count**2)
        sums = np.array([residual[way == one].sum() for one in sorted(set(way))])
        freedoms.append(float(np.clip(1.5 * (sums**2).sum() ** 2 / (sums**4).sum(), 1, number - 1)))
    return float(np.sqrt(max(variances[0] + variances[1] - variances[2], *variances[:2]))), min(freedoms[:2])


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_of_a_mean_is_that_of_a_slow_sum_over_pairs_of_facts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    facts, ways = ring(5 + seed)
    values = rng.normal(size=len(facts)) + rng.normal(size=5 + seed)[ways[0]]
    found, (error, freedom) = mean_over_facts(values, facts), slow_error(values - values.mean(), ways)
    reach = stats.t.ppf(0.975, freedom) * error
    np.testing.assert_allclose([found.low, found.high], [values.mean() - reach, values.mean() + reach])
    assert (found.facts, found.prompts, found.n) == (len(facts), 5 + seed, len(facts))
    bounded = mean_over_facts(np.tanh(values), facts, bounds=COSINE)
    assert -1 < bounded.low < bounded.value < bounded.high < 1
    apart = difference_over_facts(np.tanh(values), np.zeros(len(facts)), facts, bounds=COSINE)
    assert apart == mean_over_facts(np.tanh(values), facts)


def test_where_one_direction_has_the_sets_of_both_they_are_drawn_as_before() -> None:
    """Facts that share no prompt are independent then: nothing is joined through others that either way keeps apart."""
    label, forward = (np.array([f"f{i // size}" for i in range(24)]) for size in (1, 4))
    values = np.random.default_rng(0).normal(size=24)
    facts = Facts.of(label, forward, (forward, label))
    assert facts.ways is None and facts.sizes == {"facts": 24, "prompts": 6}
    assert mean_over_facts(values, facts) == mean_over_facts(values, Facts.of(label, forward))
    some = ring(6)[0][np.arange(6)]  # which share no prompt with one another
    assert some.sizes == {"facts": 6, "prompts": 0}
    found, alone = (mean_over_facts(values[:6], drawn) for drawn in (some, some.label))
    np.testing.assert_allclose([found.low, found.high], [alone.low, alone.high])


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_a_correlation_is_that_of_slow_jackknives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    facts, ways = ring(9)
    x, y = rng.normal(size=9)[ways[0]], rng.normal(size=9)[ways[1]]
    y = y + 0.5 * x + 0.1 * rng.normal(size=18)
    variances = []
    for way in (*ways, np.arange(18)):
        left_out = [np.arctanh(np.corrcoef(x[way != one], y[way != one])[0, 1]) for one in sorted(set(way))]
        variances.append((len(left_out) - 1) * np.var(left_out))
    error = np.sqrt(max(variances[0] + variances[1] - variances[2], *variances[:2]))
    value = np.corrcoef(x, y)[0, 1]
    edges = np.tanh(np.arctanh(value) + np.array([-1, 1]) * stats.t.ppf(0.975, 8) * error)
    found = group_correlation(x[:, None], y[:, None], facts, np.zeros(18, dtype=int))
    np.testing.assert_allclose([found.value, found.low, found.high], [value, *edges])
    assert (found.facts, found.prompts, found.lonely) == (18, 9, 0) and abs(found.null.mean()) < 1e-9


def test_intervals_hold_the_truth_where_both_prompts_of_a_fact_move_it() -> None:
    rng, (facts, ways) = np.random.default_rng(0), ring(15, 4)
    held = {"by prompts": 0, "by facts": 0}
    for _ in range(300):
        values = sum(rng.normal(size=15)[way] for way in ways) + rng.normal(size=60)
        for name, drawn in (("by prompts", facts), ("by facts", facts.label)):
            found = mean_over_facts(values, drawn)
            held[name] += found.low <= 0 <= found.high
    assert held["by prompts"] > 0.93 * 300 and held["by facts"] < 0.85 * 300


def test_a_relation_of_many_to_many_has_intervals_and_a_control() -> None:
    """15 targets of two evidences each, which have two targets each: one chain, of which nothing had an interval."""
    asked = [(i, 20 + (i + turn) % 15) for turn in range(2) for i in range(15)]
    pairs = rp.ReversalPairs.from_pairs(
        rp.ReversalPair(rp.Query([50, e, 51, t], [3], [1]), rp.Query([50, t, 52, e], [3], [1]), "swapped", f"{t} {e}")
        for t, e in asked
    )
    attention, gradient = rp.probe(gpt2(scale=0.4), pairs, only=("attention", "gradient"), progress=False)
    for reading in (attention, gradient):
        assert np.isfinite(reading.interval).all() and not reading.undefined
        assert (reading.facts, reading.prompts) == (30, 15) and reading.control is not None
        assert "n = 30 pairs of 30 facts, drawn as 15 by the prompts they share" in repr(reading)
    assert np.isfinite([gradient.excess.low, gradient.control.interval[0]]).all()
    columns = ["value", "low", "high"]
    for reading, table, by in (
        (attention, head_correlations(attention.frame), ["layer", "head"]),
        (gradient, cell_cosines(gradient.frame, ["role"]), ["role"]),
    ):
        slow = reading.summary(by=by)[[*by, *columns]].astype({name: str for name in by}).set_index(by).sort_index()
        rows = table.dropna(subset=by)[[*by, *columns]].astype({name: str for name in by}).set_index(by).sort_index()
        assert np.isfinite(rows.to_numpy()).all() and rows.index.tolist() == slow.index.tolist()
        np.testing.assert_allclose(rows.to_numpy(float), slow.to_numpy(float), rtol=1e-6)


def scored(forward: np.ndarray, reverse: np.ndarray, group: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Rows of an attention reading, one head: each prompt has a score of its own."""
    rng, size, reversed_ = np.random.default_rng(seed), len(forward), 1000 + reverse
    label = np.array([f"f{place:03}" for place in range(size)])
    names = {"pair": np.arange(size), "fact": label, "kind": "same_target", "group": group, "layer": 0, "head": 0}
    offsets = {f"{name}_{side}": group + 1 for name in ("offset", "distance") for side in ("forward", "reverse")}
    scores = rng.normal(size=2000)
    x, y = scores[forward], scores[reversed_] + 0.5 * scores[forward]
    prompts = forward.tolist(), reversed_.tolist()
    drawn = {"shown": kin(label, *prompts)}
    drawn |= {name: kin(label, side) for name, side in zip(("shown_forward", "shown_reverse"), prompts, strict=True)}
    return pd.DataFrame(names | offsets | {"score_forward": x, "score_reverse": y, "reason": ""} | drawn)


@pytest.mark.parametrize(("sets", "large"), [(8, True), (7, False)])
def test_a_group_in_chains_is_as_large_as_the_fewer_sets_of_either_direction(sets: int, large: bool) -> None:
    """Beside a group of facts of their own: it was left out as "fewer than 8 facts", however many sets it had."""
    forward = np.r_[100 + np.arange(10), np.arange(24) % sets]  # a ring: with one prompt further on each round
    reverse = np.r_[100 + np.arange(10), (np.arange(24) + 2 * (np.arange(24) // sets)) % (sets + 1)]
    frame = scored(forward, reverse, np.r_[np.zeros(10, dtype=int), np.ones(24, dtype=int)])
    assert frame["shown"].iloc[10:].nunique() == 1 and frame["shown_forward"].iloc[10:].nunique() == sets
    by_group = [np.corrcoef(part["score_forward"], part["score_reverse"])[0, 1] for _, part in frame.groupby("group")]
    value, n = (np.mean(by_group), 34) if large else (by_group[0], 10)
    reading = rp.Reading("attention_correlation", frame, {"control": True, "seed": 0})
    assert reading.value == pytest.approx(value) and reading.n == n
    assert reading.undefined == ({} if large else {"group of fewer than 8 facts": 24})
    assert np.isfinite(reading.interval).all()
    heads = head_correlations(frame)
    assert heads["value"].to_numpy() == pytest.approx(value)
    cells = distance_correlations(frame)
    assert cells["value"].tolist() == pytest.approx(by_group) and cells["n"].tolist() == [10, 24]
    both = Correlations.of(frame)
    assert both.under(np.ones((1, len(both.facts))))[0] == pytest.approx(value)
    assert both.large.ravel().tolist() == [True, large]
    assert large_enough(frame)["group"].value_counts().to_dict() == ({0: 10, 1: 24} if large else {0: 10})


@pytest.mark.parametrize("old", ["none", "shown"])
def test_rows_with_and_without_the_columns_are_joined(old: str) -> None:
    """As the refusal of pairs that are numbered twice tells people to: it ended in a TypeError of NumPy's."""
    chain = scored(np.arange(20) % 10, (np.arange(20) + np.arange(20) // 10) % 10, np.zeros(20, dtype=int))
    lone = scored(np.arange(100, 112), np.arange(100, 112), np.zeros(12, dtype=int), seed=1)
    lone["fact"] = [f"g{place}" for place in range(12)]
    lone = lone.assign(pair=lone["pair"] + 20).drop(columns=["shown", "shown_forward", "shown_reverse"])
    if old == "shown":  # of an older version, which knew sets of either direction alone
        lone["shown"] = [f"g{place // 2 * 2}" for place in range(12)]
    frame = pd.concat([chain, lone], ignore_index=True)
    drawn = 6 if old == "shown" else 12
    facts = Facts.of_rows(frame)
    assert facts.sizes == {"facts": 32, "prompts": 10 + drawn} and facts.ways is not None
    for side in ("forward", "reverse"):
        assert Facts.of_rows(frame, side).sizes == {"facts": 32, "prompts": 10 + drawn}
        asked = frame.assign(direction=side)
        assert Facts.of_rows(asked).sizes == {"facts": 32, "prompts": 10 + drawn}
    reading = rp.Reading("attention_correlation", frame, {"control": True, "seed": 0})
    assert np.isfinite(reading.interval).all() and reading.prompts == 10 + drawn
    known = lone.assign(**{"shown": lone["fact"], "shown_forward": lone["fact"], "shown_reverse": lone["fact"]})
    if old == "none":  # columns that say that each fact is drawn by itself say what their absence does
        again = rp.Reading("attention_correlation", pd.concat([chain, known], ignore_index=True), reading.meta)
        assert (again.value, *again.interval) == (reading.value, *reading.interval)


def test_rows_of_several_readings_that_join_a_fact_otherwise_join_it_by_each_direction() -> None:
    chain = scored(np.arange(20) % 10, (np.arange(20) + np.arange(20) // 10) % 10, np.zeros(20, dtype=int))
    other = chain.assign(pair=chain["pair"] + 20, shown_reverse=chain["fact"], shown_forward=chain["fact"])
    other["shown_forward"] = np.where(other["fact"].isin(["f000", "f001"]), "f000", other["shown_forward"])
    facts = Facts.of_rows(pd.concat([chain, other], ignore_index=True))
    assert facts.ways is not None and facts.sides is not None
    for side, joined in zip(facts.sides, (9, 10), strict=True):  # f000, f001 with f010, f011: one set of two
        assert len(np.unique(side)) == joined
        assert pd.DataFrame({"fact": facts.label, "side": side}).groupby("fact")["side"].nunique().eq(1).all()
