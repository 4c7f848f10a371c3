"""Tables collected over several days: runs whose folders are gone stay, where they are still the planned ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from ..reproduce import records
from .frames import FINISHED, Section6, tidy
from .plan import DROP_ORDER

_KEY = ("sweep", "run", "config")


def with_kept(found: Section6, kept: Section6) -> Section6:
    """What has been collected now, and of what was collected before the runs that are not finished here.

    A run is kept where its config is the planned one to the letter and its small model had the bytes that the model has
    here (any, where none is here: the models are made again to the same bytes). Others stand as they are found. What
    was traced stays, and what untrained twins read of runs that are still planned.
    """
    # Traces are taken of one run on its own; twins are of runs that are still the planned ones.
    planned = {(row["run"], row["config"]) for row in records(found.runs)}
    twins = [row for row in records(kept.twins) if (row["run"], row["config"]) in planned]
    found = replace(found, traces=kept.traces, twins=tidy("twins", twins))
    if found.about.get("statistics_version") != kept.about.get("statistics_version"):
        return found
    models = {name: _model(record, kept.models.get(name, {})) for name, record in found.models.items()}
    before = {tuple(row[key] for key in _KEY): row for row in records(kept.runs) if row["status"] == FINISHED}
    rows: list[dict[str, Any]] = []
    again: set[tuple[str, str]] = set()
    for row in records(found.runs):
        old = before.get(tuple(row[key] for key in _KEY))
        if row["status"] != FINISHED and old is not None and old["weights"] == _weights(models, row["weights_of"]):
            row |= old
            again.add((row["sweep"], row["run"]))
        rows.append(row)
    if not again:
        return replace(found, models=models)
    tables = {
        name: _joined(name, getattr(found, name), getattr(kept, name), again)
        for name in ("answers", "ranks", "signatures")
    }
    about = found.about | {name: _origin(found.about[name], kept.about[name], name, again) for name in DROP_ORDER}
    return replace(found, runs=tidy("runs", rows), models=models, about=about, **tables)


def _weights(models: dict[str, Any], model: str) -> str:
    return str(models.get(model, {}).get("sha256", {}).get("model.safetensors", ""))


def _model(here: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A small model's record as it is here; as it was, where none is finished here."""
    return before if here["status"] != FINISHED and before.get("status") == FINISHED else here


def _joined(name: str, now: pd.DataFrame, before: pd.DataFrame, again: set[tuple[str, str]]) -> pd.DataFrame:
    chosen = [pair in again for pair in zip(before["sweep"], before["run"], strict=True)]
    return tidy(name, [*records(now), *records(before[chosen])])


def _origin(now: dict[str, Any], before: dict[str, Any], sweep: str, again: set[tuple[str, str]]) -> dict[str, Any]:
    """Finished runs, software and commits of both."""
    kept = [run for run in before["finished"] if (sweep, run) in again]
    if not kept:
        return now
    commits = dict.fromkeys(filter(None, (before.get("trained_at_commit"), now.get("trained_at_commit"))))
    changed: dict[str, Any] = {
        "finished": sorted([*now["finished"], *kept]),
        "not_run": {run: why for run, why in now["not_run"].items() if run not in kept},
        "versions": [*before["versions"], *(one for one in now["versions"] if one not in before["versions"])],
    }
    if commits:
        changed["trained_at_commit"] = ", ".join(dict.fromkeys(", ".join(commits).split(", ")))
    return now | changed
