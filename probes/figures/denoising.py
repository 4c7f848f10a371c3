"""Denoising traces drawn: the target's probability over the steps, and which layers attend to the evidence when."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...errors import RevprobeError, did_you_mean
from ..statistics.denoising import attention_table, steps_table
from .drawable import Drawable, sample_of
from .theme import (
    FORWARD,
    OKABE_ITO,
    REVERSE,
    TEMPLATE,
    UNDEFINED_GREY,
    band,
    dashed,
    faded,
    heading,
    interval_text,
    message_figure,
    plain,
    samples_text,
    undefined_text,
)
from .training_curves import series_words

KINDS = ("steps", "layers", "heads")
COLOURS = {"forward": FORWARD, "reverse": REVERSE}
# From paper (by its name, which a dark page swaps) through one hue: a weight has a zero and no sign.
WEIGHTS = ((0.0, "white"), (1.0, OKABE_ITO["blue"]))
CELL, MOST = 18, 640  # pixels a layer, and at most


def denoising_figure(reading: Drawable, *, kind: str = "steps", step: int = 1) -> go.Figure:
    """Draw a denoising trace, forward beside reverse.

    Args:
        kind: "steps", the target's probability over the steps with its 95 % interval and its control; "layers", the
            evidence's attention weight by layer and step, mean over heads; "heads", by layer and head at one step.
        step: of kind "heads".
    Raises: RevprobeError, for an unknown kind, or a step that the trace does not have.
    """
    if kind not in KINDS:
        raise RevprobeError(f"denoising plot of kind {kind!r}{did_you_mean(kind, KINDS)}")
    frame = reading.frame
    if kind == "steps":
        return _titled(_curves(reading), reading)
    last = int(frame["step"].max())
    if kind == "heads" and not 1 <= step <= last:
        raise RevprobeError(
            f"no step {step!r} in this trace: expected one of 1 to {last}; steps= of trace_denoising sets how many"
        )
    shown = frame[frame["step"] == step] if kind == "heads" else frame
    across = "head" if kind == "heads" else "step"
    table = attention_table(shown, ["direction", "layer", across])
    if table.empty or table["value"].isna().all():
        return message_figure(f"No attention to draw: {undefined_text(reading.part(shown).undefined)}")
    return _titled(_maps(table, across, step), reading)


def _curves(reading: Drawable) -> go.Figure:
    table = steps_table(reading.frame)
    if table["value"].isna().all():
        return message_figure(f"No defined probability: {undefined_text(reading.undefined)}")
    figure = go.Figure()
    for direction, rows in table.groupby("direction", sort=True):
        colour, x = COLOURS[str(direction)], rows["step"].tolist()
        numbers = {name: rows[name].astype(float).tolist() for name in rows if name not in ("direction", "step", "n")}
        # ALiBi's two curves lie on one another, so one has rings around the other's points.
        mark = {"size": 7, "color": colour} if direction == "reverse" else {"size": 12, "symbol": "circle-open"}
        figure.add_trace(band(x, numbers["low"], numbers["high"], colour, showlegend=False))
        null = numbers.get("control", [math.nan] * len(x))
        if "control" in numbers:
            name = f"{direction}: facts shuffled" + " (undefined)" * all(map(math.isnan, null))
            figure.add_trace(dashed(x, null, faded(colour, 0.75), hoverinfo="skip", name=name))
        words = zip(x, numbers["value"], numbers["low"], numbers["high"], null, rows["n"], strict=True)
        hover = [f"{direction}, step {at}: {interval_text(*found)}, n = {n:,}" for at, *found, n in words]
        line = {"color": colour, "width": 2}
        points = go.Scatter(x=x, y=numbers["value"], mode="lines+markers", line=line, hovertext=hover, hoverinfo="text")
        figure.add_trace(points.update(name=str(direction), marker=mark))
    size = samples_text(table["n"], table["facts"])
    figure.update_xaxes(title=f"denoising step ({size} a direction)", dtick=max(1, len(set(table["step"])) // 12))
    figure.update_yaxes(title="probability of the target<br>(mean over its positions)", rangemode="tozero")
    return figure.update_layout(width=720, height=460)


def _maps(table: pd.DataFrame, across: str, step: int) -> go.Figure:
    """Two maps on one scale, forward left and reverse right; undefined cells are grey."""
    directions = [name for name in ("forward", "reverse") if (table["direction"] == name).any()]
    sides = {name: table[table["direction"] == name] for name in directions}
    counts = {name: samples_text(side["n"], side["facts"]) for name, side in sides.items()}
    titles = [f"<b>{name}</b><br><sup>{count} a cell</sup>" for name, count in counts.items()]
    figure = make_subplots(1, len(directions), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    at = f" at step {step}" if across == "head" else ""
    for column, direction in enumerate(directions, start=1):
        rows = table[table["direction"] == direction].astype({"layer": int, across: int})
        texts = [interval_text(*numbers) for numbers in rows[["value", "low", "high"]].itertuples(index=False)]
        cells, hover = (
            rows.assign(text=texts).pivot(index="layer", columns=across, values=name) for name in ("value", "text")
        )
        z = [[None if math.isnan(one) else one for one in line] for line in cells.to_numpy(dtype=float).tolist()]
        heat = go.Heatmap(
            x=cells.columns.tolist(),
            y=cells.index.tolist(),
            z=z,
            text=hover.fillna("not measured").to_numpy().tolist(),
            hovertemplate=f"{direction}, layer %{{y}}, {across} %{{x}}{at}: %{{text}}<extra></extra>",
            coloraxis="coloraxis",
        )
        figure.add_trace(heat, row=1, col=column)
        every = max(1, len(cells.columns) // 8)
        axis = {"title": f"{across}{at}" if across == "head" else "denoising step", "dtick": every, "showgrid": False}
        figure.update_xaxes(**axis, tick0=int(cells.columns[0]), row=1, col=column)
    layers = table["layer"].nunique()
    figure.update_yaxes(dtick=max(1, layers // 16), showgrid=False)
    figure.update_yaxes(title="layer", row=1, col=1)
    mean = "" if across == "head" else ",<br>mean over heads"
    bar = {"title": {"text": f"weight of<br>the evidence{mean}"}, "thickness": 14}
    scale = {"cmin": 0.0, "cmax": float(table["value"].max()) or 1.0, "colorscale": WEIGHTS, "colorbar": bar}
    size = {"height": 210 + min(MOST, max(120, CELL * layers))}
    return figure.update_layout(coloraxis=scale, plot_bgcolor=UNDEFINED_GREY, **size)


def _titled(figure: go.Figure, reading: Drawable) -> go.Figure:
    meta = reading.meta
    step = "" if meta.get("step") is None else f", training step {int(meta['step']):,}"
    control = reading.control.value if reading.control else math.nan
    numbers = interval_text(reading.value, *reading.interval, control)
    undefined = sum(reading.undefined.values())
    text = f"<b>{plain(meta.get('model') or 'model')}</b>{step} ({series_words(meta.get('weights'), meta.get('kind'))})"
    line = f"probability of the reverse target when it was written: {numbers}, {sample_of(reading)}"
    line += f", {undefined:,} undefined" if undefined else ""
    title = heading(text, line)
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
    return figure.update_layout(template=TEMPLATE, title=title, legend=legend, margin={"t": 120})
