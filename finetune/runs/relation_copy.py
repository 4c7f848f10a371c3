"""A run's own copy of the facts it is trained on: who asks the run later finds them, wherever its folder has gone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ...atomic_files import folder_written_whole, written_whole

RELATION = "relation"  # in a run's folder
MOST = 16 * 2**20  # bytes; the published files have a tenth of that


def keep_relation(folder: Path, source: str | None) -> Path | None:
    """Copy the file or folder of a run's facts to RUN/relation/NAME, whole or not at all; a copy that is there stays.

    None where there is nothing to copy: no file is named, or a data set of the Hub, it is larger than MOST, or a folder
    of it holds links. The run does not read its copy: a relation is what its config names.
    """
    if source is None or not Path(source).name:
        return None
    given = Path(source)
    copy = folder / RELATION / given.name
    if copy.exists() or not _fits(given):
        return None
    copy.parent.mkdir(exist_ok=True)
    if given.is_dir():
        with folder_written_whole(copy, lambda _: False) as part:
            shutil.copytree(given, part, dirs_exist_ok=True, copy_function=shutil.copyfile)
    else:
        with written_whole(copy) as part:
            shutil.copyfile(given, part)
    return copy


def _fits(given: Path) -> bool:
    """Whether it is there, of plain files alone, and small enough."""
    if not (given.is_file() or given.is_dir()):
        return False
    left = MOST
    for file in _entries(given):
        if file.is_symlink() and file != given:
            return False
        if file.is_file():
            left -= file.stat().st_size
        if left < 0:
            return False
    return True


def _entries(given: Path) -> Iterator[Path]:
    yield given
    if given.is_dir():
        yield from given.rglob("*")
