"""A run as a list shows it, whole or not: its state in words, what to do about it, and the files of its readings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...errors import RevprobeError, first_line
from ...finetune.config.alerts import Alert
from ...finetune.config.kinds import SMALL_MODEL, SMALL_MODELS, told_kind
from ...finetune.runs.run import CONFIG, PROBLEM, Run
from ...models.checkpoints import CHECKPOINTS

# In the order of a summary.
STATES = ("training", "finished", "interrupted", "failed", "damaged", "empty", "not begun")
BOUND = 1_000_000  # bytes of a config.yaml that are read; the longest of ours has four thousand
_WHY = 2_000  # letters of a problem that are read

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
        state: one of STATES.
        problem: why it is not whole; None where the state says it all.
        family: equal for runs that differ in nothing but their seed.
        total: training steps asked for; None where that is not known.
        last: the last complete checkpoint's step; None before the first.
        written: when that was, in seconds since the epoch.
        resume: the command that takes it up again; "" where there is nothing to take up.
        tables: those that lie beside its config, by what they hold, as they were at the scan.
        opened: its path as Python finds it from where the dashboard was started.
        tuned: whether it is a fine-tuning.
        alerts: the rules of its config.
        alerted: whether one of them is crossed, or undefined, at its last checkpoint; None where the run has not said.
    """

    key: str
    group: str
    name: str
    state: str
    problem: str | None = None
    axes: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    total: int | None = None
    last: int | None = None
    written: float | None = None
    resume: str = ""
    files: tuple[ReadingFile, ...] = ()
    tables: Mapping[str, Stamp] = field(default_factory=dict)
    opened: str = ""
    tuned: bool = False
    alerts: tuple[Alert, ...] = ()
    alerted: bool | None = None

    @property
    def steps(self) -> list[int]:
        """The steps with readings, ascending."""
        return sorted({file.step for file in self.files})


def state_of(run: Run) -> tuple[str, str | None]:
    """A readable run's state as far as its files tell it, and why it failed; "interrupted" may still be training."""
    if run.finished:
        return "finished", None
    if (run.path / PROBLEM).is_file():
        with (run.path / PROBLEM).open(encoding="utf-8", errors="replace") as file:
            return "failed", " ".join(file.read(_WHY).split())
    # Trained to the end, and something is missing: the reason, without the advice that `resume` gives.
    return "interrupted", str(run.problem).partition(";")[0] if run.trained else None


def last_checkpoint(run: Run) -> tuple[int | None, float | None]:
    """Step and time of the last complete checkpoint."""
    if not run.steps:
        return None, None
    return run.steps[-1], (run.path / CHECKPOINTS).stat().st_mtime


def total_steps(run: Run) -> int | None:
    """The training steps of a run; of a fine-tuning told in epochs only once it knows them."""
    steps = getattr(run, "resolved", {}).get("steps") or run.config.training.steps
    return None if steps is None else int(steps)


def short_words(run: Listed, now: float) -> str:
    """The state of a run for one line of a list, what matters first: `training, 2 min ago, step 500 of 5,000`."""
    if run.problem:
        return f"{run.state}: {run.problem}"
    since = ago(now - run.written) if run.state == "training" and run.written is not None else ""
    alert = "alert" if run.alerted else ""
    return ", ".join(filter(None, (run.state, alert, since, "" if run.state == "finished" else _where(run))))


def state_words(run: Listed, now: float) -> str:
    """The state of a run in a sentence: since when, how far, why, and how to go on."""
    if run.state == "training":
        since = "no checkpoint yet" if run.written is None else f"last checkpoint {ago(now - run.written)}"
        return ", ".join(filter(None, ("training", _where(run), since)))
    if run.state == "interrupted" and not run.problem:
        at = _where(run) or "before its first checkpoint"
        since = "" if run.written is None else f", last checkpoint {ago(now - run.written)}"
        return f"interrupted {at.replace('step', 'at step', 1)}{since}{_go_on(run)}"
    checkpoints = f", {len(run.steps)} checkpoints, {_where(run)}" if run.state == "finished" else ""
    return short_words(run, now) + checkpoints + _go_on(run)


def alert_words(run: Listed) -> str:
    """What a run says of its alerts; "" where its config has none."""
    if not run.alerts:
        return ""
    several = f"{len(run.alerts)} alert{'s' * (len(run.alerts) > 1)}"
    if run.alerted is None:
        return f"{several}, not judged by the run yet"
    return f"of {several} one or more crossed, or undefined" if run.alerted else f"{several}, none crossed"


def ago(seconds: float) -> str:
    """How long since, in the largest unit that gives a whole number.

    >>> ago(130), ago(7300)
    ('2 min ago', '2 h ago')
    """
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size or (unit != "days" and seconds >= size):
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def read_bounded(file: Path) -> str:
    """A config's text. Raises: RevprobeError, when it is too long to be one, or no text."""
    with file.open("rb") as opened:
        content = opened.read(BOUND + 1)
    if len(content) > BOUND:
        raise RevprobeError(f"{file.name} has more than {BOUND:,} bytes; expected a run's {CONFIG}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RevprobeError(
            f"{file.name}: not a text file ({error.reason} at byte {error.start}); expected YAML in UTF-8"
        ) from error


def small_model(text: str) -> str:
    """What a config is, where it is of pretrained models and not of a run; else ""."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return ""
    kind = told_kind(values) if isinstance(values, dict) else None
    return kind[0].what if kind is not None and kind[0] in (SMALL_MODEL, SMALL_MODELS) else ""


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_size


def reason_of(error: BaseException) -> str:
    return first_line(error, with_type=not isinstance(error, RevprobeError))


def _where(run: Listed) -> str:
    if run.last is None:
        return ""
    return f"step {run.last:,}" + (f" of {run.total:,}" if run.total else "")


def _go_on(run: Listed) -> str:
    return f"; resume with `{run.resume}`" if run.resume else ""
