"""`revprobe block-sweep`: one set of pairs at several block sizes of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RevprobeError
from .loading import Load, load_named, load_options
from .running import quick_imports


def block_sweep(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, a hub name or a registered model.")],
    pairs: Annotated[str, typer.Option(help="letters:LENGTH, or a JSONL file written by ReversalPairs.save.")],
    sizes: Annotated[
        str | None, typer.Option(help="Tokens of a block, by commas, and whole; powers of two, then whole, by default.")
    ] = None,
    probes: Annotated[str, typer.Option(help="Which probes, separated by commas.")] = "attention,gradient,probability",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the readings, the numbers and their figure.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Queries per forward pass.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    load: Load = None,
) -> None:
    """Read one set of pairs from token by token to the whole text at once, and draw the curve over block sizes."""
    asked = _sizes(sizes)
    with quick_imports():
        from ..finetune.runs.progress import shown_probes
        from ..probes.block_sweep import block_sweep as sweep
        from ..probes.figures.plot import save_figure
        from ..probes.fused import require_probes
        from ..probes.readings.block_sweep import of_a_sweep
        from ..report.summary.fitted import Narrow
        from ..report.summary.terminal import make_console, text_table
        from .probe import pairs_of, require_place

    only = require_probes(name.strip() for name in probes.split(",") if name.strip())
    if out is not None:
        require_place(out, of_a_sweep)
    probed = load_named(model, **load_options(load, device=device))
    console = make_console()
    with shown_probes(["queries"], console) as listener:
        found = sweep(
            probed,
            pairs_of(pairs, probed),
            sizes=asked,
            only=only,
            batch_size=batch_size,
            progress=None if listener is None else lambda _, done, total: listener("queries", done, total),
        )
    narrow = Narrow({"n / facts": ("common pairs", "n {}")}, notes=("note",), named=("measure", "block size"))
    console.print(text_table(found.table(), f"{probed.name} (loaded as {probed.reads}), {pairs}", narrow))
    if out is not None:
        found.save(out)
        found.frame.to_csv(out / "block_sweep.csv", index=False)
        save_figure(found.plot(), out / "block_sweep.html")
        console.print(f"readings, numbers and figure: {out}", soft_wrap=True)


def _sizes(text: str | None) -> list[int | None] | None:
    """Sizes as they are written on the command line. Raises: RevprobeError, for what is no size."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = next((part for part in parts if part != "whole" and not part.isdecimal()), None)
    if wrong is not None or not parts:
        raise RevprobeError(f"--sizes {wrong or text!r}: expected whole numbers and 'whole', such as 1,2,4,whole")
    return [None if part == "whole" else int(part) for part in parts]
