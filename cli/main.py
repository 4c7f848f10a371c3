"""The command line; each command stands in a file of its name.

Every problem a user can fix ends in one line on stderr and exit code 1 (2 for wrong usage), without a traceback;
REVPROBE_DEBUG=1 shows it. Heavy imports stay inside the commands, so that help and usage errors come at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import RevprobeError, first_line
from .block_sweep import block_sweep
from .compare_models import compare_models
from .dashboard import dashboard
from .data import data
from .diagnose import diagnose
from .evaluate import evaluate
from .finetune import finetune
from .models import models
from .plan import plan
from .pretrain import pretrain
from .probe import probe
from .report import report
from .reproduce import reproduce
from .sweep import sweep
from .train import train

DEBUG = "REVPROBE_DEBUG"
STOPPED, INTERRUPTED = "stopped", 130


class _Interruptible(TyperGroup):
    """Commands that Ctrl-C ends with one line, also while they still import or read their config."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Interruptible,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Measure how a language model stores a relation and how it routes to it when asked backwards.",
    epilog="A first look, about five minutes on two cores: [bold]revprobe sweep one-layer-quick --jobs 2[/bold]",
)


def main() -> None:
    """Run the command line; the entry point of `revprobe` and of `python -m revprobe`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal of another encoding has no "±"; it gets a "?" there and not an error.
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        app()
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        line = first_line(error, with_type=False)
        if isinstance(error, OSError):
            where = f" {str(error.filename)!r}" if error.filename else ""
            fix = {
                PermissionError: "; choose a folder you may write to (--out)",
                FileExistsError: "; it is in the way, choose another --out",
            }.get(type(error), "; check the path and the space left on the disk")
            line = f"cannot use{where}: {error.strerror or line}{fix}"
        elif isinstance(error, MemoryError) or "allocate memory" in line or "out of memory" in line:
            line = f"not enough memory ({line[:120]}); ask for a smaller model, batch or length, or another device"
        elif not isinstance(error, RevprobeError):
            line = f"unexpected {first_line(error)}; {DEBUG}=1 shows where; please report it"
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"revprobe {version('revprobe')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", hidden=True)] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


app.command(
    epilog="Examples: [bold]revprobe train my_run.yaml[/bold], [bold]revprobe train my_run.yaml --out /data/runs[/bold]"
)(train)
app.command(
    epilog="Examples: [bold]revprobe probe runs/one-layer-quick/rope-l10-s0 --pairs letters:10[/bold], "
    "[bold]revprobe probe gpt2 --pairs pairs.jsonl --probes attention,probability --out readings[/bold]"
)(probe)
app.command(
    epilog="Examples: [bold]revprobe compare-models parent=Qwen/Qwen2.5-7B child=Dream-org/Dream-v0-Base-7B "
    "--pairs pairs.jsonl[/bold], [bold]revprobe compare-models a=FOLDER b=FOLDER --pairs a=a.jsonl --pairs b=b.jsonl "
    "--load b.bidirectional=true --out compared[/bold]"
)(compare_models)
app.command(
    epilog="Examples: [bold]revprobe sweep one-layer-quick --jobs 2[/bold], "
    "[bold]revprobe sweep my_sweep.yaml -j 8 -o /data/runs[/bold]"
)(sweep)
app.command(
    epilog="Examples: [bold]revprobe report runs/one-layer-quick[/bold], "
    "[bold]revprobe report runs/one-layer-quick/rope-l10-s0[/bold], "
    "[bold]revprobe report runs/one-layer-quick --bundle to-share[/bold]"
)(report)
app.command(epilog="Example: [bold]revprobe models[/bold]")(models)
app.command(
    epilog="Examples: [bold]revprobe diagnose gpt2[/bold], "
    "[bold]revprobe diagnose runs/one-layer-quick/rope-l10-s0[/bold]"
)(diagnose)
app.command(
    epilog="Examples: [bold]revprobe evaluate runs/llada-p2c-s0[/bold], "
    "[bold]revprobe evaluate gpt2 --relation invented_names --direction P2C --out readings[/bold]"
)(evaluate)
app.command(
    epilog="Examples: [bold]revprobe finetune finetune-tiny --jobs 2[/bold], "
    "[bold]revprobe finetune my_finetuning.yaml[/bold]"
)(finetune)
app.command(
    epilog="Examples: [bold]revprobe pretrain mini-models[/bold], "
    "[bold]revprobe pretrain mini-models --only mini-llada[/bold]"
)(pretrain)
app.command(
    epilog="Examples: [bold]revprobe plan llada-8b-parent-child[/bold], "
    "[bold]revprobe plan my_finetuning.yaml --memory 24 --tokens 40[/bold]"
)(plan)
app.command(epilog="Examples: [bold]revprobe dashboard runs[/bold], [bold]revprobe dashboard runs --port 0[/bold]")(
    dashboard
)
app.command(epilog="Example: [bold]revprobe data data[/bold]")(data)
app.command(
    "block-sweep",
    epilog="Example: [bold]revprobe block-sweep JetLM/SDAR-1.7B-Chat --pairs pairs.jsonl --sizes 1,2,4,whole[/bold]",
)(block_sweep)
app.add_typer(reproduce, name="reproduce")
