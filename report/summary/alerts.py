"""The alerts of runs at their last checkpoints, as a table for the page and as lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ...finetune.config.alerts import Alert
from ...finetune.runs.alerts import Judged, alerts_of, history, standing
from ...finetune.runs.record import RunRecord

COLUMNS = ["run", "alert", "state", "value [95 %]", "step", "weights", "since step"]
WAITING = "not asked yet"


def alerts_table(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """A row for each rule of each run, as text; those that are crossed or undefined first. Empty without rules."""
    asked = [(run.name, alerts_of(run.config), run.readings) for run in runs]
    return judged_table([(name, rules, history(rules, readings)) for name, rules, readings in asked])


def judged_table(runs: Sequence[tuple[str, Sequence[Alert], Sequence[Judged]]]) -> pd.DataFrame:
    """`alerts_table` of runs that have been judged: their names, their rules, and what came out."""
    rows = []
    for name, rules, judged in runs:
        for one in judged:
            step, weights = int(one.row["step"]), str(one.row["weights"] or "-")
            where = {"step": f"{step:,}", "weights": weights, "since step": f"{one.since:,}"}
            shown = {"run": name, "alert": one.alert.words, "state": one.state or "holds"}
            rows.append(shown | {"value [95 %]": one.value} | where)
        asked = {one.alert for one in judged}
        rows += [
            {"run": name, "alert": rule.words, "state": WAITING} | dict.fromkeys(COLUMNS[3:], "-")
            for rule in rules
            if rule not in asked
        ]
    rows.sort(key=lambda row: row["state"] in ("holds", WAITING))
    return pd.DataFrame(rows, columns=COLUMNS)


def alert_lines(runs: Sequence[RunRecord]) -> list[str]:
    """A line for each rule that a run's last checkpoint crosses or that is undefined there."""
    return [
        f"alert: {run.name}: {line}" for run in runs for line in standing(history(alerts_of(run.config), run.readings))
    ]
