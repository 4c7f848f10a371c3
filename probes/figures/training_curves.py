"""The three panels of Fig. 3 over training: does the route, the gradient and the answer move together?

One line per run, weights and kind of pair: raw and EMA weights, and `same_target` and `swapped` pairs, answer different
questions, so they are never averaged and each line's label says which it is. Colour is the position encoding (or ARM),
the dashed line in the same colour is the control, the band the 95 % interval.
Source: Section 5 and Fig. 3 of the paper.
"""

from __future__ import annotations

import html
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...errors import RevprobeError
from .controls import LOOKS, control_words
from .drawable import Drawable
from .theme import (
    COLOURS,
    CONTROL_GREY,
    SPARE_COLOURS,
    SYMBOLS,
    TEMPLATE,
    StepScale,
    band,
    counts_text,
    dashed,
    faded,
    heading,
    interval_text,
    message_figure,
    plain,
    reach,
    samples_text,
)

NEEDED = ("run", "step", "weights", "kind", "measure", "value", "n", "low", "high", "control")
# Heights in pixels; they travel in the figure's meta, so that a page that hides series can take their room back.
LEGEND = {"panels": 480, "axis": 70, "row": 20, "columns": 4, "beside": 115}
LETTER, KEY_ROOM = 6.6, 45  # of a legend's entry: a letter's width, and its line with the gap to the next
NAME_LIMIT = 40  # letters of a run's name in the legend
# With less than `below` pixels for the figure a page draws two panels beside each other: titles and ticks would touch.
NARROW = {"below": 1000, "panels": 760}
SIDES = {"left": (0.0, 0.435), "right": (0.565, 1.0)}
LEVELS = {"top": (0.58, 1.0), "bottom": (0.0, 0.42)}
VIEWS = {"ema": "EMA weights (raw where there is no EMA)", "raw": "raw weights", "both": "raw and EMA"}


@dataclass(frozen=True)
class Panel:
    """One set of axes: what it shows, where it stands in the grid of 2 rows x 3 columns."""

    measure: str
    title: str
    unit: str
    row: int
    column: int


PANELS = (
    Panel("attention_correlation", "Routing: attention scores", "Pearson r of forward and reverse score", 1, 1),
    Panel("gradient_cosine", "Learning: gradients", "cosine over all parameters", 1, 2),
    Panel("forward_probability", "Answer: forward query", "target probability", 1, 3),
    Panel("reverse_probability", "Answer: reverse query", "target probability", 2, 3),
)


def measures_with_reasons(readings: Iterable[Drawable]) -> pd.DataFrame:
    """`Readings.measures()` plus `run` (the reading's model) and `reason` (why points are undefined, counted)."""
    parts = []
    for reading in readings:
        part = reading.measures()
        for place, key in enumerate(("step", "weights", "kind")):
            part.insert(place, key, reading.meta.get(key))
        part.insert(0, "run", str(reading.meta.get("model") or "model"))
        parts.append(part.assign(objective=reading.meta.get("objective")))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*NEEDED, "reason", "objective"])


def signatures_figure(
    measures: pd.DataFrame, *, buttons: bool = True, controls: pd.DataFrame | None = None
) -> go.Figure:
    """Draw attention correlation, gradient cosine and target probability over training, each with its control.

    Args:
        measures: tidy rows with the columns of `summary.csv`; `objective`, `position_encoding`, `length` and `reason`
            (shown where a value is undefined) are used when they are there.
        buttons: add the buttons that choose raw weights, EMA weights or both.
        controls: further controls (`controls_over_steps`, `run` as in `measures`), each drawn in its own dash and
            marker in the run's colour; the legend says which is which.
    Raises: RevprobeError, when a column is missing, or a number of one run stands twice at one step.
    Source: Fig. 3 of the paper; forward and reverse probability have axes of their own, for ALiBi they coincide.
    """
    missing = [column for column in NEEDED if column not in measures]
    if missing:
        raise RevprobeError(f"measures lack the columns {missing}: expected those of summary.csv, see `summary_frame`")
    drawn = [panel.measure for panel in PANELS]
    rows = measures[measures["measure"].isin(drawn)]
    if rows.empty:
        return message_figure("No readings: nothing was measured yet.")
    # A model loaded from a hub has no training step: its points stand at the left edge, and the axis says so.
    rows = rows.assign(place=rows["step"].astype(float).fillna(0.0))
    _require_one_each(rows)
    scale = StepScale.over(int(step) for step in rows["place"])
    against = pd.DataFrame(columns=["control"]) if controls is None or controls.empty else controls
    if "measure" in against:  # other readings may have controls too, such as whether a fact is stored once
        against = against[against["measure"].isin(drawn)]
    figure = _empty_panels(rows, scale, against)
    if rows["step"].isna().all():
        figure.update_xaxes(title="no training step recorded", showticklabels=False)
    for series in _all_series(rows):
        _draw_series(figure, series, scale)
        _draw_controls(figure, series, against, scale)
    draw_key(figure, against)
    fit_legend(figure)
    if buttons and {"raw", "ema"} <= set(rows["weights"].dropna()):
        choices = []
        for view, label in VIEWS.items():
            visible = [view in trace.meta["views"] for trace in figure.data]
            choices.append({"label": label, "method": "restyle", "args": [{"visible": visible}]})
        place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": 46}, "direction": "right"}
        figure.update_layout(updatemenus=[{"type": "buttons", "buttons": choices, "showactive": True, **place}])
        # Above them the key, which they would cover where the figure is narrow.
        figure.update_layout(height=figure.layout.height + 34, margin={"t": figure.layout.margin.t + 34})
    return figure


def _require_one_each(rows: pd.DataFrame) -> None:
    """Raises: RevprobeError, for two numbers at one place of one line: those of two models of one name."""
    twice = rows[rows.duplicated(["run", "place", "weights", "kind", "measure"])]
    if len(twice):
        row = twice.iloc[0]
        step = "" if pd.isna(row["step"]) else f" at step {int(row['step']):,}"
        raise RevprobeError(
            f"{row['measure']} of {row['run']!r} stands twice{step}: expected one number for each run, step, weights "
            "and kind; give each model a name of its own (`ProbedModel(module, name=...)`) and each one set of pairs"
        )


@dataclass(frozen=True)
class Series:
    """One line of every panel: a run, its weights and the kind of its pairs, with how it is drawn."""

    rows: pd.DataFrame
    label: str
    colour: str
    symbol: str
    dressing: dict[str, Any]  # what a selector needs to show or hide the traces: views, run, length


def _all_series(rows: pd.DataFrame) -> list[Series]:
    colours = run_colours(rows)
    with_ema = set(rows.loc[rows["weights"] == "ema", "run"])
    # Runs without a length beside runs with one: NaN equals nothing, not even itself.
    rows = rows.astype({"length": object}).where(rows.notna(), None) if "length" in rows else rows
    lengths = list(dict.fromkeys(rows["length"])) if "length" in rows else [None]
    series = []
    for (run, weights, kind), part in rows.groupby(["run", "weights", "kind"], sort=False, dropna=False):
        length = part["length"].iloc[0] if "length" in part else None
        symbol = SYMBOLS[lengths.index(length) % len(SYMBOLS)] if len(lengths) > 1 else "circle"
        views = ["ema", "both"] if weights == "ema" else ["raw", "both"] if run in with_ema else list(VIEWS)
        tags = {"run": str(run), "length": str(length), "views": views}
        label = plain(run, limit=NAME_LIMIT) + f" ({series_words(weights, kind)})"
        open_marker = "-open" if weights == "raw" and run in with_ema else ""
        series.append(Series(part, label, colours[run], symbol + open_marker, tags))
    return series


def run_colours(measures: pd.DataFrame) -> dict[Any, str]:
    """The colour of each run's line, by its name: that of its encoding, else a spare one that no other run has."""
    keys = {row["run"]: colour_key(row) for _, row in measures.drop_duplicates("run").iterrows()}
    taken = {COLOURS[key] for key in keys.values() if key in COLOURS}
    spare = [colour for colour in SPARE_COLOURS if colour not in taken] or list(SPARE_COLOURS)
    others = dict.fromkeys(key for key in keys.values() if key not in COLOURS)
    colours = COLOURS | {key: spare[place % len(spare)] for place, key in enumerate(others)}
    return {run: colours[key] for run, key in keys.items()}


def series_words(weights: object, kind: object) -> str:
    """Which weights and which kind of pairs a line stands for, in words: `EMA, same target`."""
    shown = {"ema": "EMA", "raw": "raw"}.get(str(weights), "")
    words = [shown, plain(str(kind).replace("_", " ")) if isinstance(kind, str) else ""]
    return ", ".join(word for word in words if word) or "as loaded"


def colour_key(row: pd.Series) -> str:
    """What decides a run's colour: ARM, else its position encoding, else its name."""
    if row.get("objective") == "causal":
        return "ARM"
    encoding = row.get("position_encoding")
    return encoding if isinstance(encoding, str) and encoding else str(row["run"])


def count_words(rows: pd.DataFrame) -> str:
    """Pairs and facts behind some rows; n alone in a table without facts, as that of several seeds together."""
    pairs, facts = ([float(one) for one in rows[name]] if name in rows else [math.nan] for name in ("n", "facts"))
    return counts_text(pairs) if any(map(math.isnan, facts)) else samples_text(pairs, facts)


def titled(panel: Panel, rows: pd.DataFrame) -> str:
    """A panel's title, and under it what it rests on."""
    return f'<b>{panel.title}</b><br><span style="font-size: 11px">{count_words(rows)}</span>'


def _empty_panels(rows: pd.DataFrame, scale: StepScale, against: pd.DataFrame) -> go.Figure:
    specs = [[{"rowspan": 2}, {"rowspan": 2}, {}], [None, None, {}]]
    titles = [titled(panel, rows[rows["measure"] == panel.measure]) for panel in PANELS]
    figure = make_subplots(2, 3, specs=specs, subplot_titles=titles, horizontal_spacing=0.11, vertical_spacing=0.2)
    for panel in PANELS:
        part = rows[rows["measure"] == panel.measure]
        place = {"row": panel.row, "col": panel.column}
        drawn = part[["value", "low", "high", "control"]].to_numpy(dtype=float).ravel()
        if len(against):
            drawn = np.append(drawn, against.loc[against["measure"] == panel.measure, "value"].to_numpy(dtype=float))
        figure.update_yaxes(title={"text": panel.unit}, range=reach(drawn), **place)
        figure.update_xaxes(scale.axis(), **place)
    figure.update_xaxes(title=None, row=1, col=3)
    key = "line: value · band: 95 % interval over facts · dashed: control (shuffled facts) · ×: undefined"
    legend = {"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom", "x": 0}
    series = rows.groupby(["run", "weights", "kind"], dropna=False).ngroups + against["control"].nunique()
    below = LEGEND["axis"] + LEGEND["row"] * math.ceil(series / LEGEND["columns"])
    size = {"height": LEGEND["panels"] + below, "margin": {"t": 96, "b": below, "r": 45}}
    meta = {"below": LEGEND, "narrow": _narrow(figure)}
    return figure.update_layout(template=TEMPLATE, title=heading(key, key=True), legend=legend, meta=meta, **size)


def _narrow(figure: go.Figure) -> dict[str, Any]:
    """What a page that has less room changes in the layout: two panels in a row, their titles with them."""
    places = [(side, level) for level in ("top", "bottom") for side in ("left", "right")]
    layout: dict[str, Any] = {}
    for number, (side, level) in zip(("", "2", "3", "4"), places, strict=True):
        title = None if level == "top" else figure.layout.xaxis.title.text
        layout[f"xaxis{number}"] = {"domain": SIDES[side], "title": {"text": title}}
        layout[f"yaxis{number}"] = {"domain": LEVELS[level]}
    layout["annotations"] = [{"x": sum(SIDES[side]) / 2, "y": LEVELS[level][1]} for side, level in places]
    return NARROW | {"layout": layout}


def _draw_series(figure: go.Figure, series: Series, scale: StepScale) -> None:
    """In every panel: the band, the control, the line, and crosses where it is undefined."""
    shown = True  # the legend lists a series once, at the first panel that holds it
    for panel in PANELS:
        rows = series.rows[series.rows["measure"] == panel.measure].sort_values("place")
        if rows.empty:
            continue
        x = [scale.position(step) for step in rows["place"]]
        value, low, high, control = (rows[name].astype(float).tolist() for name in ("value", "low", "high", "control"))
        hover = [_hover(series.label, row) for row in rows.to_dict("records")]
        # Grey crosses at the foot of the panel: the line keeps its gap, and the cross says why.
        low_end, high_end = next(figure.select_yaxes(row=panel.row, col=panel.column)).range
        floor = low_end + 0.03 * (high_end - low_end)
        gaps = [place for place, number in enumerate(value) if math.isnan(number)]
        cross = {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": CONTROL_GREY}}
        foot = {"x": [x[place] for place in gaps], "y": [floor for _ in gaps], "mode": "markers", "marker": cross}
        parts = {
            "band": band(x, low, high, series.colour),
            "control": dashed(x, control, faded(series.colour, 0.75), hoverinfo="skip"),
            "value": go.Scatter(x=x, y=value, mode="lines+markers", hovertext=hover, hoverinfo="text"),
            "undefined": go.Scatter(**foot, hovertext=[hover[place] for place in gaps], hoverinfo="text"),
        }
        parts["value"].line = {"color": series.colour, "width": 2}
        parts["value"].marker = {"symbol": series.symbol, "size": 6}
        for part, trace in parts.items():
            if trace.x:
                trace.update(name=series.label, meta={"part": part, **series.dressing}, legendgroup=series.label)
                trace.update(showlegend=shown and part == "value", visible="ema" in series.dressing["views"])
                figure.add_trace(trace, row=panel.row, col=panel.column)
        shown = False


def _draw_controls(figure: go.Figure, series: Series, against: pd.DataFrame, scale: StepScale) -> None:
    """A series' controls beside shuffled facts, in its colour; one without any number is in the key alone."""
    one = series.rows.iloc[0]
    if not len(against):
        return
    same = [against[key].eq(one[key]) | (against[key].isna() & pd.isna(one[key])) for key in ("run", "weights", "kind")]
    own = against[np.logical_and.reduce(same)]
    for panel in PANELS:
        for name, part in own[own["measure"] == panel.measure].groupby("control", sort=False):
            rows = part.assign(place=part["step"].astype(float).fillna(0.0)).sort_values("place")
            if rows["value"].isna().all():
                continue
            look = LOOKS[str(name)]
            trace = go.Scatter(
                x=[scale.position(step) for step in rows["place"]], y=rows["value"].astype(float).tolist()
            )
            hover = [f"<b>{series.label}</b><br>{control_words(row)}" for row in rows.to_dict("records")]
            trace.update(mode="lines+markers", hovertext=hover, hoverinfo="text", name=series.label)
            trace.update(line={"color": series.colour, "width": 1.2, "dash": look.dash}, opacity=0.8)
            trace.update(marker={"symbol": look.symbol, "size": 8}, legendgroup=series.label, showlegend=False)
            trace.update(meta={"part": "against", "against": name, **series.dressing})
            trace.update(visible="ema" in series.dressing["views"])
            figure.add_trace(trace, row=panel.row, col=panel.column)


def draw_key(figure: go.Figure, against: pd.DataFrame, at: Panel = PANELS[0]) -> None:
    """One entry of the legend for each control, grey: the dash and the marker that it has in every colour."""
    for name, part in against.groupby("control", sort=False):
        look, gone = LOOKS[str(name)], part["value"].isna().all()
        line = {"color": CONTROL_GREY, "width": 1.2, "dash": look.dash}
        words = f"control: {look.words}" + (" (undefined)" if gone else "")
        trace = go.Scatter(x=[None], y=[None], mode="lines+markers", name=words, line=line, hoverinfo="skip")
        trace.update(marker={"symbol": look.symbol, "size": 8, "color": CONTROL_GREY}, legendgroup=words)
        trace.update(meta={"part": "key", "against": name, "views": list(VIEWS)}, showlegend=True)
        figure.add_trace(trace, row=at.row, col=at.column)


def fit_legend(figure: go.Figure) -> None:
    """Entries as wide as the longest of them: a page counts its columns by it, and none runs into the next."""
    words = [html.unescape(trace.name) for trace in figure.data if trace.showlegend]
    width = round(LETTER * max(map(len, words), default=20))
    meta = dict(figure.layout.meta)
    figure.update_layout(
        legend={"entrywidth": width}, meta=meta | {"below": meta["below"] | {"entry": width + KEY_ROOM}}
    )


def _hover(label: str, row: dict[Hashable, Any]) -> str:
    numbers = interval_text(float(row["value"]), float(row["low"]), float(row["high"]), float(row["control"]))
    step = "" if pd.isna(row["step"]) else f"step {int(row['step']):,}: "
    lines = [f"<b>{label}</b>", step + numbers, count_words(pd.DataFrame([row]))]
    if row.get("reason"):
        lines.append(f"undefined: {plain(row['reason'], limit=200)}")
    return "<br>".join(lines)
