"""A sweep's folder: many runs and what each came to."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd

from ...arguments import checked
from ...engines.launcher import Work
from ...errors import RevprobeError, did_you_mean
from ...probes.readings.readings import Readings
from ...progress import Progress, counted, shows_progress
from ..config.finetuning import FinetuneConfig, FinetuneSweepConfig, is_sweep_text
from ..config.loading import dump_config, load_config, require_no_config
from ..config.mistakes import differences
from ..config.one_layer import RunConfig, SweepConfig
from .open import open_run
from .record import NOT_STARTED, RunRecord, summary_frame
from .run import Run, is_run

CONFIG = "sweep.yaml"
AnySweep = SweepConfig | FinetuneSweepConfig
AnyRun = RunConfig | FinetuneConfig


@dataclass(frozen=True, repr=False)
class Sweep:
    """A sweep folder; `open_sweep(path)` and `run_sweep(...)` return it."""

    path: Path

    @cached_property
    def config(self) -> AnySweep:
        """What the sweep was asked to be. Raises: RevprobeError, when sweep.yaml is damaged."""
        file = self.path / CONFIG
        return load_config(file, FinetuneSweepConfig) if is_sweep_text(file) else load_config(file, SweepConfig)

    @property
    def runs(self) -> list[Run]:
        """The runs that have been started, in the order of the config."""
        return [open_run(self.path / run.name) for run in self.config.runs() if is_run(self.path / run.name)]

    @checked
    @shows_progress("runs")
    def records(
        self,
        watch: Callable[[Iterable[AnyRun]], Iterable[AnyRun]] | None = None,
        *,
        progress: Progress | bool | None = None,
    ) -> list[RunRecord]:
        """What every run came to; one that is missing or damaged stands there with its problem.

        Args:
            watch: passes the runs' configs on one by one, such as a bar of the caller's own does.
            progress: called with (runs read, runs in all); None shows a bar, False nothing.
        """
        asked: Sequence[AnyRun] = self.config.runs()
        return [self._record(run) for run in (counted(asked, progress) if watch is None else watch(asked))]

    def for_report(self) -> list[RunRecord]:
        """Renamed: `records`. Raises: RevprobeError, saying so."""
        raise RevprobeError("for_report() of a sweep is now records()")

    def __repr__(self) -> str:
        return f"Sweep({'; '.join(self._told())})"

    def _repr_html_(self) -> str:
        name, *rest = map(html.escape, self._told())
        return f"<table><tr><th>{name}</th></tr>{''.join(f'<tr><td>{one}</td></tr>' for one in rest)}</table>"

    def _told(self) -> list[str]:
        """How far each run is, in counts; a damaged config is said and not raised."""
        try:
            asked, runs = self.config.runs(), self.runs
            done = sum(run.finished for run in runs)
        except RevprobeError as error:
            return [self.path.name, f"cannot be read: {error}"]
        others = {"begun": len(runs) - done, "not started": len(asked) - len(runs)}
        rest = [f"{count} {state}" for state, count in others.items() if count]
        return [self.path.name, f"{done} of {len(asked)} runs finished", *rest]

    @checked
    @shows_progress("runs")
    def summary(self, *, progress: Progress | bool | None = None) -> pd.DataFrame:
        """All numbers of all runs, tidy, with the columns of summary.csv; `progress` as in `records`."""
        return summary_frame(self.records(progress=progress))

    def _record(self, config: AnyRun) -> RunRecord:
        folder = self.path / config.name
        try:
            run = open_run(folder)
            changed = differences(config, run.config)
            record = run.record()
            if not changed:
                return record
            another = f"it is another run than the sweep's: {', '.join(changed)} (sweep -> run)"
            return replace(record, problem="; ".join(filter(None, (another, record.problem))))
        except RevprobeError as error:
            problem = NOT_STARTED if not is_run(folder) else str(error)
            return RunRecord(config.name, config.axes, config.model_dump(mode="json"), Readings([]), problem)


def work_of(run: AnyRun) -> Work:
    """A run as an engine takes it."""
    training = run.training
    verb: Literal["train", "finetune"] = "finetune" if isinstance(run, FinetuneConfig) else "train"
    return Work(run.name, verb, dump_config(run), training.threads, training.device, training.steps)


def is_sweep(path: str | Path) -> bool:
    """Whether a folder holds a sweep's config."""
    return (Path(path) / CONFIG).is_file()


@checked
def open_sweep(path: str | Path) -> Sweep:
    """Open a sweep folder. Raises: RevprobeError, when it is none; it names the nearest sweep beside it."""
    path = Path(path)
    if not is_sweep(path):
        require_no_config(path)
        beside = [str(p) for p in path.parent.glob("*") if is_sweep(p)] if path.parent.is_dir() else []
        hint = did_you_mean(str(path), beside) if beside else "; expected a folder written by `revprobe sweep`"
        raise RevprobeError(f"no sweep at {str(path)!r}{hint}")
    return Sweep(path)
