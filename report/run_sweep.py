"""Train the runs of a sweep that are not finished, then write one report over all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.progress import track

from ..arguments import checked
from ..atomic_files import write_text
from ..engines.known import LOCAL, launcher
from ..engines.launcher import Display, Listener, Work
from ..errors import RevprobeError, did_you_mean
from ..finetune.config.finetuning import FinetuneConfig, FinetuneSweepConfig
from ..finetune.config.loading import dump_config, load_config
from ..finetune.config.mistakes import differences
from ..finetune.config.one_layer import RunConfig, SweepConfig
from ..finetune.runs.alerts import Watch
from ..finetune.runs.open import is_finished
from ..finetune.runs.progress import ListenerAtFirstNews, PlainLines, bars, loss_note
from ..finetune.runs.record import RunRecord
from ..finetune.runs.run import is_run
from ..finetune.runs.sweeps import CONFIG, AnySweep, Sweep, is_sweep, work_of
from .html.finetune_sections import finetune_sections
from .html.report import write_report
from .summary.terminal import make_console

REPORT = "report.html"


class RunsFailed(RevprobeError):
    """Some runs of a sweep failed; the others have ended and are in its report."""


@checked
def run_sweep(
    config: AnySweep | Mapping[str, Any] | str | Path,
    *,
    jobs: int | None = None,
    out: str | Path = "runs",
    console: Console | None = None,
    batched: bool = False,
    on: str = LOCAL,
    address: str | None = None,
    only: Sequence[str] | None = None,
) -> Sweep:
    """Train every run of a sweep that is not finished, then write the report.

    Args:
        config: a SweepConfig or FinetuneSweepConfig, or a SweepConfig's keys, YAML file or example ("one-layer-quick").
        jobs: runs side by side, each with its config's own number of threads; by default one here, and as many as there
            is room for on a cluster.
        out: the sweep's folder is `out/<name>`; on a cluster it lies on storage that all its machines see.
        batched: train all runs of one shape (other seeds and encodings) as one batched model in this process, which is
            what a GPU is fast at; `jobs` is not used then.
        on: "local", or "ray" for a cluster; the runs come out the same.
        address: of a Ray cluster that is there, such as "10.0.0.1:6379" or "auto"; without it one is started here.
        only: names of runs; the others are left as they are. All by default.
    Raises: RunsFailed, naming the runs that failed, after all others have ended and the report is written;
        RevprobeError, for a folder of something else, an engine that is not there, or a name in `only` that no run
        has, before anything is trained.
    """
    config = load_config(config, SweepConfig) if isinstance(config, Mapping | str | Path) else config
    if batched and not isinstance(config, SweepConfig):
        raise RevprobeError(f"batched=True: {config.name} fine-tunes whole models, which run one by one; leave it out")
    if batched and on != LOCAL:
        raise RevprobeError(f"batched=True trains all runs in this process, not on {on!r}; leave one of the two out")
    chosen = _chosen(config, only)
    engine = launcher(on, jobs=jobs, address=address)
    console = console or make_console()
    sweep = Sweep(Path(out) / config.name)
    sweep.path.mkdir(parents=True, exist_ok=True)
    if is_run(sweep.path):
        raise RevprobeError(f"{sweep.path} is a single run, not a sweep; choose another name or folder")
    _require_same_base(sweep, config)
    write_text(sweep.path / CONFIG, dump_config(config))
    waiting = [run for run in chosen if not is_finished(sweep.path / run.name, run)]
    for run in chosen:
        if run not in waiting:
            console.print(f"{run.name}: finished already, skipped")
    works = [work_of(run) for run in waiting]
    with _display(works, console, waiting, sweep.path) as display:
        problems = (
            _train_together([run for run in waiting if isinstance(run, RunConfig)], sweep.path, display)
            if batched
            else engine.run_all(works, sweep.path, display)
        )
    reported = shown_records(sweep, console)
    report = write_report(reported, sweep.path / REPORT, title=config.name, sections=sweep_sections(sweep))
    asked = {run.name for run in chosen}
    problems = {run.name: run.problem for run in reported if run.problem and run.name in asked} | problems
    if problems:
        listed = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise RunsFailed(f"{len(problems)} of {len(chosen)} runs failed ({listed}); the others are in {report}")
    return sweep


def _chosen(config: AnySweep, only: Sequence[str] | None) -> list[RunConfig | FinetuneConfig]:
    """The runs asked for. Raises: RevprobeError, for a name that no run has."""
    runs: list[RunConfig | FinetuneConfig] = [*config.runs()]
    names = [run.name for run in runs]
    for name in only or ():
        if name not in names:
            raise RevprobeError(f"{config.name} has no run {name!r}{did_you_mean(name, names)}")
    return runs if only is None else [run for run in runs if run.name in only]


def sweep_sections(sweep: Sweep) -> list[Markup]:
    """What the report of a sweep of fine-tunings shows besides; one that lies in another sweep is not its own."""
    return finetune_sections(sweep.runs) if isinstance(sweep.config, FinetuneSweepConfig) else []


def shown_records(sweep: Sweep, console: Console) -> list[RunRecord]:
    """What every run came to, with a bar on a terminal: reading many runs takes a while."""
    hidden = not console.is_terminal
    return sweep.records(
        lambda asked: track(list(asked), "reading the runs", console=console, transient=True, disable=hidden),
        progress=False,
    )


def _require_same_base(sweep: Sweep, config: AnySweep) -> None:
    """Cells (models, datasets, seeds) may come and go; another base would put runs of two kinds into one report."""
    changed = differences(sweep.config.base, config.base) if is_sweep(sweep.path) else []
    if changed:
        raise RevprobeError(
            f"{sweep.path} was started with another base: {', '.join(changed)} (old -> new); restore the old values, "
            "or choose another name or folder (cells can be added and removed)"
        )


@contextmanager
def _display(
    works: Sequence[Work], console: Console, runs: Sequence[RunConfig | FinetuneConfig], folder: Path
) -> Iterator[Display]:
    """What shows the works, and tells of the alerts of their runs."""
    with _progress(works, console) as shown:
        yield _with_alerts(shown, runs, folder)


@contextmanager
def _progress(works: Sequence[Work], console: Console) -> Iterator[Display]:
    """A bar for the sweep and one per running run on a terminal; short plain lines elsewhere."""
    say = lambda text: console.print(text, soft_wrap=True)  # noqa: E731
    if not console.is_terminal or not works:
        yield Display(lambda work: PlainLines(work.name, console), say)
        return
    with bars(console) as progress:
        steps = dict.fromkeys((work.name for work in works), 0)
        # A fine-tuning told in epochs knows its steps when its rows are made.
        totals = {work.name: work.steps for work in works}
        total = progress.add_task("all runs", total=_sum(totals), note="")
        tasks: dict[str, Any] = {}

        def listen(work: Work) -> Listener:
            tasks[work.name] = progress.add_task(work.name, total=work.steps, note="starting")

            def update(step: int, of: int, loss: float | None) -> None:
                progress.update(tasks[work.name], completed=step, total=of, note=loss_note(loss))
                steps[work.name], totals[work.name] = step, of
                progress.update(total, completed=sum(steps.values()), total=_sum(totals))

            return update

        yield Display(listen, say, lambda work: progress.remove_task(tasks[work.name]))


def _with_alerts(display: Display, runs: Sequence[RunConfig | FinetuneConfig], folder: Path) -> Display:
    """The display, telling besides which alerts the new readings of its runs cross, and which stand at their ends.

    A run's own process leaves it to the sweep.
    """
    watches = {run.name: Watch(folder / run.name, run.alerts, display.say) for run in runs}

    def done(work: Work) -> None:
        display.done(work)
        watches[work.name].end()

    return Display(lambda work: watches[work.name].listening(display.listen(work)), display.say, done)


def _train_together(runs: list[RunConfig], folder: Path, display: Display) -> dict[str, str]:
    """All runs in this process, those of one shape as one; returns the problem of each that failed."""
    from ..finetune.runs.batched import train_together

    listeners = {
        work.name: ListenerAtFirstNews(partial(display.listen, work), partial(display.done, work))
        for work in map(work_of, runs)
    }
    problems = train_together(runs, folder, listeners=listeners)
    for name, problem in problems.items():
        display.say(f"{name}: failed: {problem}")
    return problems


def _sum(totals: dict[str, int | None]) -> int | None:
    """The steps of all runs; None while those of one are unknown."""
    known = [steps for steps in totals.values() if steps is not None]
    return sum(known) if len(known) == len(totals) else None
