"""Runs that differ only in their seed as one line: the mean over seeds, and the range they span as its band.

The range of seeds is another uncertainty than the interval over facts of one run, so the two are never drawn
in one figure: `SEEDS_KEY` is what a figure of seeds says of its band.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import pandas as pd

from ...finetune.runs.run import Run

SEEDS_KEY = (
    "line: mean over seeds · band: lowest to highest seed (their range, no 95 % interval) · dashed: mean control · "
    "×: undefined in some seed"
)
_SERIES = ["family", "weights", "kind"]


def pool_seeds(measures: pd.DataFrame, names: dict[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """One row per family of runs, step, weights, kind and measure, from rows of single runs.

    Args:
        measures: rows as `RunsFolder.measures` gives them.
        names: what each run is called.
    Returns: rows of the same columns: `run` is the family's label with its number of seeds, value and control are
        means over seeds, low and high the lowest and highest seed, n and facts the fewest of a seed (undefined in one
        seed is undefined, with the reason); and a note for each family with steps that not all its seeds have reached,
        which are left out, since a mean over changing seeds jumps where none of them does.
    """
    rows, notes = [], []
    for _, series in measures.groupby(_SERIES, sort=False, dropna=False):
        runs = list(dict.fromkeys(series["run"]))
        label = family_label([names.get(run, run) for run in runs])
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


def family_of(run: Run) -> str:
    """What a run is but for its name and seed."""
    asked = run.config.model_dump(mode="json")
    asked.pop("name", None)
    asked.get("training", {}).pop("seed", None)
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]


def family_label(names: list[str]) -> str:
    """What runs that differ in their seed are called together: `rope-l10 (3 seeds)`; one alone keeps its name.

    >>> family_label(["rope-l10-s0", "rope-l10-s1"])
    'rope-l10 (2 seeds)'
    """
    if len(names) == 1:
        return names[0]
    stems = {name.rpartition("-s")[0] if name.rpartition("-s")[2].isdecimal() else name for name in names}
    return f"{stems.pop() if len(stems) == 1 else names[0] + ' ...'} ({len(names)} seeds)"


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
