"""A run's own copy of the facts it is trained on: who asks the run later finds them, wherever its folder has gone."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from ...atomic_files import folder_written_whole, written_whole
from ...errors import first_line

RELATION = "relation"  # in a run's folder
MOST = 16 * 2**20  # bytes; the published files have a tenth of that
_LEFT = re.compile(r"\..+\.\d+\.\d+\.part")  # what `written_whole` leaves when it is killed


def keep_relation(folder: Path, source: str | None, *, anew: bool = False) -> Path | None:
    """Copy the file or folder of a run's facts to RUN/relation/NAME, whole or not at all; a copy that is there stays.

    None where there is nothing to copy: no file is named, or a data set of the Hub, it is larger than MOST, or a folder
    of it holds the run, links, or what cannot be read. The run does not read its copy: a relation is what its config
    names.
    Args:
        anew: nothing has been trained yet, so a copy of what the source no longer holds is replaced.
    Warns: when it cannot be copied; the run goes on without.
    """
    if source is None or Path(source).name in ("", ".."):
        return None
    given = Path(source)
    copy = folder / RELATION / given.name
    try:
        _remove_left(copy)
        if anew and differs_from_copy(folder, source):
            shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
        if copy.exists() or not _fits(given) or _holds(given, copy):
            return None
        _copy(given, copy)
    except OSError as error:  # a full disk, a name that is too long, a folder that cannot be written
        told = f"{folder}: the facts at {source!r} were not copied into it ({first_line(error)}); the run goes on"
        warnings.warn(told, stacklevel=2)
        return None
    return copy


def copy_of(folder: Path, source: str | None) -> Path | None:
    """A run's own copy of its facts, where it has one."""
    copy = None if source is None or Path(source).name in ("", "..") else folder / RELATION / Path(source).name
    return copy if copy is not None and copy.exists() else None


def differs_from_copy(folder: Path, source: str | None) -> bool:
    """Whether a file of a run's copy is another at its source now; False where there is no copy, or no source."""
    copy, given = copy_of(folder, source), Path(str(source))
    if copy is None or not given.exists():
        return False
    for file in _entries(copy):
        own = given / file.relative_to(copy) if copy.is_dir() else given
        if not own.is_file() or own.read_bytes() != file.read_bytes():
            return True
    return False


def _copy(given: Path, copy: Path) -> None:
    copy.parent.mkdir(exist_ok=True)
    if given.is_dir():
        with folder_written_whole(copy, lambda _: False) as part:
            shutil.copytree(given, part, dirs_exist_ok=True, copy_function=shutil.copyfile)
    else:
        with written_whole(copy) as part:
            shutil.copyfile(given, part)


def _remove_left(copy: Path) -> None:
    """Delete what a killed copy left beside this one."""
    for left in copy.parent.glob(".*.part"):
        if left != copy and _LEFT.fullmatch(left.name) and left.is_file():
            left.unlink()


def _holds(given: Path, place: Path) -> bool:
    """Whether a place lies in what is to be copied, which would then be copied into itself without end."""
    return place.resolve().is_relative_to(given.resolve())


def _fits(given: Path) -> bool:
    """Whether it is there, of plain files that can be read alone, and small enough."""
    if not (given.is_file() or given.is_dir()):
        return False
    left = MOST
    try:
        for file in _entries(given):
            if not file.is_file() or (file.is_symlink() and file != given):
                return False
            with file.open("rb"):
                left -= file.stat().st_size
            if left < 0:
                return False
    except PermissionError:
        return False
    return True


def _entries(given: Path) -> Iterator[Path]:
    """The file, or what is in the folder and in those below, but folders themselves. Raises: OSError."""
    if not given.is_dir():
        yield given
        return
    with os.scandir(given) as inside:
        entries = sorted(inside, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(Path(entry.path))
        else:
            yield Path(entry.path)
