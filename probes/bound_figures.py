"""Measured attention correlation by distance, with RoPE's lower bound for each head's own query and for the mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from ..errors import RevprobeError
from .statistics import LEAST_FACTS
from .theme import OKABE_ITO, TEMPLATE, counts_text, interval_text, message_figure, plain

if TYPE_CHECKING:
    from .readings import Reading

MOST_HEADS = 7  # more curves than colours
UNIT = ["layer", "head", "offset_forward"]


def bounds_figure(reading: Reading, frame: pd.DataFrame) -> go.Figure:
    """Pearson r over facts by distance, one curve per head, its bound dotted, the mean bound over queries dashed.

    Only groups at equal distances on opposite sides have a bound, and only those of at least LEAST_FACTS facts are
    drawn. The dotted line is for the head's own queries (mean of forward and reverse); the dashed one bounds the mean
    over random queries, and a single head may lie below it.

    Args:
        frame: the rows of the reading to draw, with the columns of `with_bounds`.
    Raises: RevprobeError, when the reading carries no bounds.
    """
    if "bound_mean" not in frame:
        raise RevprobeError(
            "this reading carries no bounds; add them with with_bounds(reading, model, pairs) and plot that"
        )
    bounded = frame[frame["bound_mean"].notna()]
    bounded = bounded[bounded.groupby(UNIT)["fact"].transform("nunique") >= LEAST_FACTS]
    if bounded.empty:
        return message_figure(f"No bound to draw. {_why_none(frame)}")
    layers = sorted(bounded["layer"].unique())
    if bounded.groupby(["layer", "head"]).ngroups > MOST_HEADS and len(layers) > 1:
        bounded = bounded[bounded["layer"] == layers[0]]  # layer= chooses another
    cells = _cells(reading, bounded)
    figure = go.Figure()
    for place, ((layer, head), rows) in enumerate(cells.groupby(["layer", "head"])):
        for trace in _head_traces(rows, f"layer {layer}, head {head}", list(OKABE_ITO.values())[place % 7]):
            figure.add_trace(trace)
    for trace in _mean_traces(cells):
        figure.add_trace(trace)
    return _laid_out(figure, reading, cells)


def _why_none(frame: pd.DataFrame) -> str:
    counted = frame.loc[frame["bound_reason"] != "", "bound_reason"].value_counts()
    if counted.empty:
        return f"No group at equal distances has {LEAST_FACTS} facts."
    return plain("; ".join(f"{count:,} scores: {reason}" for reason, count in counted.items()), limit=None)


def _cells(reading: Reading, bounded: pd.DataFrame) -> pd.DataFrame:
    """One row per head and distance: r with its interval and control, and the bounds."""
    part = type(reading)(reading.name, bounded, reading.meta)
    cells = part.summary(by=UNIT).merge(
        bounded.groupby(UNIT)[["bound_forward", "bound_reverse", "bound_mean"]].mean().reset_index(), on=UNIT
    )
    cells["distance"] = cells["offset_forward"].abs()
    cells["bound"] = (cells["bound_forward"] + cells["bound_reverse"]) / 2
    return cells.sort_values("distance")


def _head_traces(rows: pd.DataFrame, name: str, colour: str) -> list[go.Scatter]:
    bars = {"type": "data", "symmetric": False, "color": colour, "thickness": 1, "width": 3}
    bars |= {"array": (rows["high"] - rows["value"]).tolist(), "arrayminus": (rows["value"] - rows["low"]).tolist()}
    measured = go.Scatter(x=rows["distance"].tolist(), y=rows["value"].tolist(), mode="lines+markers", error_y=bars)
    measured.update(name=f"measured, {name}", line={"color": colour}, marker={"color": colour, "size": 7})
    measured.update(hovertext=[_measured_text(row) for row in rows.to_dict("records")], hoverinfo="name+text")
    bound = go.Scatter(x=rows["distance"].tolist(), y=rows["bound"].tolist(), mode="lines")
    bound.update(name=f"bound, {name}'s query", line={"color": colour, "dash": "dot", "width": 2})
    bound.update(hovertext=[_bound_text(row) for row in rows.to_dict("records")], hoverinfo="name+text")
    return [measured, bound]


def _measured_text(row: dict[Any, Any]) -> str:
    numbers = interval_text(row["value"], row["low"], row["high"], row["control"])
    return f"distance {row['distance']}: {numbers}, n = {row['n']:,}"


def _bound_text(row: dict[Any, Any]) -> str:
    apart = f"forward query {row['bound_forward']:.3f}, reverse query {row['bound_reverse']:.3f}"
    return f"distance {row['distance']}: {row['bound']:.3f} ({apart})"


def _mean_traces(cells: pd.DataFrame) -> list[go.Scatter]:
    """The expectation over queries: one line, or one for each set of layers whose angles differ."""
    line = {"color": "#000000", "dash": "dash", "width": 2}
    by_layer = cells.groupby(["layer", "distance"])["bound_mean"].mean().unstack("distance")
    traces = []
    for values, same in by_layer.round(12).groupby(list(by_layer.columns), dropna=False):
        layers = "" if len(same) == len(by_layer) else f", layers {', '.join(map(str, same.index))}"
        trace = go.Scatter(x=list(by_layer.columns), y=list(values), mode="lines", line=line)
        traces.append(trace.update(name=f"bound, mean over queries{layers}"))
    return traces


def _laid_out(figure: go.Figure, reading: Reading, cells: pd.DataFrame) -> go.Figure:
    defined = cells.dropna(subset=["value"])
    below = int((defined["high"] < defined["bound"]).sum())
    one_query = float((cells["bound_forward"] - cells["bound_reverse"]).abs().max())
    step = reading.meta.get("step")
    where = plain(reading.meta.get("model") or "model") + ("" if step is None else f", step {int(step):,}")
    text = f"<b>{where}</b><br>interval below the head's bound in {below} of {len(defined)} cells"
    if one_query > 1e-3:
        text += f"; forward and reverse queries differ (bounds by up to {one_query:.2f})"
    figure.update_xaxes(
        title=f"distance from readout row to evidence, equal both ways (tokens; {counts_text(cells['n'])})"
    )
    low = min(-0.05, float(cells[["low", "bound", "bound_mean"]].min().min()) - 0.05)
    figure.update_yaxes(title="Pearson r of forward and reverse score", range=[low if math.isfinite(low) else -1, 1.05])
    title = {"text": text, "font": {"size": 14}, "y": 1, "yref": "container", "pad": {"t": 12}}
    return figure.update_layout(template=TEMPLATE, title=title, margin={"t": 80}, width=960, height=480)
