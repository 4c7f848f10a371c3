"""`revprobe report`: the page about a run or a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RevprobeError
from .running import quick_imports


def write_bundle(path: Path, folder: Path) -> None:
    """The same for both commands: the size is said before, and what was written after."""
    from ..report.bundle.bundle import write_bundle as write
    from ..report.summary.terminal import make_console

    console = make_console()
    write(path, folder, say=lambda text: console.print(text, soft_wrap=True))


def report(
    path: Annotated[Path, typer.Argument(help="The folder of a run or of a sweep; for a bundle also of several.")],
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Write a folder to hand on instead: report, tables, the rows behind them, configs, versions and an "
            "index; without paths and names of this machine.",
        ),
    ] = None,
) -> None:
    """Write report.html (one file, opens without a network) and summary.csv into the folder of a run or sweep."""
    if bundle is not None:
        write_bundle(path, bundle)
        return
    with quick_imports():
        from ..finetune.runs.open import open_run
        from ..finetune.runs.run import is_run
        from ..finetune.runs.sweeps import open_sweep
        from ..report.html.finetune_sections import finetune_sections
        from ..report.html.report import write_report
        from ..report.run_sweep import shown_records, sweep_sections
        from ..report.summary.alerts import alert_lines
        from ..report.summary.terminal import make_console, print_final, read_summary

    console = make_console()
    if is_run(path):
        one = open_run(path)
        runs, sections = [one.record()], finetune_sections([one])
    else:
        all_of_them = open_sweep(path)
        runs, sections = shown_records(all_of_them, console), sweep_sections(all_of_them)
    written = write_report(runs, path / "report.html", title=path.resolve().name, sections=sections)
    print_final(read_summary(path), console)
    for line in alert_lines(runs):
        console.print(line, soft_wrap=True)
    console.print(f"report: {written}", soft_wrap=True)
    problems = [f"{run.name}: {run.problem}" for run in runs if run.problem]
    if problems:
        raise RevprobeError(
            f"the report is written, but {len(problems)} of {len(runs)} runs are not whole ({'; '.join(problems)})"
        )
