"""The command line of fine-tuning: `revprobe finetune`, and `revprobe plan` for the memory it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..finetune.config.finetuning import FinetuneConfig, FinetuneSweepConfig
    from ..finetune.memory.plan import MemoryPlan

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder that gets a folder of the config's name.")]


def finetune(
    config: Annotated[str, typer.Argument(help="A fine-tuning's or its sweep's YAML file, or an example's name.")],
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Runs of a sweep side by side, each in a process of its own.")
    ] = 1,
    out: Out = Path("runs"),
) -> None:
    """Fine-tune on one direction of a relation, probe at every snapshot, and score both directions.

    Resumes a run that was stopped, skips what is finished in a sweep, and writes a report with Table 7's layout.
    """
    from ..finetune.config.finetuning import FinetuneConfig, parse_finetune, read_finetune

    chosen = parse_finetune(sys.stdin.read(), "stdin") if config == "-" else read_finetune(config)
    if isinstance(chosen, FinetuneConfig):
        _finetune_one(chosen, out / chosen.name)
    else:
        _finetune_all(chosen, jobs, out)


def _finetune_one(config: FinetuneConfig, folder: Path) -> None:
    """One run, with its numbers and its report; only its progress where a sweep listens."""
    from ..finetune.runs.finetuning import fine_tune
    from ..finetune.runs.open import is_finished
    from ..finetune.runs.progress import JSON_PROGRESS, json_lines, shown_progress
    from ..finetune.runs.record import summary_frame
    from ..report.html.finetune_sections import finetune_sections
    from ..report.html.report import write_report
    from ..report.paper.table7 import print_table7
    from ..report.summary.terminal import make_console, print_final

    console = make_console()
    if os.environ.get(JSON_PROGRESS):
        with interruptible(console):
            fine_tune(config, folder, listener=json_lines)
        return
    if is_finished(folder, config):
        console.print(f"{config.name}: finished already, skipped ({folder})", soft_wrap=True)
        return
    if config.model.tiny is None and not int(os.environ.get("RANK", "0")):
        _show_plan(config, console)
    with interruptible(console), shown_progress(config.name, console) as listener:
        run = fine_tune(config, folder, listener=listener)
    if int(os.environ.get("RANK", "0")):  # another process of this run shows and writes it
        return
    record = run.record()
    print_final(summary_frame([record]), console)
    print_table7([run], console)
    report = write_report([record], folder / "report.html", title=run.name, sections=finetune_sections([run]))
    console.print(f"report: {report}", soft_wrap=True)


def _finetune_all(config: FinetuneSweepConfig, jobs: int, out: Path) -> None:
    from ..finetune.runs.finetuning import finetuning_runs
    from ..report.paper.table7 import print_table7
    from ..report.run_sweep import run_sweep
    from ..report.summary.terminal import make_console, print_final, read_summary

    console = make_console()
    with interruptible(console):
        done = run_sweep(config, jobs=jobs, out=out, console=console)
    print_final(read_summary(done.path), console)
    print_table7(finetuning_runs(done.runs), console)
    console.print(f"report: {done.path / 'report.html'}", soft_wrap=True)


@contextmanager
def interruptible(console: Console) -> Iterator[None]:
    """Say what Ctrl-C leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("stopped; everything up to the last snapshot is kept, run the same command again to go on")
        raise typer.Exit(130) from None


def plan(
    config: Annotated[str, typer.Argument(help="A fine-tuning's or its sweep's YAML file, or an example's name.")],
    memory: Annotated[
        float | None, typer.Option(min=0, help="GB (10^9 bytes) there are; this machine's GPU or 48 by default.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the longest row; worked out from the relation by default.")
    ] = None,
) -> None:
    """Work out the memory that a fine-tuning and its probes need, from shapes alone; exit code 1 when it is too much.

    Loads no weights, and for the published LLaDA and Dream checkpoints needs no network.
    """
    from ..finetune.config.finetuning import FinetuneConfig, read_finetune
    from ..finetune.memory.from_config import require_room
    from ..finetune.memory.plan import GB
    from ..report.summary.terminal import make_console

    chosen, console = read_finetune(config), make_console()
    # The runs of a sweep that share model and dataset differ in direction and seed, which cost no memory.
    runs = [chosen] if isinstance(chosen, FinetuneConfig) else chosen.runs()
    apart = {(str(run.model), str(run.label)): run for run in reversed(runs)}
    given = None if memory is None else int(memory * GB)
    for planned, there in [_show_plan(run, console, given, tokens) for run in reversed(apart.values())]:
        require_room(planned, there)


def _show_plan(
    config: FinetuneConfig, console: Console, memory: int | None = None, tokens: int | None = None
) -> tuple[MemoryPlan, int]:
    """Print a config's memory plan; returns it with the bytes it is held against."""
    from ..finetune.memory.from_config import memory_here, plan_finetuning, plan_table
    from ..finetune.memory.plan import GB
    from ..report.summary.terminal import text_table

    there, of = memory_here() if memory is None else (memory, "as asked")
    planned = plan_finetuning(config, tokens=tokens)
    console.print(text_table(plan_table(planned, there), f"memory of {config.name} against {there / GB:.1f} GB ({of})"))
    for line in planned.about:
        console.print(line, soft_wrap=True)
    return planned, there
