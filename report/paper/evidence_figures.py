"""The two figures about negative evidence: the reverse answer over training, and what presses on it, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ...probes.figures.theme import CONTROL_GREY, OKABE_ITO
from .evidence_runs import FINISHED
from .line_panels import Line, Panel, drawn
from .predictions import RECIPES, Cell

COLOURS = {"keep": OKABE_ITO["vermillion"], "drop-right": OKABE_ITO["blue"], "mirror": OKABE_ITO["green"]}
SWITCHES = (("keep", "drop-right"), ("drop-right", "keep"), ("keep", "mirror"))
ENCODINGS = {"rope": "RoPE", "absolute": "absolute", "scalar": "scalar"}
# Each line of the pressure is a sum. The target's terms and those of the placeholders left of the evidence are each
# large and cancel (which hidden place on the left is the target's is not known), so they are shown together.
TERMS = {
    "target and placeholders left of the evidence": (("target", "left"), OKABE_ITO["blue"]),
    "placeholders right of the evidence": (("negative",), OKABE_ITO["vermillion"]),
    "all terms": (("all",), OKABE_ITO["black"]),
}
UNIT = (0.0, 1.0)
PUBLISHED = "one-layer-published"
FEWEST = 4  # checkpoints, for a curve of pressure: two are a line whatever lies between


def reverse_figure(runs: pd.DataFrame, answers: pd.DataFrame, *, weights: str = "ema") -> str:
    """Reverse and letters-only accuracy over training, by dial and encoding, a row for each recipe; then the switches.

    Lines are means over seeds, bands reach from the lowest to the highest seed.
    """
    rows = []
    for recipe in RECIPES:
        own = runs[(runs["recipe"] == recipe) & (runs["weights"] == weights)]
        row = []
        for encoding, name in ENCODINGS.items():
            found = [(Cell(encoding, dial=dial).among(own), dial) for dial in COLOURS]
            planned = any(len(table) for table, _ in found)
            lines = [line for table, dial in found for line in _curves(table, answers, weights, COLOURS[dial])]
            empty = "not run" if planned else "no such runs"
            row.append(Panel(f"{name}, L = 10, recipe {recipe}", lines, empty, UNIT))
        row.append(_switches(own, answers, weights, recipe))
        rows.append(row)
    legend = [_key(dial, colour) for dial, colour in COLOURS.items()]
    legend += [_key("reverse accuracy", CONTROL_GREY), _key("letters-only accuracy", CONTROL_GREY, "dashed")]
    kind = "averaged" if weights == "ema" else "raw"
    return drawn(rows, legend, x_title="training step", y_title=f"share of answers, {kind} weights")


def _switches(runs: pd.DataFrame, answers: pd.DataFrame, weights: str, recipe: str) -> Panel:
    lines: list[Line] = []
    for before, after in SWITCHES:
        table = Cell(dial=before, switch=after).among(runs)
        at = table["switch_step"].dropna()
        if len(at):
            lines += _curves(table, answers, weights, COLOURS[after], since=float(at.iloc[0]))
    return Panel(f"RoPE, switched to, recipe {recipe}", lines, "not run", UNIT)


def _curves(rows: pd.DataFrame, answers: pd.DataFrame, weights: str, colour: str, *, since: float = 0.0) -> list[Line]:
    """Reverse solid, letters-only dashed."""
    names = rows.loc[rows["status"] == FINISHED, "run"]
    chosen = answers["run"].isin(names) & (answers["weights"] == weights) & (answers["question"] == "reverse")
    own = answers[chosen & (answers["extra"] == 0) & (answers["step"] >= since)]
    lines = []
    for column, dash in (("accuracy", "solid"), ("letters_only", "dashed")):
        table = own.pivot_table(index="step", columns="run", values=column).astype(float)
        if len(table):
            lines.append(_over_seeds(table, colour, dash, band=dash == "solid"))
    return lines


def _over_seeds(table: pd.DataFrame, colour: str, dash: str, *, band: bool = True) -> Line:
    """Mean over columns, with their lowest and highest. Shapes: `step seed`."""
    x, values = table.index.to_numpy(float), table.to_numpy(float)
    low, high = (values.min(1), values.max(1)) if band else (None, None)
    return Line("", x, values.mean(1), colour, dash, low, high)


def _key(name: str, colour: str, dash: str = "solid") -> Line:
    return Line(name, np.array([]), np.array([]), colour, dash)


def pressure_figure(pressure: pd.DataFrame) -> str | None:
    """The pressure of each kind of term over training, a panel for each cell that has at least 4 checkpoints.

    None where no cell has. Four panels in a row.
    Args:
        pressure: rows of `rp.pressure`, with sweep, recipe, cell and run beside them.
    """
    panels = []
    for (sweep, recipe, cell), own in pressure.groupby(["sweep", "recipe", "cell"], sort=False):
        if own["step"].nunique() < FEWEST:
            continue
        lines = []
        for names, colour in TERMS.values():
            summed = own[own["terms"].isin(names)].groupby(["step", "run"])["pressure"].sum(min_count=1)
            lines.append(_over_seeds(summed.unstack("run"), colour, "solid"))
        panels.append(Panel(f"{cell}, recipe {recipe}{' (Table 1)' if sweep == PUBLISHED else ''}", lines))
    if not panels:
        return None
    legend = [_key(name, colour) for name, (_, colour) in TERMS.items()]
    return drawn(_rows(panels), legend, x_title="training step", y_title="pressure (nats per unit of learning rate)")


def _rows(panels: Sequence[Panel], size: int = 4) -> list[Sequence[Panel]]:
    return [panels[start : start + size] for start in range(0, len(panels), size)]
