"""The bounds of the paper: against its tables, against matrices and simulated keys, and where they must fail."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from revprobe import (
    RevprobeError,
    alibi_correlation,
    rope_asymmetric_bound,
    rope_conditional_correlation,
    rope_correlation_bound,
    rope_correlation_tail,
    rope_limit_bound,
    rope_query_bound,
    theory_tables,
)
from revprobe.probes.theory.score_correlation import mean_bound, rope_frequencies

QUERIES = 10_000


# --- slow references ------------------------------------------------------------------------------------------------


def rotation(d: int, tokens: float, base: float) -> np.ndarray:
    """R_D of the paper, block by block: plane k is entries 2k and 2k + 1."""
    matrix = np.zeros((d, d))
    for k in range(d // 2):
        angle = tokens * base ** (-2 * k / d)
        matrix[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = [
            [math.cos(angle), -math.sin(angle)],
            [math.sin(angle), math.cos(angle)],
        ]
    return matrix


def key_covariance(query: np.ndarray, alignment: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """The block covariance of App. A.3, from the query's own directions."""
    covariance = np.zeros((len(query), len(query)))
    for k in range(len(query) // 2):
        block = slice(2 * k, 2 * k + 2)
        along = np.outer(query[block], query[block]) / (query[block] @ query[block])
        covariance[block, block] = variance[k] / 2 * (np.eye(2) + alignment[k] * (2 * along - np.eye(2)))
    return covariance


def correlation_by_matrices(query, alignment, variance, forward, reverse, base) -> float:
    """Corr(q^T R_Df k, q^T R_-Dr k) over k with the covariance above."""
    sigma = key_covariance(query, alignment, variance)
    left, right = (rotation(len(query), turn, base).T @ query for turn in (forward, -reverse))
    return float(left @ sigma @ right / math.sqrt((left @ sigma @ left) * (right @ sigma @ right)))


def plane_energy(query: np.ndarray) -> np.ndarray:
    return np.square(query.reshape(*query.shape[:-1], -1, 2)).sum(-1)


# --- the printed tables ----------------------------------------------------------------------------------------------


def test_tables_3_and_4_come_out_to_the_printed_digit() -> None:
    """33 cells; a wrong frequency, range, variance or column order moves some by more than half a unit."""
    tables = theory_tables(samples=10)
    exact = tables[tables["table"] != 5]
    assert len(exact) == 3 + 5 * 6, "three minima of Table 3, five distances x six columns of Table 4"
    assert exact["within"].all(), f"off: {exact[~exact['within']]}"
    assert [f"{value:.3f}" for value in exact["ours"]] == [f"{value:.3f}" for value in exact["paper"]]
    assert exact["paper"].head(3).tolist() == [0.337, 0.384, 0.410], "Table 3 as printed"


def test_table_5_reports_its_grid_and_does_not_hide_its_difference() -> None:
    """Our grid gives about 0.19, 0.27, 0.33; the paper prints 0.275, 0.363, 0.395 on a grid that is not legible."""
    fifth = theory_tables().query("table == 5")
    assert np.allclose(fifth["ours"], [0.19, 0.27, 0.33], atol=0.01), fifth["ours"].tolist()
    assert np.allclose(fifth["difference"], fifth["ours"] - [0.275, 0.363, 0.395]), "difference is ours - paper"
    assert not fifth["within"].any(), "a cell outside the tolerance must be marked"
    assert fifth["note"].str.contains("grid D_f, D_r = 1..50").all(), "the grid must stand beside the number"
    assert fifth["note"].str.contains("exact correlation").all(), "the surrogate is a bound only where not negative"


def test_the_error_of_random_queries_stands_in_a_column_of_its_own() -> None:
    """Closed forms have none; Table 5's is that of the cell it was found in, larger than half a printed digit."""
    tables = theory_tables(samples=500, seed=2)
    assert (tables.query("table != 5")["standard_error"] == 0).all()
    fifth = tables.query("table == 5")
    for row in fifth.itertuples():
        distances = [int(part) for part in row.note.split("D_f = ")[1].split(":")[0].split(", D_r = ")]
        found = rope_asymmetric_bound(int(row.column[4:]), *distances, samples=500, seed=2)
        assert row.standard_error == pytest.approx(found["bound_error"][0])
        assert row.ours == pytest.approx(found["bound"][0])
    assert (fifth["standard_error"] > fifth["tolerance"]).all()


def test_the_columns_of_the_tables_are_a_contract() -> None:
    """The command line writes these columns; a boolean `within` selects the cells to mark."""
    tables = theory_tables(samples=10)
    columns = ["table", "row", "column", "paper", "ours", "standard_error", "difference", "tolerance", "within", "note"]
    assert tables.columns.tolist() == columns
    assert tables["within"].dtype == bool and not tables.isna().any().any()
    assert not tables.duplicated(["table", "row", "column"]).any(), "each cell once"


# --- equal distances -------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    planes=st.integers(1, 64),
    distance=st.integers(0, 200),
    base=st.sampled_from([500.0, 10_000.0, 1_000_000.0]),
    ceiling=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ten_thousand_admissible_covariances_keep_the_bounds(planes, distance, base, ceiling, seed) -> None:
    """The exact correlation is never below the q-specific bound, nor its mean below the bound on the mean."""
    rng = np.random.default_rng(seed)
    energy = plane_energy(rng.normal(size=(QUERIES, 2 * planes)))
    rho = rng.uniform(0, ceiling, size=(QUERIES, planes))
    exact = rope_conditional_correlation(energy, rho, distance, distance, base)
    own = rope_query_bound(energy, distance, base)
    assert exact.shape == own.shape == (QUERIES,)
    assert (exact >= own - 1e-12).all(), f"below its bound by {(own - exact).max()}"
    expected = rope_correlation_bound(2 * planes, distance, base)
    # At rho = 0 exact equals its bound, whose mean over queries is the expectation up to sampling.
    error = own.std() / math.sqrt(QUERIES)
    assert exact.mean() >= expected - 5 * error - 1e-12, f"mean {exact.mean()} below {expected} ± {error}"
    assert abs(own.mean() - expected) <= 5 * error + 1e-12, "the q-specific bound averages to the expectation"


@settings(max_examples=25)
@given(
    planes=st.integers(2, 64),
    distance=st.integers(1, 50),
    depth=st.floats(0.05, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_keys_that_lie_across_the_query_break_the_bound(planes, distance, depth, seed) -> None:
    """rho < 0 in every plane violates the assumption, and the exact correlation falls below for every query."""
    rng = np.random.default_rng(seed)
    energy = plane_energy(rng.normal(size=(QUERIES, 2 * planes)))
    exact = rope_conditional_correlation(energy, np.full(planes, -depth), distance, distance)
    assert (exact < rope_query_bound(energy, distance)).all(), "an inadmissible covariance kept the bound"
    assert exact.mean() < rope_correlation_bound(2 * planes, distance), "nor may its mean keep it"


def test_variance_gathered_in_one_plane_breaks_the_bound() -> None:
    """Equal variance of the planes is part of the assumption: one loud plane at half a turn makes them opposed."""
    weights, frequencies = np.ones(2), np.array([math.pi / 2, 0.01])
    loud = rope_conditional_correlation(weights, np.zeros(2), 1, 1, frequencies=frequencies, variance=[1.0, 1e-3])
    assert loud < -0.99 < rope_query_bound(weights, 1, frequencies=frequencies), loud


def test_single_queries_fall_below_the_bound_on_the_mean() -> None:
    """At rho = 0 about half do: the reason why a figure draws the bound of the head's own query."""
    energy = plane_energy(np.random.default_rng(0).normal(size=(QUERIES, 128)))
    below = (rope_query_bound(energy, 20) < rope_correlation_bound(128, 20)).mean()
    assert 0.4 < below < 0.6, f"{below:.2f} of queries below the mean"


@pytest.mark.parametrize("draw", range(6))
def test_the_conditional_correlation_is_that_of_the_matrices(draw: int) -> None:
    """Against q^T R Sigma R^T q with whole matrices, at unequal distances, alignments and variances of any kind."""
    rng = np.random.default_rng(draw)
    d, base = int(rng.choice([2, 8, 32])), float(rng.choice([50.0, 10_000.0]))
    query, rho, variance = rng.normal(size=d), rng.uniform(-1, 1, d // 2), rng.uniform(0.1, 3, d // 2)
    forward, reverse = rng.integers(0, 60, 2)
    ours = rope_conditional_correlation(plane_energy(query), rho, forward, reverse, base, variance=variance)
    slow = correlation_by_matrices(query, rho, variance, forward, reverse, base)
    assert ours == pytest.approx(slow, abs=1e-10), f"d={d}, distances {forward}, {reverse}"


@pytest.mark.parametrize(("forward", "reverse", "sign"), [(5, 5, 1), (3, 17, 1), (3, 17, -1)])
def test_simulated_gaussian_keys_show_the_conditional_correlation(forward: int, reverse: int, sign: int) -> None:
    """No formula: keys are drawn, scored through rotation matrices, and the scores correlated."""
    rng = np.random.default_rng(7)
    d, count = 8, 400_000
    query, rho, variance = rng.normal(size=d), sign * rng.uniform(0.2, 1, d // 2), rng.uniform(0.5, 2, d // 2)
    keys = rng.multivariate_normal(np.zeros(d), key_covariance(query, rho, variance), size=count, method="cholesky")
    scores = [keys @ (rotation(d, turn, 10_000.0).T @ query) for turn in (forward, -reverse)]
    seen = float(np.corrcoef(*scores)[0, 1])
    exact = rope_conditional_correlation(plane_energy(query), rho, forward, reverse, variance=variance)
    assert abs(seen - exact) < 5 * (1 - exact**2) / math.sqrt(count), f"simulated {seen}, exact {exact}"


def test_bounds_over_many_distances_are_those_of_each() -> None:
    """Vectorized over distances, against one plain sum each."""
    d, distances = 64, np.arange(1, 51)
    slow = [2 / d * sum(math.cos(2 * D * 10_000 ** (-2 * k / d)) for k in range(d // 2)) for D in distances]
    assert np.allclose(rope_correlation_bound(d, distances), slow, atol=1e-12)
    assert isinstance(rope_correlation_bound(d, 3), float), "a number in, a number out"
    weights = np.random.default_rng(0).exponential(size=(5, 1, d // 2))
    grid = rope_query_bound(weights, distances)
    assert grid.shape == (5, 50), "queries x distances by broadcasting"
    assert grid[3, 7] == pytest.approx(rope_query_bound(weights[3, 0], 8)), "one cell of the grid alone"


def test_the_limit_is_the_integral_and_large_heads_approach_it() -> None:
    for distance in (1, 10, 50):
        by_quadrature = quad(lambda x, D=distance: math.cos(2 * D * 10_000.0**-x), 0, 1, limit=500)[0]
        assert rope_limit_bound(distance) == pytest.approx(by_quadrature, abs=1e-6)
        assert rope_correlation_bound(2**16, distance) == pytest.approx(rope_limit_bound(distance), abs=1e-3)
    assert rope_limit_bound([0, 50])[0] == 1.0, "no distance, no turn"


@pytest.mark.parametrize(("d", "distance", "tau"), [(128, 10, 0.3), (64, 50, 0.2), (256, 40, 0.35)])
def test_the_share_of_queries_is_at_least_what_cantelli_says(d: int, distance: int, tau: float) -> None:
    energy = plane_energy(np.random.default_rng(0).normal(size=(20_000, d)))
    share = (rope_query_bound(energy, distance) >= tau).mean()
    bound = rope_correlation_tail(d, distance, tau)
    assert share >= bound, f"{share} of queries reach {tau}, the bound says at least {bound}"
    variance = rope_query_bound(energy, distance).var()
    gap = rope_correlation_bound(d, distance) - tau
    assert bound == pytest.approx(gap**2 / (gap**2 + variance), rel=0.05), "the Dirichlet variance is the simulated one"


def test_cantelli_says_nothing_above_the_mean() -> None:
    mean = rope_correlation_bound(128, 30)
    assert math.isnan(rope_correlation_tail(128, 30, mean)), "undefined is NaN, not 0"
    assert np.isnan(rope_correlation_tail(128, 30, [mean - 0.1, mean + 0.1])).tolist() == [False, True]


# --- unequal distances and ALiBi -------------------------------------------------------------------------------------


def dinkelbach(weights: np.ndarray, far: np.ndarray, near: np.ndarray) -> float:
    """The paper's iteration: the least surrogate over rho in [0, 1]."""
    gamma = 1.0
    for _ in range(100):
        rho = (near * (1 - gamma * far) < 0).astype(float)
        value = (weights * (far + rho * near)).sum() / (weights * (1 + rho * far * near)).sum()
        if abs(value - gamma) < 1e-14:
            break
        gamma = value
    return float(gamma)


@pytest.mark.parametrize(("forward", "reverse"), [(21, 50), (3, 3), (1, 40)])
def test_the_closed_form_worst_case_is_what_dinkelbach_converges_to(forward: int, reverse: int) -> None:
    """Draw by draw with the same random queries, and the exact correlation at that alignment by its own function."""
    d, samples = 64, 200
    row = rope_asymmetric_bound(d, forward, reverse, samples=samples, seed=3).iloc[0]
    energy = np.random.default_rng(3).exponential(size=(samples, d // 2))
    theta = rope_frequencies(d)
    far, near = np.cos((forward + reverse) * theta), np.cos((forward - reverse) * theta)
    slow = np.array([dinkelbach(one, far, near) for one in energy])
    assert row["bound"] == pytest.approx(slow.mean(), abs=1e-12)
    assert row["bound_error"] == pytest.approx(slow.std(ddof=1) / math.sqrt(samples))
    assert row["negative"] == pytest.approx((slow < 0).mean())
    exact = rope_conditional_correlation(energy, (near < 0).astype(float), forward, reverse)
    assert row["exact"] == pytest.approx(exact.mean(), abs=1e-12)
    assert (exact >= slow - 1e-12)[slow >= 0].all(), "where not negative, the surrogate bounds the exact value"


@settings(max_examples=25)
@given(forward=st.integers(1, 50), reverse=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_no_admissible_alignment_is_worse_than_the_closed_form(forward, reverse, seed) -> None:
    rng = np.random.default_rng(seed)
    theta, weights, rho = rope_frequencies(32), rng.exponential(size=16), rng.uniform(size=(500, 16))
    far, near = np.cos((forward + reverse) * theta), np.cos((forward - reverse) * theta)
    surrogate = (weights * (far + rho * near)).sum(-1) / (weights * (1 + rho * far * near)).sum(-1)
    assert (surrogate >= dinkelbach(weights, far, near) - 1e-12).all()


def test_frequencies_of_a_model_take_the_place_of_the_bases() -> None:
    """Partial rotary: by brute force over all corners of the alignment cube, each query's worst, from plain sums."""
    theta, samples = np.array([1.0, 0.2, 0.04, 0.0]), 300
    row = rope_asymmetric_bound(8, 4, 23, samples=samples, seed=1, frequencies=theta).iloc[0]
    energy = np.random.default_rng(1).exponential(size=(samples, 4))
    far, near = np.cos(27 * theta), np.cos(19 * theta)
    worst = np.full(samples, np.inf)
    for corner in range(16):
        rho = np.array([corner >> plane & 1 for plane in range(4)])
        worst = np.minimum(worst, (energy * (far + rho * near)).sum(1) / (energy * (1 + rho * far * near)).sum(1))
    assert row["bound"] == pytest.approx(worst.mean(), abs=1e-12)
    assert abs(row["bound"] - rope_asymmetric_bound(8, 4, 23, samples=samples, seed=1)["bound"][0]) > 0.01
    own = rope_asymmetric_bound(8, 4, 23, samples=samples, frequencies=rope_frequencies(8))
    assert own["bound"][0] == rope_asymmetric_bound(8, 4, 23, samples=samples)["bound"][0]


def test_unequal_distances_are_drawn_once_and_may_be_exchanged() -> None:
    grid = rope_asymmetric_bound(64, [3, 9, 4], [9, 3, 4], samples=50)
    values = ["bound", "exact", "negative"]
    assert grid.loc[0, values].tolist() == pytest.approx(grid.loc[1, values].tolist(), abs=1e-12)
    again = rope_asymmetric_bound(64, 3, 9, samples=50)
    assert again["bound"][0] == pytest.approx(grid["bound"][0], abs=1e-12), "the same queries serve every pair"
    other = rope_asymmetric_bound(64, 3, 9, samples=50, seed=1)
    assert other["bound"][0] != grid["bound"][0], "the seed is used"


def test_alibi_is_exactly_one_for_any_keys_and_distances() -> None:
    """The scores of drawn keys, minus slope times distance, correlate at 1; the function says 1.0 in every shape."""
    rng = np.random.default_rng(0)
    content = rng.normal(size=(1000, 8)) @ rng.normal(size=8)
    assert np.corrcoef(content - 0.5 * 3, content - 0.5 * 40)[0, 1] == pytest.approx(1.0, abs=1e-12)
    assert alibi_correlation(3) == 1.0
    assert alibi_correlation([1, 2, 3], 7).tolist() == [1.0, 1.0, 1.0]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rope_correlation_bound(7, 1), "d=7: expected an even number"),
        (lambda: rope_correlation_bound(8, -1), "distance -1.0: expected finite numbers of at least 0"),
        (lambda: rope_correlation_bound(8, math.nan), "distance nan"),
        (lambda: rope_correlation_bound(8, 1, base=0), "base=0: expected a positive number"),
        (lambda: rope_limit_bound(1, base=1), "needs a base above 1"),
        (lambda: rope_query_bound([1, -1], 1), r"weights -1\.0"),
        (lambda: rope_query_bound([1, 1], 1, frequencies=[1.0]), "one for each of the 2 planes"),
        (lambda: rope_conditional_correlation([1, 1], [0, 1.5], 1, 1), r"alignment 1.5: expected numbers in \[-1, 1\]"),
        (lambda: rope_asymmetric_bound(8, 1, 1, samples=1), "samples=1: expected at least 2"),
        (lambda: alibi_correlation([1, -2]), "distance -2.0"),
        (lambda: alibi_correlation([1, 2], [1, 2, 3]), r"shape \(2,\), reverse of shape \(3,\)"),
        (lambda: rope_correlation_bound(math.nan, 3), "head dimension d=nan: expected an even number"),
        (lambda: rope_correlation_bound(math.inf, 3), "head dimension d=inf: expected an even number"),
        (lambda: rope_correlation_bound(None, 3), "d=None: expected a whole number"),
        (lambda: rope_correlation_bound("8", 3), "d='8': expected a whole number"),
        (lambda: rope_correlation_bound(8, "far"), "distance='far': expected a number"),
        (lambda: rope_correlation_bound(8, 1, base=None), "base=None: expected a number"),
        (lambda: rope_correlation_tail(8, 1, tau=math.nan), "tau nan: expected finite numbers"),
        (lambda: rope_query_bound([1, 1], 1, frequencies=[math.nan, 1]), "frequencies nan: expected finite numbers"),
        (lambda: mean_bound([math.nan, 1], 1), "frequencies nan"),
        (lambda: mean_bound([], 1), r"frequencies of shape \(0,\): expected one for each plane"),
        (lambda: rope_asymmetric_bound(64, [1, 2], [1, 2, 3]), r"shape \(2,\), reverse of shape \(3,\): expected one"),
        (
            lambda: rope_asymmetric_bound(64, 1, 2, samples=2.5),
            "samples=2.5: expected at least 2 random",
        ),
        (lambda: rope_asymmetric_bound(64, 1, 2, frequencies=[1.0]), "one for each of the 32 planes"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(call, words: str) -> None:
    with pytest.raises(RevprobeError, match=words):
        call()


def test_undefined_correlations_are_nan() -> None:
    """A zero query has no shares; keys along one line, at a quarter turn from the query, give a score no variance."""
    assert math.isnan(rope_query_bound([0.0, 0.0], 3))
    still = rope_conditional_correlation([1.0], [1.0], 1, 1, frequencies=[math.pi / 2])
    assert math.isnan(still), f"a score that does not vary correlates with nothing, got {still}"
