"""Figures over the layers of a model: the logit lens, and whether a fact is stored once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...errors import RevprobeError, did_you_mean
from ..statistics.coverage import counted
from ..statistics.intervals import FRACTION, Estimate, mean_over_facts, proportion_over_facts
from ..statistics.resampling import Facts
from .drawable import Drawable, sample_of
from .theme import (
    BELOW,
    CONTROL_GREY,
    DIVERGING,
    FORWARD,
    OKABE_ITO,
    REVERSE,
    TEMPLATE,
    UNDEFINED_GREY,
    band,
    dashed,
    heading,
    interval_text,
    message_figure,
    plain,
    samples_text,
    undefined_text,
)
from .training_curves import series_words

COLOURS = {"forward": FORWARD, "reverse": REVERSE}
KINDS = ("layers", "heads")
SHARES = {"correct": "share at the top", "place": "share of other candidates below"}
TESTS = {"map": "Map to the target's row, held-out facts", "classifier": "Classifier of facts"}
BESIDE = {
    "_control": ("reverse, shuffled labels", CONTROL_GREY),
    "_untrained": ("reverse, untrained twin", OKABE_ITO["purple"]),
    "_evidence": ("reverse, other evidence", OKABE_ITO["green"]),
}
CONTROL = "control: facts shuffled"


@dataclass(frozen=True)
class Curve:
    """One line over the layers with its 95 % intervals; a control is dashed and has no band."""

    name: str
    colour: str
    layers: Sequence[int]
    found: Sequence[Estimate]
    control: bool = False


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    unit: str
    curves: Sequence[Curve]


def logit_lens_figure(reading: Drawable, *, kind: str = "layers", direction: str = "reverse") -> go.Figure:
    """Draw a logit lens.

    Args:
        kind: "layers", the target's log-probability and how often it comes first, by layer, both directions;
            "heads", what each head and each MLP adds to the target's logit above the control's, for a reading taken
            with contributions.
        direction: of the queries, for kind "heads".
    Raises: RevprobeError, for an unknown kind or direction.
    """
    for what, value, known in (("kind", kind, KINDS), ("direction", direction, tuple(COLOURS))):
        if value not in known:
            raise RevprobeError(f"logit lens plot of {what} {value!r}{did_you_mean(value, known)}")
    if kind == "heads":
        return _heads(reading, direction)
    rows = reading.frame[reading.frame["site"] == "residual"]
    logs, first = [], []
    for side, colour in COLOURS.items():
        part = rows[rows["direction"] == side]
        logs.append(curve(part, "log_probability", side, colour, mean_over_facts))
        is_first = part.assign(first=(part["rank"] == 1).astype(float).where(part["rank"].notna()))
        first.append(curve(is_first, "first", side, colour, proportion_over_facts))
        if "log_probability_control" in part:
            name = f"{side}, {CONTROL}"
            logs.append(curve(part, "log_probability_control", name, colour, mean_over_facts, control=True))
    if not any(np.isfinite(one.value) for line in logs for one in line.found):
        return message_figure(f"No defined log-probability: {undefined_text(reading.undefined)}")
    panels = [
        Panel("What the state says", "log-probability of the target (nats)", logs),
        Panel("How often the target comes first", "share of pairs", first),
    ]
    return titled(layer_panels(panels), reading, "nats gained by the reverse target, embedding to last layer")


def stored_once_figure(reading: Drawable, *, number: str = "correct") -> go.Figure:
    """Draw both tests by layer, each with its controls.

    Args:
        number: "correct", the share at the top, or "place", the share of other candidates below (0.5 by chance).
    Raises: RevprobeError, for another number.
    """
    if number not in SHARES:
        raise RevprobeError(f"stored-once plot of number {number!r}{did_you_mean(number, tuple(SHARES))}")
    panels = []
    for test, title in TESTS.items():
        rows = reading.frame[reading.frame["test"] == test]
        sides = {side: rows[rows["direction"] == side] for side in COLOURS}
        lines = [curve(part, number, f"{side} states", COLOURS[side], _share) for side, part in sides.items()]
        for ending, (name, colour) in BESIDE.items():
            if f"{number}{ending}" in rows:
                lines.append(curve(sides["reverse"], f"{number}{ending}", name, colour, _share, control=True))
        panels.append(Panel(title, SHARES[number], lines))
    if not any(np.isfinite(one.value) for panel in panels for line in panel.curves for one in line.found):
        return message_figure(f"No defined test: {undefined_text(reading.undefined)}")
    figure = layer_panels(panels).update_yaxes(range=[-0.04, 1.04])
    return titled(figure, reading, "held-out targets put first by the reverse state of the last layer")


def _share(values: np.ndarray, facts: Facts) -> Estimate:
    return mean_over_facts(values, facts, bounds=FRACTION)


def curve(
    rows: pd.DataFrame,
    column: str,
    name: str,
    colour: str,
    estimate: Callable[[np.ndarray, Facts], Estimate],
    *,
    control: bool = False,
) -> Curve:
    """A column of the frame over its layers, each layer's estimate over facts."""
    layers, found = [], []
    for layer in sorted(int(layer) for layer in rows["layer"].unique()):
        part = rows[rows["layer"] == layer]
        values, facts = part[column].to_numpy(dtype=np.float64), Facts.of_rows(part)
        layers.append(layer)
        found.append(estimate(values, facts) if np.isfinite(values).any() else Estimate.undefined())
    return Curve(name, colour, layers, found, control)


def layer_panels(panels: Sequence[Panel]) -> go.Figure:
    """Panels side by side over the same layers; where a layer has no number the lines break."""
    titles = [f"<b>{panel.title}</b>" for panel in panels]
    figure = make_subplots(1, len(panels), subplot_titles=titles, horizontal_spacing=0.14)
    known: set[str] = set()
    drawn = {line.name for panel in panels for line in panel.curves if any(one.n for one in line.found)}
    for place, panel in enumerate(panels, start=1):
        for line in panel.curves:
            value, low, high = ([getattr(one, end) for one in line.found] for end in ("value", "low", "high"))
            hover = [
                f"{layer_name(layer)}: {interval_text(one.value, one.low, one.high)}, {counted(one.n, one.facts)}"
                for layer, one in zip(line.layers, line.found, strict=True)
            ]
            shown = {"legendgroup": line.name, "name": line.name + " (undefined)" * (line.name not in drawn)}
            if not line.control:
                figure.add_trace(band(line.layers, low, high, line.colour, showlegend=False, **shown), row=1, col=place)
            x, solid = list(line.layers), {"color": line.colour, "width": 2.0}
            points = (
                dashed(x, value, line.colour)
                if line.control
                else go.Scatter(x=x, y=value, mode="lines+markers", line=solid, marker={"size": 5})
            )
            points.update(hovertext=hover, hoverinfo="text+name", showlegend=line.name not in known, **shown)
            figure.add_trace(points, row=1, col=place)
            known.add(line.name)
        found = [one for line in panel.curves for one in line.found if one.n]
        counts = samples_text([one.n for one in found], [one.facts for one in found])
        figure.update_yaxes(title=f"{panel.unit}<br>({counts})", row=1, col=place)
        layers = sorted({layer for line in panel.curves for layer in line.layers})
        every = max(1, math.ceil(len(layers) / 12))
        # Beside "emb." there is no room for 0 once the layers stand close.
        ticks = [layer for layer in layers if layer < 0 or (layer % every == 0 and (layer or every == 1))]
        axis = {"tickvals": ticks, "ticktext": ["emb." if tick < 0 else str(tick) for tick in ticks], "tickangle": 0}
        figure.update_xaxes(title="layer (emb.: before the first)", **axis, row=1, col=place)
    return figure


def layer_name(layer: int) -> str:
    return "embedding" if layer < 0 else f"layer {layer}"


def titled(figure: go.Figure, reading: Drawable, what: str) -> go.Figure:
    """The heading every single reading carries, and the legend below."""
    meta = reading.meta
    step = "" if meta.get("step") is None else f", step {int(meta['step']):,}"
    model = plain(meta.get("model") or "model")
    control = reading.control.value if reading.control else math.nan
    numbers = f"{what}: {interval_text(reading.value, *reading.interval, control)}, {sample_of(reading)}"
    undefined = sum(reading.undefined.values())
    numbers += f", {undefined:,} undefined" if undefined else ""
    text = f"<b>{model}</b>{step} ({series_words(meta.get('weights'), meta.get('kind'))})"
    title = heading(text, numbers)
    margin = {"t": 110, "b": 110}
    return figure.update_layout(template=TEMPLATE, title=title, legend=BELOW, margin=margin, height=470)


def _heads(reading: Drawable, direction: str) -> go.Figure:
    """Layer x head, MLPs in a column of their own."""
    rows = reading.frame[(reading.frame["site"] != "residual") & (reading.frame["direction"] == direction)]
    if rows.empty:
        return message_figure("No contributions: take the reading with probe_logit_lens(..., contributions=True)")
    if rows["logit"].isna().all():
        return message_figure(f"No defined contribution: {rows['reason'].iloc[0]}")
    beside = "logit_control" in rows and rows["logit_control"].notna().any()
    table = rows.assign(shown=rows["logit"] - rows["logit_control"] if beside else rows["logit"])
    table["place"] = table["head"].astype("string").fillna("MLP")
    layers = sorted(int(layer) for layer in table["layer"].unique())
    heads = sorted(int(head) for head in table["head"].dropna().unique())
    places = [*map(str, heads), "MLP"]
    means = table.groupby(["layer", "place"])["shown"].mean().unstack("place")
    means = means.reindex(index=layers, columns=places)
    limit = float(np.nanmax(np.abs(means.to_numpy(dtype=float)), initial=0.0)) or 1.0
    cells = [[None if math.isnan(value) else value for value in line] for line in means.to_numpy(dtype=float).tolist()]
    heat = go.Heatmap(
        z=cells, x=places, y=[str(layer) for layer in layers], colorscale=DIVERGING, zmin=-limit, zmax=limit
    )
    heat.update(
        hovertemplate="layer %{y}, head %{x}: %{z:.4f}<extra></extra>",
        colorbar={"title": "logits, less<br>the control's" if beside else "logits"},
    )
    figure = go.Figure(heat).update_layout(plot_bgcolor=UNDEFINED_GREY, width=720)
    every = {"tickmode": "linear", "showgrid": False, "type": "category"}
    figure.update_xaxes(title="head", dtick=max(1, len(places) // 16), **every)
    figure.update_yaxes(title="layer", dtick=max(1, len(layers) // 16), **every)
    part = reading.part(rows)
    what = f"added to the {direction} target's logit, all heads and MLPs"
    titled(figure, part, what).update_yaxes(
        title=f"layer (cells: mean over {counted(rows['pair'].nunique(), rows['fact'].nunique())})"
    )
    figure.update_layout(margin={"t": 110, "b": 60, "r": 150})
    return figure.update_layout(height=max(420, min(760, 260 + 18 * len(layers))))
