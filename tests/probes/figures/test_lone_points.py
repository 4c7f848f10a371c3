"""A control that has one point, or one between gaps: a line of it would show nothing, so it has a marker."""

import math

import pandas as pd
import plotly.graph_objects as go
import pytest

import revprobe as rp
from revprobe.probes.figures.objective_terms import pressure_figure
from revprobe.probes.figures.storage import storage_curves_figure
from revprobe.probes.figures.theme import dashed
from revprobe.probes.figures.training_curves import signatures_figure
from tiny import pairs_at, radd

PAIRS = pairs_at((1, 5), (5, 1), count=5)
NAN = math.nan


@pytest.mark.parametrize(
    ("values", "mode", "marked"),
    [
        ([0.5], "markers", [1]),
        ([0.5, 0.6], "lines", None),
        ([0.5, NAN, 0.6, 0.7], "lines+markers", [1, 0, 0, 0]),
        ([0.5, 0.4, NAN, 0.7], "lines+markers", [0, 0, 0, 1]),
        ([NAN, 0.4, NAN], "markers", [0, 1, 0]),
        ([NAN, NAN], "lines", None),
        ([], "lines", None),
    ],
)
def test_a_point_without_a_neighbour_has_a_marker(values: list[float], mode: str, marked: list[int] | None) -> None:
    trace = dashed(list(range(len(values))), values, "#123456", name="control")
    assert trace.mode == mode and trace.line.dash == "dash" and trace.name == "control"
    assert (None if trace.marker.opacity is None else list(trace.marker.opacity)) == marked


def shows(figure: go.Figure, part: str) -> bool:
    """Whether some trace whose name or part is `part` can be seen at its one point."""
    own = [one for one in figure.data if part in str(one.name) or (one.meta or {}).get("part") == part]
    return any("markers" in one.mode and any(y is not None and math.isfinite(y) for y in one.y) for one in own)


def test_the_controls_of_one_layer_and_of_one_checkpoint_are_seen() -> None:
    model = radd()
    once = rp.probe_stored_once(model, pairs_at((1, 5), (5, 1), count=12), untrained=False).plot()
    assert shows(once, "shuffled labels")
    one = rp.probe_gradient_cosine(model, PAIRS).measures()
    assert shows(signatures_figure(one.assign(run="a", step=0, weights="raw", kind="same_target")), "control")


def test_a_figure_of_one_checkpoint_names_model_and_step() -> None:
    model = radd()
    reading = rp.probe_attention_correlation(model, PAIRS)
    reading.meta.update(model="a<b", step=1500, weights="ema")
    title = reading.plot(kind="heatmap").layout.title.text
    assert title == "<b>a&lt;b</b>, step 1,500"


def test_tables_over_training_name_their_model_and_say_pairs_of_facts() -> None:
    rows = [
        {"model": "m", "step": 3, "weights": "ema", "curve": curve, "direction": side, "value": 0.5, "low": 0.4}
        | {"high": 0.6, "n": 90, "facts": 9, "control": 0.1}
        for curve in ("stored", "weight", "contribution")
        for side in ("forward", "reverse")
    ]
    figure = storage_curves_figure(pd.DataFrame(rows))
    assert figure.layout.title.text.startswith("<b>m</b> (EMA weights)")
    assert all("n = 90 pairs of 9 facts" in note.text for note in figure.layout.annotations)
    assert shows(figure, "control")
    row = {"model": "m", "step": 3, "terms": "all", "pressure": 1.0, "pressure_low": 0.5, "pressure_high": 1.5}
    row |= {"control": 0.2, "log_odds": -1.0, "log_odds_low": -2.0, "log_odds_high": 0.0, "n": 9}
    unnamed = pd.DataFrame([row | {"model": None}])
    assert pressure_figure(unnamed).layout.title.text.startswith("<b>model</b>: pressure")
    figure = pressure_figure(pd.DataFrame([row]))
    assert figure.layout.title.text.startswith("<b>m</b>: pressure over training")
    assert shows(figure, "all terms, control")
