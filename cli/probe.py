"""`revprobe probe`: readings of one model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RevprobeError
from .loading import Load, load_options

if TYPE_CHECKING:
    from ..models.probed import ProbedModel
    from ..probes.pairs.pairs import ReversalPairs


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
    controls: Annotated[
        str,
        typer.Option(help="Beside shuffled facts: untrained, neighbour, sink, parent, separated by commas, or all."),
    ] = "",
    parent: Annotated[str | None, typer.Option(help="The parent model, named like the model.")] = None,
    parent_pairs: Annotated[str | None, typer.Option(help="The parent's pairs; those of --pairs by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    load: Load = None,
) -> None:
    """Take readings of one model and show them beside their controls."""
    from ..finetune.runs.progress import shown_probes
    from ..finetune.training.probe_callback import take_readings
    from ..models.registry import load_model
    from ..probes.fused import require_probes
    from ..report.summary.terminal import controls_table, make_console, read_as, readings_table

    names = require_probes(name.strip() for name in probes.split(",") if name.strip())
    against = controls_of(controls, parent, parent_pairs)
    if not names:
        raise RevprobeError("--probes names no probe; expected some of attention, gradient, probability")
    if out is not None:
        # A folder and a file in it, so that a wrong --out costs no probing.
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    probed = load_model(model, **load_options(load, step=step, weights=weights, device=device))
    given = pairs_of(pairs, probed, placements, alphabet)
    asked = {name: given.for_probe(name) for name in names}
    beside: dict[str, Any] = {"controls": against}
    if parent is not None:
        elder = load_model(parent, step=-1, device=device)
        beside["parent"] = elder, pairs_of(parent_pairs or pairs, elder, placements, alphabet)
    console = make_console()
    with shown_probes(names, console) as listener:
        readings = take_readings(probed, asked, batch_size=batch_size, listener=listener, **beside)
    console.print(readings_table(readings, f"{probed.name} ({read_as(readings)}), {pairs}"))
    if against:
        console.print(controls_table(readings, "what the signatures are held against"))
    if out is not None:
        for reading in readings:
            reading.save(out / f"{reading.name}.{reading.meta.get('weights') or 'raw'}.parquet")
        console.print(f"{len(readings)} readings: {out}", soft_wrap=True)


def controls_of(names: str, parent: str | None, parent_pairs: str | None) -> tuple[str, ...]:
    """What `--controls` names. Raises: RevprobeError, for an unknown control, or a parent that does not fit."""
    from ..probes.controls import PARENT, require_controls

    asked = [name.strip() for name in names.split(",") if name.strip()]
    if parent is None and (parent_pairs is not None or PARENT in asked):
        raise RevprobeError(
            f"--parent-pairs {parent_pairs} without --parent; name the model that they are for"
            if parent_pairs is not None
            else f"--controls {names} needs the parent; name it with --parent MODEL"
        )
    return require_controls(asked, parent is not None)


def require_place(out: Path, ours: Callable[[Path], bool]) -> None:
    """Tell a wrong `--out` before anything is probed: it can be written, and replaces nothing but what `ours` knows.

    Raises: RevprobeError or OSError, when it cannot, or would.
    """
    from ..atomic_files import require_replaceable

    require_replaceable(out, ours)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):
        pass


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
