"""Tables collected over several days: runs whose folders are gone stay, where they are still the planned ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from ..reproduce import records
from .frames import FINISHED, Section6, tidy
from .plan import DROP_ORDER, MODELS

_KEY = ("sweep", "run", "config")


def with_kept(found: Section6, kept: Section6) -> Section6:
    """What has been collected now, and of what was collected before the runs that are not finished here.

    A run is kept where its config is the planned one to the letter, and its small model had the bytes that the model
    has here or was made by the same file: on another processor the same command rounds sums otherwise and ends at other
    bytes, and each run says which it started from. Others stand as they are found. What was traced stays, and what
    untrained twins read of runs that are still planned.
    """
    # Traces are taken of one run on its own; twins are of runs that are still the planned ones.
    planned = {(row["run"], row["config"]) for row in records(found.runs)}
    twins = [row for row in records(kept.twins) if (row["run"], row["config"]) in planned]
    found = replace(found, traces=kept.traces, twins=tidy("twins", twins))
    if found.about.get("statistics_version") != kept.about.get("statistics_version"):
        return found
    same_plan = _file(found) is not None and _file(found) == _file(kept)
    models = {name: _model(record, kept.models.get(name, {}), same_plan) for name, record in found.models.items()}
    before = {tuple(row[key] for key in _KEY): row for row in records(kept.runs) if row["status"] == FINISHED}
    rows: list[dict[str, Any]] = []
    again: set[tuple[str, str]] = set()
    for row in records(found.runs):
        old = before.get(tuple(row[key] for key in _KEY))
        if row["status"] != FINISHED and old is not None and old["weights"] in _weights(models, row["weights_of"]):
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
    if MODELS in about:
        about[MODELS] = about[MODELS] | _commits(kept.about.get(MODELS, {}), about[MODELS])
    return replace(found, runs=tidy("runs", rows), models=models, about=about, **tables)


def _file(found: Section6) -> str | None:
    """The hash of the file that says how the small models are made."""
    return found.about.get(MODELS, {}).get("file_sha256")


def _weights(models: dict[str, Any], model: str) -> set[str]:
    """The bytes that a small model has, wherever it was made."""
    record = models.get(model, {})
    return {digest(one) for one in (record, *record.get("made_again", ()))}


def digest(record: dict[str, Any]) -> str:
    """The sha256 of a small model's weights; "" where there is none."""
    return str(record.get("sha256", {}).get("model.safetensors", ""))


def _model(here: dict[str, Any], before: dict[str, Any], same_plan: bool) -> dict[str, Any]:
    """A small model's record as it is here; as it was, where none is finished here; the first of both by the same plan
    to other bytes, with the others in `made_again`."""
    if before.get("status") != FINISHED:
        return here
    if here["status"] != FINISHED:
        return before
    known = [before, *before.get("made_again", ())]
    if digest(here) == digest(before) or not same_plan:
        return here | {key: before[key] for key in ("made_again",) if key in before and same_plan}
    return before | {"made_again": [*known[1:], *([here] if digest(here) not in map(digest, known) else [])]}


def _joined(name: str, now: pd.DataFrame, before: pd.DataFrame, again: set[tuple[str, str]]) -> pd.DataFrame:
    chosen = [pair in again for pair in zip(before["sweep"], before["run"], strict=True)]
    return tidy(name, [*records(now), *records(before[chosen])])


def _origin(now: dict[str, Any], before: dict[str, Any], sweep: str, again: set[tuple[str, str]]) -> dict[str, Any]:
    """Finished runs, software and commits of both."""
    kept = [run for run in before["finished"] if (sweep, run) in again]
    if not kept:
        return now
    changed: dict[str, Any] = {
        "finished": sorted([*now["finished"], *kept]),
        "not_run": {run: why for run, why in now["not_run"].items() if run not in kept},
        "versions": [*before["versions"], *(one for one in now["versions"] if one not in before["versions"])],
    }
    return now | changed | _commits(before, now)


def _commits(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The commits of both, each once; nothing where none is known."""
    told = [one["trained_at_commit"] for one in (before, now) if one.get("trained_at_commit")]
    return {"trained_at_commit": ", ".join(dict.fromkeys(", ".join(told).split(", ")))} if told else {}
