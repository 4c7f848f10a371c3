"""What a pair's mean over layers, heads or places is held against: the controls of the same cells, pair by pair."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

import revprobe as rp
import tiny
from revprobe.probes.statistics.causal_trace import causal_trace, head_ranking, route_edit
from revprobe.probes.statistics.coverage import ONE_FACT
from revprobe.probes.statistics.denoising import denoising_trace
from revprobe.probes.statistics.estimators import NO_PARTNER, NOT_FINITE, Measured

HIDDEN, ZERO, NO_OTHER = "evidence hidden", "probability 0 under the control's edit", "no other head"
Estimator = Callable[[pd.DataFrame, int], Measured]
# Each estimator with its column, and the columns that its frames have besides.
ESTIMATORS: dict[str, tuple[Estimator, str, dict[str, object]]] = {
    "route_edit": (route_edit, "change", {"scope": "head"}),
    "head_ranking": (head_ranking, "effect", {}),
    "causal_trace": (causal_trace, "effect", {}),
    "denoising_trace": (denoising_trace, "probability", {"part": "answer", "token": 1}),
}


def made(column: str, about: dict[str, object], *, pairs: int = 20, cells: int = 4, seed: int = 0) -> pd.DataFrame:
    """Cells of very different size; a fifth without a value, a third of the rest without a control."""
    draw, rows = np.random.default_rng(seed), []
    for pair in range(pairs):
        for cell in range(cells):
            value = draw.uniform(0, 0.2) + 0.2 * cell
            null, reason, why = value - draw.uniform(0, 0.05), "", ""
            if draw.random() < 0.2 or pair == 3:
                value, null, reason, why = np.nan, np.nan, HIDDEN, HIDDEN
            elif draw.random() < 0.33 or pair == 5:
                null, why = np.nan, ZERO
            row = {"pair": pair, "fact": f"f{pair // 2}", "direction": "reverse", "head": cell, column: value}
            rows.append(row | {f"{column}_control": null, "reason": reason, "reason_control": why} | about)
    frame = pd.DataFrame(rows)
    # As the probes write them: a category that no row has is no reason.
    kinds = pd.CategoricalDtype(["", HIDDEN, ZERO, "never"])
    return frame.astype({"reason": kinds, "reason_control": kinds})


def by_hand(frame: pd.DataFrame, column: str) -> dict[str, list[float]]:
    """Value, control and excess of each pair that has them, by loops over rows."""
    found: dict[str, list[float]] = {"value": [], "control": [], "excess": []}
    for pair in sorted(set(frame["pair"])):
        values, over, nulls = [], [], []
        for row in frame.to_dict("records"):
            if row["pair"] != pair or np.isnan(row[column]):
                continue
            values.append(row[column])
            if not np.isnan(row[f"{column}_control"]):
                over.append(row[column] - row[f"{column}_control"])
                nulls.append(row[f"{column}_control"])
        for name, some in (("value", values), ("control", nulls), ("excess", over)):
            found[name] += [sum(some) / len(some)] if some else []
    return found


@pytest.mark.parametrize("name", ESTIMATORS)
def test_value_and_control_are_of_the_same_cells(name: str) -> None:
    """A control that is missing where effects are large would make of their difference an effect of its own."""
    estimator, column, about = ESTIMATORS[name]
    frame = made(column, about)
    found, slow = estimator(frame, 0), by_hand(frame, column)
    assert found.control is not None and found.excess is not None
    for number, wanted in ((found.estimate, "value"), (found.control, "control"), (found.excess, "excess")):
        assert number.value == pytest.approx(np.mean(slow[wanted]), abs=1e-12), wanted
        assert number.n == len(slow[wanted]), wanted
    assert found.excess.high < 0.06, "no cell exceeds its control by more than 0.05"
    apart = found.estimate.value - found.control.value
    assert abs(apart - found.excess.value) > 0.005, "of different cells they differ, and so tell the two apart"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_undefined_counts_pairs_without_a_number_and_the_caution_those_with_fewer_cells(name: str) -> None:
    """A pair that has a value is not undefined, however many of its cells are; and none is counted twice."""
    estimator, column, about = ESTIMATORS[name]
    frame = made(column, about)
    found, slow = estimator(frame, 0), by_hand(frame, column)
    assert found.undefined == {HIDDEN: 1, ZERO: len(slow["value"]) - len(slow["control"])}
    assert found.estimate.n + found.undefined[HIDDEN] == frame["pair"].nunique()
    lost, asked = 0, 0
    for _, part in frame.groupby("pair"):
        if 0 < part[column].isna().sum() < len(part):
            lost, asked = lost + int(part[column].isna().sum()), asked + len(part)
    assert f"the value of {asked // 4} pairs leave out {lost} of {asked} " in found.caution
    assert f"({HIDDEN})" in found.caution and f"({ZERO})" in found.caution and "never" not in found.caution
    whole = frame.assign(**{column: 0.1 + 0.01 * frame["pair"], f"{column}_control": 0.005 * frame["pair"]})
    assert not estimator(whole, 0).undefined and "leave" not in estimator(whole, 0).caution


def test_heads_equal_to_their_controls_exceed_them_by_nothing() -> None:
    """The second head does far more and has no control: -2 nats of "excess" when the means were taken apart."""
    draw = np.random.default_rng(0)
    first, second = draw.normal(-1, 0.1, 30), draw.normal(-5, 0.1, 30)
    about = {"pair": np.arange(30), "fact": np.arange(30).astype(str), "direction": "reverse", "scope": "head"}
    about |= {"layer": 0, "reason": ""}
    rows = [pd.DataFrame(about | {"change": first, "change_control": first, "reason_control": ""})]
    rows.append(pd.DataFrame(about | {"change": second, "change_control": np.nan, "reason_control": NO_OTHER}))
    found = route_edit(pd.concat(rows, ignore_index=True), 0)
    assert found.estimate.value == pytest.approx((first.mean() + second.mean()) / 2)
    assert found.control is not None and found.excess is not None
    assert found.control.value == pytest.approx(first.mean()) and found.excess.value == 0
    assert f"control and excess of 30 pairs leave out 30 of 60 heads ({NO_OTHER})" in found.caution


def test_top_heads_without_another_in_their_layer_have_no_part_in_the_excess() -> None:
    """Both heads of layer 0 are among the three best, so only that of layer 1 has one to be compared with."""
    model, pairs = tiny.wired(facts=12)
    reading = rp.rank_heads(model, pairs, top=3)
    both = reading.frame.dropna(subset=["effect", "effect_control"])
    assert 0 < len(both) < len(reading.frame) and reading.excess is not None
    by_pair = [np.mean(part["effect"] - part["effect_control"]) for _, part in both.groupby("pair")]
    assert reading.excess.value == pytest.approx(np.mean(by_pair)) and reading.excess.n == len(by_pair)
    assert reading.excess.value > 2 * reading.value, "the heads left out do nothing here"
    assert "control and excess of 6 pairs leave out 12 of 18 heads" in reading.caution
    assert reading.controls["reason"].str.contains("leave out 12 of 18 heads").all(), "said beside the control too"


def test_a_pair_of_several_reasons_counts_once_and_one_without_any_is_told() -> None:
    about = {"fact": ["a", "a", "b", "c"], "direction": "reverse", "scope": "layer", "layer": [0, 1, 0, 0]}
    numbers = {"change": [np.nan, np.nan, np.nan, -1.0], "change_control": np.nan}
    why = {"reason": ["late", HIDDEN, "", ""], "reason_control": ["late", HIDDEN, "", ""]}
    found = route_edit(pd.DataFrame({"pair": [0, 0, 1, 2]} | about | numbers | why), 0)
    assert found.undefined == {f"{HIDDEN} / late": 1, NOT_FINITE: 1, NO_PARTNER: 1, ONE_FACT: 1}
    assert found.control is None and found.estimate.n == 1 and "leave" not in found.caution
