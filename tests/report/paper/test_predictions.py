"""Each prediction on made runs: what the accounts say would come, what would contradict them, and what is missing.

A made sweep is one in which every prediction holds; each test changes what it names.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_sweeps import Row, made

from revprobe.report.paper.predictions import (
    NARROWED,
    SUFFICES,
    fading_time,
    judged,
    overall,
)
from revprobe.report.paper.rules import CANNOT, FAILS, GATE, HOLDS, NOT_RUN


def verdicts(runs: pd.DataFrame, answers: pd.DataFrame, recipes: str = "W") -> dict[tuple[str, str], str]:
    table = overall(judged(runs[runs["recipe"].isin([*recipes])], answers))
    return {(row["prediction"], row["recipe"]): row["verdict"] for _, row in table.iterrows()}


def dialled(recipe: str = "W", **axes: Any) -> Callable[[Row], bool]:
    """Runs of a recipe with these axes, and without a switch unless one is named."""
    wanted = {"switch_dial": None, "masks": "rate", "recipe": recipe} | axes
    return lambda row: all(row[name] == value for name, value in wanted.items())


@pytest.fixture(scope="module")
def predicted() -> tuple[pd.DataFrame, pd.DataFrame]:
    return made()


def test_all_hold_where_all_comes_as_predicted(predicted: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    """What a recipe has no cell for is not run; scalar fades too, so negative evidence suffices."""
    found = verdicts(*predicted, recipes="WP")
    expected = {(str(name), recipe): HOLDS for name in range(8) for recipe in "WP"}
    expected |= {(f"0 ({kind})", recipe): HOLDS for kind in ("masked", "causal") for recipe in "WP"}
    expected |= {("open", "W"): SUFFICES}
    expected |= {(name, "P"): NOT_RUN for name in ("5", "6", "open")}
    assert found == expected


def test_nothing_is_judged_where_nothing_was_run() -> None:
    assert set(verdicts(*made(ran=lambda axes: False), recipes="WP").values()) == {NOT_RUN}


def test_every_part_names_its_seeds_and_numbers(predicted: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    parts = judged(*predicted).set_index(["recipe", "weights", "prediction", "cell"]).sort_index()
    row = parts.loc[("W", "ema", "1", "rope-l10-drop-right")]
    assert (row["n"], row["planned"], row["verdict"]) == (5, 5, HOLDS)
    assert (row["numbers"], row["why"], row["spans"][0][1:]) == ("all 5 0.990", "", pytest.approx((0.99, 0.99)))
    masked = {cell for (_, _, name, cell) in parts.index if name == "0 (masked)"}
    assert masked == set(predicted[0].query("objective == 'masked'")["cell"]), "every cell has its part"


@pytest.mark.parametrize(
    ("prediction", "of", "answers", "verdict"),
    [
        # 0: forgotten, in one seed of one cell; or outvoted by another letter.
        ("0", dialled(dial="drop-left", position_encoding="rope", seed=2), {"letters": 0.5}, FAILS),
        ("0", dialled(dial="drop-left", position_encoding="rope", seed=2), {"letters": 0.9}, CANNOT),
        ("0", dialled(dial="keep", position_encoding="absolute"), {"outvoted": 0.5}, FAILS),
        ("0", dialled(dial="keep", position_encoding="absolute"), {"outvoted": 0.9}, CANNOT),
        ("0", dialled(dial="keep"), {"reverse": 1.0, "outvoted": 0.0}, HOLDS),  # no error at all
        ("0 (causal)", dialled(objective="causal", dial="keep"), {"letters": 0.04}, FAILS),
        ("0 (masked)", dialled(objective="causal", dial="keep"), {"letters": 0.04}, HOLDS),
        ("0", dialled(objective="causal", dial="keep"), {"letters": 0.04}, FAILS),
        # 1 and 2: at one length.
        ("1", dialled(dial="drop-right", position_encoding="rope", length=20), {"reverse": 0.3}, FAILS),
        ("1", dialled(dial="drop-right", position_encoding="rope", length=20), {"reverse": 0.85}, CANNOT),
        ("2", dialled(dial="drop-right", position_encoding="absolute", length=10), {"reverse": 0.3}, FAILS),
        ("1", dialled(dial="drop-right", position_encoding="absolute", length=10), {"reverse": 0.3}, HOLDS),
        # 3: the other question moves along, or the own does not.
        ("3", dialled(dial="drop-right", position_encoding="rope", length=10, dose=0.0), {"mirror": 0.6}, FAILS),
        ("3", dialled(dial="mirror", position_encoding="rope", length=10), {"mirror": 0.4}, FAILS),
        ("3", dialled(dial="mirror", position_encoding="absolute", length=20), {"reverse": 0.6}, FAILS),
        # 4: the switches.
        ("4", dialled(dial="keep", switch_dial="mirror"), {"reverse": 0.7}, GATE),
        # 6 and 7.
        ("6", dialled(masks="2", dial="keep"), {"reverse": 0.9}, FAILS),
        ("6", dialled(masks="2", dial="drop-right"), {"reverse": 0.1}, FAILS),
        ("7", dialled(objective="causal", dial="drop-after"), {"reverse": 0.2}, FAILS),
        ("7", dialled(objective="causal", dial="drop-after"), {"reverse": 0.02}, CANNOT),
        ("7", dialled(objective="causal", dial="drop-after"), {"reverse": 0.004}, HOLDS),
    ],
)
def test_what_contradicts_a_prediction_fails_it(
    prediction: str, of: Callable[[Row], bool], answers: dict[str, float], verdict: str
) -> None:
    found = verdicts(*made(lambda axes: answers, of=of))[prediction, "W"]
    # A part that does not meet its gate leaves the prediction open.
    assert found == (CANNOT if verdict == GATE else verdict)


def test_one_recipe_says_nothing_of_the_other() -> None:
    found = verdicts(*made(lambda axes: {"reverse": 0.3}, of=dialled("P", dial="drop-right")), recipes="WP")
    assert (found["1", "W"], found["1", "P"]) == (HOLDS, FAILS)


def test_the_minimum_decides_what_stays(predicted: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    """One low reading in the second half of one seed: its mean is above 0.9, and yet the answer does not stay."""

    def dips(axes: Row) -> dict[str, float]:
        return {"reverse": 0.2} if axes["step"] == 4100 else {}

    of = dialled(dial="drop-right", position_encoding="rope", length=10, seed=1, dose=0.0)
    runs, answers = made(dips, of=of)
    own = runs[(runs["run"] == "rope-l10-s1-drop-right") & (runs["weights"] == "ema")].iloc[0]
    assert own["reverse"] > 0.9 and own["reverse_lowest"] == 0.2
    assert verdicts(runs, answers)["1", "W"] == FAILS and verdicts(runs, answers)["3", "W"] == HOLDS


def test_what_happens_in_the_first_half_is_no_part_of_the_statistic() -> None:
    early = made(lambda axes: {"reverse": 0.0} if axes["step"] <= 2500 else {}, of=dialled(dial="drop-right"))
    assert verdicts(*early)["1", "W"] == HOLDS


def test_a_run_whose_forward_accuracy_is_low_does_not_count() -> None:
    def of(axes: Row) -> bool:
        return dialled(dial="drop-right", position_encoding="rope")(axes) and axes["dose"] == 0

    everywhere = made(lambda axes: {"forward": 0.96, "reverse": 0.0}, of=of)
    assert verdicts(*everywhere)["1", "W"] == GATE
    once = made(lambda axes: {"forward": 0.96, "reverse": 0.0}, of=lambda axes: of(axes) and axes["seed"] == 0)
    assert verdicts(*once)["1", "W"] == CANNOT
    parts = judged(*once)
    own = parts[(parts["prediction"] == "1") & (parts["cell"] == "rope-l10-drop-right") & (parts["weights"] == "ema")]
    assert own["n"].item() == 4 and "s0 0.000 (does not count)" in own["numbers"].item()


def test_a_seed_that_is_missing_leaves_open_what_else_would_hold() -> None:
    missing = made(ran=lambda axes: not (axes["seed"] == 4 and axes["dial"] == "drop-right"))
    assert verdicts(*missing)["1", "W"] == CANNOT


def switched(before: str, after: str, curve: Callable[[int], float], seed: int | None = None) -> Any:
    def of(axes: Row) -> bool:
        named = (axes["dial"], axes["switch_dial"], axes["recipe"]) == (before, after, "W")
        return named and seed in (None, axes["seed"])

    return made(lambda axes: {"reverse": curve(axes["step"] - axes["switch_step"])}, of=of)


@pytest.mark.parametrize(
    ("before", "after", "curve", "verdict"),
    [
        ("keep", "drop-right", lambda step: 0.1 if step <= 0 else 0.3, FAILS),
        ("keep", "drop-right", lambda step: 0.1 if step <= 0 else 0.85, CANNOT),
        (
            "keep",
            "drop-right",
            lambda step: 0.1 if step < 1000 else 0.95,
            HOLDS,
        ),  # within 1,000 steps, the last of them
        ("keep", "drop-right", lambda step: 0.95, CANNOT),  # there was nothing to recover: the part's gate is not met
        ("drop-right", "keep", lambda step: 0.95 if step <= 0 else 0.7, FAILS),
        ("drop-right", "keep", lambda step: 0.95 if step <= 0 else 0.4, HOLDS),
        ("drop-right", "keep", lambda step: 0.1, CANNOT),
        ("keep", "mirror", lambda step: 0.1 if step != 500 else 0.7, FAILS),  # it recovers, be it once
        ("keep", "mirror", lambda step: 0.1 if step != 500 else 0.55, CANNOT),
    ],
)
def test_switches_are_judged_by_what_comes_within_a_thousand_steps(
    before: str, after: str, curve: Callable[[int], float], verdict: str
) -> None:
    assert verdicts(*switched(before, after, curve))["4", "W"] == verdict


def test_one_seed_that_does_not_recover_fails_the_switch() -> None:
    assert verdicts(*switched("keep", "drop-right", lambda step: 0.1, seed=3))["4", "W"] == FAILS


@pytest.mark.parametrize(
    ("accuracy", "time"),
    [
        ([0.0, 0.6, 0.7, 0.4, 0.3], 300.0),
        ([0.0, 0.6, 0.4, 0.6, 0.3], 400.0),  # for good
        ([0.0, 0.6, 0.4, 0.3, 0.5], np.inf),  # 0.5 is not below 0.5
        ([0.0, 0.1, 0.2, 0.3, 0.4], 0.0),
    ],
)
def test_the_time_to_fade_is_that_of_the_first_reading_below_for_good(accuracy: list[float], time: float) -> None:
    assert fading_time(np.array([0, 100, 200, 300, 400]), np.array(accuracy)) == time


def test_a_dose_that_fades_later_than_a_smaller_one_fails() -> None:
    later = made(lambda axes: {"reverse": 0.02 if axes["step"] >= 4000 else 0.8}, of=lambda a: a["dose"] == 0.3)
    assert verdicts(*later)["5", "W"] == FAILS
    never = made(
        lambda axes: {"reverse": 0.8}, of=lambda axes: 0 < axes["dose"] < 1
    )  # all censored, and the last fades
    assert verdicts(*never)["5", "W"] == HOLDS
    some = made(ran=lambda axes: axes["dose"] != 0.1)
    assert verdicts(*some)["5", "W"] == NOT_RUN
    parts = judged(*never)
    told = parts[(parts["prediction"] == "5") & (parts["weights"] == "ema") & (parts["recipe"] == "W")][
        "numbers"
    ].item()
    assert "s0 not by the end, not by the end, not by the end, not by the end, 800" in told


@pytest.mark.parametrize(
    ("reverse", "fitted", "verdict"),
    [
        (0.1, 0.99, SUFFICES),
        (0.1, 0.5, SUFFICES),
        (0.95, 0.99, NARROWED),
        (0.95, 0.5, CANNOT),  # it has not fitted the negatives, so nothing follows
        (0.55, 0.99, CANNOT),
    ],
)
def test_the_open_test_narrows_the_claim_only_where_the_negatives_are_fitted(
    reverse: float, fitted: float, verdict: str
) -> None:
    of = dialled(position_encoding="scalar", dial="keep")
    found = made(lambda axes: {"reverse": reverse}, of=of, late={"negative_probability": fitted})
    assert verdicts(*found)["open", "W"] == verdict


@pytest.mark.parametrize(("control", "verdict"), [(1.0, SUFFICES), (0.2, CANNOT), (None, CANNOT)])
def test_a_fade_that_its_control_shares_or_lacks_says_nothing_of_negative_evidence(
    control: float | None, verdict: str
) -> None:
    """Whatever else fades under drop-right as well is not faded by what drop-right leaves out."""

    def reverse(axes: Any) -> dict[str, float]:
        return {"reverse": 0.1 if axes["dial"] == "keep" else control or 1.0}

    def ran(axes: Any) -> bool:
        return control is not None or axes["position_encoding"] != "scalar" or axes["dial"] == "keep"

    found = made(reverse, of=dialled(position_encoding="scalar"), ran=ran)
    assert verdicts(*found)["open", "W"] == verdict


def test_raw_weights_stand_beside_and_decide_nothing(predicted: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    runs, answers = predicted
    wanders = runs.assign(
        reverse_lowest=runs["reverse_lowest"].mask((runs["weights"] == "raw") & (runs["dial"] == "drop-right"), 0.0)
    )
    table = overall(judged(wanders, answers)).set_index(["prediction", "recipe"])
    assert tuple(table.loc[("1", "W"), ["verdict", "raw"]]) == (HOLDS, FAILS)
