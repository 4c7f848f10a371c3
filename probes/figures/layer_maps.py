"""A reading by its place in the model: correlation by layer and head, gradient cosine by layer and role."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from ..statistics.by_head import head_correlations
from ..statistics.by_role import cell_cosines
from .theme import DIVERGING, TEMPLATE, UNDEFINED_GREY, counts_text, interval_text

if TYPE_CHECKING:
    from ..readings.readings import Reading

WRITTEN_OUT = 12  # cells a side up to which each cell also shows its number


def head_map(reading: Reading, frame: pd.DataFrame) -> go.Figure:
    """Within-group correlation of forward and reverse scores by layer x head; the hover has each 95 % interval.

    Args:
        frame: the reading's rows to draw.
    """
    table = head_correlations(frame, seed=reading.seed).dropna(subset=["head"])
    counted = counts_text(frame.dropna(subset=["score_forward", "score_reverse"]).groupby(["layer", "head"]).size())
    figure = _map(table, "head", "layer %{y}, head %{x}: r = %{text}<extra></extra>", "r")
    figure.update_xaxes(title=f"head ({counted} pairs each)")
    return figure.update_yaxes(title="layer")


def role_map(reading: Reading) -> go.Figure:
    """Mean per-pair cosine of the forward and reverse gradient by layer x role; the hover has each 95 % interval."""
    table = cell_cosines(reading.frame, ["layer", "role"], seed=reading.seed)
    figure = _map(table, "role", "layer %{y}, %{x}: cosine %{text}<extra></extra>", "cosine")
    figure.update_xaxes(title=f"role of the parameter ({counts_text(table['n'].astype(float))} pairs)")
    return figure.update_yaxes(title="layer (none: in no layer)")


def _map(table: pd.DataFrame, column: str, hover: str, unit: str) -> go.Figure:
    """Values by layer (rows) and `column`; undefined cells are grey, with that word on the hover."""
    columns, layers = (list(dict.fromkeys(table[name])) for name in (column, "layer"))
    cells: dict[tuple[Any, Any], Any] = {}
    for row in table.to_dict("records"):
        control = float(row.get("control", math.nan))
        cells[row["layer"], row[column]] = row["value"], interval_text(row["value"], row["low"], row["high"], control)
    z = [[_or_none(cells.get((layer, one), (math.nan,))[0]) for one in columns] for layer in layers]
    text = [[cells.get((layer, one), (0, "not measured"))[1] for one in columns] for layer in layers]
    shown: dict[str, Any] = {"x": [str(one) for one in columns], "y": [str(layer) for layer in layers], "xgap": 1}
    grey = {"colorscale": [[0, UNDEFINED_GREY], [1, UNDEFINED_GREY]], "showscale": False, "hoverinfo": "text"}
    gone = [
        [0 if number is None and words == "undefined" else None for number, words in zip(*pair, strict=True)]
        for pair in zip(z, text, strict=True)
    ]
    under = go.Heatmap(**shown, **grey, z=gone, text=text, ygap=1, hoverongaps=False)
    bar = {"title": {"text": unit}, "thickness": 14}
    scale = {"colorscale": DIVERGING, "zmin": -1, "zmax": 1, "colorbar": bar, "hoverongaps": False, "ygap": 1}
    cell = go.Heatmap(**shown, **scale, z=z, text=text, hovertemplate=hover)
    if max(len(columns), len(layers)) <= WRITTEN_OUT:
        cell.update(texttemplate="%{z:.2f}", textfont={"size": 11})
    figure = go.Figure([under, cell]).update_layout(template=TEMPLATE)
    figure.update_xaxes(type="category", showgrid=False)
    return figure.update_yaxes(type="category", showgrid=False)


def _or_none(number: float) -> float | None:
    return None if math.isnan(number) else float(number)
