"""`revprobe compare-models`: the same readings of several models, and their paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RevprobeError, did_you_mean
from .loading import options_by_model
from .probe import pairs_of, require_place
from .running import quick_imports


def compare_models(
    models: Annotated[
        list[str], typer.Argument(help="NAME=MODEL, two or more, the parent first; a folder, a run or a hub name.")
    ],
    pairs: Annotated[
        list[str],
        typer.Option(help="A JSONL file written by ReversalPairs.save, or letters:LENGTH; NAME=FILE for one model."),
    ],
    probes: Annotated[str, typer.Option(help="Which probes, separated by commas.")] = "attention,gradient,probability",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the readings, the numbers and their figure.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Queries per forward pass.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    load: Annotated[
        list[str] | None,
        typer.Option(
            "--load",
            help="An option of load_model, NAME:OPTION=VALUE for one model, such as child:block_size=32, or "
            "OPTION=VALUE for all; repeatable.",
        ),
    ] = None,
) -> None:
    """Take the same readings of two or more models, and show by how much they differ on the facts that they share."""
    named = _named(models)
    sources, loading = _pairs_by_model(pairs, named), options_by_model(load, named, device=device)
    with quick_imports():
        from ..finetune.runs.progress import shown_probes
        from ..probes.compare_models import compare_models as compare
        from ..probes.figures.plot import save_figure
        from ..probes.fused import require_probes
        from ..probes.readings.model_comparison import of_a_comparison
        from ..report.summary.fitted import Narrow
        from ..report.summary.terminal import make_console, read_as, text_table

    only = require_probes(name.strip() for name in probes.split(",") if name.strip())
    if out is not None:
        require_place(out, of_a_comparison)
    asked = {name: partial(pairs_of, source) for name, source in sources.items()}
    console = make_console()
    with shown_probes(list(named), console) as listener:
        found = compare(named, asked, only=only, batch_size=batch_size, load=loading, progress=listener)
    table = found.table()
    title = ", ".join(f"{name}: {model} ({read_as(found.readings[name])})" for name, model in named.items())
    narrow = Narrow(
        {"kind": ("measure", "{}"), "n / facts": ("all facts", "n {}"), "n / common": ("common facts", "n {}")}
    )
    console.print(text_table(table.drop(columns="note"), title, narrow))
    for (model, note), part in table[table["note"] != "-"].groupby(["model", "note"], sort=False):
        console.print(f"{model}, {', '.join(dict.fromkeys(part['measure']))}: {note}")
    if out is not None:
        found.save(out)
        found.frame.to_csv(out / "comparison.csv", index=False)
        save_figure(found.plot(), out / "comparison.html")
        console.print(f"readings, numbers and figure: {out}", soft_wrap=True)


def _named(models: Iterable[str]) -> dict[str, str]:
    """NAME=MODEL as a mapping. Raises: RevprobeError, for one without a name or a model, and a name given twice."""
    found: dict[str, str] = {}
    for text in models:
        name, _, model = text.partition("=")
        if not name.strip() or not model:
            raise RevprobeError(f"{text!r}: expected NAME=MODEL, such as parent=gpt2")
        if name in found:
            raise RevprobeError(f"two models are called {name!r}; give each a name of its own")
        found[name] = model
    return found


def _pairs_by_model(given: Iterable[str], models: Mapping[str, str]) -> dict[str, str]:
    """Where each model's pairs are: one SOURCE for all, or NAME=SOURCE for some of them.

    Raises: RevprobeError, for a name that no model has, two sources for one model, and a model without.
    """
    found: dict[str, str] = {}
    for_all: list[str] = []
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or (name not in models and Path(text).is_file()):
            for_all.append(text)
        elif name not in models or name in found:
            what = "has pairs already" if name in found else f"is none of the models{did_you_mean(name, models)}"
            raise RevprobeError(f"--pairs {text!r}: {name!r} {what}")
        else:
            found[name] = source
    if len(for_all) > 1:
        raise RevprobeError(f"--pairs {for_all[1]!r}: all models have {for_all[0]!r} already; use NAME=FILE")
    without = [name for name in models if name not in found]
    if without and not for_all:
        raise RevprobeError(f"no --pairs for {without[0]!r}; add --pairs {without[0]}=FILE, or --pairs FILE for all")
    return {name: found[name] if name in found else for_all[0] for name in models}
