"""What the commands that train share: where their runs go, and what Ctrl-C leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder that gets a folder of the config's name.")]


@contextmanager
def interruptible(console: Console) -> Iterator[None]:
    """Say what Ctrl-C leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("stopped; everything up to the last snapshot is kept, run the same command again to go on")
        raise typer.Exit(130) from None
