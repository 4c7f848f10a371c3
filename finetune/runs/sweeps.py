"""A sweep: many runs in one folder, several side by side in processes of their own, and one report over all.

Each run is `revprobe train -` in a child process with its own pinned threads, so neither the number of jobs nor the
company changes its bits. Finished runs are skipped; a run that fails does not stop the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from ...atomic_files import write_text
from ...errors import RevprobeError, did_you_mean
from ...report.summary.terminal import make_console
from ..config.finetuning import FinetuneConfig, FinetuneSweepConfig, is_sweep_text
from ..config.mistakes import differences
from ..config.one_layer import RunConfig, SweepConfig, dump_config, load_config
from .progress import JSON_PROGRESS, Listener, ListenerAtFirstNews, PlainLines, bars, loss_note
from .run import Run, is_finished, is_run, open_run

if TYPE_CHECKING:
    import pandas as pd

    from ...report.html.report import ReportRun

CONFIG, REPORT = "sweep.yaml", "report.html"
AnySweep = SweepConfig | FinetuneSweepConfig
AnyRun = RunConfig | FinetuneConfig
# How long a child gets to end by itself after Ctrl-C before it is killed; nothing is lost either way.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
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

    def for_report(self, console: Console | None = None) -> list[ReportRun]:
        """Every run as `report.html.report` takes it; one that is missing or damaged stands there with its problem."""
        hidden = console is None or not console.is_terminal
        asked: list[AnyRun] = [*self.config.runs()]
        shown = track(asked, "reading the runs", console=console, transient=True, disable=hidden)
        return [_for_report(self.path / run.name, run) for run in shown]

    def report_sections(self) -> list[str]:
        """What a report shows besides its own sections: for fine-tunings Table 7 and Fig. 4."""
        if not isinstance(self.config, FinetuneSweepConfig):
            return []
        from ...report.html.finetune_sections import finetune_sections
        from .finetuning import finetuning_runs

        return finetune_sections(finetuning_runs(self.runs))

    def summary(self) -> pd.DataFrame:
        """All numbers of all runs, tidy, with the columns of summary.csv."""
        from ...report.html.report import summary_frame

        return summary_frame(self.for_report())


def is_sweep(path: str | Path) -> bool:
    """Whether a folder holds a sweep's config."""
    return (Path(path) / CONFIG).is_file()


def open_sweep(path: str | Path) -> Sweep:
    """Open a sweep folder. Raises: RevprobeError, when it is none; it names the nearest sweep beside it."""
    path = Path(path)
    if not is_sweep(path):
        beside = [str(p) for p in path.parent.glob("*") if is_sweep(p)] if path.parent.is_dir() else []
        hint = did_you_mean(str(path), beside) if beside else "; expected a folder written by `revprobe sweep`"
        raise RevprobeError(f"no sweep at {str(path)!r}{hint}")
    return Sweep(path)


class RunsFailed(RevprobeError):
    """Some runs of a sweep failed; the others have ended and are in its report."""


def run_sweep(
    config: AnySweep | str | Path,
    *,
    jobs: int = 1,
    out: str | Path = "runs",
    console: Console | None = None,
    batched: bool = False,
) -> Sweep:
    """Train every run of a sweep that is not finished, then write the report.

    Args:
        config: a SweepConfig or FinetuneSweepConfig, or a SweepConfig's YAML file or example ("one-layer-quick").
        jobs: runs side by side; each uses its config's own number of threads.
        out: the sweep's folder is `out/<name>`.
        batched: train all runs of one shape (other seeds and encodings) as one batched model in this process, which is
            what a GPU is fast at; `jobs` is not used then.
    Raises: RunsFailed, naming the runs that failed, after all others have ended and the report is written;
        RevprobeError, for a folder of something else, before anything is trained.
    """
    from ...report.html.report import write_report

    config = load_config(config, SweepConfig) if isinstance(config, str | Path) else config
    if batched and not isinstance(config, SweepConfig):
        raise RevprobeError(f"batched=True: {config.name} fine-tunes whole models, which run one by one; leave it out")
    if jobs < 1:
        raise RevprobeError(f"jobs={jobs!r}: expected at least 1, the number of runs side by side")
    console = console or make_console()
    sweep = Sweep(Path(out) / config.name)
    sweep.path.mkdir(parents=True, exist_ok=True)
    if is_run(sweep.path):
        raise RevprobeError(f"{sweep.path} is a single run, not a sweep; choose another name or folder")
    _require_same_base(sweep, config)
    write_text(sweep.path / CONFIG, dump_config(config))
    waiting = [run for run in config.runs() if not is_finished(sweep.path / run.name, run)]
    for run in config.runs():
        if run not in waiting:
            console.print(f"{run.name}: finished already, skipped")
    with _display(waiting, console) as display:
        problems = (
            _train_together([run for run in waiting if isinstance(run, RunConfig)], sweep.path, display)
            if batched
            else _run_all(waiting, sweep.path, min(jobs, max(len(waiting), 1)), display)
        )
    reported = sweep.for_report(console)
    report = write_report(reported, sweep.path / REPORT, title=config.name, sections=sweep.report_sections())
    problems = {run.name: run.problem for run in reported if run.problem} | problems
    if problems:
        listed = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise RunsFailed(f"{len(problems)} of {len(config.runs())} runs failed ({listed}); the others are in {report}")
    return sweep


def _require_same_base(sweep: Sweep, config: AnySweep) -> None:
    """Cells (models, datasets, seeds) may come and go; another base would put runs of two kinds into one report."""
    changed = differences(sweep.config.base, config.base) if is_sweep(sweep.path) else []
    if changed:
        raise RevprobeError(
            f"{sweep.path} was started with another base: {', '.join(changed)} (old -> new); restore the old values, "
            "or choose another name or folder (cells can be added and removed)"
        )


@dataclass
class _Display:
    """Where running runs are shown. `listen(name)` starts one's line; `say` prints above the bars."""

    listen: Callable[[AnyRun], Listener]
    say: Callable[[str], None]
    done: Callable[[AnyRun], None] = field(default=lambda run: None)


@contextmanager
def _display(runs: Sequence[AnyRun], console: Console) -> Iterator[_Display]:
    """A bar for the sweep and one per running run on a terminal; short plain lines elsewhere."""
    say = lambda text: console.print(text, soft_wrap=True)  # noqa: E731
    if not console.is_terminal or not runs:
        yield _Display(lambda run: PlainLines(run.name, console), say)
        return
    with bars(console) as progress:
        steps = dict.fromkeys((run.name for run in runs), 0)
        # A fine-tuning told in epochs knows its steps when its rows are made.
        totals = {run.name: run.training.steps for run in runs}
        total = progress.add_task("all runs", total=_sum(totals), note="")
        tasks: dict[str, Any] = {}

        def listen(run: AnyRun) -> Listener:
            tasks[run.name] = progress.add_task(run.name, total=run.training.steps, note="starting")

            def update(step: int, of: int, loss: float | None) -> None:
                progress.update(tasks[run.name], completed=step, total=of, note=loss_note(loss))
                steps[run.name], totals[run.name] = step, of
                progress.update(total, completed=sum(steps.values()), total=_sum(totals))

            return update

        yield _Display(listen, say, lambda run: progress.remove_task(tasks[run.name]))


def _train_together(runs: list[RunConfig], folder: Path, display: _Display) -> dict[str, str]:
    """All runs in this process, those of one shape as one; returns the problem of each that failed."""
    from .batched import train_together

    listeners = {
        run.name: ListenerAtFirstNews(partial(display.listen, run), partial(display.done, run)) for run in runs
    }
    problems = train_together(runs, folder, listeners=listeners)
    for name, problem in problems.items():
        display.say(f"{name}: failed: {problem}")
    return problems


def _sum(totals: dict[str, int | None]) -> int | None:
    """The steps of all runs; None while those of one are unknown."""
    known = [steps for steps in totals.values() if steps is not None]
    return sum(known) if len(known) == len(totals) else None


def _run_all(runs: Sequence[AnyRun], folder: Path, jobs: int, display: _Display) -> dict[str, str]:
    """Run the children, `jobs` at a time; returns the problem of each that failed. Ctrl-C stops them all."""
    children: set[subprocess.Popen[str]] = set()
    stopping = threading.Event()
    problems: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[str | None], AnyRun] = {
            pool.submit(_run_child, run, folder, display, children, stopping): run for run in runs
        }
        try:
            for future in as_completed(futures):
                if problem := future.result():
                    problems[futures[future].name] = problem
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            _stop(children)
            raise
    return problems


def _run_child(
    run: AnyRun, folder: Path, display: _Display, children: set[subprocess.Popen[str]], stopping: threading.Event
) -> str | None:
    """Train one run in a process of its own and pass on its progress; returns what went wrong, if anything."""
    if stopping.is_set():
        return None
    threads = str(run.training.threads)
    environment = {**os.environ, JSON_PROGRESS: "1", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    verb = "finetune" if isinstance(run, FinetuneConfig) else "train"
    command = [sys.executable, "-P", "-m", "revprobe", verb, "-", "--out", str(folder)]
    began, tell = time.monotonic(), display.listen(run)
    display.say(f"{run.name}: started")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        # A session of its own: Ctrl-C reaches the sweep alone, which then stops its children in order.
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        children.add(child)
        _converse(child, dump_config(run), tell)
        code = child.wait()
        children.discard(child)
        errors.seek(0)
        said = errors.read().strip()
    display.done(run)
    for note in (line for line in said.splitlines() if line.startswith("note: ")):
        display.say(f"{run.name}: {note}")
    if code == 0:
        display.say(f"{run.name}: finished in {timedelta(seconds=round(time.monotonic() - began))}")
        return None
    problem = _problem(code, said)
    if not stopping.is_set():
        display.say(f"{run.name}: failed: {said if os.environ.get('REVPROBE_DEBUG') else problem}")
    return problem


def _converse(child: subprocess.Popen[str], config: str, tell: Listener) -> None:
    """Hand the child its config and read its progress until it ends."""
    assert child.stdin is not None and child.stdout is not None, "the child was started without pipes"
    try:
        child.stdin.write(config)
        child.stdin.close()
    except BrokenPipeError:
        pass  # it died at once; its exit code and stderr say why
    for line in child.stdout:
        try:
            news = json.loads(line)
            tell(news["step"], news["steps"], news["loss"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that some library printed


def _problem(code: int, said: str) -> str:
    """One line about a child that failed: its error line, how it ended, or the last it said."""
    errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if code < 0:
        return f"killed by signal {-code}; run the same command again to go on"
    return said.splitlines()[-1] if said else f"ended with code {code} and no message"


def _stop(children: set[subprocess.Popen[str]]) -> None:
    """End the children: ask, wait, then kill. What they had completed stays, the rest is redone on resume."""
    for child in list(children):
        child.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for child in list(children):
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


def _for_report(folder: Path, config: AnyRun) -> ReportRun:
    from ...probes.readings.readings import Readings
    from ...report.html.report import ReportRun

    try:
        run = open_run(folder)
        changed = differences(config, run.config)
        reported = run.for_report()
        if not changed:
            return reported
        another = f"it is another run than the sweep's: {', '.join(changed)} (sweep -> run)"
        return replace(reported, problem="; ".join(filter(None, (another, reported.problem))))
    except RevprobeError as error:
        problem = "not started yet" if not is_run(folder) else str(error)
        return ReportRun(config.name, config.axes, config.model_dump(mode="json"), Readings([]), problem)
