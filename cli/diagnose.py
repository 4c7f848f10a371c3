"""`revprobe diagnose`: whether the probes can be trusted on a model."""

from __future__ import annotations

from typing import Annotated

import typer

from .loading import Load, load_named, load_options
from .running import quick_imports


def diagnose(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, a hub name or a registered model.")],
    step: Annotated[int, typer.Option(help="A run's checkpoint: a step, or -1 for the last.")] = -1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; the checkpoint's by default.")] = None,
    load: Load = None,
) -> None:
    """Try what the probes take for granted on a model; exit status 0 only if all three can be trusted on it."""
    with quick_imports():
        from ..probes.diagnose import diagnose as examine
        from ..report.summary.terminal import make_console, text_table

    found = examine(load_named(model, **load_options(load, step=step, device=device, dtype=dtype)))
    console = make_console()
    console.print(text_table(found.shown(), f"{found.model}: {found.verdict}"))
    if not found.trustworthy:
        raise typer.Exit(1)
