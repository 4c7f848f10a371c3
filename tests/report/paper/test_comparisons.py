"""A value on a limit: every verdict on it is the same as computed and as read back from a table."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_published import made as published
from made_sweeps import one_run

from revprobe.finetune.config.loading import load_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.report.paper.comparisons import all_pass, passes
from revprobe.report.paper.evidence_runs import axes_of, write_table
from revprobe.report.paper.evidence_sentences import _at_least
from revprobe.report.paper.predictions import FITTED, HIGH, LETTERS, LOW, NOUGHT, OUTVOTED, fading_time, judged
from revprobe.report.paper.published_recipe import BLIND, INSIDE, joint_test, places
from revprobe.report.paper.rules import (
    CANNOT,
    EQUAL,
    FAILS,
    FORWARD,
    HOLDS,
    MARGIN,
    Bound,
    Seed,
    by_equality,
    by_threshold,
)

SIGNS = (">", ">=", "<", "<=")
BOUNDS = (HIGH, LOW, LETTERS, OUTVOTED, FITTED, NOUGHT, Bound(">=", FORWARD))
LIMITS = sorted({bound.limit + apart for bound in BOUNDS for apart in (-MARGIN, 0.0, MARGIN)} - {-0.095})


def read_back(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    write_table(table, folder / "table.parquet")
    return pd.read_parquet(folder / "table.parquet")


def on(limit: float) -> list[float]:
    """A limit as fractions of questions, and sums of them, come to it: they differ in their last digits."""
    shares = [round(limit * n) / n for n in (20, 26 * 90, 1000, 3000) if abs(round(limit * n) / n - limit) < 1e-12]
    return [limit, *shares, (limit + 0.3) - 0.3, (limit - 0.1) + 0.1, float(np.mean([limit] * 7))]


def test_a_value_on_a_limit_is_on_its_closed_side_however_it_was_come_by() -> None:
    for limit in LIMITS:
        for value in [*on(limit), *(float(np.float32(one)) for one in on(limit))]:
            assert [passes(value, sign, limit) for sign in SIGNS] == [False, True, False, True], (value, limit)
        for apart in (1e-5, 1 / 5000):
            assert [passes(limit + apart, sign, limit) for sign in SIGNS] == [True, True, False, False]
            assert [passes(limit - apart, sign, limit) for sign in SIGNS] == [False, False, True, True]
    assert [passes(float("nan"), sign, 0.5) for sign in SIGNS] == [None] * 4


def test_of_parts_one_against_decides_and_one_untold_keeps_it_open() -> None:
    assert all_pass([True, True]) is True and all_pass([]) is None
    assert all_pass([True, None]) is None and all_pass([True, None, False]) is False


@pytest.mark.parametrize("bound", [*BOUNDS, Bound("<=", 0.5)], ids=str)
def test_a_verdict_on_a_threshold_is_that_of_the_file(bound: Bound, tmp_path: Path) -> None:
    """On the limit, and by a tenth beyond it, where missing becomes failing."""
    beyond = bound.limit + (-MARGIN if bound.sign[0] == ">" else MARGIN)
    for limit, verdict in ((bound.limit, HOLDS if bound.sign.endswith("=") else CANNOT), (beyond, CANNOT)):
        table = pd.DataFrame({"value": on(limit)})
        for values in (table["value"], read_back(table, tmp_path)["value"]):
            for value in values:
                seeds = [Seed(0, bound.limit - beyond + bound.limit), Seed(1, float(value))]
                assert by_threshold(seeds, bound) == verdict, (value, bound)
    assert by_threshold([Seed(0, beyond + np.sign(beyond - bound.limit) * 1e-4)], bound) == FAILS


@pytest.mark.parametrize(("keep", "sign"), [(0.5, 1), (0.2, 1), (0.05, 1), (0.9, -1), (0.31, -1)])
def test_a_verdict_of_no_change_is_that_of_the_file(keep: float, sign: int, tmp_path: Path) -> None:
    """Every seed moved by just 0.15: both ends of the interval lie on the limit, which is within."""
    table = pd.DataFrame({"keep": [keep] * 5, "other": [keep + sign * EQUAL] * 5})
    for own in (table, read_back(table, tmp_path)):
        moved = own["other"].astype(float) - own["keep"].astype(float)
        assert by_equality([Seed(seed, float(one)) for seed, one in enumerate(moved)]) == HOLDS
    far = [Seed(seed, sign * (EQUAL + 1e-4)) for seed in range(5)]
    assert by_equality(far) == FAILS


def test_every_prediction_is_judged_alike_before_and_after_the_file(tmp_path: Path) -> None:
    """All that a rule asks of a run lies on a limit, its gate too; the curves end in it."""
    configs = load_config("negative-evidence", SweepConfig).runs()
    few = [one for one in configs if axes_of(one) | {"recipe": "W", "length": 10, "seed": 0} == axes_of(one)]
    tables, rows = zip(*(one_run(one, None, None) for one in few), strict=True)
    runs, answers = pd.DataFrame([row for own in rows for row in own]), pd.concat(tables, ignore_index=True)
    columns = ("reverse", "reverse_lowest", "mirror_reverse", "letters_only", "placeholder_share")
    late = answers["step"] > 500
    kinds = ["switch_dial", "switch_step"]  # kept as they are: what a file does to None is not what is asked here
    for limit in (LETTERS.limit, HIGH.limit, LOW.limit + MARGIN, NOUGHT.limit):
        found = dict.fromkeys((*columns, "negative_probability"), limit) | {"forward": FORWARD, "reverse_errors": 20}
        tables = runs.assign(**found), answers.assign(accuracy=answers["accuracy"].mask(late, limit))
        before = judged(*tables)
        back = read_back(tables[0].drop(columns=kinds), tmp_path)
        back = back.assign(**{name: runs[name].to_numpy() for name in kinds})
        after = judged(back, read_back(tables[1], tmp_path))
        said = ["prediction", "cell", "claim", "verdict", "n"]
        pd.testing.assert_frame_equal(before[said], after[said])
        assert (before["n"] > 0).any(), "no seed met its gate, which all lie on"


def test_a_fall_is_dated_alike_before_and_after_the_file() -> None:
    steps, curve = np.array([0, 100, 200, 300]), np.array([0.9, 0.4, (0.5 - 0.1) + 0.1 - 1e-12, 0.3])
    assert fading_time(steps, curve) == fading_time(steps, curve.astype("float32")) == 300


def test_what_is_said_to_be_the_least_is_the_files() -> None:
    assert [_at_least(float(np.float32(share))) for share in (0.95, 0.9, 0.97, 0.9499)] == [
        "95 %",
        "90 %",
        "97 %",
        "94 %",
    ]


def test_a_distribution_of_just_forty_points_informs(tmp_path: Path) -> None:
    runs, answers = published(reach=20.0)
    for table in (answers, read_back(answers, tmp_path)):
        found = places(runs, table)
        rope = found[(found["position_encoding"] == "rope") & (found["length"] == 10)]
        assert set(rope["reads"]) == {INSIDE} and BLIND not in set(rope["reads"])


def test_a_pair_without_a_number_leaves_the_joint_test_open() -> None:
    """Neither above nor below: it was counted as the other way round."""
    runs, answers = published()
    lost = runs["reverse"].where(runs["run"] != "absolute-l10-s1")
    row = joint_test(runs.assign(reverse=lost), places(runs, answers)).iloc[0]
    assert (row["verdict"], row["above"], row["pairs"]) == (CANNOT, 5, 6)
