"""Table 7 of the paper from the evaluations of finished runs: exact match forward and reverse, its spread over seeds.

One row per dataset and direction, two columns per model, each cell the mean over seeds, in per cent, with the sample
standard deviation and the number of seeds; a single seed has its 95 % interval over facts instead. The floor, the same
questions about held-out facts, stands beside it in a table of its own.
Source: paper Sec. 6, App. D.2, Table 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from ...probes.figures.theme import interval_text
from ..summary.terminal import text_table

if TYPE_CHECKING:
    from rich.console import Console

    from ...finetune.runs.finetuning import FinetuneRun

SIDES = {"forward": "Fwd.", "reverse": "Rev."}
FACTS = {"train": "trained facts", "heldout": "held-out facts (the floor)"}
COLUMNS = ["run", "objective", "model", "dataset", "direction", "seed", "asked", "split", "templates"]
NUMBERS = ["value", "low", "high", "n", "control"]
NOTE = (
    "Exact match in per cent after lower-casing and stripping blanks, decoded greedily; any of a fact's answers "
    "counts. Mean over seeds, ± their sample standard deviation; with one seed the 95 % bootstrap interval over facts. "
    "Reverse is asked about trained facts, of which training read the forward statements alone; held-out facts were "
    "never read, in any direction."
)


def match_frame(runs: Sequence[FinetuneRun]) -> pd.DataFrame:
    """Every exact match of the runs that have been evaluated, tidy.

    Returns: run, objective, model, dataset, direction (trained), seed, asked ("forward", "reverse"), split ("train",
        "heldout"), templates (whose wordings), and value, low, high, n, control, fractions; NaN is undefined.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        if not run.finished:
            continue
        for reading in run.evaluation():
            about = {name: reading.meta[name] for name in ("asked", "split", "templates")}
            low, high = reading.interval
            numbers = {"value": reading.value, "low": low, "high": high, "n": reading.n}
            control = math.nan if reading.control is None else reading.control.value
            rows.append({"run": run.name} | run.axes | about | numbers | {"control": control})
    return pd.DataFrame(rows, columns=[*COLUMNS, *NUMBERS])


def table7(matches: pd.DataFrame, split: str = "train") -> pd.DataFrame:
    """The layout of Table 7 as text: a row per dataset and direction, "<model> Fwd." and "<model> Rev." per model.

    Args:
        matches: what `match_frame` gives.
        split: "train", or "heldout" for the floor.
    """
    chosen = matches[matches["split"] == split]
    rows = []
    for (dataset, direction), part in chosen.groupby(["dataset", "direction"], sort=False):
        row = {"trained on": f"{dataset} ({direction})"}
        for model in dict.fromkeys(chosen["model"]):
            for asked, short in SIDES.items():
                row[f"{model} {short}"] = _cell(part[(part["model"] == model) & (part["asked"] == asked)])
        rows.append(row)
    return pd.DataFrame(rows)


def _cell(part: pd.DataFrame) -> str:
    """One cell: mean and spread over seeds, one seed's interval over facts, or why there is neither."""
    values = part["value"].dropna()
    if part.empty:
        return "not run"
    if values.empty:
        return "undefined"
    if len(part) == 1:
        one = part.iloc[0]
        return interval_text(one["value"], one["low"], one["high"], percent=True)
    lost = f", {len(part) - len(values)} undefined" if len(values) < len(part) else ""
    spread = f" ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread} ({len(values)} seeds{lost})"


def print_table7(runs: Sequence[FinetuneRun], console: Console) -> None:
    """Both tables in the terminal; nothing where no run has been evaluated."""
    matches = match_frame(runs)
    for split, facts in FACTS.items():
        if (matches["split"] == split).any():
            console.print(text_table(table7(matches, split), f"exact match (%), {facts}"))
