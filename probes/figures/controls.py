"""A reading's number above everything that it is held against, and how each control looks wherever it is drawn.

Every control keeps its marker and its dash, in the figure of one reading and in the curves over training; the run keeps
its colour. What has no number keeps its row, with the reason in words.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from .drawable import Drawable
from .theme import CONTROL_GREY, FORWARD, difference_text, interval_text, plain


@dataclass(frozen=True)
class Look:
    """How a control is called and drawn."""

    words: str
    symbol: str
    dash: str


LOOKS = {
    "shuffled": Look("shuffled facts", "diamond-open", "dash"),
    "untrained": Look("untrained twin", "square-open", "dot"),
    "neighbour": Look("neighbour", "triangle-up-open", "dashdot"),
    "sink": Look("attention sink", "triangle-down-open", "longdash"),
    "parent": Look("parent", "star-open", "longdashdot"),
    "evidence": Look("other evidence", "hexagon-open", "dash"),
}
AXES = {"attention_correlation": "Pearson r of forward and reverse score", "gradient_cosine": "cosine of the gradients"}
LINE = 78  # letters of a reason on one line, of two
ROW = 46
BESIDE: dict[str, Any] = {"x": 1.01, "xref": "paper", "xanchor": "left", "align": "left", "showarrow": False}
BESIDE |= {"font": {"size": 11, "color": CONTROL_GREY}}


def controls_figure(reading: Drawable) -> go.Figure:
    """The number with its 95 % interval, and below it each control with its own, and the paired difference."""
    own: dict[Hashable, Any] = {"control": "", "model": reading.meta.get("model"), "reason": reading_reason(reading)}
    own |= dict(zip(("low", "high"), reading.interval, strict=True))
    own |= {"value": reading.value, "n": reading.n, "facts": reading.facts}
    rows = [own, *reading.controls.to_dict("records")][::-1]  # plotly's first category is at the bottom
    figure = go.Figure()
    labels = [_label(row) for row in rows]
    for row, label in zip(rows, labels, strict=True):
        figure.add_trace(_point(row, label))
        _beside(figure, row, y=label)
    figure.add_annotation(text="<b>reading − control</b>", yref="paper", y=1.0, yanchor="bottom", **BESIDE)
    ends = [float(row[name]) for row in rows for name in ("value", "low", "high")]
    lowest = min([0.0, *(end for end in ends if not math.isnan(end))])
    figure.add_vline(x=0, line={"color": CONTROL_GREY, "dash": "dot", "width": 1})
    measure = "gradient_cosine" if reading.name.endswith("gradient_cosine") else reading.name
    figure.update_xaxes(title=f"{AXES.get(measure, 'value')} (bar: 95 % interval)", range=[lowest - 0.05, 1.05])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=labels)
    size = {"margin": {"t": 90, "r": 150}, "meta": {"height": 180 + ROW * len(rows)}}
    return figure.update_layout(showlegend=False, **size)


def _beside(figure: go.Figure, row: dict[Hashable, Any], **place: Any) -> None:
    """What no marker says: why there is no number, and at the right by how much the reading's is another."""
    if math.isnan(row["value"]):
        said = textwrap.wrap(f"undefined: {row['reason'] or 'no number'}", LINE, max_lines=2, placeholder=" …")
        text = "<br>".join(plain(line, limit=None) for line in said)
        figure.add_annotation(text=text, bgcolor="white", **BESIDE | {"x": 0.01}, **place)
    if row["control"] and not math.isnan(row["difference"]):
        figure.add_annotation(text=_apart(row), **BESIDE, **place)


def _apart(row: dict[Hashable, Any]) -> str:
    return difference_text(*(float(row[f"difference{end}"]) for end in ("", "_low", "_high")))


def reading_reason(reading: Drawable) -> str:
    """What is undefined of a reading, counted."""
    return "; ".join(f"{count:,} {why}" for why, count in reading.undefined.items() if count)


def _label(row: dict[Hashable, Any]) -> str:
    name = str(row["control"])
    words = "<b>forward and reverse</b>" if not name else LOOKS[name].words
    beside = "" if pd.isna(row["n"]) else f"{int(row['n']):,} pairs, {int(row['facts']):,} facts"
    if name == "parent" and isinstance(row["model"], str):
        beside = ", ".join(filter(None, [plain(row["model"], limit=28), beside]))
    return words + (f"<br><sup>{beside}</sup>" if beside else "")


def _point(row: dict[Hashable, Any], label: str) -> go.Scatter:
    """One number with its interval; a cross where it is undefined."""
    name = str(row["control"])
    colour, symbol = (CONTROL_GREY, LOOKS[name].symbol) if name else (FORWARD, "circle")
    value, low, high = (float(row[key]) for key in ("value", "low", "high"))
    known = not math.isnan(value)
    bars: dict[str, Any] = {"type": "data", "symmetric": False, "color": colour, "thickness": 2}
    if known and not math.isnan(low):
        bars |= {"array": [high - value], "arrayminus": [value - low]}
    marker = {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2, "color": colour}}
    point = go.Scatter(x=[value if known else None], y=[label], mode="markers", marker=marker, error_x=bars)
    return point.update(name=LOOKS[name].words if name else "reading", hovertext=[control_words(row)], hoverinfo="text")


def control_words(row: dict[Hashable, Any]) -> str:
    """A control as its hover says it: the number, by how much the reading's is another, and what limits both."""
    name = str(row["control"])
    title = f"<b>{LOOKS[name].words if name else 'forward and reverse'}</b>"
    model = f" ({plain(row['model'])})" if isinstance(row["model"], str) else ""
    said = [title + model, interval_text(*(float(row[key]) for key in ("value", "low", "high")))]
    if name and not math.isnan(row["difference"]):
        said.append(f"reading − control: {_apart(row)}, paired over facts")
    said += textwrap.wrap(plain(row["reason"], limit=300), LINE) if row["reason"] else []
    return "<br>".join(said)


def controls_over_steps(readings: Iterable[Drawable]) -> pd.DataFrame:
    """Every control but the shuffled facts of some readings, with run, step, weights, kind and measure before it."""
    parts = []
    for reading in (one for one in readings if one.meta.get("controls")):
        about = {key: reading.meta.get(key) for key in ("step", "weights", "kind")} | {"measure": reading.name}
        part = reading.controls[lambda table: table["control"] != "shuffled"]
        parts.append(part.assign(run=str(reading.meta.get("model") or "model"), **about))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
