"""An assumption audit drawn: every head's verdict, its cross-plane share against the null, and one head's planes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...errors import RevprobeError, did_you_mean
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
    counts_text,
    heading,
    interval_text,
    message_figure,
    plain,
    undefined_text,
)
from .training_curves import series_words

KINDS = ("heads", "planes")
VERDICTS = {"fails": OKABE_ITO["vermillion"], "cannot tell": OKABE_ITO["yellow"], "holds": OKABE_ITO["green"]}
NO_VERDICT = "no verdict"
COLOURS = {"forward": FORWARD, "reverse": REVERSE}
PER_PLANE = {"rho": "alignment with the query, rho", "trace": "trace, over the mean of planes"}


def assumption_figure(
    reading: Drawable, *, kind: str = "heads", layer: int | None = None, head: int | None = None
) -> go.Figure:
    """Draw an assumption audit.

    Args:
        kind: "heads", the verdicts and the cross-plane share less its null, layer by head; "planes", alignment and
            trace of each plane of one head.
        layer, head: of kind "planes", the first with planes when None.
    Raises: RevprobeError, for an unknown kind, a head that was not audited, or one that is named for kind "heads".
    """
    if kind not in KINDS:
        raise RevprobeError(f"assumption plot of kind {kind!r}{did_you_mean(kind, KINDS)}")
    if kind == "planes":
        return _planes(reading, layer, head)
    for what, value in (("layer", layer), ("head", head)):
        if value is not None:
            raise RevprobeError(f"{what}={value!r} has no say at kind='heads', which draws all: use kind='planes'")
    table = reading.frame.drop_duplicates(["layer", "head", "direction"])
    if table["cross_share"].isna().all():
        return message_figure(f"No head with planes: {undefined_text(reading.undefined)}")
    table = table.assign(over=table["cross_share"] - table["null"])
    layers, heads = (sorted(int(one) for one in table[name].unique()) for name in ("layer", "head"))
    cells = {place: part for place, part in table.groupby(["layer", "head"], observed=True)}
    axes: dict[str, Any] = {"x": [str(one) for one in heads], "y": [str(one) for one in layers]}

    def spread(of: Callable[[pd.DataFrame], Any]) -> list[list[Any]]:
        return [[of(cells[at, one]) if (at, one) in cells else None for one in heads] for at in layers]

    titles = ["<b>Verdict</b>", "<b>Cross-plane share, less its null</b>"]
    figure = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    codes = {name: float(place) for place, name in enumerate(VERDICTS)}
    scale = [[(place + end) / len(VERDICTS), shade] for place, shade in enumerate(VERDICTS.values()) for end in (0, 1)]
    common: dict[str, Any] = {**axes, "xgap": 1, "ygap": 1, "hoverongaps": False, "text": spread(_words)}
    common["hovertemplate"] = "layer %{y}, head %{x}: %{text}<extra></extra>"
    verdicts = go.Heatmap(z=spread(lambda part: codes.get(part["verdict"].iloc[0])), **common)
    figure.add_trace(verdicts.update(colorscale=scale, zmin=-0.5, zmax=2.5, showscale=False), row=1, col=1)
    over = table["over"].abs().max()
    limit = float(over) if over > 0 else 1.0
    bar = {"title": {"text": "share", "side": "top"}, "thickness": 14}
    shares = go.Heatmap(z=spread(lambda part: _number(part["over"].mean())), **common, colorbar=bar)
    shares.update(colorscale=[list(stop) for stop in DIVERGING], zmin=-limit, zmax=limit)
    figure.add_trace(shares, row=1, col=2)
    _verdict_legend(figure, table)
    figure.update_xaxes(title="head", type="category", showgrid=False, dtick=max(1, len(heads) // 8))
    figure.update_yaxes(type="category", showgrid=False, dtick=max(1, len(layers) // 16))
    figure.update_yaxes(title=f"layer ({counts_text(table['facts'].astype(float))} facts)", row=1, col=1)
    figure.update_layout(plot_bgcolor=UNDEFINED_GREY, height=300 + max(120, 14 * len(layers)))
    return _titled(figure, reading)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _words(part: pd.DataFrame) -> str:
    """What one head's cell says on the hover."""
    first = part.iloc[0]
    if first["reason"]:
        return plain(first["reason"], limit=None)
    lines = [first["verdict"] if isinstance(first["verdict"], str) else f"{NO_VERDICT}: {first['reason_bound']}"]
    for row in part.to_dict("records"):
        null = f"null {interval_text(row['null'], row['null_low'], row['null_high'])}"
        lines.append(f"{row['direction']}: share {row['cross_share']:.3f}, {null}")
        lines[-1] += f"; {row['why']}" if row["why"] else ""
        if not math.isnan(row["bound_assumed"]):
            bounds = f"assumed {row['bound_assumed']:.3f}, with measured values {row['bound_measured']:.3f}"
            lines.append(f"bound {bounds}, exact {row['exact']:.3f}")
    measured = interval_text(first["correlation"], first["correlation_low"], first["correlation_high"])
    return "<br>".join([*lines, f"measured correlation {measured}"])


def _verdict_legend(figure: go.Figure, table: pd.DataFrame) -> None:
    """What each colour means, and how many heads have it."""
    heads = table.drop_duplicates(["layer", "head"])["verdict"].astype(object)
    counts = heads.where(heads.notna(), NO_VERDICT).value_counts()
    why = {str(one) for one in table.loc[table["verdict"].isna(), "reason_bound"] if one}
    for name, shade in [*reversed(VERDICTS.items()), (NO_VERDICT, UNDEFINED_GREY)]:
        label = f"{name}: {int(counts.get(name, 0)):,}"
        label += f" ({plain(*why, limit=110)})" if name == NO_VERDICT and len(why) == 1 else ""
        mark = go.Scatter(x=[None], y=[None], mode="markers", name=label)
        figure.add_trace(mark.update(marker={"symbol": "square", "size": 12, "color": shade}), row=1, col=1)
    figure.update_layout(legend=BELOW)


def _planes(reading: Drawable, layer: int | None, head: int | None) -> go.Figure:
    frame = reading.frame
    for name, wanted in (("layer", layer), ("head", head)):
        there = sorted(int(one) for one in frame[name].unique())
        if wanted is not None and wanted not in there:
            raise RevprobeError(f"no {name} {wanted!r} in this reading: expected one of {there[0]} to {there[-1]}")
        frame = frame if wanted is None else frame[frame[name] == wanted]
    known = frame[frame["plane"].notna() & frame["cross_share"].notna()]
    if known.empty:
        return message_figure(f"No planes: {plain(frame['reason'].iloc[0], limit=None)}")
    first = known.iloc[0]
    rows = known[(known["layer"] == first["layer"]) & (known["head"] == first["head"])]
    figure = make_subplots(1, 2, subplot_titles=[f"<b>{what}</b>" for what in PER_PLANE.values()])
    for place, (column, expected) in enumerate({"rho": 0.0, "trace": 1.0}.items(), start=1):
        for shift, (side, colour) in enumerate(COLOURS.items()):
            part = rows[rows["direction"] == side]
            value, low, high = (part[f"{column}{end}"].astype(float) for end in ("", "_low", "_high"))
            bars = {"type": "data", "symmetric": False, "array": (high - value).tolist(), "width": 0}
            bars |= {"arrayminus": (value - low).tolist(), "thickness": 1.2}
            hover = [
                f"plane {row['plane']}, {row['frequency']:.3g} radians a token, query share {row['query_share']:.3f}: "
                + interval_text(row[column], row[f"{column}_low"], row[f"{column}_high"])
                for row in part.to_dict("records")
            ]
            points = go.Scatter(
                x=part["plane"].astype(float) + 0.2 * shift, y=value.tolist(), mode="markers", name=side
            )
            points.update(error_y=bars, hovertext=hover, hoverinfo="text+name", marker={"color": colour, "size": 6})
            figure.add_trace(points.update(legendgroup=side, showlegend=place == 1), row=1, col=place)
        line = {"color": CONTROL_GREY, "dash": "dot", "width": 1}
        figure.add_hline(y=expected, line=line, row=1, col=place)
    planes = rows["plane"].nunique()
    figure.update_xaxes(title=f"plane, fastest first ({counts_text(rows['facts'].astype(float))} facts)")
    figure.update_xaxes(tick0=0, dtick=max(1, planes // 16), range=[-0.5, planes - 0.3])
    figure.update_layout(height=430, legend=BELOW)
    verdict = first["verdict"] if isinstance(first["verdict"], str) and first["verdict"] else NO_VERDICT
    return _titled(figure, reading, f", layer {first['layer']}, head {first['head']}: {verdict}")


def _titled(figure: go.Figure, reading: Drawable, where: str = "") -> go.Figure:
    meta, null = reading.meta, reading.control
    step = "" if meta.get("step") is None else f", step {int(meta['step']):,}"
    numbers = interval_text(reading.value, *reading.interval, null.value if null else math.nan)
    what = f"mean cross-plane share, all heads: {numbers}, {sample_of(reading)}"
    undefined = sum(reading.undefined.values())
    what += f", {undefined:,} heads x directions undefined" if undefined else ""
    words = series_words(meta.get("weights"), meta.get("kind"))
    text = f"<b>{plain(meta.get('model') or 'model')}</b>{step} ({words}){where}"
    title = heading(text, what)
    return figure.update_layout(template=TEMPLATE, title=title, margin={"t": 100, "b": 100})
