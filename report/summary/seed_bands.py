"""Runs that differ only in their seed as one line: the mean over seeds, and the range they span as its band.

The range of seeds is another uncertainty than the interval over facts of one run, so the two are never drawn
in one figure: `SEEDS_KEY` is what a figure of seeds says of its band.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from .families import lines_of

SEEDS_KEY = (
    "line: mean over seeds · band: lowest to highest seed (their range, no 95 % interval) · dashed: mean control · "
    "×: undefined in some seed"
)
_SERIES = ["line", "weights", "kind"]


def pool_seeds(measures: pd.DataFrame, names: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """One row per line of runs, step, weights, kind and measure, from rows of single runs.

    Args:
        measures: rows as `RunsFolder.measures` gives them.
        names: what each run is called.
    Returns: rows of the same columns: `run` is the line's label (`lines_of`) with its number of seeds, value and
        control are means over seeds, low and high the lowest and highest seed, n and facts the fewest of a seed
        (undefined in one seed is undefined, with the reason); and a note for each line with steps that not all its
        seeds have reached, which are left out, since a mean over changing seeds jumps where none of them does.
    """
    rows, notes = [], []
    drawn = measures.assign(line=lines_of(measures, names))
    for (label, _, _), series in drawn.groupby(_SERIES, sort=False, dropna=False):
        runs = list(dict.fromkeys(series["run"]))
        left_out: set[int] = set()
        for _, part in series.groupby(["step", "measure"], sort=False, dropna=False):
            if len(set(part["run"])) < len(runs):
                left_out.add(int(part["step"].fillna(0).iloc[0]))
                continue
            rows.append(_pooled(part) | {"run": label})
        if left_out:
            steps = ", ".join(f"{step:,}" for step in sorted(left_out))
            notes.append(f"{label}: step {steps} left out, which not all {len(runs)} seeds have reached")
    return pd.DataFrame(rows, columns=measures.columns), list(dict.fromkeys(notes))


def _pooled(part: pd.DataFrame) -> dict[str, Any]:
    """One row for the seeds at one step: mean, range, fewest pairs."""
    row: dict[str, Any] = {str(name): value for name, value in part.iloc[0].items()}
    values = part["value"].astype(float)
    undefined = int(values.isna().sum())
    row |= {"value": values.mean(skipna=False), "low": values.min(skipna=False), "high": values.max(skipna=False)}
    row |= {"control": part["control"].astype(float).mean(skipna=False), "n": part["n"].min()}
    row |= {"facts": part["facts"].min()} if "facts" in part else {}
    why = next((str(reason) for reason, value in zip(part["reason"], values, strict=True) if math.isnan(value)), "")
    row["reason"] = f"{undefined} of {len(part)} seeds: {why}" if undefined else ""
    if len(part) == 1:  # a single run keeps its interval over facts off: this figure's band is the range of seeds
        row |= {"low": math.nan, "high": math.nan}
    return row | {name: math.nan for name in ("control_low", "control_high", "excess_low", "excess_high")}
