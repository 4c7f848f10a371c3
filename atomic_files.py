"""Files and folders that appear whole or not at all: written under a working name beside the final one, then renamed.

A rename is atomic, so a reader sees the old content or the new, never a part. That is a promise about processes,
not about power: nothing is forced to the disk.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import RevprobeError

# Folder -> what raises when this process may no longer replace anything in it.
_GUARDS: dict[Path, Callable[[], None]] = {}


@contextmanager
def guarded(folder: Path, require: Callable[[], None]) -> Iterator[None]:
    """Ask `require`, which may raise, before anything in the folder is replaced."""
    place = folder.absolute()
    before = _GUARDS.get(place)
    _GUARDS[place] = require
    try:
        yield
    finally:
        del _GUARDS[place]
        if before is not None:
            _GUARDS[place] = before


def require_held(path: Path) -> None:
    """Raises: what the guard of a folder raises that the path lies in."""
    for folder in path.absolute().parents if _GUARDS else ():
        if folder in _GUARDS:
            _GUARDS[folder]()


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a working path to write to; it becomes `path` when the block ends and is gone when the block raises.

    The working name starts with a dot and carries process and thread, so that two writers never share one, and ends
    with .part, so that nobody takes it for a finished file.
    Raises: RevprobeError, when the path is a folder, or is in none.
    """
    path = Path(path)
    if path.is_dir():
        raise RevprobeError(f"{str(path)!r} is a folder; expected the name of a file to write, such as one in it")
    if not path.parent.is_dir():
        raise RevprobeError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        yield part
        require_held(path)
        part.replace(path)
    finally:
        with suppress(OSError):  # gone after the rename; elsewhere the folder itself may be what is wrong
            part.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all, in UTF-8, with the line ends that the text has."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


@contextmanager
def folder_written_whole(folder: str | Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a working folder to fill; it becomes `folder` when the block ends and is gone when the block raises.

    An older folder there is put aside until the new one is in its place, and comes back if a writer dies in between.
    The working name is always the same, so that what a killed writer left goes with the next.
    Args:
        ours: whether an entry of an older folder is of the kind that is written, and may go with it.
    Raises: RevprobeError, when the path is a file, or a folder that holds anything else.
    """
    folder = Path(folder).absolute()
    working, aside = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old"))
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)
    require_replaceable(folder, ours)
    require_held(folder)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    try:
        yield working
        require_held(folder)
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            folder.rename(aside)
        working.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def require_replaceable(folder: Path, ours: Callable[[Path], bool]) -> None:
    """Raises: RevprobeError, when a folder that is to be written holds what nobody asked to lose, or is a file."""
    if folder.is_dir():
        litter = lambda entry: entry.is_file() and entry.name.startswith(".")  # noqa: E731  # .DS_Store, .nfs0001
        others = sorted(entry.name for entry in folder.iterdir() if not (ours(entry) or litter(entry)))
        if others:
            raise RevprobeError(
                f"{str(folder)!r} holds {others[0]!r}, which would be lost when it is replaced; choose another folder"
            )
    elif folder.exists():
        raise RevprobeError(f"{str(folder)!r} is a file; expected a folder to write")
