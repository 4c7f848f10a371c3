"""Objective terms drawn: each class's pressure on the reverse answer, or another of its numbers, with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from ...errors import RevprobeError, did_you_mean
from ..statistics.by_class import objective_classes
from .drawable import Drawable
from .theme import CONTROL_GREY, FORWARD, REVERSE, TEMPLATE, interval_text, message_figure, plain

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
    numbers = f"pressure of all {interval_text(reading.value, *reading.interval, control)}, n = {reading.n:,}"
    numbers += f", dial {plain(meta['dial'])}"
    if not meta["enumerated"]:
        numbers += f", error of the draw {meta['sampling_error']:.2g}"
    text = f"<b>{plain(meta.get('model') or 'model')}</b>{step}{weights}<br>{numbers}"
    title = {"text": text, "font": {"size": 14}, "y": 1, "yref": "container", "pad": {"t": 12}}
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
    return figure.update_layout(template=TEMPLATE, title=title, legend=legend, margin={"t": 110, "b": 80}, width=700)
