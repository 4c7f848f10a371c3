"""The command line: train, probe, sweep, report and models; the other commands stand beside this file.

Every problem a user can fix ends in one line on stderr and exit code 1 (2 for wrong usage), without a traceback;
REVPROBE_DEBUG=1 shows it. Heavy imports stay inside the commands, so that help and usage errors come at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RevprobeError, first_line
from .dashboard import dashboard
from .evaluate import evaluate
from .finetune import finetune, interruptible, plan
from .reproduce import reproduce

if TYPE_CHECKING:
    from ..finetune.training.probe_callback import Pairs
    from ..models.probed import ProbedModel

DEBUG = "REVPROBE_DEBUG"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Measure how a language model stores a relation and how it routes to it when asked backwards.",
    epilog="A first look, about five minutes on two cores: [bold]revprobe sweep one-layer-quick --jobs 2[/bold]",
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder that gets a folder of the config's name.")]


def main() -> None:
    """Run the command line; the entry point of `revprobe` and of `python -m revprobe`."""
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


@app.command(
    epilog="Examples: [bold]revprobe train my_run.yaml[/bold], [bold]revprobe train my_run.yaml --out /data/runs[/bold]"
)
def train(
    config: Annotated[str, typer.Argument(help="A run's YAML file; - reads it from stdin.")],
    out: Out = Path("runs"),
) -> None:
    """Train one run forward-only and probe it at every snapshot; the same command resumes a run that was stopped."""
    from ..finetune.config.loading import load_config, parse_config
    from ..finetune.config.one_layer import RunConfig
    from ..finetune.runs.one_layer import train as train_run
    from ..finetune.runs.open import is_finished
    from ..finetune.runs.progress import JSON_PROGRESS, json_lines, shown_progress
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


@app.command(
    epilog="Examples: [bold]revprobe probe runs/one-layer-quick/rope-l10-s0 --pairs letters:10[/bold], "
    "[bold]revprobe probe gpt2 --pairs pairs.jsonl --probes attention,probability --out readings[/bold]"
)
def probe(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, a hub name or a registered model.")],
    pairs: Annotated[str, typer.Option(help="letters:LENGTH, or a JSONL file written by ReversalPairs.save.")],
    probes: Annotated[str, typer.Option(help="Which probes, separated by commas.")] = "attention,gradient,probability",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the readings, one parquet file each.")
    ] = None,
    step: Annotated[int, typer.Option(help="A run's checkpoint: a step, or -1 for the last.")] = -1,
    weights: Annotated[
        str | None, typer.Option(help="raw or ema; a run's average by default, where it has one.")
    ] = None,
    placements: Annotated[
        str | None, typer.Option(help="letters only: grid, mirror or all; as at a run's snapshots by default.")
    ] = None,
    alphabet: Annotated[int, typer.Option(help="letters only: how many letter pairs.")] = 26,
    batch_size: Annotated[int | None, typer.Option(help="Queries per forward pass.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Take readings of one model and show them beside their controls."""
    from ..finetune.runs.progress import shown_probes
    from ..finetune.training.probe_callback import take_readings
    from ..models.registry import load_model
    from ..probes.fused import require_probes
    from ..report.summary.terminal import make_console, readings_table

    names = require_probes(name.strip() for name in probes.split(",") if name.strip())
    if not names:
        raise RevprobeError("--probes names no probe; expected some of attention, gradient, probability")
    if out is not None:
        # A folder and a file in it, so that a wrong --out costs no probing.
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    probed = load_model(model, step=step, weights=weights, device=device)
    asked = _pairs(pairs, probed, names, placements, alphabet)
    console = make_console()
    with shown_probes(names, console) as listener:
        readings = take_readings(probed, asked, batch_size=batch_size, listener=listener)
    console.print(readings_table(readings, f"{probed.name}, {pairs}"))
    if out is not None:
        for reading in readings:
            reading.save(out / f"{reading.name}.{reading.meta.get('weights') or 'raw'}.parquet")
        console.print(f"{len(readings)} readings: {out}", soft_wrap=True)


@app.command(
    epilog="Examples: [bold]revprobe sweep one-layer-quick --jobs 2[/bold], "
    "[bold]revprobe sweep my_sweep.yaml -j 8 -o /data/runs[/bold]"
)
def sweep(
    config: Annotated[
        str, typer.Argument(help="A sweep's YAML file, or an example: one-layer-quick, one-layer, robustness.")
    ],
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Runs side by side, each in a process of its own.")
    ] = 1,
    out: Out = Path("runs"),
) -> None:
    """Train a grid of runs, skipping finished ones, and write one report over all of them."""
    from ..report.run_sweep import run_sweep
    from ..report.summary.terminal import make_console, print_final, read_summary

    console = make_console()
    with interruptible(console):
        done = run_sweep(config, jobs=jobs, out=out, console=console)
    print_final(read_summary(done.path), console)
    console.print(f"report: {done.path / 'report.html'}", soft_wrap=True)


@app.command(
    epilog="Examples: [bold]revprobe report runs/one-layer-quick[/bold], "
    "[bold]revprobe report runs/one-layer-quick/rope-l10-s0[/bold]"
)
def report(path: Annotated[Path, typer.Argument(help="The folder of a run or of a sweep.")]) -> None:
    """Write report.html (one file, opens without a network) and summary.csv into the folder of a run or sweep."""
    from ..finetune.runs.open import open_run
    from ..finetune.runs.run import is_run
    from ..finetune.runs.sweeps import open_sweep
    from ..report.html.finetune_sections import finetune_sections
    from ..report.html.report import write_report
    from ..report.run_sweep import shown_records
    from ..report.summary.terminal import make_console, print_final, read_summary

    console = make_console()
    if is_run(path):
        one = open_run(path)
        runs, sections = [one.record()], finetune_sections([one])
    else:
        all_of_them = open_sweep(path)
        runs, sections = shown_records(all_of_them, console), finetune_sections(all_of_them.runs)
    written = write_report(runs, path / "report.html", title=path.resolve().name, sections=sections)
    print_final(read_summary(path), console)
    console.print(f"report: {written}", soft_wrap=True)
    problems = [f"{run.name}: {run.problem}" for run in runs if run.problem]
    if problems:
        raise RevprobeError(
            f"the report is written, but {len(problems)} of {len(runs)} runs are not whole ({'; '.join(problems)})"
        )


@app.command(epilog="Example: [bold]revprobe models[/bold]")
def models() -> None:
    """List what can be probed, and the example configs."""
    from ..finetune.config.loading import example_names
    from ..models.registry import list_models
    from ..report.summary.terminal import make_console, text_table

    console = make_console()
    console.print(text_table(list_models(), "models"))
    console.print(f"example sweeps: {', '.join(example_names())}", soft_wrap=True)


app.command(
    epilog="Examples: [bold]revprobe evaluate runs/llada-p2c-s0[/bold], "
    "[bold]revprobe evaluate gpt2 --relation invented_names --direction P2C --out readings[/bold]"
)(evaluate)
app.command(
    epilog="Examples: [bold]revprobe finetune finetune-tiny --jobs 2[/bold], "
    "[bold]revprobe finetune my_finetuning.yaml[/bold]"
)(finetune)
app.command(
    epilog="Examples: [bold]revprobe plan llada-8b-parent-child[/bold], "
    "[bold]revprobe plan my_finetuning.yaml --memory 24 --tokens 40[/bold]"
)(plan)
app.command(epilog="Examples: [bold]revprobe dashboard runs[/bold], [bold]revprobe dashboard runs --port 0[/bold]")(
    dashboard
)
app.add_typer(reproduce, name="reproduce")


def _pairs(source: str, model: ProbedModel, names: list[str], placements: str | None, alphabet: int) -> Pairs:
    """What `--pairs` names, for each of the probes asked for."""
    from ..finetune.runs.one_layer import probe_pairs
    from ..probes.pairs.pairs import ReversalPairs
    from ..relations.catalog import letters

    kind, _, length = source.partition(":")
    if kind != "letters":
        pairs = ReversalPairs.load(source, tokenizer=model.tokenizer)
        return dict.fromkeys(names, pairs)
    if not length.isdecimal():
        raise RevprobeError(f"--pairs {source!r}: expected letters:LENGTH with a whole number, such as letters:10")
    relation = letters(int(length), alphabet)
    if placements is not None:
        return dict.fromkeys(names, relation.pairs(model, placements=placements))
    return {name: pairs for name, pairs in probe_pairs(relation, model).items() if name in names}
