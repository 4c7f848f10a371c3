"""Figures of what is stored: the logit's parts, the matrix S, storage and routing over training, and single steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...errors import RevprobeError, did_you_mean
from ..statistics.by_part import REST, logit_contributions, remainder_text
from ..statistics.coverage import counted
from ..statistics.measures import current_columns
from .drawable import Drawable, sample_of
from .theme import (
    CONTROL_GREY,
    DIVERGING,
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
    samples_text,
)
from .training_curves import series_words

KEY = "line: mean over pairs · band: 95 % interval over facts · dashed: control (evidence of other facts)"
# Panels of `storage_curves_figure`: curve, title, unit.
CURVE_PANELS = (
    ("stored", "Storage: S[v, u]", "stored evidence (logits)"),
    ("weight", "Routing: a_ij", "attention on the evidence"),
    ("contribution", "What arrives", "part of the logit (logits)"),
)
STEP_PANELS = (
    ("stored", "Stored evidence", "change of S[v, u] (logits)"),
    ("forward_loss", "Forward loss", "change of the loss (nats)"),
    ("reverse_loss", "Reverse loss", "change of the loss (nats)"),
)


def stored_evidence_figure(reading: Drawable, *, kind: str = "parts") -> go.Figure:
    """What the target's logit is made of, forward and reverse; or the matrix S of a reading taken with `cross=True`.

    Raises: RevprobeError, for another kind, or a matrix that the reading does not have.
    """
    if kind == "matrix":
        return _matrix_figure(reading)
    if kind != "parts":
        raise RevprobeError(f"storage plot of kind {kind!r}{did_you_mean(kind, ['parts', 'matrix'])}")
    rows = logit_contributions(reading).iloc[::-1]
    if rows.empty:
        return message_figure(f"No defined part: {reading.undefined}")
    labels = []
    for row in rows.to_dict("records"):
        words = ["rest: not measured" if row["part"] == REST else str(row["part"])]
        words += [f"({row['source']})"] if isinstance(row["source"], str) else []
        words += [] if pd.isna(row["layer"]) else [f"layer {row['layer']}"]
        labels.append(plain(" ".join(words)))
    figure = go.Figure()
    for side, colour in (("forward", FORWARD), ("reverse", REVERSE)):
        value, low, high = (rows[name].astype(float) for name in (side, f"{side}_low", f"{side}_high"))
        bars = {"type": "data", "symmetric": False, "array": (high - value).tolist(), "color": colour}
        bars["arrayminus"] = (value - low).tolist()
        hover = [interval_text(*numbers) for numbers in zip(value, low, high, strict=True)]
        points = go.Scatter(x=value.tolist(), y=labels, mode="markers", error_x=bars, hovertext=hover, name=side)
        # The two often coincide: a ring shows the one behind the other.
        marker = {"color": colour, **({"symbol": "circle-open", "size": 12} if side == "forward" else {"size": 6})}
        figure.add_trace(points.update(hoverinfo="y+text+name", marker=marker))
    figure.update_xaxes(
        title=f"part of the target's logit (logits; mean over {counted(rows['n'].max(), rows['facts'].max())})"
    )
    figure.update_yaxes(type="category")
    return _titled(figure, reading).update_layout(height=190 + 24 * len(rows), width=640)


def _matrix_figure(reading: Drawable) -> go.Figure:
    if reading.cross is None:
        raise RevprobeError("this reading holds no matrix; take it with probe_stored_evidence(..., cross=True)")
    values = reading.cross.to_numpy(dtype=float)
    limit = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    names = [[plain(name, limit=20) for name in axis] for axis in (reading.cross.columns, reading.cross.index)]
    colours = {"colorscale": [list(stop) for stop in DIVERGING], "zmin": -limit, "zmax": limit}
    cells = go.Heatmap(
        z=values.tolist(), x=names[0], y=names[1], colorbar={"title": {"text": "S[v, u]<br>(logits)"}}, **colours
    )
    figure = go.Figure(cells.update(hovertemplate="target of %{y}, evidence of %{x}: %{z:.3f} logits<extra></extra>"))
    figure.update_xaxes(title=f"evidence u, by fact ({len(names[0])})", type="category")
    figure.update_yaxes(title="target v, by fact", type="category", autorange="reversed")
    return _titled(figure, reading).update_layout(width=640, height=600)


def _titled(figure: go.Figure, reading: Drawable) -> go.Figure:
    meta = reading.meta
    step = "" if meta.get("step") is None else f", step {int(meta['step']):,}"
    weights = f" ({series_words(meta.get('weights'), meta.get('kind'))})"
    control = reading.control.value if reading.control else math.nan
    what = "stored evidence" + ", first order" * reading.name.endswith("_first_order")
    numbers = f"{what} {interval_text(reading.value, *reading.interval, control)}, {sample_of(reading)}"
    undefined = sum(reading.undefined.values())
    if reading.control is not None and reading.control.n != reading.n:
        numbers += f" (control over {reading.control.n:,} of {reading.control.facts:,})"
    numbers += f", {undefined:,} undefined" if undefined else ""
    text = f"<b>{plain(meta.get('model') or 'model')}</b>{step}{weights}"
    title = heading(text, numbers, *filter(None, [remainder_text(meta)]))
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
    return figure.update_layout(template=TEMPLATE, title=title, legend=legend, margin={"t": 110})


def storage_curves_figure(curves: pd.DataFrame, *, weights: str | None = None) -> go.Figure:
    """Storage, routing and what arrives of them over training: what `finetune.analysis.storage_curves` gives.

    Args:
        weights: "raw" or "ema"; the average where there is one when None.
    Raises: RevprobeError, when a column is missing, there are no rows or no such weights.
    """
    rows = _chosen(curves, ("step", "weights", "curve", "direction", "value", "low", "high", "n"), CURVE_PANELS)
    there = sorted(set(rows["weights"]))
    weights = weights or there[0]
    if weights not in there:
        raise RevprobeError(f"no {weights!r} weights among the curves{did_you_mean(weights, there)}")
    rows = rows[rows["weights"] == weights]
    scale, figure = _panels(rows, CURVE_PANELS, "curve", f" ({series_words(weights, None)} weights)")
    for place, (curve, *_) in enumerate(CURVE_PANELS, start=1):
        for side, colour in (("forward", FORWARD), ("reverse", REVERSE)):
            part = rows[(rows["curve"] == curve) & (rows["direction"] == side)].sort_values("step")
            _draw(figure, part, scale, ("value", "low", "high"), side, colour, place)
            if "control" in part and part["control"].notna().any():
                _draw_control(figure, part, scale, "control", place)
    return figure


def one_step_figure(curves: pd.DataFrame) -> go.Figure:
    """What one optimizer step changes at each checkpoint, and what first order predicts: `one_step_curves`.

    Raises: RevprobeError, when a column is missing or there are no rows.
    """
    needed = ("step", "quantity", "observed", "predicted", "observed_control", "n")
    rows = _chosen(current_columns(curves), needed, STEP_PANELS, "quantity")
    return _steps(rows, ": what one optimizer step changes")


def foretold_figure(table: pd.DataFrame) -> go.Figure:
    """What the step after each snapshot changes, and what the gradients foretold: a fine-tuning's predictions.parquet.

    Raises: RevprobeError, when a column is missing or there are no rows.
    """
    needed = ("step", "quantity", "observed", "predicted", "observed_control", "n")
    rows = current_columns(table)
    rows = rows.assign(quantity=rows["direction"].astype(str) + "_loss") if "direction" in rows else rows
    key = "line: mean over pairs · band: 95 % over facts · dashed: control (the target under another fact's query)"
    return _steps(_chosen(rows, needed, STEP_PANELS, "quantity"), ": the optimizer step after each snapshot", key)


def _steps(rows: pd.DataFrame, what: str, key: str = KEY) -> go.Figure:
    """A panel for each quantity that is defined somewhere; the reason of one that is nowhere stands in its place."""
    defined = set(rows.loc[rows["observed"].notna(), "quantity"])
    panels = [panel for panel in STEP_PANELS if panel[0] in defined]
    missing = rows[~rows["quantity"].isin(defined)]
    why = missing.get("reason", pd.Series(dtype=str)).dropna().astype(str).drop_duplicates()
    told = plain("; ".join(filter(None, why)) or "undefined", limit=None)
    if not panels:
        return message_figure(f"No defined change: {told}")
    scale, figure = _panels(rows, panels, "quantity", what, key)
    if len(missing):
        left_out = " and ".join(title.lower() for name, title, _ in STEP_PANELS if name in set(missing["quantity"]))
        figure.update_layout(title={"text": f"{figure.layout.title.text}<br>no {left_out}: {told}"}, margin={"t": 130})
    for place, (quantity, *_) in enumerate(panels, start=1):
        part = rows[rows["quantity"] == quantity].sort_values("step")
        for name, colour in (("observed", OKABE_ITO["blue"]), ("predicted", OKABE_ITO["orange"])):
            _draw(figure, part, scale, (name, f"{name}_low", f"{name}_high"), name, colour, place)
        _draw_control(figure, part, scale, "observed_control", place)
    if len(panels) == 1:
        for name in ("observed", "predicted"):
            figure.update_traces(showlegend=True, selector={"mode": "lines+markers", "name": name})
    return figure


def _chosen(
    rows: pd.DataFrame, needed: Sequence[str], panels: Sequence[tuple[str, str, str]], key: str = "curve"
) -> pd.DataFrame:
    missing = [column for column in needed if column not in rows]
    if missing:
        raise RevprobeError(f"curves lack the columns {missing}; expected what storage_curves or one_step_curves gives")
    chosen = rows[rows[key].isin([name for name, *_ in panels])]
    if chosen.empty:
        raise RevprobeError("the curves have no rows; expected what storage_curves or one_step_curves gives")
    return chosen


def _panels(
    rows: pd.DataFrame, panels: Sequence[tuple[str, str, str]], key: str, what: str, words: str = KEY
) -> tuple[StepScale, go.Figure]:
    scale = StepScale.over(int(step) for step in rows["step"])
    titles = []  # units stand over their panels: beside the axis they would lie on the next panel of a narrow page
    for name, title, unit in panels:
        part = rows[rows[key] == name]
        # Tables of older versions count pairs alone.
        counts = samples_text(part["n"], part["facts"]) if "facts" in part else counts_text(part["n"])
        titles.append(f"<b>{title}</b><br><sup>{unit}<br>{counts}</sup>")
    figure = make_subplots(1, len(panels), subplot_titles=titles, horizontal_spacing=0.09)
    for place in range(1, len(panels) + 1):
        figure.update_xaxes(scale.axis(), row=1, col=place)
    # Tables of older versions do not say of which model they are.
    models = list(dict.fromkeys(rows["model"])) if "model" in rows else []
    told = heading(f"<b>{plain(', '.join(map(str, models)) or 'model')}</b>{what}", words, key=True)
    legend = {"orientation": "h", "y": -0.25, "x": 0}
    figure.update_layout(template=TEMPLATE, title=told, legend=legend, height=440)
    return scale, figure.update_layout(margin={"t": 112, "b": 110})


def _draw(
    figure: go.Figure,
    part: pd.DataFrame,
    scale: StepScale,
    names: tuple[str, str, str],
    label: str,
    colour: str,
    col: int,
) -> None:
    value, low, high = (part[name].astype(float).tolist() for name in names)
    if not np.isfinite(value).any():
        return
    x = [scale.position(step) for step in part["step"]]
    hover = [
        f"step {int(step):,}: {interval_text(*numbers)}"
        for step, *numbers in zip(part["step"], value, low, high, strict=True)
    ]
    shown = {"legendgroup": label, "name": label}
    figure.add_trace(band(x, low, high, colour, showlegend=False, **shown), row=1, col=col)
    line = go.Scatter(x=x, y=value, mode="lines+markers", hovertext=hover, hoverinfo="text+name", **shown)
    # The second curve often covers the first one.
    dash = "dot" if label in ("reverse", "predicted") else "solid"
    figure.add_trace(line.update(line={"color": colour, "width": 2, "dash": dash}, showlegend=col == 2), row=1, col=col)


def _draw_control(figure: go.Figure, part: pd.DataFrame, scale: StepScale, name: str, col: int) -> None:
    x, y = [scale.position(step) for step in part["step"]], part[name].astype(float).tolist()
    shown = {"name": "control", "legendgroup": "control", "hoverinfo": "name+y", "showlegend": col == 1}
    figure.add_trace(dashed(x, y, CONTROL_GREY, **shown), row=1, col=col)
