"""Causal traces drawn, layer by part of the query (or head, or step), beside their control; and rankings of heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...errors import RevprobeError, did_you_mean
from ..statistics.causal_trace import place_means
from ..statistics.coverage import counted
from .drawable import Drawable, sample_of
from .theme import (
    BELOW,
    CELL_INK,
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

AXES = ("part", "head", "step")
TAKEN_WITH = {"head": "site='head'", "step": "steps=", "part": "positions="}
MEASURES = {"effect": "effect (nats)", "share": "restored share"}
ORDER = ("evidence", "template", "target", "all")
SITES = {
    "residual": "residual stream",
    "attention": "attention output",
    "mlp": "MLP output",
    "head": "what a head read",
}
SIDES = tuple((direction, control) for direction in ("forward", "reverse") for control in (False, True))


def causal_trace_figure(
    reading: Drawable, *, by: str | None = None, part: str | None = None, measure: str = "effect"
) -> go.Figure:
    """Draw a causal trace: a map for each direction, and beside it that of its control (a third fact's state).

    Args:
        by: what stands beside the layers: "part", "head" or "step"; the head or the step where the reading has them,
            else the part.
        part: the part of the query that heads or steps are drawn for; the first the reading has when None.
        measure: "effect" (nats) or "share".
    Raises: RevprobeError, for an option that is unknown, or that the reading does not hold.
    """
    frame = reading.frame
    there = [axis for axis in AXES if axis in frame and frame[axis].notna().any()]
    by = by or next((axis for axis in ("step", "head") if axis in there), "part")
    for what, value, known in (("by", by, there), ("measure", measure, list(MEASURES))):
        if what == "by" and value in AXES and value not in there:
            raise RevprobeError(f"causal trace without a {value} to draw by: measure it with {TAKEN_WITH[value]}")
        if value not in known:
            raise RevprobeError(f"causal trace drawn with {what} {value!r}{did_you_mean(value, known)}")
    parts = [one for one in ORDER if one in set(frame["part"])]
    if part in ORDER and part not in parts:
        raise RevprobeError(f"causal trace without the part {part!r}: measure it with positions=[{part!r}, ...]")
    if part is not None and part not in parts:
        raise RevprobeError(f"causal trace drawn with part {part!r}{did_you_mean(part, parts)}")
    shown = frame if by == "part" and part is None else frame[frame["part"] == (part or parts[0])]
    sides = [side for side in SIDES if _column(measure, side[1]) in frame]
    tables = [_table(shown, by, direction, _column(measure, control)) for direction, control in sides]
    if all(table.empty for table in tables):
        why = shown["reason" if measure == "effect" else "reason_share"].astype(str)
        counts = why[why != ""].value_counts().to_dict()
        return message_figure(f"No defined {measure}: {undefined_text({str(one): n for one, n in counts.items()})}")
    layers = sorted(set(frame["layer"].dropna().astype(int)))
    columns = [one for one in parts if one in set(shown["part"])] if by == "part" else sorted(set(shown[by].dropna()))
    figure = _maps(tables, sides, layers, columns, by, MEASURES[measure])
    return _titled(figure, reading, "" if by == "part" else f", at {part or parts[0]}")


def _column(measure: str, control: bool) -> str:
    return f"{measure}_control" if control else measure


def _table(frame: pd.DataFrame, by: str, direction: str, column: str) -> pd.DataFrame:
    return place_means(frame[frame["direction"] == direction], ["layer", by], column)


def _maps(
    tables: Sequence[pd.DataFrame],
    sides: Sequence[tuple[str, bool]],
    layers: Sequence[int],
    columns: Sequence[object],
    by: str,
    unit: str,
) -> go.Figure:
    """All maps on one colour scale; those of many columns in two rows, so that a cell stays wide enough to see."""
    rows = 2 if len(columns) > 8 else 1
    titles = [f"<b>{direction}{' control' if control else ''}</b>" for direction, control in sides]
    spacing = {"horizontal_spacing": 0.03, "vertical_spacing": 0.1}
    shape = {"rows": rows, "cols": len(sides) // rows}
    figure = make_subplots(**shape, shared_yaxes=True, shared_xaxes=rows > 1, subplot_titles=titles, **spacing)
    found = np.concatenate([table["value"].to_numpy(dtype=float) for table in tables])
    limit = float(np.nanmax(np.abs(found), initial=0.0)) or 1.0
    names = ["embedded" if layer < 0 else str(layer) for layer in layers]
    for place, table in enumerate(tables):
        z = pd.DataFrame(index=[*layers], columns=[*columns], dtype=object)
        words = z.copy()
        for row in table.to_dict("records"):
            z.loc[row["layer"], row[by]] = None if math.isnan(row["value"]) else row["value"]
            words.loc[row["layer"], row[by]] = (
                f"{interval_text(row['value'], row['low'], row['high'])}, {counted(row['n'], row['facts'])}"
            )
        heat = go.Heatmap(z=z.to_numpy().tolist(), x=[str(one) for one in columns], y=names, coloraxis="coloraxis")
        heat.update(text=words.to_numpy().tolist(), xgap=1, ygap=1, hoverongaps=False)
        heat.update(hovertemplate=f"layer %{{y}}, {by} %{{x}}: %{{text}}<extra></extra>")
        figure.add_trace(heat, row=place // shape["cols"] + 1, col=place % shape["cols"] + 1)
    scale = {"colorscale": [list(stop) for stop in DIVERGING], "cmin": -limit, "cmax": limit}
    figure.update_layout(coloraxis=scale | {"colorbar": {"title": {"text": unit, "side": "right"}, "thickness": 14}})
    every = max(1, len(columns) // 8) if rows > 1 else 1
    figure.update_xaxes(type="category", showgrid=False, dtick=every, tickfont={"size": 11})
    figure.update_yaxes(type="category", showgrid=False, dtick=max(1, len(layers) // 16))
    for at in range(1, rows + 1):
        figure.update_yaxes(title="layer", row=at, col=1)
    if by != "part":
        figure.update_xaxes(title=by, row=rows)
    return figure.update_layout(plot_bgcolor=UNDEFINED_GREY, height=200 + rows * max(150, 14 * len(layers)))


def _titled(figure: go.Figure, reading: Drawable, where: str) -> go.Figure:
    meta = reading.meta
    pairs = f"{reading.frame['pair'].nunique():,} pairs of {reading.frame['fact'].nunique():,} facts"
    undefined = sum(reading.undefined.values())
    what = f"clean state put back into the corrupted query: {SITES.get(meta.get('site', ''), 'state')}{where}, {pairs}"
    what += f", {undefined:,} undefined" if undefined else ""
    null = reading.control.value if reading.control else math.nan
    numbers = f"mean over places: {interval_text(reading.value, *reading.interval, null)} nats, {sample_of(reading)}"
    return _headed(figure, meta, what, numbers).update_layout(margin={"t": 120})


def _headed(figure: go.Figure, meta: dict[str, Any], *lines: str) -> go.Figure:
    step = "" if meta.get("step") is None else f", step {int(meta['step']):,}"
    model = f"<b>{plain(meta.get('model') or 'model')}</b>{step}"
    title = heading(f"{model} ({series_words(meta.get('weights'), meta.get('kind'))})", *lines)
    return figure.update_layout(template=TEMPLATE, title=title, margin={"t": 100})


def head_ranking_figure(reading: Drawable) -> go.Figure:
    """Every head's effect on the training facts, and that of the top heads on the others beside random heads'."""
    meta, table = reading.meta, reading.summary(by=["rank", "layer", "head"])
    if not meta["ranking"]:
        return message_figure(f"No defined effect: {undefined_text(reading.undefined)}")
    names = [
        f"layer {row['layer']}, head {row['head']}<br><sup>{counted(row['n'], row['facts'])}</sup>"
        for row in table.iloc[::-1].to_dict("records")
    ]
    edit = {"knockout": "lost when its route is cut", "transplant": "gained with the other direction's route"}
    titles = [f"<b>{len(meta['training_facts']):,} training facts</b> (squares: top heads)", "<b>held-out facts</b>"]
    figure = make_subplots(1, 2, subplot_titles=titles, column_widths=[0.55, 0.45], horizontal_spacing=0.2)
    _training_map(figure, pd.DataFrame(meta["ranking"]), table)
    rows, colour = table.iloc[::-1], FORWARD if meta["direction"] == "forward" else REVERSE
    chosen_by = {(one["layer"], one["head"]): one["value"] for one in meta["ranking"]}
    for column, low, high, shade, name, symbol in (
        ("control", "control_low", "control_high", CONTROL_GREY, "random heads of the layer", "diamond-open"),
        ("value", "low", "high", colour, "this head", "circle"),
    ):
        value = rows[column].astype(float)
        if value.isna().all():  # measured without a control
            continue
        bars = {"type": "data", "symmetric": False, "array": (rows[high] - value).tolist(), "color": shade}
        bars["arrayminus"] = (value - rows[low]).tolist()
        hover = [interval_text(*numbers) for numbers in rows[[column, low, high]].astype(float).itertuples(index=False)]
        points = go.Scatter(x=value.tolist(), y=names, mode="markers", error_x=bars, hovertext=hover, name=name)
        points.update(hoverinfo="y+text+name", marker={"color": shade, "symbol": symbol, "size": 9})
        figure.add_trace(points, row=1, col=2)
    trained = [chosen_by[row["layer"], row["head"]] for row in rows.to_dict("records")]
    marks = go.Scatter(x=trained, y=names, mode="markers", name="what it was chosen by", hoverinfo="x+y+name")
    marks.update(marker={"color": CONTROL_GREY, "symbol": "x-thin", "size": 9, "line": {"width": 2}})
    marks.marker.line.color = CONTROL_GREY
    figure.add_trace(marks, row=1, col=2)
    figure.add_vline(x=0, line={"color": CONTROL_GREY, "dash": "dot", "width": 1}, row=1, col=2)
    figure.update_xaxes(title=f"log-probability {edit[meta['edit']]} (nats)", title_font={"size": 12}, row=1, col=2)
    figure.update_yaxes(type="category", row=1, col=2)
    control = reading.control.value if reading.control else math.nan
    which = f"{meta['direction']} queries, {meta['edit']} of the top heads, one at a time"
    what = f"{which}: {interval_text(reading.value, *reading.interval, control)}, {sample_of(reading)}"
    height = 250 + max(260, 14 * len({one["layer"] for one in meta["ranking"]}), 26 * len(names))
    return _headed(figure, meta, what).update_layout(
        legend=BELOW | {"x": 1, "xanchor": "right"}, height=height, margin={"b": 110}
    )


def _training_map(figure: go.Figure, ranking: pd.DataFrame, table: pd.DataFrame) -> None:
    cells = ranking.pivot(index="layer", columns="head", values="value")
    limit = float(np.nanmax(np.abs(cells.to_numpy(dtype=float)))) or 1.0
    layers, heads = ([str(one) for one in axis] for axis in (cells.index, cells.columns))
    z = [[None if math.isnan(one) else one for one in line] for line in cells.to_numpy(dtype=float).tolist()]
    scale = {"colorscale": [list(stop) for stop in DIVERGING], "zmin": -limit, "zmax": limit, "hoverongaps": False}
    bar = {"title": {"text": "effect (nats)", "side": "bottom"}, "thickness": 10, "orientation": "h", "len": 0.3}
    bar |= {"x": 0, "xanchor": "left", "xpad": 0, "y": 0.01, "yref": "container", "yanchor": "bottom"}
    heat = go.Heatmap(z=z, x=heads, y=layers, xgap=1, ygap=1, colorbar=bar, **scale)
    heat.update(hovertemplate="layer %{y}, head %{x}: %{z:.3f} nats<extra></extra>")
    figure.add_trace(heat, row=1, col=1)
    ring = {"symbol": "square-open", "size": 11, "color": CELL_INK, "line": {"width": 2}}
    x, y = (table[name].astype(str).tolist() for name in ("head", "layer"))
    top = go.Scatter(x=x, y=y, mode="markers", marker=ring)
    top.update(
        name="top heads", showlegend=False, hovertext=[f"rank {rank}" for rank in table["rank"]], hoverinfo="text"
    )
    figure.add_trace(top, row=1, col=1)
    figure.update_xaxes(title="head", type="category", showgrid=False, dtick=max(1, len(heads) // 8), row=1, col=1)
    figure.update_yaxes(title="layer", type="category", showgrid=False, dtick=max(1, len(layers) // 16), row=1, col=1)
