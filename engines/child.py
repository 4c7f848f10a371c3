"""A work in a process of its own: started, listened to, and ended in order."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from ..errors import first_line
from .launcher import JSON_PROGRESS, STARTED_BY, Work

# How long a child gets to end by itself after it was asked to before it is killed; nothing is lost either way.
GRACE_SECONDS = 5.0
_AT_ONCE = 65536  # bytes


class News(NamedTuple):
    """How far a work is, as a `Listener` takes it."""

    step: int
    steps: int
    loss: float | None


class Ending(NamedTuple):
    """How a work's process ended: its exit code, and all it said on stderr."""

    code: int
    said: str

    @property
    def notes(self) -> list[str]:
        """What it noted by the way, a line each."""
        return [line for line in self.said.splitlines() if line.startswith("note: ")]

    @property
    def problem(self) -> str | None:
        """One line about what went wrong: its error line, how it ended, or the last it said; None when nothing did."""
        if self.code == 0:
            return None
        errors = [line.removeprefix("error: ") for line in self.said.splitlines() if line.startswith("error: ")]
        if errors:
            return errors[-1]
        if self.code < 0:
            return f"killed by signal {-self.code}; run the same command again to go on"
        return self.said.splitlines()[-1] if self.said else f"ended with code {self.code} and no message"


def not_started(error: OSError) -> Ending:
    """What is told of a work whose process could not be had: no more processes, files or memory, no such folder."""
    return Ending(1, f"error: its process could not be started ({first_line(error)}); run the same command again")


class Child:
    """The process of a work, started at once with its config on stdin.

    Args:
        environment: variables besides those of this process.
        place: the folder that it runs in, to which paths in its config are relative; this process's where it is None.
    Raises: OSError, when it cannot be started; see `not_started`.
    """

    def __init__(
        self, work: Work, folder: Path, environment: Mapping[str, str] | None = None, place: Path | None = None
    ) -> None:
        threads = str(work.threads)
        pinned = {
            JSON_PROGRESS: "1",
            STARTED_BY: str(os.getpid()),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed when it has been read
        # A session of its own: Ctrl-C reaches the one that started it alone, which then stops its children in order.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "revprobe", work.verb, "-", "--out", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(environment or {}), **pinned},
            cwd=place,
            start_new_session=True,
        )
        assert self.process.stdin is not None, "the child was started without pipes"
        try:
            self.process.stdin.write(work.config.encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; its exit code and stderr say why

    def news(self) -> Iterator[News]:
        """How far it is, until it ends."""
        assert self.process.stdout is not None, "the child was started without pipes"
        return _news(self.process.stdout)

    def news_or_none(self, patience: float) -> Iterator[News | None]:
        """As `news`, and None whenever so many seconds bring nothing: who waits for it can be interrupted there."""
        assert self.process.stdout is not None, "the child was started without pipes"
        pipe, rest = self.process.stdout.fileno(), b""
        with selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_READ)
            while True:
                if not ready.select(patience):
                    yield None
                    continue
                read = os.read(pipe, _AT_ONCE)
                *lines, rest = (rest + read).split(b"\n")
                yield from _news(lines if read else [rest])
                if not read:
                    return

    def ended(self) -> Ending:
        """Wait until it has ended, and tell how."""
        code = self.process.wait()
        self._errors.seek(0)
        with self._errors:
            return Ending(code, self._errors.read().decode(errors="replace").strip())

    def stop(self, seconds: float = GRACE_SECONDS) -> None:
        """Ask it to end, wait so long, then kill it. What it had completed stays, the rest is redone on resume."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _news(lines: Iterable[bytes]) -> Iterator[News]:
    for line in lines:
        try:
            told = json.loads(line)
            yield News(told["step"], told["steps"], told["loss"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that some library printed
