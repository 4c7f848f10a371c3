"""Figures show the readings' own numbers, keep what must not be mixed apart, and treat text from data as text."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from revprobe import ProbedModel, Query, Reading, Readings, ReversalPair, ReversalPairs, RevprobeError
from revprobe.probes.figures import plot
from revprobe.probes.figures.plot import (
    correlation_heatmap,
    plot_reading,
    plot_readings,
    save_figure,
    signatures_figure,
)
from revprobe.probes.figures.theme import (
    COLOURS,
    DARK_PAPER,
    IN_THE_DARK,
    OKABE_ITO,
    StepScale,
    band,
    interval_text,
    plain,
    with_theme,
)
from revprobe.probes.figures.token_strip import token_strip
from revprobe.probes.figures.training_curves import measures_with_reasons
from revprobe.probes.statistics.by_distance import cell_correlations, distance_correlations, unit_correlations
from revprobe.probes.statistics.by_head import head_correlations
from revprobe.probes.statistics.by_role import cell_cosines
from tiny import made_probabilities

DISTANCES = ["distance_forward", "distance_reverse"]


def meta(**about: Any) -> dict[str, Any]:
    return {"model": "toy", "objective": "masked", "kind": "same_target", "step": 0, "weights": "raw"} | about


def attention(draw: int = 0, *, facts: int = 10, heads: int = 1, distances: int = 3, **about: Any) -> Reading:
    """Correlated scores with a position bias per group, on a full grid of distances."""
    rng = np.random.default_rng(draw)
    grid = [(f, r) for f in range(1, distances + 1) for r in range(1, distances + 1)]
    parts = []
    for head in range(heads):
        for group, (forward, reverse) in enumerate(grid):
            shared, own = rng.normal(size=(2, facts))
            columns = {"pair": group * facts + np.arange(facts), "fact": [str(fact) for fact in range(facts)]}
            columns |= {"group": group, "layer": 0, "head": head, "offset_forward": forward, "offset_reverse": -reverse}
            columns |= {"distance_forward": forward, "distance_reverse": reverse, "reason": ""}
            columns |= {"score_forward": shared + forward, "score_reverse": shared + own - reverse}
            parts.append(pd.DataFrame(columns))
    return Reading("attention_correlation", pd.concat(parts, ignore_index=True), meta(**about))


def gradient(draw: int = 0, *, pairs: int = 20, **about: Any) -> Reading:
    rng = np.random.default_rng(draw)
    parts = []
    for role in ("embed", "q", "v"):
        columns = {"pair": np.arange(pairs), "fact": [str(pair % 10) for pair in range(pairs)], "parameter": role}
        columns |= {"role": role, "layer": 0, "inner": rng.uniform(-0.2, 1, pairs), "norm_forward": 1.0}
        columns |= {"norm_reverse": 1.0, "floor_forward": 1e-6, "floor_reverse": 1e-6, "floor_control": 1e-6}
        parts.append(pd.DataFrame(columns | {"inner_control": rng.uniform(-0.5, 0.5, pairs), "norm_control": 1.0}))
    return Reading("gradient_cosine", pd.concat(parts, ignore_index=True), meta(**about))


def probability(draw: int = 0, *, pairs: int = 40, **about: Any) -> Reading:
    return made_probabilities(draw, [str(pair % 10) for pair in range(pairs)], meta(**about))


def checkpoints(*steps: int, weights: tuple[str, ...] = ("raw", "ema"), **about: Any) -> Readings:
    made = []
    for step in steps:
        for place, which in enumerate(weights):
            about |= {"step": step, "weights": which}
            made += [make(2 * step + place, **about) for make in (attention, gradient, probability)]
    return Readings(made)


@pytest.fixture(scope="module")
def three_steps() -> Readings:
    """Three checkpoints, raw and EMA; shared, since the readings work out their intervals only once."""
    return checkpoints(0, 10, 1000)


def traces_of(figure: go.Figure, part: str) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.meta["part"] == part]


PANEL_AXES = {"attention_correlation": "y", "gradient_cosine": "y2", "forward_probability": "y3"}
PANEL_AXES |= {"reverse_probability": "y4"}


@pytest.mark.parametrize("part", ["value", "control", "band"])
@pytest.mark.parametrize("measure", PANEL_AXES)
def test_signatures_draw_the_numbers_of_the_readings(part: str, measure: str, three_steps: Readings) -> None:
    """Values, controls and both edges of each band, per panel and weights; a swapped column or panel turns it red."""
    drawn = [t for t in traces_of(plot_readings(three_steps), part) if t.yaxis == PANEL_AXES[measure]]
    assert len(drawn) == 2, f"expected raw and EMA, got {[trace.name for trace in drawn]}"
    for trace, weights in zip(drawn, ("raw", "ema"), strict=True):
        rows = three_steps.select(weights=weights).measures()
        rows = rows[rows["measure"] == measure]
        if part == "band":
            expected = [*rows["low"], *rows["high"][::-1], None]
        else:
            expected = rows[part].tolist()
        assert list(trace.y) == expected, f"{measure} {part} of {weights} weights"
        assert ("EMA" if weights == "ema" else "raw") in trace.name, f"{trace.name} does not say which weights it is"


def test_the_buttons_never_show_raw_and_ema_of_one_run_together_unless_asked(three_steps: Readings) -> None:
    """ARM has raw weights only and stays in the EMA view; the MDM shows one of its two there."""
    arm = measures_with_reasons(checkpoints(0, 10, 1000, weights=("raw",), kind="swapped", objective="causal"))
    mdm = measures_with_reasons(three_steps)
    figure = signatures_figure(pd.concat([mdm.assign(run="mdm"), arm.assign(run="arm")], ignore_index=True))
    shown = {
        button.label: {t.name for t, seen in zip(figure.data, button.args[0]["visible"], strict=True) if seen}
        for button in figure.layout.updatemenus[0].buttons
    }
    ema, raw = "mdm (EMA, same target)", "mdm (raw, same target)"
    swapped = "arm (raw, swapped)"
    assert list(shown.values()) == [{ema, swapped}, {raw, swapped}, {ema, raw, swapped}], shown
    at_first = {trace.name for trace in figure.data if trace.visible is not False}
    assert at_first == {ema, swapped}, f"before any click: {at_first}"


def test_each_encoding_keeps_its_colour_and_the_control_its_dash() -> None:
    runs = [("rope", "masked", "rope"), ("alibi", "masked", "alibi"), ("arm", "causal", None), ("x", "masked", "new")]
    rows = measures_with_reasons(checkpoints(0, 10, weights=("raw",)))
    frames = [rows.assign(run=run, objective=o, position_encoding=e) for run, o, e in runs]
    figure = signatures_figure(pd.concat(frames, ignore_index=True))
    colours = {trace.meta["run"]: trace.line.color for trace in traces_of(figure, "value")}
    assert colours["rope"] == COLOURS["rope"] and colours["alibi"] == COLOURS["alibi"], colours
    assert colours["arm"] == COLOURS["ARM"], colours
    assert len(set(colours.values())) == 4, f"an unknown encoding shares a colour: {colours}"
    assert set(colours.values()) <= set(OKABE_ITO.values()), colours
    assert {trace.line.dash for trace in traces_of(figure, "control")} == {"dash"}
    assert {trace.line.dash for trace in traces_of(figure, "value")} == {None}


def test_an_undefined_point_is_a_gap_with_its_reason() -> None:
    """NaN is never drawn as 0 nor bridged: the value and the band break, a cross carries the reason."""
    broken = attention(1, step=10)
    broken.frame["score_reverse"] = np.nan
    broken.frame["reason"] = "evidence <hidden>"
    figure = plot_readings([attention(0), broken, attention(2, step=20), attention(3, step=30)])
    value, crosses = (traces_of(figure, part)[0] for part in ("value", "undefined"))
    assert [math.isnan(y) for y in value.y] == [False, True, False, False], value.y
    assert value.connectgaps is None, "a gap must stay a gap"
    assert "90 evidence &lt;hidden&gt;" in crosses.hovertext[0], crosses.hovertext
    assert len(crosses.x) == 1 and crosses.x[0] == value.x[1], "the cross stands at the undefined step"
    assert traces_of(figure, "band")[0].x.count(None) == 2, "the band must be two pieces"


def test_a_band_breaks_at_nan_and_keeps_single_points() -> None:
    trace = band([0, 1, 2], [0.1, math.nan, 0.3], [0.5, 0.6, 0.7], OKABE_ITO["blue"])
    assert list(trace.x) == [0, 0, None, 2, 2, None], trace.x
    assert list(trace.y) == [0.1, 0.5, None, 0.3, 0.7, None], trace.y


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=30, unique=True))
def test_steps_keep_their_order_and_zero_its_place(steps: list[int]) -> None:
    scale = StepScale.over(steps)
    places = [scale.position(step) for step in sorted(steps)]
    assert all(math.isfinite(place) for place in places), places
    assert all(a < b for a, b in pairwise(places)), f"{sorted(steps)} stand at {places}"


def test_log_spaced_steps_get_a_log_axis_and_even_ones_a_linear_one() -> None:
    log = StepScale.over([0, 1, 10, 100, 1000, 10000])
    assert "log" in log.axis()["title"]["text"] and log.axis()["ticktext"][0] == "0", log.axis()
    assert log.position(10000) < 6 * log.position(10), "log-spaced steps must not crowd at the left"
    quick = StepScale.over([0, 50, 76, 116, 176, 267, 406, 616, 937, 1424, 2164, 3290, 5000])
    places = [quick.position(tick) for tick in quick.ticks]
    least = min(after - before for before, after in pairwise(places))
    assert len(places) > 3 and least > (places[-1] - places[0]) / 6, f"{quick.ticks}: plotly turns labels that touch"
    assert StepScale.over(range(0, 10001, 500)).axis()["title"]["text"] == "training step"


def test_a_model_without_a_step_is_drawn_and_said_to_have_none() -> None:
    readings = Readings([attention(step=None, weights=None), probability(step=None, weights=None)])
    figure = plot_readings(readings)
    assert traces_of(figure, "value")[0].y[0] == readings[0].value
    assert figure.layout.xaxis.title.text == "no training step recorded"


def test_missing_columns_are_named() -> None:
    with pytest.raises(RevprobeError, match=r"lack the columns \['low', 'high'\].*summary.csv"):
        signatures_figure(measures_with_reasons([attention()]).drop(columns=["low", "high"]))


@pytest.mark.parametrize(("facts", "heads"), [(10, 1), (10, 3), (4, 2)])
def test_cells_equal_the_probe_on_the_pairs_of_the_cell(facts: int, heads: int) -> None:
    """Parity with `Reading.summary`, whose way is separate and slow: large groups, several heads, pooled small ones."""
    reading = attention(facts=facts, heads=heads)
    reading.frame.loc[reading.frame["group"] == 1, "score_forward"] = 0.25  # a constant group
    reading.frame.loc[(reading.frame["group"] == 2) & (reading.frame["pair"] % 3 == 0), "score_reverse"] = np.nan
    cells, slow = distance_correlations(reading.frame), reading.summary(by=DISTANCES)
    np.testing.assert_array_equal(cells[DISTANCES], slow[DISTANCES])
    np.testing.assert_allclose(cells["value"], slow["value"], atol=1e-12)
    assert cells["value"].isna().sum() == 1, "only the constant group is undefined"
    assert cells["n"].tolist() == slow["n"].tolist()


def test_the_heat_map_shows_the_cells_of_each_checkpoint(three_steps: Readings) -> None:
    """One slider step per checkpoint, each with both weights' own cells; a transposed or shifted map turns it red."""
    figure = correlation_heatmap(three_steps)
    slider = figure.layout.sliders[0]
    assert [step.label for step in slider.steps] == ["0", "10", "1,000"]
    for step, mark in zip((0, 10, 1000), slider.steps, strict=True):
        for place, weights in ((1, "raw"), (3, "ema")):
            frame = three_steps.select(name="attention_correlation", step=step, weights=weights)[0].frame
            for (forward, reverse), pairs in frame.groupby(DISTANCES):
                expected = np.corrcoef(pairs["score_forward"], pairs["score_reverse"])[0, 1]
                shown = mark.args[0]["z"][place][forward - 1][reverse - 1]
                assert shown == pytest.approx(expected, abs=1e-12), (step, weights, forward, reverse)
                assert mark.args[0]["customdata"][place][forward - 1][reverse - 1] == len(pairs)
    assert figure.data[3].z[0][1] == slider.steps[-1].args[0]["z"][3][0][1], "it opens on the last checkpoint"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-1, 1)
    value = three_steps.select(name="attention_correlation", step=10, weights="ema")[0].value
    assert f"r = {value:.2f} [" in slider.steps[1].args[1]["annotations"][1]["text"]


def test_an_undefined_cell_is_grey_with_its_reason_and_an_unmeasured_one_is_white() -> None:
    reading = attention()
    reading.frame.loc[reading.frame["group"] == 0, "score_forward"] = 0.25
    kept = reading.frame[reading.frame["group"] != 8]
    undefined, value = correlation_heatmap([Reading(reading.name, kept, reading.meta)]).data
    assert undefined.z[0][0] == 0 and "constant scores" in undefined.customdata[0][0]
    assert value.z[0][0] is None, "an undefined cell has no colour of the scale"
    assert undefined.z[2][2] is None and value.z[2][2] is None, "no pair was measured there"


def test_two_models_never_share_a_heat_map() -> None:
    with pytest.raises(
        RevprobeError, match=r"two attention readings at step 0 \(raw, same target\).*figure of its own"
    ):
        correlation_heatmap([attention(0), attention(1)])


def test_the_scatter_shows_scores_as_the_statistic_sees_them() -> None:
    """Centred by group: the pooled correlation of what is drawn is the within-group one, not that of the bias."""
    reading = attention()
    figure = plot_reading(reading)
    points = figure.data[1]
    frame = reading.frame
    expected = frame["score_forward"] - frame.groupby("group")["score_forward"].transform("mean")
    np.testing.assert_allclose(points.x, expected, atol=1e-12)
    assert f"{reading.value:.2f} [" in figure.layout.title.text and "n = 90" in figure.layout.title.text
    assert np.allclose(reading.frame["score_forward"], frame["score_forward"]), "drawing must not edit the frame"


def test_the_gradient_plot_shows_each_role_and_all_with_control() -> None:
    reading = gradient()
    control, value = plot_reading(reading).data
    roles = reading.summary(by="role").iloc[::-1]
    assert list(value.x) == [reading.value, *roles["value"]], "the last row is all parameters"
    assert list(control.x) == [reading.control.value if reading.control else None, *roles["control"]]
    low = [x - minus for x, minus in zip(value.x, value.error_x.arrayminus, strict=True)]
    np.testing.assert_allclose(low, [reading.interval[0], *roles["low"]], atol=1e-12)
    assert value.y[0] == "all<br><sup>n = 20 pairs of 10 facts</sup>", value.y


def test_the_probability_plot_shows_shares_of_pairs() -> None:
    reading = probability()
    forward, reverse, control = plot_reading(reading, bins=10).data
    for trace, direction, column in (
        (forward, "forward", "probability"),
        (reverse, "reverse", "probability"),
        (control, "reverse", "probability_control"),
    ):
        values = reading.frame.loc[reading.frame["direction"] == direction, column]
        expected = [((values >= k / 10) & (values < (k + 1) / 10)).mean() for k in range(10)]
        np.testing.assert_allclose(trace.y[:10], expected, atol=1e-12)
    assert reverse.name.startswith(f"reverse: mean {reading.value:.2f} ["), reverse.name
    assert control.line.dash == "dash"


def test_the_plot_method_takes_options_and_names_the_nearest() -> None:
    assert isinstance(attention().plot(kind="heatmap").data[0], go.Heatmap)
    with pytest.raises(RevprobeError, match="has no option 'kin'; the closest is 'kind'"):
        attention().plot(kin="heatmap")
    with pytest.raises(RevprobeError, match="kind 'heatmp'; the closest is 'heatmap'"):
        attention().plot(kind="heatmp")
    with pytest.raises(RevprobeError, match="no head 7 in this reading: expected one of 0 to 0"):
        attention().plot(head=7)
    with pytest.raises(RevprobeError, match="cannot draw a reading called 'gradient_cosin'; the closest"):
        plot_reading(Reading("gradient_cosin", gradient().frame, meta()))
    with pytest.raises(RevprobeError, match="has no option 'button'; the closest is 'buttons'"):
        checkpoints(0).plot(button=False)


def texts_of(value: Any) -> Iterator[str]:
    """Every string of a figure but those under `meta`, which is for scripts and never drawn."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for key, inner in value.items() if key != "meta" for text in texts_of(inner))
    elif isinstance(value, list | tuple):
        yield from (text for inner in value for text in texts_of(inner))


def test_text_from_data_is_shown_and_never_interpreted() -> None:
    """plotly draws a subset of HTML, links included; names must reach it escaped in labels, titles and hovers."""
    name = "<b>x</b><a href='http://y'>"
    readings = checkpoints(0, 10, 1000, model=name, kind="<i>kind</i>")
    for figure in (plot_readings(readings), *(plot_reading(r) for r in readings[:3]), correlation_heatmap(readings)):
        for text in texts_of(figure.to_plotly_json()):
            for tag in ("<a", "<i>", "<b>x"):
                assert tag not in text, f"{tag} reached plotly in {text!r}"


@given(st.text())
def test_plain_text_leaves_nothing_to_interpret(text: str) -> None:
    assert not set("<>\n") & set(plain(text)), plain(text)
    assert len(" ".join(plain(text, limit=5).split("&amp;"))) <= 25, "long names must not push a legend apart"


def test_numbers_as_people_read_them() -> None:
    assert interval_text(0.534, 0.41, 0.619, 0.0199) == "0.53 [0.41, 0.62] (control 0.02)"
    assert interval_text(0.5, math.nan, math.nan) == "0.50"
    assert interval_text(0.003, 0.0021, 0.0048, 0.0041) == "0.003 [0.002, 0.005] (control 0.004)", "as fine"
    assert interval_text(0.0014, 0.0013, 0.0018) == "0.001 [0.001, 0.002]", "no interval looks as if it had no width"
    assert interval_text(0.99995, 0.9999, 1.0, percent=True) == "100.00 [99.99, 100.00]"
    assert interval_text(math.nan, 0.1, 0.2, 0.0) == "undefined"
    assert interval_text(2.2e-9, 2.1e-9, 2.4e-9) == "2.2e-9 [2.1e-9, 2.4e-9]", "no row of zeros"
    assert interval_text(2.2e-9, 2.18e-9, 2.22e-9) == "2.20e-9 [2.18e-9, 2.22e-9]", "told apart here as well"
    assert interval_text(3e-8, 0.0, 9e-8, 0.021) == "3.0e-8 [0, 9.0e-8] (control 0.02)", "zero is zero"
    assert interval_text(3e-8, 1e-8, 0.002) == "0.000 [0.000, 0.002]", "one form within a reading, by its greatest"
    assert interval_text(-4e-4, -6e-4, 2e-4, -0.0042) == "-4.0e-4 [-6.0e-4, 2.0e-4] (control -0.004)"
    assert interval_text(4e-6, 3e-6, 6e-6, 1e-19, percent=True) == "4.0e-4 [3.0e-4, 6.0e-4] (control 0)"
    assert interval_text(1e-17, -1e-18, 1e-17) == "0.00", "a rounding error is no number"
    assert interval_text(0.0038, math.nan, math.nan) == "0.004", "one pair's small number is not nothing"
    assert interval_text(0.0, math.nan, math.nan) == "0.00"
    assert interval_text(0.5, 0.5, 0.5) == "0.50" == interval_text(0.5, 0.5, 0.5 + 1e-18), "no certainty is printed"
    assert interval_text(1.2345, 1.2, 1.3, digits=3) == "1.234 [1.200, 1.300]"
    assert interval_text(0.987, 0.95, 1.0, -0.0004, percent=True) == "98.7 [95.0, 100.0] (control 0.0)"
    assert interval_text(0.0004, 0.0001, 0.002, percent=True) == "0.04 [0.01, 0.2]", "above nothing, below all"
    assert interval_text(0.9996, 0.998, 0.9999, percent=True) == "99.96 [99.8, 99.99]"
    assert interval_text(0.012, 2e-4, 0.07, percent=True) == "1.2 [0.02, 7.0]", "what is told keeps its digits"
    assert interval_text(0.004, 2e-14, 0.1, percent=True) == "0.4 [0.0, 10.0]", "a rounding of nothing"
    assert interval_text(0.01, -0.0004, 0.02, percent=True) == "1.0 [-0.04, 2.0]", "a difference that may be none"
    assert interval_text(0.0, 0.0, 0.1, percent=True) == "0.0 [0.0, 10.0]"
    assert interval_text(0.2, 0.1, 0.3, -0.0004) == "0.20 [0.10, 0.30] (control 0.00)"


@pytest.mark.parametrize(("facts", "heads"), [(10, 3), (4, 2)])
def test_head_correlations_equal_the_reading_on_each_head(facts: int, heads: int) -> None:
    """Parity with `Reading.summary`, one head at a time: values and intervals, large groups and pooled small ones."""
    reading = attention(facts=facts, heads=heads)
    reading.frame.loc[reading.frame["group"] == 1, "score_forward"] = 0.25  # a constant group
    reading.frame.loc[(reading.frame["group"] == 2) & (reading.frame["pair"] % 3 == 0), "score_reverse"] = np.nan
    table = head_correlations(reading.frame)
    slow = reading.summary(by=["layer", "head"])
    names = ["value", "low", "high"]
    np.testing.assert_allclose(table.dropna(subset=["head"])[names], slow[names], atol=1e-12)
    whole, layer = table.iloc[0][names].tolist(), table.iloc[1][names].tolist()
    assert whole == layer == pytest.approx([reading.value, *reading.interval], abs=1e-12)
    by = ["layer", "head"]
    cells = cell_correlations(unit_correlations(reading.frame), by)
    expected = reading.summary(by=[*by, *DISTANCES])
    np.testing.assert_allclose(cells["value"], expected["value"], atol=1e-12)
    assert cells["n"].tolist() == expected["n"].tolist()


def test_a_head_without_a_large_group_is_left_out_of_the_mean_where_others_have_one() -> None:
    """As the reading's own number does; pooling it in would mix two statistics."""
    reading = attention(facts=10, heads=2)
    small = (reading.frame["head"] == 1) & (reading.frame["fact"].astype(int) >= 5)
    reading.frame.loc[small, "score_forward"] = np.nan
    table = head_correlations(reading.frame)
    assert table["value"][0] == pytest.approx(reading.value, abs=1e-12)
    alone = Reading(reading.name, reading.frame[reading.frame["head"] == 1].reset_index(drop=True), reading.meta)
    assert table["value"].iloc[-1] == pytest.approx(alone.value, abs=1e-12), "by itself it is pooled"


def test_cell_cosines_stand_in_network_order() -> None:
    """Neither by the alphabet (norm, q, unembed) nor as the parameters come (unembed, q, norm)."""
    frame = gradient().frame.replace({"role": {"embed": "unembed", "v": "norm"}})
    assert cell_cosines(frame, ["role"])["role"].tolist() == ["q", "norm", "unembed"]


@pytest.mark.parametrize("by", [[], ["role"], ["layer", "role"]])
def test_cell_cosines_equal_the_reading_on_each_cell(by: list[str]) -> None:
    reading = gradient()
    frame = reading.frame
    frame["layer"] = frame["role"].map({"embed": pd.NA, "q": 0, "v": 1}).astype("Int64")
    frame.loc[(frame["pair"] == 3) & (frame["role"] == "q"), "norm_forward"] = 1e-9  # below the floor
    found = cell_cosines(frame, by)
    slow = Reading(reading.name, frame, reading.meta).summary(by=by or None)
    if by:
        found = found.set_index("role").loc[slow["role"]]
    for name in ("value", "low", "high", "control"):
        np.testing.assert_allclose(found[name], slow[name], atol=1e-12, err_msg=name)
    assert found["n"].tolist() == slow["n"].tolist()


def test_maps_by_head_and_by_role_show_the_summaries() -> None:
    reading = attention(heads=3)
    by_head = reading.summary(by=["layer", "head"])
    heat = reading.plot(kind="heads").data[1]
    np.testing.assert_allclose(heat.z[0], by_head["value"], atol=1e-12)
    assert heat.text[0][1] == interval_text(*by_head[["value", "low", "high"]].iloc[1])
    cosines = gradient()
    by_role = cosines.summary(by=["layer", "role"]).set_index("role")
    heat = cosines.plot(kind="layers").data[1]
    np.testing.assert_allclose(heat.z[0], by_role.loc[list(heat.x), "value"], atol=1e-12)
    assert f"{by_role['control'].iloc[0]:.2f}".removeprefix("-") in heat.text[0][0]


def test_a_dark_figure_differs_in_ink_and_paper_alone(three_steps: Readings) -> None:
    light, dark = (plot_readings(three_steps, theme=theme) for theme in ("light", "dark"))
    assert light.layout.template.layout.paper_bgcolor == "white"
    assert dark.layout.template.layout.paper_bgcolor == "#16191D" and dark.layout.title.font.color == "#B5B5B5"
    for one, other in zip(light.data, dark.data, strict=True):
        assert one.y == other.y and one.name == other.name
        assert other.line.color != OKABE_ITO["black"], "black ink on dark paper"
    with pytest.raises(RevprobeError, match="theme 'drak'; the closest is 'dark'"):
        plot_readings(three_steps, theme="drak")


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2 between two #RRGGBB colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    bright, dim = sorted([luminance(one), luminance(other)], reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_lines_and_words_can_be_read_on_dark_paper() -> None:
    """WCAG 2 asks 3 for graphics and 4.5 for text."""
    for name, colour in OKABE_ITO.items():
        assert contrast(IN_THE_DARK.get(colour, colour), DARK_PAPER) >= 3, name
    assert contrast(IN_THE_DARK["#1A1A1A"], DARK_PAPER) >= 4.5


def test_the_hover_shows_the_pairs_text_of_these_pairs_only() -> None:
    queries = [Query([5, 1, 2], [0], [2]), Query([2, 1, 5], [2], [0])]
    pairs = ReversalPairs.from_pairs([ReversalPair(*queries, fact="0")] * 90)
    reading = attention()
    reading.meta["pairs"] = pairs.digest
    shown = pairs.to_frame()["query"].iloc[0]
    assert plain(shown) in reading.plot(pairs=pairs).data[1].hovertext[0]
    reading.meta["pairs"] = "others"
    with pytest.raises(RevprobeError, match="expected those of the reading, 'others'"):
        reading.plot(pairs=pairs)


def test_the_token_strip_shows_where_the_readout_position_looks() -> None:
    """Parity with the attention weights that transformers returns, eager, for one layer and head and the mean."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=24, n_embd=8, n_layer=2, n_head=2)
    module = transformers.GPT2LMHeadModel(config).eval()
    query = Query([1, 2, 3, 4, 5, 6], [5], [1])
    module.set_attn_implementation("eager")
    with torch.no_grad():
        layers = module(torch.tensor([[1, 2, 3, 4, 5, 6]]), output_attentions=True).attentions
    module.set_attn_implementation("sdpa")
    model = ProbedModel(module, objective="causal")
    for layer, head in ((1, 0), (0, 1), (None, None)):
        rows = torch.stack([one[0, :, 4] for one in layers])  # layer head token; position 5 is read at row 4
        expected = rows.mean((0, 1)) if layer is None else rows[layer, head]
        strip = token_strip(model, query, layer=layer, head=head)
        np.testing.assert_allclose(strip.data[0].z[0], expected, atol=1e-6)
    frames = {shape.line.color: (shape.x0 + shape.x1) / 2 for shape in strip.layout.shapes}
    assert frames == {OKABE_ITO["orange"]: 5, OKABE_ITO["sky"]: 1}
    named = ProbedModel(module, objective="causal", name="a <b>", step=1500, weights="ema")
    title = token_strip(named, query).layout.title.text
    assert title.startswith("<b>a &lt;b&gt;</b>, step 1,500 (EMA)<br>") and "target, hidden from the model" in title
    told = strip.data[0].hovertext[0]
    assert ["hidden" in one for one in told] == [False] * 5 + [True], told
    with pytest.raises(RevprobeError, match=r"layer 7 has no attention.*\[0, 1\]"):
        token_strip(model, query, layer=7)
    with pytest.raises(RevprobeError, match="no head 2: expected 0 to 1"):
        token_strip(model, query, head=2)


def test_a_figure_is_saved_whole_or_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = go.Figure(go.Scatter(y=[1, 2]))
    dark = save_figure(with_theme(figure, "dark"), tmp_path / "figure.html").read_text()
    assert "body.style.background='#16191D'" in dark, "a dark figure on a white page"
    page = save_figure(figure, tmp_path / "figure.html").read_text()
    assert "plotly.js v" in page and 'src="http' not in page, "the page must open without a network"
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(RevprobeError, match=r"a figure as \.svg needs kaleido.*pip install kaleido"):
        save_figure(figure, tmp_path / "figure.svg")
    with pytest.raises(RevprobeError, match=r"cannot write a figure as 'figure\.pgn'; the closest is '\.png'"):
        save_figure(figure, tmp_path / "figure.pgn")
    with pytest.raises(RevprobeError, match=r"there is no folder .*; make it first"):
        save_figure(figure, tmp_path / "nowhere" / "figure.html")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.html"]


def test_a_picture_is_asked_of_kaleido(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kaleido is, plotly writes the picture; where its browser is missing, that is said in one line."""
    figure = go.Figure(go.Scatter(y=[1, 2]))
    monkeypatch.setattr(plot, "find_spec", lambda name: object())
    write = lambda self, path, format, scale, width: path.write_text(f"{format} x{scale}, {width} wide")  # noqa: E731
    monkeypatch.setattr(go.Figure, "write_image", write)
    assert save_figure(figure, tmp_path / "a.png", scale=3).read_text() == "png x3, 900 wide"
    figure.update_layout(width=640)
    assert save_figure(figure, tmp_path / "a.png").read_text() == "png x2.0, 640 wide"
    monkeypatch.setattr(go.Figure, "write_image", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no Chrome")))
    with pytest.raises(RevprobeError, match=r"cannot draw .*no Chrome.*save it as \.html"):
        save_figure(figure, tmp_path / "b.png")
