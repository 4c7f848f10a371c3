"""Tables collected over several days: runs whose folders are gone stay, where they are still the planned ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from ..reproduce import records
from .frames import FINISHED, WEIGHTS, Section6, tidy, times_made, weights_of
from .plan import DROP_ORDER, MODELS

_KEY = ("sweep", "run", "config")
# What the tables hold of readings of an older version of the statistics: 4 has other intervals of how far proportions
# exceed their controls; 5 differs where a reading says which facts hang together in chains, 6 where it says which facts
# are partners of several, as those of before do not.
_BUT_EXCESS_OF_PROPORTIONS, _THE_SAME = 3, (4, 5, 6)
Run = tuple[str, str]  # sweep and name


def with_kept(found: Section6, kept: Section6) -> Section6:
    """What has been collected now, and of what was collected before the runs that are not finished here.

    A run is kept where its config is the planned one to the letter, the data are the same, and its small model has the
    bytes of the model that is here or is made by the same file of the same corpus and tokenizer: the same command ends
    at other bytes on another processor or with other software, and the tables say which run is of which. Others stand
    as they are found. What was traced stays, and what untrained twins read of runs that are still planned. Where an
    older version of the statistics gave other intervals, they are missing.
    """
    # Traces are taken of one run on its own; twins are of runs that are still the planned ones.
    planned = {(row["run"], row["config"]) for row in records(found.runs)}
    twins = [row for row in records(kept.twins) if (row["run"], row["config"]) in planned]
    found = replace(found, traces=kept.traces, twins=tidy("twins", twins))
    before, now = _versions(found, kept)
    known = before == now or (before in (_BUT_EXCESS_OF_PROPORTIONS, *_THE_SAME) and now in _THE_SAME)
    if not known or not _same_data(found, kept):
        return found
    kept = _as_today(kept) if before != now and before == _BUT_EXCESS_OF_PROPORTIONS else kept
    same_file = _file(found) == _file(kept)
    models = {name: _joined_model(one, kept.models.get(name, {}), same_file) for name, one in found.models.items()}
    rows, again = _rows(found, kept, models)
    about = dict(found.about)
    if again:
        about |= {name: _origin(found.about[name], kept.about[name], name, again) for name in DROP_ORDER}
    models = {name: _those_used(name, record, rows, found.models[name]) for name, record in models.items()}
    if MODELS in about and any(weights_of(models[name]) != weights_of(found.models[name]) for name in models):
        about[MODELS] = about[MODELS] | _commits(kept.about.get(MODELS, {}), about[MODELS])
    tables = {
        name: _joined(name, getattr(found, name), getattr(kept, name), again)
        for name in ("answers", "ranks", "signatures")
    }
    return replace(found, runs=tidy("runs", rows), models=models, about=about, **tables)


def _rows(found: Section6, kept: Section6, models: Mapping[str, Any]) -> tuple[list[dict[str, Any]], set[Run]]:
    """Every planned run as it is now or was before, and which are as they were."""
    before = {tuple(row[key] for key in _KEY): row for row in records(kept.runs) if row["status"] == FINISHED}
    rows: list[dict[str, Any]] = []
    again: set[Run] = set()
    for row in records(found.runs):
        old = before.get(tuple(row[key] for key in _KEY))
        known = {weights_of(one) for one in times_made(models.get(row["weights_of"], {}))}
        if row["status"] != FINISHED and old is not None and old["weights"] in known:
            row |= old
            again.add((row["sweep"], row["run"]))
        rows.append(row)
    return rows, again


def _file(found: Section6) -> str | None:
    """The hash of the file that says how the small models are made."""
    return found.about.get(MODELS, {}).get("file_sha256")


def _versions(found: Section6, kept: Section6) -> tuple[Any, Any]:
    return kept.about.get("statistics_version"), found.about.get("statistics_version")


def _as_today(kept: Section6) -> Section6:
    """Without the intervals that today's statistics would not give."""
    table = kept.signatures.copy()
    table.loc[table["measure"].str.endswith("_accuracy"), ["excess_low", "excess_high"]] = float("nan")
    return replace(kept, signatures=table)


def _same_data(found: Section6, kept: Section6) -> bool:
    """Whether the files that were trained on are the same, as far as they are at hand now."""
    before = kept.about.get("data", {})
    return all(
        one["sha256"] in (None, before[path]["sha256"])
        for path, one in found.about.get("data", {}).items()
        if before.get(path, {}).get("sha256") is not None
    )


def _joined_model(here: dict[str, Any], before: dict[str, Any], same_file: bool) -> dict[str, Any]:
    """A small model as it was made first, with what it was made again to; as it is here, where before is another."""
    if before.get("status") != FINISHED or not (same_file and _alike(here, before)):
        return here
    if here["status"] != FINISHED or weights_of(here) in map(weights_of, times_made(before)):
        return before
    return before | {"made_again": [*before.get("made_again", ()), here]}


def _alike(here: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether two records are of the same corpus, tokenizer and configuration, where one is made here at all."""
    if here["status"] != FINISHED:
        return True
    others = [{file: sha for file, sha in one["sha256"].items() if file != WEIGHTS} for one in (here, before)]
    corpora = [one.get("corpus", {}).get("sha256") for one in (here, before)]
    return others[0] == others[1] and corpora[0] == corpora[1]


def _those_used(
    name: str, record: dict[str, Any], rows: Iterable[dict[str, Any]], here: dict[str, Any]
) -> dict[str, Any]:
    """Of the times that a model was made those that a finished run starts from; as it is here, where none does."""
    used = {row["weights"] for row in rows if row["weights_of"] == name and row["status"] == FINISHED}
    first, *others = [one for one in times_made(record) if weights_of(one) in used] or [
        here if here["status"] == FINISHED else record
    ]
    plain = {key: value for key, value in first.items() if key != "made_again"}
    return plain | ({"made_again": others} if others else {})


def _joined(name: str, now: pd.DataFrame, before: pd.DataFrame, again: set[Run]) -> pd.DataFrame:
    chosen = [pair in again for pair in zip(before["sweep"], before["run"], strict=True)]
    return tidy(name, [*records(now), *records(before[chosen])])


def _origin(now: dict[str, Any], before: dict[str, Any], sweep: str, again: set[Run]) -> dict[str, Any]:
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
