"""What the commands share: where work is done, where runs go, and what Ctrl-C leaves behind."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder that gets a folder of the config's name.")]

Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", min=1, help="Runs side by side, each in a process of its own: 1, or all that a cluster holds."
    ),
]
On = Annotated[str, typer.Option("--on", help="Where the work is done: local (here), or ray (on a cluster).")]
Address = Annotated[
    str | None,
    typer.Option(help="With --on ray: a cluster that is there, HOST:PORT or auto; else one is started here."),
]


@contextmanager
def interruptible(console: Console, last: str = "snapshot") -> Iterator[None]:
    """Say what Ctrl-C leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"stopped; everything up to the last {last} is kept, run the same command again to go on")
        raise typer.Exit(130) from None


@contextmanager
def quick_imports() -> Iterator[None]:
    """A command's imports, without Python looking for garbage among what will stay: two to three seconds less.

    Torch and transformers make a million objects. They are also left out of every later search, of which training
    asks for some (0.3 s each). So is all else that is alive then: in a program that runs a command in its own process,
    the caller's objects too, which are then not freed where they refer to each other in a circle. Where torch is there
    already, as in a test, nothing is done.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
