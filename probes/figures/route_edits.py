"""Route edits drawn: the change of log-probability for everything at once, each layer and each head."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ...errors import RevprobeError, did_you_mean
from ..statistics.coverage import counted
from .drawable import Drawable
from .theme import (
    CONTROL_GREY,
    DIVERGING,
    FORWARD,
    REVERSE,
    TEMPLATE,
    UNDEFINED_GREY,
    heading,
    interval_text,
    message_figure,
    plain,
    undefined_text,
)
from .training_curves import series_words

KINDS = ("intervals", "heatmap")
EDIT_WORDS = {
    "knockout": "route to the evidence cut",
    "transplant": "route of the other direction put in",
    "scale": "odds of the evidence scaled",
}
COLOURS = {"forward": FORWARD, "reverse": REVERSE}
CHANGE = "change of the target's log-probability (nats)"


def route_edit_figure(reading: Drawable, *, kind: str = "intervals", direction: str = "reverse") -> go.Figure:
    """Draw a route-edit reading.

    Args:
        kind: "intervals", one row per edit (all at once, each layer, each head) with its 95 % interval and its
            control; "heatmap", layer x head, for a reading of scope "head".
        direction: of the queries that were edited.
    Raises: RevprobeError, for an unknown kind or direction.
    """
    for what, value, known in (("kind", kind, KINDS), ("direction", direction, tuple(COLOURS))):
        if value not in known:
            raise RevprobeError(f"route plot of {what} {value!r}{did_you_mean(value, known)}")
    part = _part(reading, direction=direction)
    table = part.summary(by=["scope", "layer", "head"])
    table = table.assign(order=table["scope"].map({"all": 0, "layer": 1, "head": 2}))
    table = table.sort_values(["order", "layer", "head"], ignore_index=True)  # one row per edit, the widest first
    shown = table[table["scope"] == "head"] if kind == "heatmap" else table
    if shown.empty:
        return message_figure("No defined change: no single head was edited; measure with scope='head'")
    if shown["value"].isna().all():
        return message_figure(
            f"No defined change: {undefined_text(_part(part, scope=shown['scope'].iloc[0]).undefined)}"
        )
    figure = _heatmap(shown) if kind == "heatmap" else _intervals(shown, direction)
    return _titled(figure, part, table.iloc[0], direction)


def _part(reading: Drawable, **where: str) -> Drawable:
    """The reading of the frame's rows with these values alone: its own n, undefined and numbers."""
    frame = reading.frame
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return reading.part(frame)


def _intervals(table: pd.DataFrame, direction: str) -> go.Figure:
    rows = table.iloc[::-1]
    labels = []
    for row in rows.to_dict("records"):
        head = f", head {row['head']}" if row["scope"] == "head" else ""
        place = "all at once" if row["scope"] == "all" else f"layer {row['layer']}{head}"
        labels.append(f"{place}<br><sup>{counted(int(row['n']), int(row['facts']))}</sup>")
    figure = go.Figure()
    for column, low, high, colour, name, symbol in (
        ("control", "control_low", "control_high", CONTROL_GREY, "control (other positions)", "diamond-open"),
        ("value", "low", "high", COLOURS[direction], "evidence", "circle"),
    ):
        value = rows[column].astype(float)
        if value.isna().all():  # measured without a control
            continue
        bars = {"type": "data", "symmetric": False, "array": (rows[high] - value).tolist(), "color": colour}
        bars["arrayminus"] = (value - rows[low]).tolist()
        hover = [interval_text(*numbers) for numbers in rows[[column, low, high]].astype(float).itertuples(index=False)]
        points = go.Scatter(
            x=value.tolist(), y=labels, mode="markers", error_x=bars, hovertext=hover, hoverinfo="y+text"
        )
        figure.add_trace(points.update(name=name, marker={"color": colour, "symbol": symbol, "size": 9}))
    figure.add_vline(x=0, line={"color": CONTROL_GREY, "dash": "dot", "width": 1})
    figure.update_xaxes(title=CHANGE)
    figure.update_yaxes(type="category")
    return figure.update_layout(height=190 + 28 * len(rows))


def _heatmap(table: pd.DataFrame) -> go.Figure:
    cells = table.astype({"layer": int, "head": int}).pivot(index="layer", columns="head", values="value")
    texts = [interval_text(*numbers) for numbers in table[["value", "low", "high", "control"]].itertuples(index=False)]
    hover = (
        table.assign(text=texts).astype({"layer": int, "head": int}).pivot(index="layer", columns="head", values="text")
    )
    limit = float(np.nanmax(np.abs(cells.to_numpy(dtype=float)))) or 1.0
    heat = go.Heatmap(
        x=[str(head) for head in cells.columns],
        y=[str(layer) for layer in cells.index],
        z=[[None if math.isnan(value) else value for value in line] for line in cells.to_numpy(dtype=float).tolist()],
        text=hover.to_numpy().tolist(),
        hovertemplate="layer %{y}, head %{x}: %{text}<extra></extra>",
        colorscale=DIVERGING,
        zmin=-limit,
        zmax=limit,
        colorbar={"title": "nats"},
    )
    heat.update(xgap=1, ygap=1, hoverongaps=False)
    figure = go.Figure(heat).update_layout(plot_bgcolor=UNDEFINED_GREY, height=230 + max(150, 14 * len(cells)))
    every = {"tickmode": "linear", "type": "category", "showgrid": False}
    figure.update_xaxes(title=f"head edited ({CHANGE})", dtick=max(1, len(cells.columns) // 16), **every)
    return figure.update_yaxes(title="layer edited", dtick=max(1, len(cells) // 16), **every)


def _titled(figure: go.Figure, reading: Drawable, widest: pd.Series, direction: str) -> go.Figure:
    meta = reading.meta
    step = "" if meta.get("step") is None else f", step {int(meta['step']):,}"
    numbers = interval_text(*(float(widest[name]) for name in ("value", "low", "high", "control")))
    undefined = sum(reading.undefined.values())
    what = (
        f"{direction} queries, {EDIT_WORDS[meta['edit']]}: {numbers}, {counted(int(widest['n']), int(widest['facts']))}"
    )
    what += f", {undefined:,} undefined" if undefined else ""
    text = f"<b>{plain(meta.get('model') or 'model')}</b>{step} ({series_words(meta.get('weights'), meta.get('kind'))})"
    title = heading(text, what)
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
    return figure.update_layout(template=TEMPLATE, title=title, legend=legend, margin={"t": 110}, width=640)
