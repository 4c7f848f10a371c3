"""Block size as a dial: each measure over the sizes, on the pairs that have a value at all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .theme import (
    CONTROL_GREY,
    FORWARD,
    OKABE_ITO,
    REVERSE,
    TEMPLATE,
    band,
    counts_text,
    faded,
    interval_text,
    message_figure,
    plain,
    with_theme,
)

_PANELS = {
    "attention_correlation": ("Routing: attention scores", "Pearson r", OKABE_ITO["blue"], -0.25),
    "gradient_cosine": ("Learning: gradients", "cosine over all parameters", OKABE_ITO["blue"], -0.25),
    "forward_probability": ("Answer: forward query", "target probability", FORWARD, 0.0),
    "reverse_probability": ("Answer: reverse query", "target probability", REVERSE, 0.0),
}
_KEY = "line: common pairs · band: 95 % interval over facts · dashed: control (shuffled facts) · ×: undefined"


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
    figure = make_subplots(1, len(measures), subplot_titles=titles, horizontal_spacing=0.08)
    for column, measure in enumerate(measures, start=1):
        rows = frame[(frame["measure"] == measure) & (frame["part"] == "common")].reset_index(drop=True)
        _, unit, colour, floor = _PANELS[measure]
        _draw(figure, rows, sizes, measure.replace("_", " "), colour, floor, column)
        seen = "<br>".join(["block size", f"(below: pairs in sight, of {asked[measure]:,})"])
        ticks = [
            f"{'whole' if size is None else size}<br>{n:,}" for size, n in zip(sizes, rows["visible"], strict=True)
        ]
        places = list(range(len(sizes)))
        span = [-0.4, len(sizes) - 0.6]
        figure.update_xaxes(title=seen, tickvals=places, ticktext=ticks, range=span, row=1, col=column)
        title = f"{unit} ({counts_text(rows['n'].astype(float))})"
        lowest = min([floor, *rows[["value", "low", "control"]].astype(float).min().dropna()])
        figure.update_yaxes(title=title, range=[lowest - 0.07, 1.04], row=1, col=column)
    heading = {"text": _KEY, "font": {"size": 12, "color": "#555"}, "y": 1, "yref": "container", "pad": {"t": 8}}
    figure.update_layout(template=TEMPLATE, title=heading, showlegend=False, height=440, margin={"t": 80, "b": 90})
    return with_theme(figure.update_layout(width=max(420, 330 * len(measures))), theme)


def _draw(
    figure: go.Figure,
    rows: pd.DataFrame,
    sizes: Sequence[int | None],
    name: str,
    colour: str,
    floor: float,
    column: int,
) -> None:
    """Band, control and line of one measure, and a cross at the foot where it is undefined."""
    x = [float(place) for place in range(len(sizes))]
    value, low, high, control = (rows[key].astype(float).tolist() for key in ("value", "low", "high", "control"))
    hover = []
    for size, row in zip(sizes, rows.to_dict("records"), strict=True):
        numbers = interval_text(*(float(row[key]) for key in ("value", "low", "high", "control")))
        where = "every token sees every other" if size is None else f"blocks of {size}"
        counts = f"n = {row['n']:,} pairs of {row['facts']:,} facts, {row['visible']:,} in sight"
        notes = [plain(row[key], limit=200) for key in ("reason", "caution") if row[key]]
        hover.append("<br>".join([f"<b>{name}</b>", f"{where}: {numbers}", counts, *notes]))
    gaps = [place for place, number in enumerate(value) if math.isnan(number)]
    cross = {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": CONTROL_GREY}}
    line, dashed = {"color": colour, "width": 2}, {"color": faded(colour, 0.75), "width": 1.5, "dash": "dash"}
    parts = [
        band(x, low, high, colour),
        go.Scatter(x=x, y=control, mode="lines", line=dashed, hoverinfo="skip", name=f"control of {name}"),
        go.Scatter(x=x, y=value, mode="lines+markers", line=line, hovertext=hover, hoverinfo="text", name=name),
        go.Scatter(
            x=[x[place] for place in gaps],
            y=[floor for _ in gaps],
            mode="markers",
            marker=cross,
            hovertext=[hover[place] for place in gaps],
            hoverinfo="text",
            name=f"{name}, undefined",
        ),
    ]
    for part in parts:
        if part.x:
            figure.add_trace(part, row=1, col=column)
