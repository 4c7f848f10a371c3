"""A signature drawn against its controls: every one has its place, its look and its number, or its reason."""

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import revprobe as rp
from revprobe.probes.controls import CONTROLS
from revprobe.probes.figures.controls import LOOKS
from revprobe.probes.figures.plot import plot_readings

NAN = float("nan")
EVIL = "<img src=x onerror=alert(1)>"


def row(name: str, value: float, **more: Any) -> dict[str, Any]:
    made = {"control": name, "model": f"{name} model", "value": value, "low": value - 0.1, "high": value + 0.05}
    made |= {"n": 24, "facts": 12, "difference": 0.5 - value, "difference_low": 0.1, "difference_high": 0.7}
    return made | {"reason": ""} | more


NOTHING = dict.fromkeys(("low", "high", "n", "facts", "difference", "difference_low", "difference_high"))
ROWS = [
    row("untrained", 0.31),
    row("neighbour", 0.22, reason="3 pairs have no other tokens"),
    row("sink", NAN, reason="12 no variance within the group", **NOTHING),
    row("parent", -0.4, model=EVIL),
]


def attention(step: int | None = None, heads: int = 1, rows: list[dict[str, Any]] | None = None) -> rp.Reading:
    rng, parts = np.random.default_rng(0), []
    for head in range(heads):
        shared, own = rng.normal(size=(2, 24))
        columns = {"pair": np.arange(24), "fact": [f"f{n % 12}" for n in range(24)], "group": np.arange(24) // 12}
        columns |= {"layer": head // 32, "head": head % 32, "offset_forward": 1, "offset_reverse": 1, "reason": ""}
        columns |= {"distance_forward": 1, "distance_reverse": 1, "score_forward": shared}
        parts.append(pd.DataFrame(columns | {"score_reverse": shared + own}))
    meta = {"model": "toy", "kind": "same_target", "step": step, "weights": "raw", "objective": "masked"}
    controls = {"controls": ROWS if rows is None else rows}
    return rp.Reading("attention_correlation", pd.concat(parts, ignore_index=True), meta | controls)


def by_symbol(figure: go.Figure) -> dict[str, go.Scatter]:
    return {trace.marker.symbol: trace for trace in figure.data if trace.marker.symbol}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_control_is_drawn_at_its_number_with_its_interval_or_says_why_not(theme: str) -> None:
    reading = attention()
    figure = reading.plot(kind="controls", theme=theme)
    points, table = by_symbol(figure), reading.controls.set_index("control")
    assert len(points) == len(figure.data) == len(CONTROLS) + 1, "the reading and its controls, a look each"
    assert points["circle"].x[0] == reading.value
    said = " | ".join(note.text for note in figure.layout.annotations)
    for name in CONTROLS:
        point, one = points[LOOKS[name].symbol], table.loc[name]
        if math.isnan(one["value"]):
            assert point.x[0] is None and f"undefined: {one['reason']}" in said
            continue
        assert point.x[0] == one["value"]
        assert point.x[0] + point.error_x.array[0] == pytest.approx(one["high"])
        assert point.x[0] - point.error_x.arrayminus[0] == pytest.approx(one["low"])
        assert "paired over facts" in point.hovertext[0] and one["reason"] in point.hovertext[0]
    low, high = figure.layout.xaxis.range
    assert low < -0.5 and high > 1, "the parent's interval is inside the axis"
    assert "0.19" in said and "0.28" in said and "0.90" in said, "differences beside the controls that have one"
    assert f"{table.loc['shuffled', 'difference']:.2f}" in said


def test_a_models_name_is_text_in_the_figure() -> None:
    figure = attention().plot(kind="controls")
    everything = figure.to_json()
    assert EVIL not in everything and "onerror" in everything


def test_the_figure_is_as_light_for_many_heads() -> None:
    """Its points are the controls, not the rows behind them."""
    few, many = (len(attention(heads=heads).plot(kind="controls").to_json()) for heads in (1, 64))
    assert abs(many - few) < 200 and many < 20_000


def test_a_reading_that_was_asked_for_no_control_shows_the_shuffle_alone() -> None:
    figure = attention(rows=[]).plot(kind="controls")
    assert [trace.name for trace in figure.data] == ["shuffled facts", "reading"]


def test_a_choice_of_one_head_has_no_controls_of_all_heads() -> None:
    reading = attention(heads=2)
    assert len(reading.plot(kind="controls").data) == 6
    assert len(reading.plot(kind="controls", head=1).data) == 2, "theirs are of all heads"


def test_the_gradients_figure_is_drawn_from_a_probe() -> None:
    from tiny import radd

    model = radd()
    reading = rp.probe_gradient_cosine(model, rp.letter_pairs(4, model=model), controls=["untrained", "sink"])
    figure = reading.plot(kind="controls")
    names = [trace.name for trace in figure.data]
    assert names == ["attention sink", "untrained twin", "shuffled facts", "reading"], "the reading on top"
    assert by_symbol(figure)["square-open"].x[0] == reading.controls.set_index("control").loc["untrained", "value"]


def test_the_curves_over_training_draw_each_control_in_its_own_dash_and_say_which_has_none() -> None:
    later = [row("untrained", 0.35), row("neighbour", 0.25), ROWS[2], ROWS[3]]
    figure = plot_readings([attention(0), attention(100, rows=later)])
    drawn = {trace.meta["against"]: trace for trace in figure.data if trace.meta["part"] == "against"}
    assert set(drawn) == {"untrained", "neighbour", "parent"}
    assert list(drawn["untrained"].y) == [0.31, 0.35] and list(drawn["neighbour"].y) == [0.22, 0.25]
    dashes = {trace.line.dash for trace in drawn.values()}
    assert len(dashes) == 3 and all(drawn[name].line.dash == LOOKS[name].dash for name in drawn)
    key = [trace.name for trace in figure.data if trace.meta["part"] == "key"]
    assert "control: attention sink (undefined)" in key and len(key) == 4
    bare = plot_readings([attention(0), attention(100)], controls=None)
    assert not [trace for trace in bare.data if trace.meta["part"] in ("against", "key")]
