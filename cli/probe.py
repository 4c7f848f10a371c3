"""`revprobe probe`: readings of one model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RevprobeError
from .loading import Load, load_named, load_options, no_config
from .running import Address, On, interruptible, quick_imports

if TYPE_CHECKING:
    from rich.console import Console

    from ..models.probed import ProbedModel
    from ..probes.pairs.pairs import ReversalPairs
    from ..probes.readings.readings import Readings

ControlNames = Annotated[
    str,
    typer.Option(help="Beside shuffled facts: untrained, neighbour, sink, parent, separated by commas, or all."),
]
ParentModel = Annotated[
    str | None,
    typer.Option(help="The model of the control 'parent', named like the model; --load parent:NAME=VALUE is its."),
]
ParentPairs = Annotated[str | None, typer.Option(help="The parent's pairs; those of --pairs by default.")]
WorkerCount = Annotated[
    int | None, typer.Option(help="On a cluster: processes that share the pairs; by default, as many as fit.")
]
Folder = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the readings, one parquet file each.")]
InParts = Annotated[
    int | None,
    typer.Option(
        "--in-parts",
        help="For many pairs in a file: so many at a time, rows as parquet in --out; the same command goes on.",
    ),
]


def probe(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, a hub name or a registered model.")],
    pairs: Annotated[str, typer.Option(help="letters:LENGTH, or a JSONL file written by ReversalPairs.save.")],
    probes: Annotated[str, typer.Option(help="Which probes, separated by commas.")] = "attention,gradient,probability",
    out: Folder = None,
    step: Annotated[int, typer.Option(help="A run's checkpoint: a step, or -1 for the last.")] = -1,
    weights: Annotated[
        str | None, typer.Option(help="raw or ema; a run's average by default, where it has one.")
    ] = None,
    placements: Annotated[
        str | None, typer.Option(help="letters only: grid, mirror or all; as at a run's snapshots by default.")
    ] = None,
    alphabet: Annotated[int, typer.Option(help="letters only: how many letter pairs.")] = 26,
    batch_size: Annotated[int | None, typer.Option(help="Queries per forward pass.")] = None,
    in_parts: InParts = None,
    controls: ControlNames = "",
    parent: ParentModel = None,
    parent_pairs: ParentPairs = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    load: Load = None,
    on: On = "local",
    address: Address = None,
    workers: WorkerCount = None,
    threads: Annotated[int, typer.Option(help="On a cluster: threads, and CPUs, of each process.")] = 1,
) -> None:
    """Take readings of one model and show them beside their controls."""
    with quick_imports():
        from ..engines.known import workers as workers_of
        from ..finetune.runs.progress import shown_probes
        from ..finetune.training.probe_callback import take_readings
        from ..probes.fused import require_probes
        from ..probes.passes.shared_out import shared_out
        from ..report.summary.terminal import controls_table, make_console, print_readings, read_as

    if not (names := require_probes(listed(probes))):
        raise RevprobeError("--probes names no probe; expected some of attention, gradient, probability")
    against = controls_of(controls, names, parent, parent_pairs)
    own, theirs = parted_load(load, parent)
    require_out(out, in_parts, pairs, against)
    no_config(model)
    loading = load_options(own, step=step, weights=weights)
    team = workers_of(on, count=workers, address=address, device=device or "cpu", threads=threads, **loading)
    console = make_console()
    if in_parts is not None and out is not None:
        source = model if team else load_named(model, device=device, **loading)
        show_parts(source, pairs, out, console, size=in_parts, only=names, batch_size=batch_size, workers=team)
        return
    with shared_out(team, model, device=device, **loading) as (probed, share):
        given = pairs_of(pairs, probed, placements, alphabet)
        elder = None if parent is None else load_named(parent, **load_options(theirs, step=-1, device=device))
        beside = elder and (elder, pairs_of(parent_pairs or pairs, elder, placements, alphabet))
        options: dict[str, Any] = {"batch_size": batch_size, "controls": against, "parent": beside, "share": share}
        with shown_probes(names, console) as options["listener"]:
            readings = take_readings(probed, {name: given.for_probe(name) for name in names}, **options)
    print_readings(readings, f"{probed.name} ({read_as(readings)}), {pairs}", console)
    if against:
        console.print(controls_table(readings, "controls"))
    if out:
        save_each(readings, out, console)


def save_each(readings: Readings, out: Path, console: Console) -> None:
    """Every reading as a file of its own in the folder."""
    for reading in readings:
        reading.save(out / f"{reading.name}.{reading.meta.get('weights') or 'raw'}.parquet")
    console.print(f"{len(readings)} readings: {out}", soft_wrap=True)


def require_out(out: Path | None, size: int | None, pairs: str, controls: Sequence[str]) -> None:
    """Tell a wrong `--out`, and what `--in-parts` cannot do, before the model is loaded.

    Raises: RevprobeError or OSError.
    """
    if size is None:
        if out is not None:
            require_folder(out)
        return
    if size < 2:
        raise RevprobeError(f"--in-parts {size}: expected two pairs in a part or more, such as 5000")
    if out is None:
        raise RevprobeError(f"--in-parts {size} needs a folder for the rows of its parts; name one with --out")
    if pairs.startswith("letters:"):
        raise RevprobeError(f"--pairs {pairs} --in-parts {size}: letters are few; expected a file of pairs")
    if controls:
        raise RevprobeError(
            f"--controls {controls[0]} --in-parts {size}: parts have shuffled facts alone; leave one out"
        )


def show_parts(source: ProbedModel | str, pairs: str, out: Path, console: Console, **asked: Any) -> None:
    """Probe in parts, tell how far it is, and show the numbers of all parts together."""
    from ..finetune.runs.progress import shown_progress
    from ..probes.in_parts import probe_in_parts
    from ..report.summary.terminal import print_readings

    name = source if isinstance(source, str) else source.name
    with interruptible(console, "part"), shown_progress(name, console, unit="pair") as listener:
        told: list[int] = [-1]  # a part's end is told by its probes and again for itself

        def tell(done: int, of: int) -> None:
            if done != told[-1]:
                told[:] = [done]
                listener(done, of, None)

        table = probe_in_parts(source, pairs, out, progress=tell, **asked)
    print_readings(table, f"{name}, {pairs}", console)
    console.print(f"rows of {table['probe'].nunique()} probes, and measures.csv: {out}", soft_wrap=True)


def listed(names: str) -> list[str]:
    """The names in "attention, gradient"."""
    return [name.strip() for name in names.split(",") if name.strip()]


def controls_of(names: str, probes: list[str], parent: str | None, parent_pairs: str | None) -> tuple[str, ...]:
    """What `--controls` names. Raises: RevprobeError, for an unknown control, or a parent that does not fit."""
    from ..probes.controls import CONTROLLED, PARENT, require_controls

    asked = listed(names)
    if asked and not {*probes} & {*CONTROLLED}:
        raise RevprobeError(f"--controls {names}: expected attention or gradient among --probes; others have none")
    if parent is None and parent_pairs is not None:
        raise RevprobeError(f"--parent-pairs {parent_pairs} without --parent; name the model that they are for")
    if parent is None and PARENT in asked:
        raise RevprobeError(f"--controls {names} needs the parent; name it with --parent MODEL")
    if parent is not None and not {PARENT, "all"} & {*asked}:
        raise RevprobeError(f"--parent {parent} is not asked for; add parent to --controls, or let it be all")
    return require_controls(asked, parent is not None)


def parted_load(load: list[str] | None, parent: str | None) -> tuple[list[str], list[str]]:
    """The model's `--load NAME=VALUE`, and the parent's `--load parent:NAME=VALUE`, without the prefix.

    Raises: RevprobeError, for an option of a parent that is not there.
    """
    own = [text for text in load or () if not text.startswith("parent:")]
    theirs = [text.removeprefix("parent:") for text in load or () if text.startswith("parent:")]
    if theirs and parent is None:
        raise RevprobeError(f"--load parent:{theirs[0]} without --parent; name the model that it is for")
    return own, theirs


def require_folder(out: Path) -> None:
    """Make the folder, and a file in it, so that a wrong `--out` costs no probing. Raises: OSError, when it cannot."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def require_place(out: Path, ours: Callable[[Path], bool]) -> None:
    """Tell a wrong `--out` before anything is probed: it can be written, and replaces nothing but what `ours` knows.

    Raises: RevprobeError or OSError, when it cannot, or would.
    """
    from ..atomic_files import require_replaceable

    require_replaceable(out, ours)
    require_folder(out.parent)


def pairs_of(source: str, model: ProbedModel, placements: str | None = None, alphabet: int = 26) -> ReversalPairs:
    """The pairs that `--pairs` names, for a model."""
    from ..probes.pairs.pairs import ReversalPairs
    from ..relations.catalog import letters

    kind, _, length = source.partition(":")
    if kind != "letters":
        return ReversalPairs.load(source, tokenizer=model.tokenizer)
    if not length.isdecimal():
        raise RevprobeError(f"--pairs {source!r}: expected letters:LENGTH with a whole number, such as letters:10")
    return letters(int(length), alphabet).pairs(model, placements=placements)
