"""`revprobe sweep`: a grid of runs, and one report over all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .running import Address, Jobs, On, Out, interruptible, quick_imports


def sweep(
    config: Annotated[
        str,
        typer.Argument(
            help="A sweep's YAML file, or an example: one-layer-quick, one-layer, one-layer-published, "
            "negative-evidence, pressure, robustness."
        ),
    ],
    jobs: Jobs = None,
    out: Out = Path("runs"),
    on: On = "local",
    address: Address = None,
) -> None:
    """Train a grid of runs, skipping finished ones, and write one report over all of them."""
    with quick_imports():
        from ..report.run_sweep import run_sweep
        from ..report.summary.terminal import make_console, print_final, read_summary

    console = make_console()
    with interruptible(console):
        done = run_sweep(config, jobs=jobs, out=out, console=console, on=on, address=address)
    print_final(read_summary(done.path), console)
    console.print(f"report: {done.path / 'report.html'}", soft_wrap=True)
