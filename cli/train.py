"""`revprobe train`: one run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .running import Out, interruptible, quick_imports


def train(
    config: Annotated[str, typer.Argument(help="A run's YAML file; - reads it from stdin.")],
    out: Out = Path("runs"),
) -> None:
    """Train one run forward-only and probe it at every snapshot; the same command resumes a run that was stopped."""
    with quick_imports():
        from ..engines.launcher import JSON_PROGRESS
        from ..finetune.config.loading import load_config, parse_config
        from ..finetune.config.one_layer import RunConfig
        from ..finetune.runs.one_layer import train as train_run
        from ..finetune.runs.open import is_finished
        from ..finetune.runs.progress import json_lines, shown_progress
        from ..finetune.runs.record import summary_frame
        from ..report.summary.terminal import make_console, print_final

    run_config = parse_config(sys.stdin.read(), RunConfig, "stdin") if config == "-" else load_config(config, RunConfig)
    folder, console = out / run_config.name, make_console()
    if os.environ.get(JSON_PROGRESS):  # a sweep is listening
        with interruptible(console):
            train_run(run_config, folder, listener=json_lines)
        return
    if is_finished(folder, run_config):
        console.print(f"{run_config.name}: finished already, skipped ({folder})", soft_wrap=True)
        return
    with interruptible(console), shown_progress(run_config.name, console) as listener:
        run = train_run(run_config, folder, listener=listener)
    print_final(summary_frame([run.record()]), console)
    console.print(f"checkpoints and readings: {folder}", soft_wrap=True)
