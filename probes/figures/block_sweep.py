"""Block size as a dial: each measure over the sizes, on the pairs that have a value at all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .theme import (
    CONTROL_GREY,
    FORWARD,
    OKABE_ITO,
    REVERSE,
    TEMPLATE,
    heading,
    interval_text,
    message_figure,
    plain,
    samples_text,
    with_theme,
)

_PANELS = {
    "attention_correlation": ("Routing: attention scores", "Pearson r", OKABE_ITO["blue"], -0.25),
    "gradient_cosine": ("Learning: gradients", "cosine over all parameters", OKABE_ITO["blue"], -0.25),
    "forward_probability": ("Answer: forward query", "target probability", FORWARD, 0.0),
    "reverse_probability": ("Answer: reverse query", "target probability", REVERSE, 0.0),
}
_KEY = "line: common pairs · bar: 95 % interval over facts · grey: control (shuffled facts) · ×: undefined (hover: why)"
# Two panels beside each other fit half a screen. Of more sizes than find room under one, some have no label.
_WIDTH, _PANEL, _COLUMNS, _CHARACTER = 760, 290, 2, 8


def block_sweep_figure(
    frame: pd.DataFrame, sizes: Sequence[int | None], asked: Mapping[str, int], *, theme: str = "light"
) -> go.Figure:
    """Draw what `BlockSweep.frame` holds.

    Args:
        sizes: ascending, None last: every token sees every other.
        asked: measure -> how many pairs were asked; the ticks say how many of them are in sight.
    """
    measures = [measure for measure in _PANELS if (frame["measure"] == measure).any()]
    if not measures:
        return message_figure("No measure to draw.")
    titles = [f"<b>{_PANELS[measure][0]}</b>" for measure in measures]
    lines = math.ceil(len(measures) / _COLUMNS)
    figure = make_subplots(
        lines,
        min(len(measures), _COLUMNS),
        subplot_titles=titles,
        horizontal_spacing=0.15,
        vertical_spacing=0.34 / lines,
    )
    for place, measure in enumerate(measures):
        at = {"row": place // _COLUMNS + 1, "col": place % _COLUMNS + 1}
        rows = frame[(frame["measure"] == measure) & (frame["part"] == "common")].reset_index(drop=True)
        _, unit, colour, floor = _PANELS[measure]
        _draw(figure, rows, sizes, measure.replace("_", " "), colour, floor, at)
        ticks = _ticks(sizes, rows["visible"].tolist(), _PANEL if len(measures) > 1 else _WIDTH - 115)
        title = f"block size<br>(below: pairs in sight, of {asked[measure]:,})"
        figure.update_xaxes(title=title, range=[-0.4, len(sizes) - 0.6], tickangle=0, **ticks, **at)
        title = f"{unit}<br>({samples_text(rows['n'], rows['facts'])})"
        lowest = min([floor, *rows[["value", "low", "control", "control_low"]].astype(float).min().dropna()])
        figure.update_yaxes(title=title, range=[lowest - 0.07, 1.04], **at)
    figure.update_layout(template=TEMPLATE, title=heading(_KEY, key=True), showlegend=False, margin={"t": 80, "b": 90})
    return with_theme(figure.update_layout(width=_WIDTH, height=90 + 350 * lines), theme)


def _ticks(sizes: Sequence[int | None], visible: Sequence[int], width: int) -> dict[str, list[Any]]:
    """A size with its pairs in sight below it, of as many sizes as stand beside each other in `width` pixels."""
    texts = [f"{'whole' if size is None else size}<br>{n:,}" for size, n in zip(sizes, visible, strict=True)]
    wide = 10 + _CHARACTER * max(len(part) for text in texts for part in text.split("<br>"))
    step = math.ceil(len(sizes) * wide / width)
    # Counted from the last, the whole text; the lines of the others stay.
    labelled = {place for place in range(len(sizes)) if (len(sizes) - 1 - place) % step == 0}
    return {
        "tickvals": list(range(len(sizes))),
        "ticktext": [text if place in labelled else "" for place, text in enumerate(texts)],
    }


def _draw(
    figure: go.Figure,
    rows: pd.DataFrame,
    sizes: Sequence[int | None],
    name: str,
    colour: str,
    floor: float,
    at: dict[str, int],
) -> None:
    """Control and line of one measure with their intervals, and a cross at the foot where it is undefined."""
    hover = []
    for size, row in zip(sizes, rows.to_dict("records"), strict=True):
        numbers = interval_text(*(float(row[key]) for key in ("value", "low", "high", "control")))
        where = "every token sees every other" if size is None else f"blocks of {size}"
        counts = f"n = {row['n']:,} pairs of {row['facts']:,} facts, {row['visible']:,} in sight"
        notes = [plain(row[key], limit=200) for key in ("reason", "caution") if row[key]]
        hover.append("<br>".join([f"<b>{name}</b>", f"{where}: {numbers}", counts, *notes]))
    grey = {"color": CONTROL_GREY, "symbol": "diamond-open", "size": 6}
    dashed = {"color": CONTROL_GREY, "width": 1.5, "dash": "dash"}
    parts = [
        _points(rows, "control", line=dashed, marker=grey, hoverinfo="skip", name=f"control of {name}"),
        _points(rows, "value", line={"color": colour, "width": 2}, hovertext=hover, hoverinfo="text", name=name),
    ]
    gaps = [place for place, number in enumerate(rows["value"].astype(float)) if math.isnan(number)]
    cross = {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": CONTROL_GREY}}
    lost = go.Scatter(x=gaps, y=[floor for _ in gaps], mode="markers", marker=cross, name=f"{name}, undefined")
    parts += [lost.update(hovertext=[hover[place] for place in gaps], hoverinfo="text")] if gaps else []
    for part in parts:
        figure.add_trace(part, **at)


def _points(rows: pd.DataFrame, number: str, *, line: dict[str, Any], **look: Any) -> go.Scatter:
    """One number over the sizes. A bar at each size, not an area: a size without neighbours has its interval too."""
    ends = ("low", "high") if number == "value" else (f"{number}_low", f"{number}_high")
    value, low, high = (rows[column].astype(float) for column in (number, *ends))
    bars = {"type": "data", "symmetric": False, "color": line["color"], "thickness": line["width"] * 0.75, "width": 4}
    bars |= {"array": (high - value).fillna(0).tolist(), "arrayminus": (value - low).fillna(0).tolist()}
    places = list(range(len(rows)))
    return go.Scatter(x=places, y=value.tolist(), mode="lines+markers", line=line, error_y=bars, **look)
