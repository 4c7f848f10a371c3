"""Fig. 4 of the paper over fine-tuning: attention scores' correlation, gradient cosines, probabilities, seeds pooled.

A line is one model trained on one dataset in one direction: its mean over seeds, with a band from the lowest to the
highest seed, of a single seed its 95 % interval over facts. Masked and causal models are asked different kinds of
pairs, which the legend says; they are never pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...finetune.runs.finetuning import FinetuneRun
from ...probes.figures.theme import SPARE_COLOURS, SYMBOLS, TEMPLATE, band, faded, plain

# Panel -> its measures, with the dash of their lines; "dash" is the control's, here as in the other curves of a page.
PANELS: dict[str, dict[str, str]] = {
    "Attention scores: correlation of forward and reverse": {"attention_correlation": "solid"},
    "Gradients: cosine (dotted: adapter alone)": {"gradient_cosine": "solid", "lora_gradient_cosine": "dot"},
    "Target probability (solid: reverse, dotted: forward)": {
        "reverse_probability": "solid",
        "forward_probability": "dot",
    },
}
# A control of a second line in a panel would hide the first's.
_WITH_CONTROL = ("attention_correlation", "gradient_cosine", "reverse_probability")
_SERIES = ["model", "dataset", "direction", "variant", "kind"]


def signature_frame(runs: Sequence[FinetuneRun]) -> pd.DataFrame:
    """All measures of all runs, as `Readings.measures` has them, by what a sweep varies, kind and step."""
    parts = []
    for run in runs:
        readings = run.readings_so_far()
        if len(readings):
            about = {name: run.axes.get(name, "") for name in ("model", "dataset", "direction", "variant", "seed")}
            parts.append(readings.measures().assign(**about))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def has_figure4(runs: Sequence[FinetuneRun]) -> bool:
    """Whether any run has a reading to draw."""
    return any(len(run.readings_so_far()) for run in runs)


def pooled(frame: pd.DataFrame) -> pd.DataFrame:
    """Over seeds: mean, lowest and highest value, mean control, and how many seeds, for each series, measure and step.

    Of one seed, low and high are its 95 % interval over facts, NaN where it has none. Seeds whose value is undefined
    are left out of all.
    """
    keys = [*_SERIES, "measure", "step"]
    frame = frame if "variant" in frame else frame.assign(variant="")
    defined = frame[frame["value"].notna()]
    grouped = defined.groupby(keys, sort=False, dropna=False)
    table = grouped["value"].agg(mean="mean", low="min", high="max", seeds="count")
    alone = table["seeds"] == 1
    for end in ("low", "high"):
        table[end] = table[end].where(~alone, grouped[end].first())
    return table.assign(control=grouped["control"].mean()).reset_index()


def figure4(runs: Sequence[FinetuneRun]) -> go.Figure:
    """The three panels over optimizer steps."""
    table = pooled(signature_frame(runs))
    figure = make_subplots(rows=1, cols=len(PANELS), subplot_titles=list(PANELS), horizontal_spacing=0.07)
    figure.update_annotations(font={"size": 13})
    for place, (series, part) in enumerate(table.groupby(_SERIES, sort=False, dropna=False)):
        model, dataset, direction, variant, kind = (str(value) for value in series)
        name = f"{model} {dataset} ({direction}), {variant}{', ' if variant else ''}{kind.replace('_', ' ')}"
        look = {"colour": SPARE_COLOURS[place % len(SPARE_COLOURS)], "symbol": SYMBOLS[place % len(SYMBOLS)]}
        for column, measures in enumerate(PANELS.values(), start=1):
            for measure, dash in measures.items():
                rows = part[part["measure"] == measure].sort_values("step")
                for trace in _traces(rows, plain(name), dash, measure in _WITH_CONTROL, **look):
                    first = measure == "attention_correlation" and trace.mode == "lines+markers"
                    figure.add_trace(trace.update(legendgroup=name, showlegend=first), row=1, col=column)
    figure.update_layout(template=TEMPLATE, height=460, legend={"orientation": "h", "y": -0.2}, margin={"b": 100})
    figure.update_xaxes(title="optimizer step")
    return figure


def _traces(
    rows: pd.DataFrame, name: str, dash: str, with_control: bool, *, colour: str, symbol: str
) -> list[go.Scatter]:
    """One measure of one series: its mean, the band over seeds, and its control."""
    if rows.empty:
        return []
    steps, mean = rows["step"].tolist(), rows["mean"].tolist()
    hover = [
        f"<b>{name}</b><br>{str(row['measure']).replace('_', ' ')}<br>step {row['step']:,}: {row['mean']:.3f} "
        f"[{row['low']:.3f}, {row['high']:.3f}], {_band_words(row['seeds'])}, control {row['control']:.3f}"
        for row in rows.to_dict("records")
    ]
    line: dict[str, Any] = {"color": colour, "dash": dash, "width": 2}
    mark = {"symbol": symbol, "size": 7}
    drawn = [
        go.Scatter(
            x=steps, y=mean, mode="lines+markers", line=line, marker=mark, name=name, hovertext=hover, hoverinfo="text"
        )
    ]
    if rows["low"].notna().any():
        drawn.append(band(steps, rows["low"].tolist(), rows["high"].tolist(), colour))
    if with_control and rows["control"].notna().any():
        pale = {"color": faded(colour, 0.6), "dash": "dash", "width": 1.5}
        drawn.append(go.Scatter(x=steps, y=rows["control"].tolist(), mode="lines", line=pale, hoverinfo="skip"))
    return drawn


def _band_words(seeds: int) -> str:
    return "95 % over facts, 1 seed" if seeds == 1 else f"lowest to highest of {seeds} seeds"
