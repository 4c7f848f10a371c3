"""Models side by side: each one's values with interval and control, and the paired differences beside them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .theme import (
    CONTROL_GREY,
    OKABE_ITO,
    SYMBOLS,
    TEMPLATE,
    counts_text,
    difference_text,
    heading,
    interval_text,
    message_figure,
    plain,
    samples_text,
    with_theme,
)

# A model keeps its colour; black is for differences.
_COLOURS = [OKABE_ITO[name] for name in ("blue", "vermillion", "green", "purple", "sky", "orange")]
_KEY = (
    "bar: 95 % interval over facts · grey: control (shuffled facts) · open: common facts alone · "
    "×: undefined (hover: why)"
)


def comparison_figure(frame: pd.DataFrame, *, theme: str = "light") -> go.Figure:
    """Draw what `ModelComparison.frame` holds: values on the left, differences on the right, a row for each measure.

    Where two models share some of their facts only, an open marker is the value on these, which the difference is of.
    """
    measures = list(dict.fromkeys(frame["measure"]))
    if not measures:
        return message_figure("No measure that two models share.")
    models = list(dict.fromkeys(frame["model"]))
    titles = ["<b>Each model</b>", "<b>Paired differences</b>"]
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    places = {measure: -float(place) for place, measure in enumerate(measures)}
    for number, model in enumerate(models):
        at = _spread(number, len(models))
        colour = _COLOURS[number % len(_COLOURS)]
        symbol = SYMBOLS[number // len(_COLOURS) % len(SYMBOLS)]
        rows = frame[frame["model"] == model].assign(at=frame["measure"].map(places) + at)
        _draw_model(figure, rows, _with_kind(model, rows), colour, symbol, 0.18 / len(models))
    differences = frame[frame["part"] == "difference"]
    between = list(dict.fromkeys(zip(differences["model"], differences["against"], strict=True)))
    for number, (model, against) in enumerate(between):
        rows = differences[(differences["model"] == model) & (differences["against"] == against)]
        rows = rows.assign(at=rows["measure"].map(places) + _spread(number, len(between)))
        symbol = SYMBOLS[number % len(SYMBOLS)] + ("-open" if number // len(SYMBOLS) % 2 else "")
        _draw_difference(figure, rows, f"{plain(model)} − {plain(against)}", symbol)
    figure.add_vline(x=0, line={"color": CONTROL_GREY, "dash": "dot", "width": 1}, col=2)
    ticks = {"tickvals": list(places.values()), "ticktext": [measure.replace("_", " ") for measure in measures]}
    figure.update_yaxes(range=[0.6 - len(measures), 0.6], **ticks)
    whole = frame[frame["part"] == "all"]
    facts = counts_text(differences["facts"].astype(float)).removeprefix("n = ")
    figure.update_xaxes(title=f"value ({samples_text(whole['n'], whole['facts'])})", col=1)
    figure.update_xaxes(title=f"difference ({facts} common facts)", col=2)
    legend = {"orientation": "h", "y": -0.14, "yanchor": "top", "x": 0}
    rows_drawn = len(measures) * max(len(models), len(between))
    size = {"height": 240 + max(52 * len(measures), 18 * rows_drawn), "width": 780}
    figure.update_layout(
        template=TEMPLATE, title=heading(_KEY, key=True), legend=legend, margin={"t": 80, "b": 110}, **size
    )
    return with_theme(figure, theme)


def _with_kind(model: str, rows: pd.DataFrame) -> str:
    """A model's name and the kind of its pairs: numbers of different kinds are no answers to one question."""
    kinds = dict.fromkeys(kind.replace("_", " ") for kind in rows.loc[rows["part"] == "all", "kind"] if kind)
    return f"{plain(model)} ({', '.join(kinds)})" if kinds else plain(model)


def _spread(number: int, count: int) -> float:
    """Where one of several stands within a row's height."""
    return 0.3 - 0.6 * (number + 0.5) / count


def _draw_model(figure: go.Figure, rows: pd.DataFrame, name: str, colour: str, symbol: str, beside: float) -> None:
    """One model on all its facts; below that its controls, above it the values on facts that two models share."""
    whole, common = (rows[rows["part"] == part] for part in ("all", "common"))
    common = common[common["facts"] < common["measure"].map(whole.set_index("measure")["facts"])]
    grey = {"color": CONTROL_GREY, "symbol": "diamond-open", "size": 6}
    hollow = {"color": colour, "symbol": f"{symbol}-open", "size": 7}
    value = _points(whole, "value", name, {"color": colour, "symbol": symbol, "size": 9})
    control = _points(whole.assign(at=whole["at"] - beside), "control", f"control of {name}", grey)
    shared = _points(common.assign(at=common["at"] + beside), "value", f"{name}, common facts", hollow)
    for trace in (control, shared):
        if any(one is not None for one in trace.x):
            figure.add_trace(trace.update(showlegend=False, legendgroup=name), row=1, col=1)
    figure.add_trace(value.update(legendgroup=name), row=1, col=1)
    _draw_undefined(figure, whole, name, 1)


def _draw_difference(figure: go.Figure, rows: pd.DataFrame, name: str, symbol: str) -> None:
    look = {"color": OKABE_ITO["black"], "symbol": symbol, "size": 9}
    figure.add_trace(_points(rows, "value", name, look), row=1, col=2)
    _draw_undefined(figure, rows, name, 2)


def _draw_undefined(figure: go.Figure, rows: pd.DataFrame, name: str, column: int) -> None:
    """A cross at zero for each number that is not there; it says why."""
    lost = rows[rows["value"].isna()]
    cross = {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": CONTROL_GREY}}
    hover = [f"<b>{name}</b><br>undefined: {plain(row['reason'], limit=200)}" for row in lost.to_dict("records")]
    crosses = go.Scatter(x=[0.0] * len(lost), y=lost["at"].tolist(), mode="markers", marker=cross, showlegend=False)
    if len(lost):
        figure.add_trace(
            crosses.update(name=f"{name}, undefined", hovertext=hover, hoverinfo="text"), row=1, col=column
        )


def _points(rows: pd.DataFrame, number: str, name: str, marker: dict[str, Any]) -> go.Scatter:
    """One number of some rows with its interval."""
    ends = ("low", "high") if number == "value" else (f"{number}_low", f"{number}_high")
    value, low, high = (rows[column].astype(float) for column in (number, *ends))
    hover = []
    for row in rows.to_dict("records"):
        text = difference_text if row["part"] == "difference" else interval_text
        said = text(*(float(row[column]) for column in (number, *ends)))
        facts = f"{row['n']:,} pairs of {row['facts']:,} facts, {plain(str(row['kind']).replace('_', ' '))}"
        note = plain(row["caution"], limit=200) if row["caution"] else ""
        hover.append("<br>".join(filter(None, [f"<b>{name}</b>", said, facts, note])))
    x = [None if math.isnan(one) else one for one in value]
    reach = {"array": (high - value).fillna(0).tolist(), "arrayminus": (value - low).fillna(0).tolist()}
    bars = {"type": "data", "symmetric": False, "color": marker["color"], "thickness": marker["size"] / 5, **reach}
    points = go.Scatter(x=x, y=rows["at"].tolist(), mode="markers", name=name, marker=marker, error_x=bars)
    return points.update(hovertext=hover, hoverinfo="text")
