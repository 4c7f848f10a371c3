"""The tabs of a report that its slider and selectors drive: empty panels, controls, and the data of every run."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from ...errors import RevprobeError, first_line
from ...finetune.runs.record import RunRecord
from ...probes.figures.attention_maps import Grid
from ...probes.figures.theme import BELOW, DIVERGING, StepScale, plain
from ...probes.readings.readings import Readings
from .explorer import ATTENTION, BINS, GRADIENT, PROBABILITY, explore
from .page import data_block, paragraph, section
from .templates import macros

EXPLORER = macros("explorer.html")
ROUNDED = (
    "Worked out when the report was written and rounded: correlations and cosines to 0.00003, the colours of the map "
    "over distances to 0.01, scores to 0.003 % of the largest. All numbers in full are in summary.csv and in the "
    "run's readings."
)
ROUTING = (
    "Values are means over the chosen heads of the within-group Pearson r between forward and reverse scores (a group "
    "is one pair of signed offsets); bands and brackets: 95 % intervals over facts. Points are scores less "
    "their group's mean, averaged over the chosen heads. Empty: no such pair, or undefined in a layer x head map. "
    "Grey: undefined, the hover says why."
)
GRADIENTS = (
    "Mean over pairs of the cosine of forward and reverse gradient, summed over the parameters of a role (and layer); "
    "bars and brackets: 95 % intervals over facts; grey: control (shuffled facts)."
)
SHARES = "How the target's probability is spread over pairs; means with their 95 % intervals over facts."
EXPLORED = (ATTENTION, GRADIENT, PROBABILITY)
# Tab -> the probe it shows, its heading, its figures, and what is said under them.
TABS = {
    "routing": (ATTENTION, "Attention correlation", ("heads", "course", "distances", "scores"), ROUTING),
    "gradients": (GRADIENT, "Gradient cosine", ("roles", "role-map"), GRADIENTS),
    "probability": (PROBABILITY, "Probability of the target", ("shares",), SHARES),
}


def explorer(
    runs: Sequence[RunRecord], *, watch: Callable[[Iterable[Any]], Iterator[Any]] = iter
) -> tuple[Markup, dict[str, list[Markup]]]:
    """The controls that the three tabs share, and the parts of each tab that some run has a reading for.

    A run whose readings cannot be worked out is left out with its reason; where that leaves none, so are the controls.

    Args:
        watch: passes the readings on one by one, such as a progress bar does.
    """
    with_data: list[str] = []
    drawn: set[str] = set()
    blocks: list[Markup] = []
    problems: list[str] = []
    for run in runs:
        readings = Readings(one for one in run.readings if one.name in EXPLORED)
        if not len(readings):
            continue
        try:
            data = _run_data(readings, len(runs), watch)
        except RevprobeError as error:
            problems.append(f"{run.name} cannot be explored: {first_line(error, with_type=False)}")
            continue
        blocks.append(data_block(f"run-{len(blocks)}", data))
        with_data.append(run.name)
        drawn |= {one.name for one in readings}
    said = [paragraph(text) for text in problems]
    tabs = {tab: _tab(tab, title, panels, note, said) for tab, (of, title, panels, note) in TABS.items() if of in drawn}
    if not with_data:
        return Markup(), {"routing": said} if said else {}
    blocks.append(data_block("panels", _panels() | {"bins": BINS}))
    # The data of all three stands in the first of them.
    next(iter(tabs.values())).extend([EXPLORER.notes(), paragraph(ROUNDED, note=True), *blocks])
    return EXPLORER.controls([(f"run-{place}", name) for place, name in enumerate(with_data)]), tabs


def _run_data(readings: Readings, runs: int, watch: Callable[[Iterable[Any]], Iterator[Any]]) -> dict[str, Any]:
    explored = explore(readings, runs=runs, watch=watch)
    data = explored.data
    scale = StepScale.over(data["steps"])
    data |= {"positions": [scale.position(step) for step in data["steps"]], "axis": scale.axis()}
    # Names go into options, which take plain text; series words are escaped for plotly.
    data |= {
        "names": [html.unescape(words) for words in data["series"]],
        "notes": [plain(n, limit=None) for n in explored.notes],
    }
    if ATTENTION in data:
        maps = data[ATTENTION]["maps"]
        grid = Grid.over(maps["cells"]["distance_forward"], maps["cells"]["distance_reverse"])
        maps |= {"forward": grid.forward, "reverse": grid.reverse}
    return data


def _tab(name: str, title: str, panels: Sequence[str], note: str, notes: Sequence[Markup]) -> list[Markup]:
    return [section(name, title, EXPLORER.panels(name, panels), paragraph(note, note=True), *notes)]


def _panels() -> dict[str, Any]:
    """The layouts of the panels; the script fills in traces, titles and the axes that depend on the run."""
    diverging = {"cmin": -1, "cmax": 1, "colorscale": DIVERGING, "colorbar": {"title": {"text": "r"}, "thickness": 12}}
    cosine = diverging | {"colorbar": {"title": {"text": "cosine"}, "thickness": 12}}
    category = {"type": "category", "showgrid": False}
    square = {**category, "constrain": "domain"}
    layouts = {
        "heads": {
            "xaxis": {**category, "title": "head"},
            "yaxis": {**category, "title": "layer"},
            "coloraxis": diverging,
            "height": 460,
        },
        "course": {
            "xaxis": {},
            "yaxis": {"title": "Pearson r of forward and reverse score"},
            "legend": BELOW,
            "height": 460,
        },
        "distances": {
            "xaxis": {**square, "title": "reverse distance (tokens)"},
            "yaxis": {**square, "title": "forward distance (tokens)", "scaleanchor": "x"},
            "coloraxis": diverging,
            "height": 500,
        },
        "scores": {
            "xaxis": {"title": ""},
            "yaxis": {"title": "reverse score − group mean (pre-softmax)", "scaleanchor": "x"},
            "height": 500,
        },
        "roles": {
            "xaxis": {"title": "cosine (mean over pairs)"},
            "yaxis": {"type": "category"},
            "legend": BELOW,
        },
        "role-map": {
            "xaxis": {**category, "title": "role of the parameter"},
            "yaxis": {**category, "title": "layer"},
            "coloraxis": cosine,
            "height": 460,
        },
        "shares": {
            "xaxis": {"title": "probability of the target", "range": [-0.01, 1.01]},
            "yaxis": {"title": "", "rangemode": "tozero"},
            "legend": {"orientation": "v", "y": -0.2, "yanchor": "top", "x": 0},
            "height": 520,
        },
    }
    size = {"title": {"text": "", "font": {"size": 14}}, "margin": {"t": 80}}
    return {name: go.Layout(size | layout).to_plotly_json() for name, layout in layouts.items()}
