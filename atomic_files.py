"""Files that appear whole or not at all: written under a working name beside the final one, then renamed.

A rename is atomic, so a reader sees the old content or the new, never a part. That is a promise about processes,
not about power: nothing is forced to the disk.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import RevprobeError


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
        part.replace(path)
    finally:
        with suppress(OSError):  # gone after the rename; elsewhere the folder itself may be what is wrong
            part.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all, in UTF-8, with the line ends that the text has."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")
