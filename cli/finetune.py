"""The command line of fine-tuning: `revprobe finetune`, and `revprobe plan` for the memory it needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RevprobeError
from .plan import show_plan
from .running import Address, Jobs, On, Out, interruptible, quick_imports

if TYPE_CHECKING:
    from ..finetune.config.finetuning import FinetuneConfig, FinetuneSweepConfig


def finetune(
    config: Annotated[str, typer.Argument(help="A fine-tuning's or its sweep's YAML file, or an example's name.")],
    jobs: Jobs = None,
    out: Out = Path("runs"),
    on: On = "local",
    address: Address = None,
) -> None:
    """Fine-tune on one direction of a relation, probe at every snapshot, and score both directions.

    Resumes a run that was stopped, skips what is finished in a sweep, and writes a report with Table 7's layout.
    """
    from ..finetune.config.finetuning import FinetuneConfig, parse_finetune, read_finetune

    chosen = parse_finetune(sys.stdin.read(), "stdin") if config == "-" else read_finetune(config)
    if isinstance(chosen, FinetuneConfig):
        if on != "local":
            raise RevprobeError(f"--on {on}: {chosen.name} is one run, which is done here; a sweep's runs go anywhere")
        _finetune_one(chosen, out / chosen.name)
    else:
        _finetune_all(chosen, out, jobs=jobs, on=on, address=address)


def _finetune_one(config: FinetuneConfig, folder: Path) -> None:
    """One run, with its numbers and its report; only its progress where a sweep listens."""
    with quick_imports():
        from ..engines.launcher import JSON_PROGRESS
        from ..finetune.runs.finetuning import fine_tune
        from ..finetune.runs.open import is_finished
        from ..finetune.runs.progress import json_lines, shown_progress
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
    # A run that was killed before its report was written goes on to that.
    if is_finished(folder, config) and (folder / "report.html").is_file():
        console.print(f"{config.name}: finished already, skipped ({folder})", soft_wrap=True)
        return
    if config.model.tiny is None and not int(os.environ.get("RANK", "0")):
        show_plan(config, console)
    with interruptible(console), shown_progress(config.name, console) as listener:
        run = fine_tune(config, folder, listener=listener)
    if int(os.environ.get("RANK", "0")):  # another process of this run shows and writes it
        return
    record = run.record()
    print_final(summary_frame([record]), console)
    print_table7([run], console)
    report = write_report([record], folder / "report.html", title=run.name, sections=finetune_sections([run]))
    console.print(f"report: {report}", soft_wrap=True)


def _finetune_all(config: FinetuneSweepConfig, out: Path, **where: Any) -> None:
    with quick_imports():
        from ..finetune.runs.finetuning import finetuning_runs
        from ..report.paper.table7 import print_table7
        from ..report.run_sweep import run_sweep
        from ..report.summary.terminal import make_console, print_final, read_summary

    console = make_console()
    with interruptible(console):
        done = run_sweep(config, out=out, console=console, **where)
    print_final(read_summary(done.path), console)
    print_table7(finetuning_runs(done.runs), console)
    console.print(f"report: {done.path / 'report.html'}", soft_wrap=True)
