"""The figures: Figs. 4 and 6 over fine-tuning, and reverse against forward, as SVG text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ....probes.figures.theme import CONTROL_GREY, OKABE_ITO
from ..line_panels import Line, Panel, drawn
from .frames import Section6
from .plan import DATASETS, SEEDS, TABLE_MODELS, Cell, main_cell

COLOURS = {
    "mini-llada": OKABE_ITO["blue"],
    "mini-dream": OKABE_ITO["green"],
    "mini-mlm": OKABE_ITO["purple"],
    "mini-llama": OKABE_ITO["vermillion"],
    "mini-qwen2": OKABE_ITO["orange"],
}
BLUE, RED = OKABE_ITO["blue"], OKABE_ITO["vermillion"]
PANELS = {
    "attention correlation": (("attention_correlation", BLUE, True),),
    "gradient cosine": (("gradient_cosine", BLUE, True),),
    "probability": (("reverse_probability", RED, True), ("forward_probability", BLUE, False)),
}
LEAST_HEIGHT = 0.02  # of the axis of reverse exact match: nothing answered backwards is a line on the ground
FIGURE_4, FIGURE_6, AGAINST = "section6_figure4.svg", "section6_figure6.svg", "section6_reverse_forward.svg"


def figures(found: Section6) -> dict[str, tuple[str, str]]:
    """The drawings that have a line: file -> (what it shows, SVG)."""
    shown = {AGAINST: ("Reverse against forward exact match over fine-tuning", against_figure(found))}
    for file, title, model in ((FIGURE_4, "Figure 4", "mini-llada"), (FIGURE_6, "Figure 6", "mini-dream")):
        words = f"{title}: the three probes over forward-only fine-tuning, {model}"
        shown[file] = (words, signatures_figure(found, model))
    return {file: (words, svg) for file, (words, svg) in shown.items() if svg}


def signatures_figure(found: Section6, model: str) -> str:
    """A row for each dataset, a panel for each probe: means over seeds, bands from the lowest to the highest seed.

    Empty where there is no line to draw.
    """
    rows: list[list[Panel]] = []
    for trained in DATASETS:
        cell = main_cell(model, trained)
        row = []
        for title, measures in PANELS.items():
            lines: list[Line] = []
            for measure, colour, with_control in measures:
                lines += _over_seeds(_signature(found, cell, measure, "value"), colour)
                if with_control:
                    lines += _over_seeds(_signature(found, cell, measure, "control"), CONTROL_GREY, "dotted")
            row.append(Panel(f"{trained.direction}: {title}, {_seeds(found, cell)}", lines))
        rows.append(row)
    if not any(panel.lines for row in rows for panel in row):
        return ""
    nothing = np.array([])
    keys = [("correlation, cosine; forward probability", BLUE, "solid"), ("reverse probability", RED, "solid")]
    keys.append(("control: facts shuffled", CONTROL_GREY, "dotted"))
    legend = [Line(name, nothing, nothing, colour, dash) for name, colour, dash in keys]
    return drawn(rows, legend, x_title="optimizer step", y_title=f"{model}: mean over seeds, band: lowest to highest")


def against_figure(found: Section6) -> str:
    """Each model's path from before fine-tuning to the last step, one panel for each dataset; empty without a line.

    All panels have one upward axis, as high as the highest answer backwards: on one to 1 all would lie on the ground.
    """
    paths = [[line for model in TABLE_MODELS for line in _path(found, main_cell(model, one))] for one in DATASETS]
    heights = [float(line.y.max()) for lines in paths for line in lines]
    if not heights:
        return ""
    top = min(1.0, max(LEAST_HEIGHT, 1.1 * max(heights)))
    panels = [Panel(trained.words, lines, y=(0.0, top)) for trained, lines in zip(DATASETS, paths, strict=True)]
    nothing = np.array([])
    legend = [Line(model, nothing, nothing, colour) for model, colour in COLOURS.items()]
    rows = [panels[:3], panels[3:]]
    return drawn(rows, legend, x_title="forward exact match", y_title="reverse exact match, mean over seeds")


def _path(found: Section6, cell: Cell) -> list[Line]:
    """Means over seeds at the steps at which both are defined."""
    sides = []
    for asked in ("forward", "reverse"):
        curves = {seed: found.curve(cell, seed, asked) for seed in SEEDS}
        lines = _over_seeds(_values(curves.__getitem__, "value"), COLOURS[cell.model])
        sides.append(dict(zip(lines[0].x, lines[0].y, strict=True)) if lines else {})
    forward, reverse = sides
    steps = [step for step in forward if step in reverse]
    if not steps:
        return []
    x, y = (np.array([side[step] for step in steps]) for side in sides)
    return [Line("", x, y, COLOURS[cell.model])]


def _signature(found: Section6, cell: Cell, measure: str, column: str) -> dict[int, list[float]]:
    return _values(lambda seed: found.curve(cell, seed, measure, table="signatures"), column)


def _values(curve: Callable[[int], dict[int, dict[str, float]]], column: str) -> dict[int, list[float]]:
    """By step the values of the seeds that have one."""
    found: dict[int, list[float]] = {}
    for seed in SEEDS:
        for step, row in curve(seed).items():
            found.setdefault(step, []).append(float(row[column]))
    return dict(sorted(found.items()))


def _over_seeds(values: dict[int, list[float]], colour: str, dash: str = "solid") -> list[Line]:
    """Mean, lowest and highest over the seeds in which it is defined; no line without one."""
    steps = [step for step, own in values.items() if np.isfinite(own).any()]
    if not steps:
        return []
    known = [np.array(values[step])[np.isfinite(values[step])] for step in steps]
    low, high = (np.array([pick(own) for own in known]) for pick in (np.min, np.max))
    band = (low, high) if dash == "solid" else (None, None)
    return [Line("", np.array(steps, float), np.array([own.mean() for own in known]), colour, dash, *band)]


def _seeds(found: Section6, cell: Cell) -> str:
    count = sum(found.steps(cell, seed) is not None for seed in SEEDS)
    return f"{count} seed{'' if count == 1 else 's'}"
