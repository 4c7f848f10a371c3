"""The rules: numbers in, a word out. Each verdict can be reached, and by what its sentence says."""

import numpy as np
import pytest
from scipy import stats

from revprobe.report.paper.rules import (
    CANNOT,
    FAILS,
    GATE,
    HOLDS,
    NOT_RUN,
    Bound,
    Seed,
    by_equality,
    by_order,
    by_threshold,
    combined,
    interval,
)

INF, NAN = float("inf"), float("nan")


def seeds(*values: float, counts: tuple[int, ...] | None = None) -> list[Seed]:
    """Seeds 0, 1, ...; `counts` names those that meet the gate, all when None."""
    return [Seed(i, value, counts is None or i in counts) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("found", "sign", "limit", "verdict"),
    [
        (seeds(0.91, 0.95, 1.0), ">", 0.9, HOLDS),
        (seeds(0.91, 0.95, 0.9), ">", 0.9, CANNOT),  # above is not at least
        (seeds(0.91, 0.95, 0.9), ">=", 0.9, HOLDS),
        (seeds(0.91, 0.95, 0.81), ">", 0.9, CANNOT),
        (seeds(0.91, 0.95, 0.8), ">", 0.9, CANNOT),  # by 0.1, which is not more than 0.1
        (seeds(0.91, 0.95, 0.79), ">", 0.9, FAILS),
        (seeds(0.1, 0.49), "<", 0.5, HOLDS),
        (seeds(0.1, 0.55), "<", 0.5, CANNOT),
        (seeds(0.1, 0.61), "<", 0.5, FAILS),
        (seeds(0.95, NAN), ">", 0.9, CANNOT),  # a seed that was not run has not passed
        (seeds(0.2, NAN), ">", 0.9, FAILS),
        (seeds(NAN, NAN), ">", 0.9, NOT_RUN),
        ([], ">", 0.9, NOT_RUN),
        (seeds(0.95, 0.2, counts=(0,)), ">", 0.9, CANNOT),  # what does not count neither passes nor fails
        (seeds(0.2, 0.95, counts=()), ">", 0.9, GATE),
        (seeds(NAN, 0.95, counts=()), ">", 0.9, GATE),
    ],
)
def test_a_threshold_holds_in_every_seed_and_fails_by_more_than_a_tenth(
    found: list[Seed], sign: str, limit: float, verdict: str
) -> None:
    assert by_threshold(found, Bound(sign, limit)) == verdict


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.01, 0.02, -0.01, 0.0, 0.03), HOLDS),
        ((0.1, 0.12, 0.14, 0.1, 0.13), HOLDS),
        ((0.105, 0.061, 0.111, -0.030, 0.200), CANNOT),  # the interval reaches beyond
        ((0.3, 0.31, 0.29, 0.3, 0.32), FAILS),
        ((-0.3, -0.31, -0.29, -0.3, -0.32), FAILS),
        ((0.3, -0.3), CANNOT),
        ((0.01, 0.02, NAN), CANNOT),
        ((0.01, NAN), CANNOT),  # one pair has no interval
        ((NAN, NAN), NOT_RUN),
    ],
)
def test_no_change_holds_where_the_interval_of_paired_differences_lies_within(
    differences: tuple[float, ...], verdict: str
) -> None:
    assert by_equality(seeds(*differences)) == verdict


def test_pairs_that_do_not_count_are_no_change_of_anything() -> None:
    assert by_equality(seeds(0.0, 0.0, counts=())) == GATE
    assert by_equality(seeds(0.0, 0.01, 0.9, counts=(0, 1))) == CANNOT


def test_the_interval_is_students_at_90_per_cent() -> None:
    values = [0.105, 0.061, 0.111, -0.030, 0.200]
    expected = stats.t.interval(0.90, 4, loc=np.mean(values), scale=stats.sem(values))
    assert interval(values) == pytest.approx(expected)
    assert all(np.isnan(interval([0.1])))


@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        ((INF, INF, 2000, 1000, 500), HOLDS),
        ((INF, 2000, 2000, 1000, 0), HOLDS),
        ((2000, 2000, 2000, 2000, 2000), CANNOT),  # nothing shortens
        ((INF, INF, INF, INF, INF), CANNOT),
        ((INF, 1000, 1100, 500, 100), CANNOT),  # later by less than two readings lie apart
        ((INF, 1000, 1300, 500, 100), FAILS),
        ((INF, 1000, INF, 500, 100), FAILS),  # by the end it has not come at all
        ((INF, NAN, 2000, 1000, 500), NOT_RUN),
        ((INF, NAN, 1000, 2000, 500), FAILS),  # what is there contradicts already
    ],
)
def test_time_shortens_with_the_dose_and_what_has_not_come_is_later_than_the_end(
    times: tuple[float, ...], verdict: str
) -> None:
    assert by_order([times], [150.0]) == [verdict]


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, FAILS, NOT_RUN], FAILS),
        ([HOLDS, NOT_RUN], CANNOT),
        ([HOLDS, CANNOT], CANNOT),
        ([HOLDS, GATE], CANNOT),
        ([GATE, GATE], GATE),
        ([NOT_RUN, NOT_RUN], NOT_RUN),
        ([], NOT_RUN),
    ],
)
def test_one_part_that_fails_decides_and_all_must_hold(parts: list[str], verdict: str) -> None:
    assert combined(parts) == verdict
