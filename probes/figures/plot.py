"""One figure for each kind of reading, the signatures of several (what `.plot()` draws), and figures as files.

Every drawing is a plain `plotly.graph_objects.Figure` with the numbers of the reading in it, sample sizes on the
axes, the 95 % interval over facts, and the control dashed or grey.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ...arguments import checked
from ...atomic_files import written_whole
from ...errors import RevprobeError, did_you_mean, first_line
from ..pairs.pairs import ReversalPairs
from ..statistics.coverage import counted
from .assumptions import assumption_figure
from .attention_maps import correlation_heatmap, head_map, role_map
from .bounds import bounds_figure
from .by_layer import logit_lens_figure, stored_once_figure
from .causal_trace import causal_trace_figure, head_ranking_figure
from .controls import controls_figure, controls_over_steps
from .denoising import denoising_figure
from .drawable import Drawable, sample_of
from .objective_terms import objective_terms_figure
from .route_edits import route_edit_figure
from .storage import stored_evidence_figure
from .theme import (
    CONTROL_GREY,
    FORWARD,
    OKABE_ITO,
    PICTURE_WIDTH,
    REVERSE,
    TEMPLATE,
    faded,
    heading,
    interval_text,
    message_figure,
    plain,
    with_theme,
)
from .training_curves import measures_with_reasons, series_words, signatures_figure

__all__ = ["correlation_heatmap", "plot_reading", "plot_readings", "signatures_figure"]

KINDS = ("scatter", "heatmap", "heads", "bounds", "controls")
GRADIENT_KINDS = ("intervals", "layers", "controls")
POINTS = 5_000  # more points than this slow a browser down and show nothing new
SIZE = {"width": 640, "height": 480}
PICTURES = (".png", ".svg", ".pdf")


def plot_reading(reading: Drawable, *, theme: str = "light", **options: Any) -> go.Figure:
    """Draw one reading; what can be asked of each stands at `Reading.plot`.

    Raises: RevprobeError, when the reading or an option is not known.
    """
    if reading.name not in RENDERERS:
        raise RevprobeError(f"cannot draw a reading called {reading.name!r}{did_you_mean(reading.name, RENDERERS)}")
    return with_theme(_called(RENDERERS[reading.name], reading, options, what=f"a plot of {reading.name}"), theme)


def plot_readings(readings: Iterable[Drawable], *, theme: str = "light", **options: Any) -> go.Figure:
    """Draw readings over training steps: attention correlation, gradient cosine, target probability (Fig. 3).

    Args:
        theme: "light" or "dark".
        options: `buttons=False` leaves out the choice of weights, `controls=None` the controls beside shuffled facts
            (drawn where the readings have some: `controls=` of a probe). For the map over distances see
            `correlation_heatmap`.
    Raises: RevprobeError, when an option is not known.
    """
    shown = list(readings)
    options = {"controls": controls_over_steps(shown)} | options
    figure = _called(signatures_figure, measures_with_reasons(shown), options, what="a plot of readings")
    return with_theme(figure, theme)


def _called(draw: Callable[..., go.Figure], subject: Any, options: dict[str, Any], *, what: str) -> go.Figure:
    known = [name for name, one in inspect.signature(draw).parameters.items() if one.kind is one.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise RevprobeError(f"{what} has no option {option!r}{did_you_mean(option, known)}")
    return draw(subject, **options)


def attention_figure(
    reading: Drawable,
    *,
    kind: str = "scatter",
    layer: int | None = None,
    head: int | None = None,
    pairs: ReversalPairs | None = None,
) -> go.Figure:
    """Forward against reverse attention score, one point per pair and head, or the correlation by distance or head."""
    if kind not in KINDS:
        raise RevprobeError(f"attention plot of kind {kind!r}{did_you_mean(kind, KINDS)}")
    frame = _one_head(_one_head(reading.frame, "layer", layer), "head", head)
    if kind == "heatmap":
        return correlation_heatmap([reading.part(frame.reset_index(drop=True))])
    if kind == "heads":
        return _titled(head_map(reading, frame), reading, "Pearson r within groups, all heads:")
    if kind == "bounds":
        return bounds_figure(reading, frame)
    if kind == "controls":
        return _controls(
            reading if len(frame) == len(reading.frame) else reading.part(frame), "Pearson r within groups"
        )
    frame = frame.dropna(subset=["score_forward", "score_reverse"])
    if frame.empty:
        return message_figure(f"No defined score: {reading.undefined}")
    scores = ["score_forward", "score_reverse"]
    # Group means are position biases; left in, they would draw a correlation that the statistic does not count.
    frame[scores] -= frame.groupby(["group", "layer", "head"])[scores].transform("mean")
    shown = frame.sample(POINTS, random_state=0) if len(frame) > POINTS else frame
    return _score_scatter(reading, shown, _pair_words(reading, pairs), of=len(frame))


def _one_head(frame: pd.DataFrame, column: str, wanted: int | None) -> pd.DataFrame:
    if wanted is None:
        return frame
    if wanted not in set(frame[column]):
        there = sorted(set(frame[column]))
        raise RevprobeError(f"no {column} {wanted!r} in this reading: expected one of {there[0]} to {there[-1]}")
    return frame[frame[column] == wanted]


def _pair_words(reading: Drawable, pairs: ReversalPairs | None) -> dict[int, str]:
    """Each pair's two queries as text. Raises: RevprobeError, when the reading was taken on other pairs."""
    if pairs is None:
        return {}
    pairs = pairs.for_probe("attention")
    if reading.meta.get("pairs") is not None and not pairs.has_digest(reading.meta["pairs"]):
        raise RevprobeError(
            f"pairs= has the digest {pairs.digest!r}: expected those of the reading, {reading.meta['pairs']!r}"
        )
    queries = pairs.to_frame().pivot(index="pair", columns="direction", values="query")
    return {int(pair): "<br>".join(plain(text, limit=120) for text in row) for pair, *row in queries.itertuples()}


def _score_scatter(reading: Drawable, shown: pd.DataFrame, words: Mapping[int, str], *, of: int) -> go.Figure:
    limit = 1.05 * float(np.abs(shown[["score_forward", "score_reverse"]].to_numpy(dtype=float)).max()) or 1.0
    diagonal = {"color": CONTROL_GREY, "dash": "dot", "width": 1}
    figure = go.Figure(go.Scatter(x=[-limit, limit], y=[-limit, limit], mode="lines", line=diagonal, hoverinfo="skip"))
    figure.data[0].update(name="equal scores")
    at_step = "" if reading.meta.get("step") is None else f"step {int(reading.meta['step']):,}"
    for place, (layer, rows) in enumerate(shown.groupby("layer")):
        marker = {"size": 4, "opacity": 0.5, "color": list(OKABE_ITO.values())[place % 7]}
        x, y = rows["score_forward"].tolist(), rows["score_reverse"].tolist()
        hover = []
        for row in rows.to_dict("records"):
            fact = f"fact {plain(row['fact'])}, pair {plain(row['pair'])}"
            apart = f"distances {row['distance_forward']} / {row['distance_reverse']}"
            where = f"layer {row['layer']}, head {row['head']}, {apart}"
            scores = f"score − mean: {row['score_forward']:.3f} / {row['score_reverse']:.3f}"
            hover.append("<br>".join(filter(None, [fact, words.get(int(row["pair"])), where, scores, at_step])))
        points = go.Scatter(x=x, y=y, mode="markers", marker=marker, hovertext=hover, hoverinfo="text")
        figure.add_trace(points.update(name=f"layer {layer}"))
    part = f"{len(shown):,} of {of:,} points drawn" if len(shown) < of else f"{of:,} points"
    figure.update_xaxes(title=f"forward score − group mean ({part})", range=[-limit, limit])
    figure.update_yaxes(title="reverse score − group mean (pre-softmax)", range=[-limit, limit], scaleanchor="x")
    return _titled(figure, reading, "Pearson r within groups")


def gradient_figure(reading: Drawable, *, by: str = "role", kind: str = "intervals") -> go.Figure:
    """Cosine of forward and reverse gradient by role of the parameter, beside its control; the last row is all."""
    if kind not in GRADIENT_KINDS:
        raise RevprobeError(f"gradient plot of kind {kind!r}{did_you_mean(kind, GRADIENT_KINDS)}")
    what = "gradient cosine" + " of the adapter" * (reading.name == "lora_gradient_cosine")
    if kind == "controls":
        return _controls(reading, what)
    if kind == "layers":
        return _titled(role_map(reading), reading, f"{what}, all parameters:")
    parts = reading.summary(by=by)
    everything = reading.summary().assign(**{by: "all"})
    rows = pd.concat([parts, everything], ignore_index=True).iloc[::-1]
    names = ["none" if pd.isna(name) else plain(name) for name in rows[by]]
    sizes = zip(names, rows["n"], rows["facts"], strict=True)
    labels = [f"{name}<br><sup>{counted(int(n), int(facts))}</sup>" for name, n, facts in sizes]
    figure = go.Figure()
    for column, low, high, colour, name, symbol in (
        ("control", "control_low", "control_high", CONTROL_GREY, "control (shuffled facts)", "diamond-open"),
        ("value", "low", "high", FORWARD, "forward and reverse gradient", "circle"),
    ):
        value = rows[column].astype(float)
        bars = {"type": "data", "symmetric": False, "array": (rows[high] - value).tolist(), "color": colour}
        bars["arrayminus"] = (value - rows[low]).tolist()
        hover = [interval_text(*numbers) for numbers in rows[[column, low, high]].astype(float).itertuples(index=False)]
        points = go.Scatter(
            x=value.tolist(), y=labels, mode="markers", error_x=bars, hovertext=hover, hoverinfo="y+text"
        )
        figure.add_trace(points.update(name=name, marker={"color": colour, "symbol": symbol, "size": 9}))
    lowest = float(np.nanmin(rows[["low", "control_low", "control", "value"]].to_numpy(dtype=float), initial=0.0))
    figure.update_xaxes(title="cosine (mean over pairs)", range=[lowest - 0.05, 1.05])
    figure.update_yaxes(type="category")
    return _titled(figure, reading, what).update_layout(height=170 + 32 * len(rows))


def probability_figure(reading: Drawable, *, bins: int = 20) -> go.Figure:
    """How the target's probability is spread over pairs: forward, reverse, and reverse under the control."""
    frame = reading.frame
    forward, reverse = (frame[frame["direction"] == direction] for direction in ("forward", "reverse"))
    measures = reading.measures().set_index("measure")
    figure = go.Figure()
    edges = np.linspace(0.0, 1.0, bins + 1)
    curves = [
        ("forward", forward["probability"], FORWARD, "solid"),
        ("reverse", reverse["probability"], REVERSE, "solid"),
    ]
    if "probability_control" in reverse:
        curves.append(("control (reverse, shuffled facts)", reverse["probability_control"], CONTROL_GREY, "dash"))
    for name, values, colour, dash in curves:
        if f"{name}_probability" in measures.index:
            numbers, accuracy = (
                [float(measures[column][f"{name}_{what}"]) for column in ("value", "low", "high")]
                for what in ("probability", "accuracy")
            )
            label = f"{name}: mean {interval_text(*numbers)}, accuracy {interval_text(*accuracy, percent=True)}"
            label += "" if math.isnan(accuracy[0]) else " %"
        else:
            null = reading.control if name.startswith("control") else None
            own = (float(values.mean()), math.nan, math.nan) if null is None else (null.value, *null.interval)
            label = f"{name}: mean {interval_text(*own)}"
        trace = _histogram(values.dropna().to_numpy(dtype=float), edges, colour, dash)
        figure.add_trace(trace.update(name=label))
    figure.update_xaxes(title="probability of the target", range=[-0.01, 1.01])
    figure.update_yaxes(title=f"share of pairs ({sample_of(reading)})", rangemode="tozero")
    return _titled(figure, reading, "reverse probability")


def _histogram(values: np.ndarray, edges: np.ndarray, colour: str, dash: str) -> go.Scatter:
    share = np.histogram(values, bins=edges)[0] / max(len(values), 1)
    ends = [
        f"{low:.2f} to {high:.2f}: {part:.1%}" for low, high, part in zip(edges[:-1], edges[1:], share, strict=True)
    ]
    x, y = [*edges.tolist()], [*share.tolist(), share[-1].item()]  # hv steps: the last value is drawn twice
    line = {"color": colour, "dash": dash, "width": 2, "shape": "hv"}
    fill = None if dash == "dash" else "tozeroy"
    trace = go.Scatter(x=x, y=y, mode="lines", line=line, fill=fill, hovertext=[*ends, ends[-1]], hoverinfo="name+text")
    return trace.update(fillcolor=faded(colour, 0.12))


def _controls(reading: Drawable, what: str) -> go.Figure:
    figure = controls_figure(reading)
    return _titled(figure, reading, what).update_layout(height=figure.layout.meta["height"], width=None)


def _titled(figure: go.Figure, reading: Drawable, what: str) -> go.Figure:
    """The heading every single reading carries: which model, step, weights and kind, and its value with control."""
    meta = reading.meta
    step = "" if meta.get("step") is None else f", step {int(meta['step']):,}"
    model = plain(meta.get("model") or "model")
    control = reading.control.value if reading.control else math.nan
    numbers = f"{what} {interval_text(reading.value, *reading.interval, control)}, {sample_of(reading)}"
    undefined = sum(reading.undefined.values())
    numbers += f", {undefined:,} undefined" if undefined else ""
    text = f"<b>{model}</b>{step} ({series_words(meta.get('weights'), meta.get('kind'))})"
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
    title = heading(text, numbers)
    return figure.update_layout(template=TEMPLATE, title=title, legend=legend, margin={"t": 110}, **SIZE)


RENDERERS: dict[str, Callable[..., go.Figure]] = {
    "assumption_audit": assumption_figure,
    "attention_correlation": attention_figure,
    "causal_trace": causal_trace_figure,
    "denoising_trace": denoising_figure,
    "gradient_cosine": gradient_figure,
    "head_ranking": head_ranking_figure,
    "logit_lens": logit_lens_figure,
    "lora_gradient_cosine": gradient_figure,
    "objective_terms": objective_terms_figure,
    "reverse_probability": probability_figure,
    "route_edit": route_edit_figure,
    "stored_evidence": stored_evidence_figure,
    "stored_evidence_first_order": stored_evidence_figure,
    "stored_once": stored_once_figure,
}


@checked
def save_figure(figure: go.Figure, path: str | Path, *, scale: float = 2.0) -> Path:
    """Write a figure by its path's ending: .html (self-contained), .png, .svg or .pdf; whole or not at all.

    Args:
        scale: pixels of a picture per pixel of the figure.
    Raises: RevprobeError, for another ending, a picture without kaleido (`pip install kaleido`; it also needs Chrome
        or Chromium), or a folder that cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".html", *PICTURES):
        raise RevprobeError(f"cannot write a figure as {path.name!r}{did_you_mean(ending, ['.html', *PICTURES])}")
    if ending in PICTURES and find_spec("kaleido") is None:
        raise RevprobeError(
            f"a figure as {ending} needs kaleido, which is not installed; `pip install kaleido` (the checkout's extra "
            "'.[images]'), or save it as .html"
        )
    try:
        with written_whole(path) as part:
            if ending == ".html":
                # The page around a figure in its colour, or a dark one would stand on white.
                paper = figure.layout.paper_bgcolor or figure.layout.template.layout.paper_bgcolor or "white"
                figure.write_html(part, include_plotlyjs=True, post_script=f"document.body.style.background='{paper}'")
            else:
                width = figure.layout.width or PICTURE_WIDTH
                figure.write_image(part, format=ending.removeprefix("."), scale=scale, width=width)
    except RevprobeError:
        raise
    except OSError as error:
        raise RevprobeError(
            f"cannot write the figure {str(path)!r}: {first_line(error)}; expected a writable folder"
        ) from error
    except (ValueError, RuntimeError) as error:  # kaleido without a browser
        raise RevprobeError(
            f"cannot draw {str(path)!r}: {first_line(error)}; kaleido needs Chrome or Chromium (`plotly_get_chrome` "
            "installs one), or save it as .html instead"
        ) from error
    return path
