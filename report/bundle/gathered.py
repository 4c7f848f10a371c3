"""The runs that a bundle hands on: of one run, a sweep, or a folder of both, told without what is private."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from markupsafe import Markup

from ...errors import RevprobeError
from ...finetune.runs.finetuning import FinetuneRun
from ...finetune.runs.open import open_run
from ...finetune.runs.record import RunRecord
from ...finetune.runs.run import Run, is_run
from ...finetune.runs.sweeps import is_sweep, open_sweep
from ...probes.readings.readings import Readings
from ...progress import Progress, counted
from ..dashboard.folder import RunsFolder
from ..dashboard.listed_runs import Listed, short_words
from ..html.finetune_sections import finetune_sections
from ..run_sweep import sweep_sections
from .private import Private


@dataclass
class Gathered:
    """One run to hand on.

    Attributes:
        state: how far it is, in words that stay true.
        record: what it came to.
        run: its folder, where that can be opened; None where it has not begun or is damaged.
        answers: what a fine-tuning was asked besides.
    """

    state: str
    record: RunRecord
    run: Run | None
    answers: Readings = field(default_factory=lambda: Readings([]))

    @property
    def name(self) -> str:
        return self.record.name


def gather(path: Path, private: Private, progress: Progress | bool | None) -> tuple[list[Gathered], list[Markup]]:
    """Every run, and what a report shows besides. Raises: RevprobeError, when there is none."""
    listed = {one.key: one for one in RunsFolder(path).scan()}
    if is_run(path):
        found = [_gathered(run.record(), listed.get("."), run) for run in counted([open_run(path)], progress)]
    elif is_sweep(path):
        sweep = open_sweep(path)
        there = {run.path.name: run for run in sweep.runs}
        records = sweep.records(lambda asked: counted(list(asked), progress))
        found = [_gathered(record, listed.get(record.name), there.get(record.name)) for record in records]
    else:
        begun = [one for one in listed.values() if one.state not in ("not begun", "empty")]
        if not begun:
            raise RevprobeError(f"no run in {str(path)!r}; expected the folder of a run, of a sweep, or one of several")
        found = [_of_folder(path, one) for one in counted(begun, progress)]
    runs = [one.run for one in found if one.run is not None]
    sections = sweep_sections(open_sweep(path)) if is_sweep(path) else finetune_sections(runs)
    # The sections last: only when all else was told is it known which paths there are.
    return _told(found, private), [private.markup(section) for section in sections]


def _gathered(record: RunRecord, listed: Listed | None, run: Run | None) -> Gathered:
    answers = Readings([])
    if isinstance(run, FinetuneRun) and run.asks:
        with suppress(RevprobeError):  # not evaluated yet
            answers = run.answers()
    return Gathered(_state(record, listed), record, run, answers)


def _of_folder(path: Path, listed: Listed) -> Gathered:
    """A run of a folder of many, whole or not; its name is its path from there."""
    name = path.resolve().name if listed.key == "." else listed.key
    problem = listed.problem
    if listed.state != "damaged":  # a link that leads out is: it is not followed
        try:
            run = open_run(path / listed.key)
            return _gathered(replace(run.record(), name=name), listed, run)
        except RevprobeError as error:
            problem = str(error)
    return _gathered(RunRecord(name, listed.axes, {}, Readings([]), problem), listed, None)


def _state(record: RunRecord, listed: Listed | None) -> str:
    """Not how long ago, which would not stay true."""
    if listed is None or (listed.state == "finished" and record.problem is not None):
        return record.problem or "finished"
    return short_words(replace(listed, written=None), now=0.0)


def _told(found: Sequence[Gathered], private: Private) -> list[Gathered]:
    """The runs without what is private; names that have become equal are numbered."""
    told: list[Gathered] = []
    for one in found:
        record = private.record(one.record)
        name, count = record.name, 1
        while name in {other.name for other in told}:
            count += 1
            name = f"{record.name} ({count})"
        answers = Readings(private.reading(reading) for reading in one.answers)
        told.append(Gathered(private.text(one.state), replace(record, name=name), one.run, answers))
    return told
