"""`revprobe data`: files that look like the published ones, for those who lack them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def data(
    folder: Annotated[Path, typer.Argument(help="The folder to write; one that holds other things is refused.")],
    seed: Annotated[int, typer.Option(min=0, help="Draws who goes with what.")] = 0,
) -> None:
    """Write look-alikes of the Parent-Child, Person-Description and T-REx files, with invented people and things."""
    from ..relations.invented.look_alike import look_alike_data
    from ..report.summary.terminal import make_console

    written = look_alike_data(folder, seed)
    for name in ("parent_child_pairs.csv", "person_description", "trex"):
        make_console().print(str(written / name), soft_wrap=True)
