"""Who may write a run: one process at a time, of one machine or of several that share its folder.

On one machine the kernel tells: it lets go of a lock however the process ends that holds it. Another machine may not
see that lock, so the locked file holds a lease as well, which its holder renews. Who finds a lease of another machine
watches it, and takes it when it has stood still for its whole time by the watcher's own clock. Whose lease was taken
writes no more. Where an engine of several machines set the lease's time, a holder that could not renew for half of it
writes no more either, so two machines never write at once while clocks run at about the same rate and no single write
takes longer than the other half. Elsewhere a process that was stopped, or whose machine slept, looks whether the folder
is still its own, and goes on.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from ...atomic_files import guarded
from ...engines.launcher import LEASE_SECONDS, STARTED_BY, TAKES_OVER
from ...errors import RevprobeError

# Held by the process that writes the run.
LOCK = ".lock"
_SECONDS = 60.0
_BEATS = 6  # renewals in that time
_TICK = 0.5  # seconds; so soon a process notices that it was left alone
_TRIES, _PAUSE = 4, 0.05  # whoever only asks (`being_written`) lets go at once
_PATIENCE = 10  # times its seconds that a lease which goes on is waited for by one that takes over
_LENGTH = 512  # bytes: always as many, so that one write replaces all


@dataclass(frozen=True)
class Lease:
    """What the file says; it is empty when the writer has let go. `beat` counts renewals."""

    machine: str
    host: str
    process: int
    token: str
    seconds: float
    beat: int = 0


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run folder for this process; nothing in it is replaced when it is no longer held.

    Raises: RevprobeError, when another process is writing the run; inside, for what would be written after the folder
        had to be given up.
    Warns: when another machine has the folder, or had it and went silent.
    """
    try:
        import fcntl
    except ImportError:  # Windows: nothing to hold, two writers are the caller's care
        yield
        return
    path = run / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until = _now() + (2 * _lease_seconds() if TAKES_OVER in os.environ else (_TRIES - 1) * _PAUSE)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if _now() > until:
                    raise _held_by(run) from error
                time.sleep(_PAUSE)
        foreign = _outwaited(run)
        heart = _Heart(run, descriptor)
        if foreign:
            heart.confirm()
        with guarded(run, heart.require_held):
            try:
                yield
            finally:
                heart.stop()
    finally:
        os.close(descriptor)


def being_written(run: Path) -> bool | None:
    """Whether a process holds the run's folder; None where that cannot be asked. Writes nothing."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        with (run / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            age = time.time() - os.fstat(lock.fileno()).st_mtime
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:  # a disk that knows no locks
        return None
    lease = _read(run / LOCK)
    return lease is not None and lease.machine != machine() and age < lease.seconds


@lru_cache(maxsize=1)
def machine() -> str:
    """This machine since it was started: another one, or a later start, cannot hold its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


class _Heart:
    """The lease of this process, and the thread that renews it."""

    def __init__(self, run: Path, descriptor: int) -> None:
        self.run, self.descriptor, self.shared = run, descriptor, LEASE_SECONDS in os.environ
        self.lease = Lease(machine(), platform.node()[:100], os.getpid(), secrets.token_hex(16), _lease_seconds())
        self.lost, self.renewed, self._over = "", _now(), threading.Event()
        self._write(self.lease)
        self._starter = _starter()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {run}", daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Raises: RevprobeError, when another has taken the lease at the same moment."""
        time.sleep(2 * self.lease.seconds / _BEATS)
        self.require_held()

    def require_held(self) -> None:
        """Raises: RevprobeError, when the folder is another's, or may be, since the lease was not renewed in time."""
        if not self.lost and not self._in_time(_now()):
            self._renew()
        if self.lost:
            raise RevprobeError(self._said())

    def _in_time(self, now: float) -> bool:
        return now - self.renewed <= self.lease.seconds / 2

    def _said(self) -> str:
        why = self.lost or "the one that started it has ended"
        return f"{self.run}: this process stops writing, since {why}; run the same command again to go on"

    def stop(self) -> None:
        """Let go of the lease, if it is still held."""
        self._over.set()
        self._thread.join()
        found = _read(self.run / LOCK)
        in_time = not self.lost and (not self.shared or self._in_time(_now()))
        if in_time and found is not None and found.token == self.lease.token:
            os.ftruncate(self.descriptor, 0)

    def _beat(self) -> None:
        pause = self.lease.seconds / _BEATS
        while not self._over.wait(min(_TICK, pause)):
            alone = self._starter is not None and os.getppid() != self._starter
            if _now() - self.renewed >= pause and not alone:
                self._renew()
            if alone or (self.lost and self._starter is not None):
                print(f"error: {self._said()}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)  # whoever started this process does the run elsewhere
                return
            if self.lost:
                return

    def _renew(self) -> None:
        asked = _now()  # before it is read: what comes in between counts against this process
        try:
            found = _read(self.run / LOCK)
            if found is None or found.token != self.lease.token:
                self.lost = f"{found.host} has taken the folder" if found else "its lease is gone"
            elif self.shared and not self._in_time(asked):
                self.lost = f"its lease was not renewed for {self.lease.seconds / 2:g} s"
            else:
                self.lease = replace(self.lease, beat=self.lease.beat + 1)
                self._write(self.lease)
                self.renewed = asked
        except OSError:
            return  # the storage is away; when it stays away, the time runs out

    def _write(self, lease: Lease) -> None:
        os.pwrite(self.descriptor, json.dumps(asdict(lease)).ljust(_LENGTH - 1).encode() + b"\n", 0)
        os.fsync(self.descriptor)


def _outwaited(run: Path) -> bool:
    """Wait while another machine may write the run; returns whether its lease was outwaited.

    Raises: RevprobeError, when that machine goes on.
    """
    lease = _read(run / LOCK)
    if lease is None or lease.machine == machine():
        return False
    warnings.warn(
        f"{run} was last written from {lease.host}; watching for {lease.seconds:g} s whether it still is", stacklevel=5
    )
    since = began = _now()
    while _now() - since < lease.seconds:
        time.sleep(lease.seconds / _BEATS / 4)
        found = _read(run / LOCK)
        if found is None:
            return False
        if found != lease:
            if TAKES_OVER not in os.environ or _now() - began > _PATIENCE * lease.seconds:
                raise _held_by(run, f", on {lease.host}")
            lease, since = found, _now()
    return True


def _held_by(run: Path, where: str = "") -> RevprobeError:
    return RevprobeError(f"{run} is being written by another process{where}; wait for it, or stop it, then run again")


def _read(path: Path) -> Lease | None:
    """The lease in the file, opened anew since other machines' writes are seen then; None where there is none.

    What cannot be read is somebody's who is just writing.
    """
    try:
        said = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Lease(**json.loads(said)) if said else None
    except (ValueError, TypeError):
        return Lease("", "another machine", 0, said[:_LENGTH].decode(errors="replace"), _SECONDS)


@lru_cache(maxsize=1)
def _starter() -> int | None:
    """The process that started this one to do a run; taken out of the environment, which others inherit."""
    said = os.environ.pop(STARTED_BY, "")
    return int(said) if said.isdecimal() else None


def _lease_seconds() -> float:
    try:
        return max(0.1, float(os.environ.get(LEASE_SECONDS, _SECONDS)))
    except ValueError:
        return _SECONDS


def _now() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
