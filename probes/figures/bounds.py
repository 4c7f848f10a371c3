"""Measured attention correlation by distance, with RoPE's lower bound for each head's own queries and for the mean."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ...errors import RevprobeError
from ..statistics.coverage import counted
from ..statistics.group_correlation import LEAST_FACTS
from ..statistics.resampling import Facts
from .drawable import Drawable
from .theme import OKABE_ITO, SYMBOLS, TEMPLATE, band, heading, interval_text, message_figure, plain, samples_text

# Black is the line of the mean, and yellow is not seen on white.
COLOURS = [colour for name, colour in OKABE_ITO.items() if name not in ("black", "yellow")]
MOST_HEADS = 7  # of all layers together; more of them are drawn one layer at a time
MOST_IN_LAYER = len(COLOURS) * len(SYMBOLS)  # a pair of colour and symbol for each
ONE_NUMBER = 1e-3  # a bound that spreads by more over a cell's queries is no one number
GROUP = ["layer", "head", "offset_forward"]
UNIT = ["layer", "head", "distance"]


def bounds_figure(reading: Drawable, frame: pd.DataFrame) -> go.Figure:
    """Pearson r over facts by distance, one curve per head, its bound dotted, the mean bound over queries dashed.

    Only groups at equal distances on opposite sides have a bound, and only those of at least LEAST_FACTS facts are
    drawn; evidence ahead of the forward query and behind it count as one distance. The dotted line is the mean bound of
    the head's own queries, forward and reverse; where they give different bounds a band spans the least and the
    greatest, and whether the measured interval lies below "the" bound is not asked there. The dashed line bounds the
    mean over random queries, and a single head may lie below it.

    Args:
        frame: the rows of the reading to draw, with the columns of `with_bounds`.
    Raises: RevprobeError, when the reading carries no bounds.
    """
    if "bound_mean" not in frame:
        raise RevprobeError(
            "this reading carries no bounds; add them with with_bounds(reading, model, pairs) and plot that"
        )
    bounded = frame[frame["bound_mean"].notna()]
    bounded = large_enough(bounded)
    if bounded.empty:
        reasons = frame.loc[frame["bound_reason"] != "", "bound_reason"].value_counts()
        why = plain("; ".join(f"{count:,} scores: {reason}" for reason, count in reasons.items()), limit=None)
        return message_figure(f"No bound to draw. {why or f'No group at equal distances has {LEAST_FACTS} facts.'}")
    bounded, left_out = _what_fits(bounded)
    cells = _cells(reading, bounded)
    figure = go.Figure()
    for place, ((layer, head), rows) in enumerate(cells.groupby(["layer", "head"])):
        for trace in _head_traces(rows, f"layer {layer}, head {head}", place):
            figure.add_trace(trace)
    for trace in _mean_traces(cells):
        figure.add_trace(trace)
    return _laid_out(figure, reading, cells, left_out)


def large_enough(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of groups of at least LEAST_FACTS facts in a head; of facts in chains, by the fewer sets there."""
    drawn = pd.DataFrame(np.stack(Facts.of_rows(rows).counted, axis=1), rows.index)
    counts = drawn.groupby([rows[name] for name in GROUP]).transform("nunique").min(axis=1)
    return rows[counts >= LEAST_FACTS]


def _what_fits(bounded: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of as many heads as can be told apart, and what was left out in words."""
    left_out, layers = [], sorted(bounded["layer"].unique())
    if bounded.groupby(["layer", "head"]).ngroups > MOST_HEADS and len(layers) > 1:
        bounded = bounded[bounded["layer"] == layers[0]]
        left_out.append(f"layer {layers[0]} of {len(layers)} drawn; layer= chooses another")
    heads = sorted(bounded["head"].unique())
    if len(heads) > MOST_IN_LAYER:
        bounded = bounded[bounded["head"].isin(heads[:MOST_IN_LAYER])]
        left_out.append(f"heads {heads[0]} to {heads[MOST_IN_LAYER - 1]} of {len(heads)} drawn; head= chooses another")
    return bounded, left_out


def _cells(reading: Drawable, bounded: pd.DataFrame) -> pd.DataFrame:
    """One row per head and distance: r with its interval and control, and the bounds with their extremes."""
    bounded = bounded.assign(distance=bounded["offset_forward"].abs())
    cells = reading.part(bounded).summary(by=UNIT)
    grouped = bounded.groupby(UNIT)[["bound_forward", "bound_reverse", "bound_mean"]]
    means, least, most = grouped.mean(), grouped.min(), grouped.max()
    sides = ["bound_forward", "bound_reverse"]
    spread = means.assign(bound=means[sides].mean(axis=1), least=least[sides].min(axis=1), most=most[sides].max(axis=1))
    cells = cells.merge(spread.reset_index(), on=UNIT)
    cells["spread"] = cells["most"] - cells["least"]
    return cells.sort_values("distance")


def _head_traces(rows: pd.DataFrame, name: str, place: int) -> list[go.Scatter]:
    colour, symbol = COLOURS[place % len(COLOURS)], SYMBOLS[place // len(COLOURS) % len(SYMBOLS)]
    at = rows["distance"].tolist()
    measured_text, bound_text = [], []
    for row in rows.to_dict("records"):
        numbers = interval_text(row["value"], row["low"], row["high"], row["control"])
        apart = f"forward queries {row['bound_forward']:.3f}, reverse queries {row['bound_reverse']:.3f}"
        apart += f"; {row['least']:.3f} to {row['most']:.3f}"
        measured_text.append(f"distance {row['distance']}: {numbers}, {counted(row['n'], row['facts'])}")
        bound_text.append(f"distance {row['distance']}: {row['bound']:.3f} ({apart})")
    bars = {"type": "data", "symmetric": False, "color": colour, "thickness": 1, "width": 3}
    bars |= {"array": (rows["high"] - rows["value"]).tolist(), "arrayminus": (rows["value"] - rows["low"]).tolist()}
    measured = go.Scatter(x=at, y=rows["value"].tolist(), mode="lines+markers", error_y=bars, line={"color": colour})
    measured.update(name=f"measured, {name}", marker={"color": colour, "size": 7, "symbol": symbol})
    measured.update(hovertext=measured_text, hoverinfo="name+text")
    bound = go.Scatter(x=at, y=rows["bound"].tolist(), mode="lines+markers")
    bound.update(name=f"bound, {name}", line={"color": colour, "dash": "dot", "width": 2})
    bound.update(marker={"color": colour, "size": 5, "symbol": f"{symbol}-open"})
    bound.update(hovertext=bound_text, hoverinfo="name+text")
    if (rows["spread"] <= ONE_NUMBER).all():
        return [measured.update(legendgroup=name), bound.update(legendgroup=name)]
    span = band(at, rows["least"].tolist(), rows["most"].tolist(), colour, showlegend=False)
    span.update(name=f"bounds, {name}: least to greatest")
    return [one.update(legendgroup=name) for one in (measured, bound, span)]


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


def _finding(cells: pd.DataFrame) -> str:
    """How many cells lie below their bound, among those of which that can be asked; the others by reason."""
    one = cells["spread"] <= ONE_NUMBER
    told = cells[one & cells["value"].notna()]
    below = int((told["high"] < told["bound"]).sum())
    text = f"interval below the head's bound in {below} of {len(told)} cells"
    if several := int((~one).sum()):
        widest = float(cells["spread"].max())
        text += f"; {several} not counted, whose queries give bounds that differ by up to {widest:.2f}"
    if undefined := int((one & cells["value"].isna()).sum()):
        text += f"; {undefined} without a defined r"
    return text


def _laid_out(figure: go.Figure, reading: Drawable, cells: pd.DataFrame, left_out: list[str]) -> go.Figure:
    step = reading.meta.get("step")
    where = plain(reading.meta.get("model") or "model") + ("" if step is None else f", step {int(step):,}")
    title = heading(f"<b>{where}</b>", _finding(cells), *left_out)
    sizes = samples_text(cells["n"], cells["facts"])
    figure.update_xaxes(title=f"distance from readout row to evidence, equal both ways (tokens; {sizes})")
    low = min(-0.05, float(cells[["low", "least", "bound_mean"]].min().min()) - 0.05)
    figure.update_yaxes(title="Pearson r of forward and reverse score", range=[low if math.isfinite(low) else -1, 1.05])
    margin = {"t": 80 + 18 * len(left_out)}
    figure.update_layout(template=TEMPLATE, title=title, legend={"tracegroupgap": 0})
    return figure.update_layout(margin=margin, width=None, height=480)
