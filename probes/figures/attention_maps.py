"""Heat maps of readings: the attention correlation by distances, with a checkpoint slider, and by head; the gradient
cosine by role.

A cell of the first is the statistic of the attention probe on the pairs at these two distances: the mean over groups
(one pair of signed offsets, one layer, one head) of the within-group Pearson r. Cells are aggregated here, so that a
page carries one number per cell and not one point per pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...errors import RevprobeError
from ..statistics.by_distance import DISTANCES, distance_correlations
from ..statistics.by_head import head_correlations
from ..statistics.by_role import cell_cosines
from .drawable import Drawable, sample_of
from .theme import (
    CELL_INK,
    DIVERGING,
    TEMPLATE,
    UNDEFINED_GREY,
    heading,
    interval_text,
    message_figure,
    plain,
    samples_text,
)
from .training_curves import series_words

Entry = tuple[Drawable, pd.DataFrame]
Checkpoint = tuple[dict[str, list[Any]], dict[str, list[Any]]]

WIDEST = 40  # distances per axis up to which those without a pair are drawn too, as white cells
WRITTEN_OUT = 12  # cells a side up to which each cell also shows its number


def correlation_heatmap(readings: Iterable[Drawable]) -> go.Figure:
    """Draw the within-group correlation by distance pair as a heat map, one slider step per checkpoint.

    Raw and EMA weights (and the two kinds of pairs) get a panel each. White cells were not measured, grey ones are
    undefined and say why. The colour scale is fixed at -1..1, so checkpoints and runs compare by eye.

    Args:
        readings: of one run or model; the attention ones are drawn.
    Raises: RevprobeError, when two readings claim the same checkpoint, weights and kind.
    """
    found = [reading for reading in readings if reading.name == "attention_correlation"]
    found.sort(key=lambda reading: reading.meta.get("weights") == "ema")  # raw left, EMA right, however they were read
    if not found:
        return message_figure("No attention reading: there is no correlation to draw.")
    entries: dict[tuple[int, str], Entry] = {}
    for reading in found:
        place = int(reading.meta.get("step") or 0), series_words(reading.meta.get("weights"), reading.meta.get("kind"))
        if place in entries:
            raise RevprobeError(
                f"two attention readings at step {place[0]} ({place[1]}): expected one run's readings, "
                "draw each run or model in a figure of its own"
            )
        entries[place] = reading, distance_correlations(reading.frame)
    steps = sorted({step for step, _ in entries})
    panels = list(dict.fromkeys(panel for _, panel in entries))
    grid = Grid.of(cells for _, cells in entries.values())
    figure = _empty_maps(panels, grid, heads=max((int(cells["heads"].max()) for _, cells in entries.values())))
    for column, panel in enumerate(panels, start=1):
        all_cells = pd.concat([entries[step, panel][1] for step in steps if (step, panel) in entries])
        for trace in _map_traces(all_cells, grid):
            figure.add_trace(trace, row=1, col=column)
    checkpoints = [_checkpoint([entries.get((step, panel)) for panel in panels], panels, grid) for step in steps]
    models = list(dict.fromkeys(plain(reading.meta.get("model") or "model") for reading in found))
    step = f", step {steps[0]:,}" if len(steps) == 1 and found[0].meta.get("step") is not None else ""
    figure.update_layout(title=heading(f"<b>{', '.join(models)}</b>{step}"))
    return _add_slider(figure, steps, checkpoints)


@dataclass(frozen=True)
class Grid:
    """The distances a heat map spans, the same for every checkpoint, so that a slider step moves no cell."""

    forward: list[int]
    reverse: list[int]

    @classmethod
    def of(cls, tables: Iterable[pd.DataFrame]) -> Grid:
        """Every distance from smallest to largest; only the measured ones where that would be mostly white."""
        cells = pd.concat(list(tables), ignore_index=True)
        return cls.over(*(cells[name] for name in DISTANCES))

    @classmethod
    def over(cls, forward_distances: Iterable[int], reverse_distances: Iterable[int]) -> Grid:
        """`of`, from the distances themselves."""
        axes = [sorted({int(one) for one in found}) for found in (forward_distances, reverse_distances)]
        return cls(*(list(range(axis[0], axis[-1] + 1)) if axis[-1] - axis[0] < WIDEST else axis for axis in axes))

    def spread(self, cells: pd.DataFrame, column: str) -> list[list[Any]]:
        """One column of `cells` as rows (forward) of columns (reverse); None where no pair was measured."""
        known = {(int(f), int(r)): value for f, r, value in cells[[*DISTANCES, column]].itertuples(index=False)}
        return [[known.get((forward, reverse)) for reverse in self.reverse] for forward in self.forward]


def _empty_maps(panels: Sequence[str], grid: Grid, *, heads: int) -> go.Figure:
    gap = 0.3 / (2 * len(panels))
    figure = make_subplots(1, len(panels), subplot_titles=[" "] * len(panels), horizontal_spacing=gap)
    for column in range(1, len(panels) + 1):
        anchor = {"scaleanchor": "x" if column == 1 else f"x{column}", "row": 1, "col": column}
        figure.update_xaxes(title="reverse distance (tokens)", **_distance_axis(grid.reverse), row=1, col=column)
        figure.update_yaxes(title="forward distance (tokens)", **_distance_axis(grid.forward), **anchor)
    over = f"<br>mean over {heads} heads" if heads > 1 else ""
    bar = {"title": {"text": f"Pearson r<br>within groups{over}"}, "thickness": 14}
    scale = {"cmin": -1, "cmax": 1, "colorscale": DIVERGING, "colorbar": bar}
    size = {"width": 230 + 460 * len(panels), "height": 620, "margin": {"t": 90, "b": 140, "l": 70, "r": 170}}
    return figure.update_layout(template=TEMPLATE, coloraxis=scale, **size)


def _distance_axis(distances: Sequence[int]) -> dict[str, Any]:
    every = math.ceil(len(distances) / 20)
    return {"type": "category", "showgrid": False, "constrain": "domain", "dtick": every, "tickmode": "linear"}


def _map_traces(cells: pd.DataFrame, grid: Grid) -> list[go.Heatmap]:
    """The undefined cells (grey, with the reason) and the defined ones; a checkpoint fills in the numbers."""
    where = "forward distance %{y}, reverse distance %{x}<br>"
    common: dict[str, Any] = {"x": grid.reverse, "y": grid.forward, "xgap": 1, "ygap": 1, "hoverongaps": False}
    grey = {"colorscale": [[0, UNDEFINED_GREY], [1, UNDEFINED_GREY]], "showscale": False}
    undefined = go.Heatmap(**common, **grey, hovertemplate=where + "undefined: %{customdata}<extra></extra>")
    hover = where + "r = %{z:.3f}, n = %{customdata} pairs<br>offsets (forward, reverse): %{text}<extra></extra>"
    value = go.Heatmap(**common, coloraxis="coloraxis", text=grid.spread(cells, "offsets"), hovertemplate=hover)
    if max(len(grid.forward), len(grid.reverse)) <= WRITTEN_OUT:
        value.update(texttemplate="%{z:.2f}", textfont={"size": 10, "color": CELL_INK})
    return [undefined, value]


def _checkpoint(entries: Sequence[Entry | None], panels: Sequence[str], grid: Grid) -> Checkpoint:
    """What a slider step sets: `z` and `customdata` of every trace, and the panels' headings."""
    traces: dict[str, list[Any]] = {"z": [], "customdata": []}
    for entry in entries:
        cells = entry[1] if entry else pd.DataFrame(columns=[*DISTANCES, "value", "n", "reason"])
        undefined = cells["value"].isna()
        reasons = grid.spread(cells[undefined], "reason")
        marked = [[None if reason is None else 0 for reason in row] for row in reasons]
        traces["z"] += [marked, grid.spread(cells[~undefined], "value")]
        traces["customdata"] += [reasons, grid.spread(cells, "n")]
    return traces, {"annotations": [_title(place, panels, entry) for place, entry in enumerate(entries)]}


def _title(place: int, panels: Sequence[str], entry: Entry | None) -> dict[str, Any]:
    """A panel's heading with the reading's own value; part of each frame, since the value moves with the slider."""
    if entry is None:
        numbers = "no reading at this checkpoint"
    else:
        reading = entry[0]
        control = reading.control.value if reading.control else math.nan
        numbers = "r = " + interval_text(reading.value, *reading.interval, control) + f", {sample_of(reading)}"
    text = f"<b>{panels[place]}</b><br>{numbers}"
    anchor = {"xref": f"x{place + 1 if place else ''} domain", "yref": f"y{place + 1 if place else ''} domain"}
    return {"text": text, "x": 0.5, "y": 1.02, "yanchor": "bottom", "showarrow": False, "font": {"size": 13}, **anchor}


def _add_slider(figure: go.Figure, steps: Sequence[int], checkpoints: Sequence[Checkpoint]) -> go.Figure:
    """Show the last checkpoint; with several, add a slider. Not frames: plotly would play those on opening."""
    traces, layout = checkpoints[-1]
    for place, trace in enumerate(figure.data):
        trace.update({name: values[place] for name, values in traces.items()})
    figure.update_layout(layout)
    marks = [
        {"label": f"{step:,}", "method": "update", "args": list(checkpoint)}
        for step, checkpoint in zip(steps, checkpoints, strict=True)
    ]
    shown = {"prefix": "checkpoint: step ", "font": {"size": 14}}
    slider = {"steps": marks, "active": len(steps) - 1, "currentvalue": shown, "pad": {"t": 60}}
    return figure.update_layout(sliders=[slider]) if len(steps) > 1 else figure


def head_map(reading: Drawable, frame: pd.DataFrame) -> go.Figure:
    """Within-group correlation of forward and reverse scores by layer x head; the hover has each 95 % interval.

    Args:
        frame: the reading's rows to draw.
    """
    table = head_correlations(frame).dropna(subset=["head"])
    heads = frame.dropna(subset=["score_forward", "score_reverse"]).groupby(["layer", "head"])
    figure = _map(table, "head", "layer %{y}, head %{x}: r = %{text}<extra></extra>", "r")
    figure.update_xaxes(title=f"head ({samples_text(heads.size(), heads['fact'].nunique())} each)")
    return figure.update_yaxes(title="layer")


def role_map(reading: Drawable) -> go.Figure:
    """Mean per-pair cosine of the forward and reverse gradient by layer x role; the hover has each 95 % interval."""
    table = cell_cosines(reading.frame, ["layer", "role"])
    figure = _map(table, "role", "layer %{y}, %{x}: cosine %{text}<extra></extra>", "cosine")
    figure.update_xaxes(title=f"role of the parameter ({samples_text(table['n'], table['facts'])})")
    return figure.update_yaxes(title="layer (none: in no layer)")


def _map(table: pd.DataFrame, column: str, hover: str, unit: str) -> go.Figure:
    """Values by layer (rows) and `column`; undefined cells are grey, with that word on the hover."""
    columns, layers = (list(dict.fromkeys(table[name])) for name in (column, "layer"))
    cells: dict[tuple[Any, Any], Any] = {}
    for row in table.to_dict("records"):
        control = float(row.get("control", math.nan))
        number = None if math.isnan(row["value"]) else float(row["value"])
        cells[row["layer"], row[column]] = number, interval_text(row["value"], row["low"], row["high"], control)
    z, text = (
        [[cells.get((layer, one), (None, "not measured"))[part] for one in columns] for layer in layers]
        for part in (0, 1)
    )
    shown: dict[str, Any] = {"x": [str(one) for one in columns], "y": [str(layer) for layer in layers], "xgap": 1}
    grey = {"colorscale": [[0, UNDEFINED_GREY], [1, UNDEFINED_GREY]], "showscale": False, "hoverinfo": "text"}
    undefined = [
        [0 if number is None and words == "undefined" else None for number, words in zip(*pair, strict=True)]
        for pair in zip(z, text, strict=True)
    ]
    under = go.Heatmap(**shown, **grey, z=undefined, text=text, ygap=1, hoverongaps=False)
    bar = {"title": {"text": unit}, "thickness": 14}
    scale = {"colorscale": DIVERGING, "zmin": -1, "zmax": 1, "colorbar": bar, "hoverongaps": False, "ygap": 1}
    cell = go.Heatmap(**shown, **scale, z=z, text=text, hovertemplate=hover)
    if max(len(columns), len(layers)) <= WRITTEN_OUT:
        cell.update(texttemplate="%{z:.2f}", textfont={"size": 11, "color": CELL_INK})
    figure = go.Figure([under, cell]).update_layout(template=TEMPLATE)
    figure.update_xaxes(type="category", showgrid=False)
    return figure.update_yaxes(type="category", showgrid=False)
