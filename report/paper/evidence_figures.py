"""The two figures about negative evidence: the reverse answer over training, and what presses on it, as SVG text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from ...probes.figures.theme import CONTROL_GREY, OKABE_ITO
from .evidence_runs import FINISHED
from .line_panels import Line, Panel, drawn
from .prediction_parts import Cell
from .predictions import RECIPES

COLOURS = {"keep": OKABE_ITO["vermillion"], "drop-right": OKABE_ITO["blue"], "mirror": OKABE_ITO["green"]}
CAUSAL = {"keep": OKABE_ITO["vermillion"], "drop-after": OKABE_ITO["blue"]}
KEYS = {
    "keep": "keep: every term priced",
    "drop-right": "drop-right (causal: drop-after): not the placeholders right of the uppercase letter",
    "mirror": "mirror: drop-right's reflection",
}
SWITCHES = (("keep", "drop-right"), ("drop-right", "keep"), ("keep", "mirror"))
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
    """Reverse and letters-only accuracy over training, by dial: a row of encodings for each recipe, then the switches.

    Lines are means over seeds, bands reach from the lowest to the highest seed. A causal model has raw weights alone.
    """
    rows, last = [], []
    for recipe in RECIPES:
        own = runs[(runs["recipe"] == recipe) & ((runs["weights"] == weights) | (runs["objective"] == "causal"))]
        rows.append(
            [
                _dialled(own, answers, Cell("rope"), f"RoPE, recipe {recipe}", COLOURS),
                _dialled(own, answers, Cell("absolute"), f"absolute, recipe {recipe}", COLOURS),
                _dialled(own, answers, Cell(objective="causal"), f"causal, recipe {recipe}", CAUSAL),
            ]
        )
        last.append(_switches(own, answers, recipe))
    plain = runs[(runs["recipe"] == "W") & (runs["weights"] == weights)]
    rows.append([*last, _dialled(plain, answers, Cell("scalar"), "scalar positions, recipe W", COLOURS)])
    legend = [_key(words, COLOURS[dial]) for dial, words in KEYS.items()]
    legend += [_key("reverse accuracy", CONTROL_GREY), _key("letters-only: right among the 26", CONTROL_GREY, "dashed")]
    kind = "averaged" if weights == "ema" else "raw"
    title = f"share of answers at length 10, {kind} weights (causal: raw)"
    return drawn(rows, legend, x_title="training step", y_title=title)


def _dialled(rows: pd.DataFrame, answers: pd.DataFrame, cell: Cell, title: str, colours: Mapping[str, str]) -> Panel:
    """A model under each dial."""
    found = {dial: replace(cell, dial=dial).among(rows) for dial in colours}
    lines = [line for dial, table in found.items() for line in _curves(table, answers, colours[dial])]
    empty = "not run" if any(len(table) for table in found.values()) else "no such runs"
    return Panel(f"{title}, {_n(found.values())}", lines, empty, UNIT)


def _switches(runs: pd.DataFrame, answers: pd.DataFrame, recipe: str) -> Panel:
    """RoPE after each switch, in the colour of the dial it goes on with."""
    lines: list[Line] = []
    tables = [Cell(dial=before, switch=after).among(runs) for before, after in SWITCHES]
    for (_, after), table in zip(SWITCHES, tables, strict=True):
        at = table["switch_step"].dropna()
        if len(at):
            lines += _curves(table, answers, COLOURS[after], since=float(at.iloc[0]))
    return Panel(f"RoPE, switched to, recipe {recipe}, {_n(tables)}", lines, "not run", UNIT)


def _n(tables: Iterable[pd.DataFrame]) -> str:
    """How many seeds each line is the mean of; one number where all that are planned are alike."""
    counts = [int((table["status"] == FINISHED).sum()) for table in tables if len(table)]
    return f"n = {', '.join(str(count) for count in (dict.fromkeys(counts) if len(set(counts)) == 1 else counts)) or 0}"


def _curves(rows: pd.DataFrame, answers: pd.DataFrame, colour: str, *, since: float = 0.0) -> list[Line]:
    """Reverse solid, letters-only dashed, on the weights that the rows are of."""
    done = rows[rows["status"] == FINISHED]
    chosen = answers["run"].isin(done["run"]) & answers["weights"].isin(done["weights"])
    chosen &= answers["question"] == "reverse"
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

    None where no cell has. Three panels in a row.
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
        # A cell of recipe P needs not name it twice.
        named = f"{str(cell).replace('-published', '')}, recipe {recipe}{' (Table 1)' if sweep == PUBLISHED else ''}"
        panels.append(Panel(f"{named}, n = {own['run'].nunique()}", lines))
    if not panels:
        return None
    legend = [_key(name, colour) for name, (_, colour) in TERMS.items()]
    return drawn(_rows(panels), legend, x_title="training step", y_title="pressure (nats per unit of learning rate)")


def _rows(panels: Sequence[Panel], size: int = 3) -> list[Sequence[Panel]]:
    return [panels[start : start + size] for start in range(0, len(panels), size)]
