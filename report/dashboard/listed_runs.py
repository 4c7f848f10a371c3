"""A run as a list shows it, whole or not: its state, why it is not complete, and the files of its readings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ...errors import RevprobeError, first_line
from ...finetune.runs.run import PROBLEM, Run
from ...models.checkpoints import CHECKPOINTS

_MAGIC = b"PAR1"  # how every whole parquet file ends

Stamp = tuple[int, int]  # time in ns and size


@dataclass(frozen=True)
class ReadingFile:
    """One parquet file of a run's readings, as it was at the scan."""

    path: Path
    step: int
    name: str
    weights: str
    stamp: Stamp


@dataclass(frozen=True)
class Listed:
    """A run as the list shows it, be it whole or not.

    Attributes:
        key: its path from RUNS_DIR, "." for RUNS_DIR itself; the only name a page may ask for it by.
        group: the key of the folder it stands in, usually a sweep's.
        family: equal for runs that differ in nothing but their seed.
        total: training steps asked for; None where that is not known.
        state: "complete", "open" (training, or stopped without an error), "stopped" (by an error), "broken", "empty"
            or "waiting" (a sweep's run that has not begun).
        problem: why it is not complete; None when it is.
    """

    key: str
    group: str
    name: str
    state: str
    problem: str | None = None
    axes: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    total: int | None = None
    files: tuple[ReadingFile, ...] = ()

    @property
    def steps(self) -> list[int]:
        """The steps with readings, ascending."""
        return sorted({file.step for file in self.files})


def state_of(run: Run) -> tuple[str, str | None]:
    """A readable run's state, and why it is not complete."""
    if run.finished:
        return "complete", None
    noted, checkpoints = run.path / PROBLEM, run.path / CHECKPOINTS
    if noted.is_file() or run.trained:
        return "stopped", run.problem
    if not run.steps:
        return "open", "begun: no checkpoint yet"
    last = datetime.fromtimestamp(checkpoints.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
    of = total_steps(run)
    return "open", f"training or stopped: at step {run.steps[-1]:,}{f' of {of:,}' if of else ''}, written {last}"


def total_steps(run: Run) -> int | None:
    """The training steps of a run; of a fine-tuning told in epochs only once it knows them."""
    steps = getattr(run, "resolved", {}).get("steps") or run.config.training.steps
    return None if steps is None else int(steps)


def ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) < 2 * len(_MAGIC):
            return False
        file.seek(-len(_MAGIC), os.SEEK_END)
        return file.read() == _MAGIC


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_size


def reason_of(error: BaseException) -> str:
    return first_line(error, with_type=not isinstance(error, RevprobeError))
