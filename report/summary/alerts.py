"""The alerts of runs at their last checkpoints, as a table for the page and as lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ...finetune.runs.alerts import alerts_of, history
from ...finetune.runs.record import RunRecord

COLUMNS = ["run", "alert", "state", "value [95 %]", "step", "weights", "since step"]
WAITING = "not asked yet"


def alerts_table(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """A row for each rule of each run, as text; those that are crossed or undefined first. Empty without rules."""
    rows = []
    for run in runs:
        rules = alerts_of(run.config)
        judged = history(rules, run.readings)
        for one in judged:
            step, weights = int(one.row["step"]), str(one.row["weights"] or "-")
            where = {"step": f"{step:,}", "weights": weights, "since step": f"{one.since:,}"}
            shown = {"run": run.name, "alert": one.alert.words, "state": one.state or "holds"}
            rows.append(shown | {"value [95 %]": one.value} | where)
        asked = {one.alert for one in judged}
        rows += [
            {"run": run.name, "alert": rule.words, "state": WAITING} | dict.fromkeys(COLUMNS[3:], "-")
            for rule in rules
            if rule not in asked
        ]
    rows.sort(key=lambda row: row["state"] in ("holds", WAITING))
    return pd.DataFrame(rows, columns=COLUMNS)


def alert_lines(runs: Sequence[RunRecord]) -> list[str]:
    """A line for each rule that a run's last checkpoint crosses or that is undefined there."""
    return [
        f"alert: {run.name}: {one.text} (since step {one.since:,})"
        for run in runs
        for one in history(alerts_of(run.config), run.readings)
        if one.state
    ]
