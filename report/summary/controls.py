"""What the signatures of runs are held against beside shuffled facts, as a table of its own.

The columns of `summary.csv` stay what they are: a run has these controls only where its config asks for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from ...finetune.runs.record import SERIES, RunRecord
from ...probes.figures.controls import LOOKS, controls_over_steps
from ...probes.figures.theme import difference_text, interval_text
from ...probes.readings.reading import CONTROL_COLUMNS, Reading

COLUMNS = [*SERIES, "measure", *CONTROL_COLUMNS]
SHOWN = ["measure", "control", "model", "value [95 %]", "reading - control [95 %]", "n pairs", "n facts", "reason"]


def controls_frame(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """Every control of all runs at every checkpoint, shuffled facts aside; empty where none was asked for.

    Returns: exactly the columns of `summary.csv` up to measure, then those of `Reading.controls`.
    """
    parts = [(run, controls_over_steps(run.readings)) for run in runs]
    labelled = [run.label(part).reindex(columns=COLUMNS) for run, part in parts if len(part)]
    if not labelled:
        return pd.DataFrame(columns=COLUMNS)
    table = pd.concat(labelled, ignore_index=True)
    for column in ("length", "seed", "step", "n", "facts"):
        table[column] = pd.to_numeric(table[column]).astype("Int64")
    return table


def last_controls(controls: pd.DataFrame) -> pd.DataFrame:
    """Each run's controls at its last checkpoint, as text for people."""
    last = controls[controls["step"].fillna(-1) == controls.groupby("run")["step"].transform("max").fillna(-1)]
    names = ["run", "step", "weights", "kind"]
    rows = [
        {name: "-" if pd.isna(row[name]) else str(row[name]) for name in names} | _shown(row)
        for row in last.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=[*names, *SHOWN])


def reading_controls(readings: Iterable[Reading]) -> pd.DataFrame:
    """All controls of some readings that were asked for some, shuffled facts first, as text for people."""
    rows = [
        {"weights": str(reading.meta.get("weights") or "-")} | _shown(row | {"measure": reading.name})
        for reading in readings
        if "controls" in reading.meta
        for row in reading.controls.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=["weights", *SHOWN])


def _shown(row: dict[Any, Any]) -> dict[str, str]:
    """One control in words; a difference is of the facts that both have."""
    value, apart = (
        [float(row[f"{what}{end}"]) for end in ends]
        for what, ends in (("", ("value", "low", "high")), ("difference", ("", "_low", "_high")))
    )
    return {
        "measure": str(row["measure"]).replace("_", " "),
        "control": LOOKS[row["control"]].words,
        "model": row["model"] if isinstance(row["model"], str) else "-",
        "value [95 %]": interval_text(*value),
        "reading - control [95 %]": "-" if pd.isna(apart[0]) else difference_text(*apart),
        "n pairs": "-" if pd.isna(row["n"]) else f"{int(row['n']):,}",
        "n facts": "-" if pd.isna(row["facts"]) else f"{int(row['facts']):,}",
        "reason": row["reason"] or "-",
    }
