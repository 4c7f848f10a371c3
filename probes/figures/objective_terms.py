"""Objective terms drawn: each class's pressure on the reverse answer, and sums of them over training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...errors import RevprobeError, did_you_mean
from ..statistics.by_class import objective_classes
from .drawable import Drawable, sample_of
from .theme import (
    CONTROL_GREY,
    FORWARD,
    OKABE_ITO,
    REVERSE,
    TEMPLATE,
    StepScale,
    band,
    counts_text,
    dashed,
    heading,
    interval_text,
    message_figure,
    plain,
)

SHOWN = {
    "pressure": "pressure on the reverse answer (nats per unit of learning rate)",
    "letters": "pressure on p(target | candidates) (nats per unit of learning rate)",
    "margin": "pressure on p(candidates) (nats per unit of learning rate)",
    "change_adamw": "change of the reverse loss by the coming step (nats)",
    "share": "share of the objective",
    "cosine": "cosine with the reverse loss's gradient",
}
BY = ("priced", "target", "evidence")


def objective_terms_figure(reading: Drawable, *, by: str | Iterable[str] = BY, measure: str = "pressure") -> go.Figure:
    """One row per class of terms; terms that the dial leaves out are hollow.

    Args:
        by: what tells classes apart, as in `objective_classes`.
        measure: "pressure", "letters", "margin", "change_adamw", "share" or "cosine".
    Raises: RevprobeError, for another measure or grouping.
    """
    if measure not in SHOWN:
        raise RevprobeError(f"objective plot of measure {measure!r}{did_you_mean(measure, list(SHOWN))}")
    table = objective_classes(reading, by)
    table = table[table[measure].notna()].iloc[::-1]
    if table.empty:
        return message_figure(f"No class has a {measure} here: {reading.meta['reason_adamw'] or reading.undefined}")
    dropped = table["dropped"].astype(bool) if "dropped" in table else pd.Series(False, index=table.index)
    labels = [_label(row) for row in table.to_dict("records")]
    figure = go.Figure()
    if measure == "pressure" and table["control"].notna().any():
        _add(figure, table, labels, "control", CONTROL_GREY, "control (other facts)", ["diamond-open"] * len(table))
    symbols = ["circle-open" if out else "circle" for out in dropped]
    _add(figure, table, labels, measure, FORWARD if measure in ("share", "cosine") else REVERSE, measure, symbols)
    if measure != "share":
        figure.add_vline(x=0, line={"color": CONTROL_GREY, "dash": "dot", "width": 1})
    figure.update_xaxes(title=f"{SHOWN[measure]}<br>mean over {int(table['n'].max()):,} facts")
    figure.update_yaxes(type="category")
    return _titled(figure, reading).update_layout(height=210 + 22 * len(table))


def _label(row: Mapping[Any, Any]) -> str:
    words = [str(row["priced"])] if "priced" in row else []
    words += [f"{side} {row[side]}" for side in ("target", "evidence") if isinstance(row.get(side), str)]
    words += [f"{row['masks']} masks"] if "masks" in row and not pd.isna(row["masks"]) else []
    words += [str(row["role"])] if "role" in row else []
    words += ["left out"] if row.get("dropped") else []
    return plain(", ".join(words) or "all terms")


def _add(
    figure: go.Figure, table: pd.DataFrame, labels: list[str], name: str, colour: str, label: str, symbols: list[str]
) -> None:
    value = table[name].astype(float)
    marker = {"color": colour, "symbol": symbols, "size": 9}
    points = go.Scatter(x=value.tolist(), y=labels, mode="markers", name=label, marker=marker, hoverinfo="y+text")
    edges = [f"{name}_low", f"{name}_high"]
    if edges[0] in table:
        low, high = (table[edge].astype(float) for edge in edges)
        bars = {"type": "data", "symmetric": False, "array": (high - value).tolist(), "color": colour}
        points.update(error_x=bars | {"arrayminus": (value - low).tolist()})
        points.update(hovertext=[interval_text(*numbers) for numbers in zip(value, low, high, strict=True)])
    else:
        points.update(hovertext=[f"{number:.3g}" for number in value])
    figure.add_trace(points)


def _titled(figure: go.Figure, reading: Drawable) -> go.Figure:
    meta = reading.meta
    step = "" if meta.get("step") is None else f", step {int(meta['step']):,}"
    weights = f" ({plain(meta['weights'])})" if meta.get("weights") else ""
    control = reading.control.value if reading.control else math.nan
    numbers = f"pressure of all {interval_text(reading.value, *reading.interval, control)}, {sample_of(reading)}"
    numbers += f", dial {plain(meta['dial'])}"
    if not meta["enumerated"]:
        numbers += f", error of the draw {meta['sampling_error']:.2g}"
    text = f"<b>{plain(meta.get('model') or 'model')}</b>{step}{weights}"
    title = heading(text, numbers)
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
    return figure.update_layout(template=TEMPLATE, title=title, legend=legend, margin={"t": 110, "b": 80}, width=700)


LINES = {
    "target": ("target, evidence visible", OKABE_ITO["blue"]),
    "negative": ("placeholders right of it", OKABE_ITO["vermillion"]),
    "left": ("placeholders left of it", OKABE_ITO["orange"]),
    "asked": ("these three", OKABE_ITO["purple"]),
    "all": ("all terms", OKABE_ITO["black"]),
}


def pressure_figure(table: pd.DataFrame) -> go.Figure:
    """The pressure on the reverse answer by kind of term over training, above the reverse log-odds.

    Args:
        table: what `finetune.analysis.pressure` gave for one run.
    Raises: RevprobeError, when a column is missing or there are no rows.
    """
    needed = ("step", "terms", "pressure", "pressure_low", "pressure_high", "control", "log_odds", "log_odds_low", "n")
    missing = [column for column in needed if column not in table]
    if missing or table.empty:
        raise RevprobeError(f"the table lacks {missing or 'rows'}; expected what pressure gives")
    scale = StepScale.over(int(step) for step in table["step"])
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4])
    for name, (label, colour) in LINES.items():
        part = table[table["terms"] == name].sort_values("step")
        _curve(figure, part, scale, "pressure", label, colour, row=1)
    everything = table[table["terms"] == "all"].sort_values("step")
    x, y = [scale.position(step) for step in everything["step"]], everything["control"].astype(float).tolist()
    figure.add_trace(dashed(x, y, CONTROL_GREY, name="all terms, control (other facts)"), 1, 1)
    _curve(figure, everything, scale, "log_odds", "reverse log-odds", REVERSE, row=2)
    for row in (1, 2):
        figure.add_hline(y=0, line={"color": CONTROL_GREY, "dash": "dot", "width": 1}, row=row, col=1)
    counts = counts_text(table["n"].astype(float))
    figure.update_yaxes(title=f"pressure (nats per unit<br>of learning rate, {counts} facts)", row=1, col=1)
    figure.update_yaxes(title="target against<br>placeholder (nats)", row=2, col=1)
    figure.update_xaxes(scale.axis(), row=2, col=1)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    # Tables of older versions do not say of which model they are.
    models = ", ".join(str(one) for one in table["model"].dropna().unique()) if "model" in table else ""
    words = "above 0: a step on these terms lowers the reverse loss · band: 95 % over facts"
    title = heading(f"<b>{plain(models or 'model')}</b>: pressure over training", words, key=True)
    return figure.update_layout(template=TEMPLATE, title=title, legend=legend, height=620, width=760, margin={"t": 110})


def _curve(
    figure: go.Figure, part: pd.DataFrame, scale: StepScale, name: str, label: str, colour: str, *, row: int
) -> None:
    value, low, high = (part[f"{name}{end}"].astype(float).tolist() for end in ("", "_low", "_high"))
    x = [scale.position(step) for step in part["step"]]
    hover = [
        f"step {int(step):,}: {interval_text(*numbers)}"
        for step, *numbers in zip(part["step"], value, low, high, strict=True)
    ]
    figure.add_trace(band(x, low, high, colour, showlegend=False, legendgroup=label, name=label), row, 1)
    line = go.Scatter(x=x, y=value, mode="lines+markers", name=label, legendgroup=label, line={"color": colour})
    figure.add_trace(line.update(hovertext=hover, hoverinfo="text+name"), row, 1)
