"""`revprobe reproduce`: the paper's tables beside ours, from the formulas or from trained one-layer models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RevprobeError, did_you_mean, first_line
from .running import Address, Jobs, On, interruptible, quick_imports

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from ..report.paper.section6.miniature import Miniature

reproduce = typer.Typer(
    no_args_is_help=True,
    help="The paper's tables, cell by cell: its value, ours with its spread over seeds, and the difference.",
)


def theory_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of the theory's tables as text for 80 columns: an error where there is one, no difference of -0."""
    from ..probes.theory.tables import MINIMUM

    numbers = zip(cells["ours"], cells["standard_error"], strict=True)
    ours = [f"{value:.3f}±{error:.3f}" if error else f"{value:.4f}" for value, error in numbers]
    apart = [f"{round(value, 4) + 0.0:.4f}" for value in cells["difference"]]  # -0.0 + 0.0 is 0.0
    verdict = cells["within"].map({True: "within", False: "OUTSIDE"})
    about = cells[["table", "row", "column"]].replace({"row": {MINIMUM: "minimum"}})
    about["column"] = about["column"].str.replace("tau", "τ").str.replace(" = ", "=")
    return about.assign(paper=cells["paper"].map("{:.3f}".format), ours=ours, difference=apart, verdict=verdict)


@reproduce.command(epilog="Example: [bold]revprobe reproduce theory --out runs/theory[/bold]")
def theory(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for theory.csv and reproduction.md.")] = Path(
        "runs/theory"
    ),
) -> None:
    """Tables 3, 4 and 5 from the formulas, in seconds."""
    from ..probes.theory.tables import theory_tables
    from ..report.paper.markdown import theory_markdown, write_reproduction
    from ..report.summary.terminal import make_console, text_table

    cells = theory_tables()
    written = write_reproduction(out, {"theory": cells}, theory_markdown(cells), "The paper's theory, cell by cell")
    console = make_console()
    console.print(text_table(theory_cells(cells), "Tables 3, 4 and 5 (printed to 3 digits; ±: over random queries)"))
    for note in cells.loc[~cells["within"].astype(bool), ["table", "column", "note"]].itertuples():
        console.print(f"Table {note.table}, {note.column}: {note.note}")
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


@reproduce.command(
    "one-layer",
    epilog="Examples: [bold]revprobe reproduce one-layer --jobs 2[/bold], "
    "[bold]revprobe reproduce one-layer --lengths 10 --seeds 1[/bold], "
    "[bold]revprobe reproduce one-layer --device cuda[/bold]",
)
def one_layer(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each cell, from 0.")] = 3,
    jobs: Jobs = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder that gets the folder one-layer.")] = Path("runs"),
    lengths: Annotated[
        str | None, typer.Option(help="Sequence lengths, separated by commas; all of 10,20,30,40 by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where new runs are trained: cpu, cuda, or auto.")] = "cpu",
    batched: Annotated[
        bool | None,
        typer.Option(
            "--batched/--separate", help="Runs of one shape as one model, without --jobs; by default on a GPU."
        ),
    ] = None,
    on: On = "local",
    address: Address = None,
    train: Annotated[
        bool, typer.Option("--train/--table-only", help="Or only the tables of what has been run.")
    ] = True,
) -> None:
    """Tables 1 and 2 and Figure 3 from trained models; hours on two cores, and the same command goes on."""
    with quick_imports():
        from ..report.paper.reproduce import one_layer_sweep
        from ..report.run_sweep import RunsFailed, run_sweep
        from ..report.summary.terminal import make_console

    asked = one_layer_sweep(seeds=seeds, lengths=_lengths(lengths), device=device)
    console, failed = make_console(), None
    if train:
        if batched is None:
            import torch

            batched = on == "local" and (device == "cuda" or (device == "auto" and torch.cuda.is_available()))
        try:
            run_sweep(asked, jobs=jobs, out=out, console=console, batched=batched, on=on, address=address)
        except RunsFailed as error:  # the runs that are whole still make a table
            failed = error
        except KeyboardInterrupt:
            console.print("stopped; finished runs and checkpoints are kept, run the same command again to go on")
            raise typer.Exit(130) from None
    try:
        _tabulate(out / asked.name, seeds, console)
    except RevprobeError as error:
        raise (failed or error) from error
    if failed is not None:
        raise failed


def _tabulate(folder: Path, seeds: int, console: Console) -> None:
    """Print and write the tables of what has been run in `folder`. Raises: RevprobeError, when no run is finished."""
    from ..report.paper.markdown import one_layer_markdown, write_reproduction
    from ..report.paper.reproduce import NOT_RUN, collect_measures, compare, one_layer_sweep

    if not folder.is_dir():
        raise RevprobeError(f"no runs at {str(folder)!r}; expected the folder of a sweep, or leave --table-only out")
    measures, left_out = collect_measures(folder, one_layer_sweep(seeds=seeds).runs())
    for name, problem in left_out.items():
        if problem != NOT_RUN:
            console.print(f"{name}: not in the tables: {problem}", soft_wrap=True)
    if measures.empty:
        raise RevprobeError(f"no finished run in {str(folder)!r}; no table was written, run without --table-only first")
    result = compare(measures, seeds=seeds)
    text = one_layer_markdown(result, seeds=seeds)
    written = write_reproduction(folder, result.frames, text, "Tables 1 and 2 and Figure 3 of the paper")
    console.print(text, soft_wrap=True)
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


def _lengths(asked: str | None) -> list[int] | None:
    if asked is None:
        return None
    parts = [part.strip() for part in asked.split(",")]
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise RevprobeError(f"--lengths {asked!r}: {wrong[0]!r} is no length; expected whole numbers such as 10,20")
    return [int(part) for part in parts]


@reproduce.command(
    epilog="Examples: [bold]revprobe reproduce section6 --quick[/bold], "
    "[bold]revprobe reproduce section6 --jobs 2[/bold], "
    "[bold]revprobe reproduce section6 --only main --only ablations[/bold]",
)
def section6(
    quick: Annotated[
        bool, typer.Option("--quick", help="The whole path in small, in minutes and without any file: no result.")
    ] = False,
    jobs: Jobs = None,
    on: On = "local",
    address: Address = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder of models, runs and page; runs, or runs/section6-quick.", show_default=False
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Of main, ablations, methods these alone; repeat it.")
    ] = None,
    data: Annotated[
        Path, typer.Option("--data", help="Folder of the published files or their look-alikes (`revprobe data`).")
    ] = Path("data"),
    device: Annotated[str, typer.Option(help="Where new runs are fine-tuned: cpu, cuda, or auto.")] = "cpu",
    train: Annotated[bool, typer.Option("--train/--table-only", help="Or only the page of what has been run.")] = True,
) -> None:
    """Table 7 and Figures 4 and 6 on small models made here; hours on two cores, and the same command goes on."""
    from ..report.paper.section6.miniature import PARTS, Miniature
    from ..report.summary.terminal import make_console

    if wrong := [part for part in only or () if part not in PARTS]:
        raise RevprobeError(f"--only {wrong[0]!r} is no part of Section 6{did_you_mean(wrong[0], list(PARTS))}")
    folder = out or Path("runs/section6-quick" if quick else "runs")
    asked = Miniature.of(folder, data=data, only=only or (), device=device, quick=quick)
    console, failed = make_console(), list[str]()
    if train:
        with interruptible(console):
            failed = _make_section6(asked, console, jobs=jobs, on=on, address=address)
    try:
        _write_section6(asked, console)
    except RevprobeError as error:
        raise (RevprobeError("; ".join(failed)) if failed else error) from error
    if failed:
        raise RevprobeError("; ".join(failed))


def _make_section6(asked: Miniature, console: Console, **where: Any) -> list[str]:
    """Sweep by sweep the models it needs, then its runs; returns what failed, which keeps nothing else from being made.

    Runs whose model could not be made are not started, and stand in the tables as not run.

    Raises: RevprobeError, for missing data and for a sweep's folder of something else, before its runs are begun.
    """
    with quick_imports():
        from ..finetune.runs.pretraining import pretrain
        from ..finetune.runs.progress import shown_progress
        from ..report.run_sweep import RunsFailed, run_sweep

    asked.require_data()
    failed: dict[str, str] = {}
    for sweep in asked.sweeps_to_run():
        for one in asked.models_of(sweep):
            if one.name in failed:
                continue
            try:
                with shown_progress(one.name, console) as listener:
                    pretrain(one, asked.models_folder / one.name, listener=listener)
            except Exception as error:  # the other models make a page
                failed[one.name] = f"{one.name}: {first_line(error, with_type=not isinstance(error, RevprobeError))}"
                console.print(f"failed: {failed[one.name]}", soft_wrap=True)
        able, planned = asked.runs_without(sweep, failed), len(sweep.runs())
        if len(able) < planned:
            without = f"{planned - len(able)} of {planned} runs are not started, for want of their model"
            console.print(f"{sweep.name}: {without}", soft_wrap=True)
        if not able:
            continue
        try:
            run_sweep(sweep, out=asked.out, console=console, only=able, **where)
        except RunsFailed as error:
            failed[sweep.name] = f"{sweep.name}: {error}"
    return list(failed.values())


def _write_section6(asked: Miniature, console: Console) -> None:
    """Collect what has been run, write the page in both forms and print its few lines."""
    from ..report.html.section6 import write_html
    from ..report.paper.section6.sentences import Told

    found = asked.collect()
    written = asked.write(found)
    written.insert(0, write_html(found, asked.out))
    if asked.quick:
        console.print("Quick variant: the path works; none of this is a result.")
    for line in Told(found).short():
        console.print(line, soft_wrap=True)
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)
