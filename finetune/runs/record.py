"""What a run came to, whole or not, and many of them as one tidy table: that of `summary.csv`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ...probes.readings.readings import Readings
from ...probes.statistics.estimators import STATISTICS_VERSION

AXES = ["objective", "position_encoding", "length", "seed"]
SERIES = ["run", *AXES, "step", "weights", "kind"]
NUMBERS = ["value", "n", "facts", "low", "high", "control"]
NOT_STARTED = "not started yet"  # what is wrong with a sweep's run that has no folder
SUMMARY_COLUMNS = [*SERIES, "measure", *NUMBERS, "undefined", "reason", "caution", "statistics_version"]
# Its columns of words, also where all of them look like numbers.
TEXTS = ["run", "objective", "position_encoding", "weights", "kind", "measure", "reason", "caution"]
# What a run's config says besides of what is trained and measured: what it is called, where it ran, who was told.
_ASIDE = {"": {"name", "alerts"}, "training": {"seed", "threads", "device", "report_to"}}


@dataclass(frozen=True)
class RunRecord:
    """What a report shows of one run.

    Attributes:
        axes: objective, position_encoding, length, seed; one that is missing stays empty.
        problem: why the run is broken or unfinished; None when it is complete.
        tables: those over its checkpoints that lie in its folder, by what they hold (`kept_tables.TABLES`).
        family: `family_of` its config; it stays what it is where the config is told without its folders.
    """

    name: str
    axes: Mapping[str, Any]
    config: Mapping[str, Any]
    readings: Readings
    problem: str | None = None
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    family: str = ""

    def __post_init__(self) -> None:
        if not self.family:
            object.__setattr__(self, "family", family_of(self.config))

    def label(self, measures: pd.DataFrame) -> pd.DataFrame:
        """A table about the run's readings with columns for its name and axes."""
        return measures.assign(run=self.name, **{axis: self.axes.get(axis) for axis in AXES})


def family_of(config: Mapping[str, Any]) -> str:
    """What a run is but for its seed: equal digests are seeds of one thing, others never are.

    Args:
        config: a run's, as plain values. Its name, alerts, threads, device and reports are no part of it.

    >>> family_of({"name": "a-s0", "training": {"seed": 0}}) == family_of({"name": "b", "training": {"seed": 1}})
    True
    """
    asked = {name: value for name, value in config.items() if name not in _ASIDE[""]}
    for section, aside in _ASIDE.items():
        if isinstance(asked.get(section), Mapping):
            asked[section] = {name: value for name, value in asked[section].items() if name not in aside}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]


def summary_frame(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """All numbers of all runs, tidy.

    Returns: exactly the columns run, objective, position_encoding, length, seed, step, weights, kind, measure, value,
        n (pairs), facts, low, high, control, undefined (how many), reason (of each, counted), caution,
        statistics_version; probabilities and accuracies are fractions. NaN is undefined, for the reason beside it.
    """
    return tidy_summary(run.label(run.readings.measures()) for run in runs)


def tidy_summary(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Runs' measures under each other, in exactly the columns of `summary.csv`, in the order given.

    Whole numbers stay whole: a run without a seed leaves a gap and does not turn the other seeds into 0.0.
    """
    filled = [part.reindex(columns=SUMMARY_COLUMNS) for part in parts if len(part)]
    table = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=SUMMARY_COLUMNS)
    table["statistics_version"] = STATISTICS_VERSION
    # A column that no part has is all NaN: float64, which takes no text.
    table[["reason", "caution"]] = table[["reason", "caution"]].astype(object).fillna("")
    for column in ("length", "seed", "step", "n", "facts", "undefined"):
        table[column] = pd.to_numeric(table[column]).astype("Int64")
    for column in ("value", "low", "high", "control"):
        table[column] = table[column].astype(float)
    return table
