"""Whole or absent: how a run's files appear, what a killed run leaves behind, and who may write at a time.

A checkpoint is written under a working name, completed, marked and renamed; a rename is atomic, so whatever kills
the process leaves either the old state or the new one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RevprobeError
from ..models.checkpoints import CHECKPOINTS, COMPLETE, checkpoint_steps, step_name, step_of

READINGS = "readings"
# What only a resume needs; without these files a checkpoint is still a model to load and probe.
_RESUME_ONLY = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
# A pickle of the TrainingArguments that nothing here reads.
_UNUSED = ("training_args.bin",)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    working = path.with_name(f".{path.name}.{os.getpid()}")
    working.write_text(text, encoding="utf-8")
    working.replace(path)


def complete_checkpoint(run: Path, step: int, *, working: Path, add: Callable[[Path], None] | None = None) -> Path:
    """Turn the Trainer's own `checkpoint-500` into the run's `step-000500`, then slim the older ones down.

    Args:
        working: the folder the Trainer has just written.
        add: writes what is still missing (the averaged weights) into it.
    Returns: the complete checkpoint's folder.
    """
    if add is not None:
        add(working)
    for pattern in _UNUSED:
        _remove(working.glob(pattern))
    (working / COMPLETE).touch()
    final = run / CHECKPOINTS / step_name(step)
    if final.exists():  # a user saved the same step twice; the newer one holds
        shutil.rmtree(final)
    working.rename(final)
    slim_checkpoints(run)
    return final


def slim_checkpoints(run: Path) -> None:
    """Drop optimizer and RNG state from all complete checkpoints but the last, the only one a run resumes from."""
    for step in checkpoint_steps(run)[:-1]:
        folder = run / CHECKPOINTS / step_name(step)
        for pattern in _RESUME_ONLY:
            _remove(folder.glob(pattern))


def remove_unfinished(run: Path) -> list[Path]:
    """Delete what a killed run left half-written: checkpoints without a mark, and readings without a checkpoint.

    A reading is written before its checkpoint is completed, so a reading that is later than the last complete
    checkpoint belongs to steps that will be trained again.

    Returns: the folders deleted.
    """
    steps = checkpoint_steps(run)
    last = steps[-1] if steps else -1
    cut_off = list((run / CHECKPOINTS).glob("checkpoint-*")) + list((run / READINGS).glob(".step-*.part"))
    unmarked = [p for p in (run / CHECKPOINTS).glob("step-*") if step_of(p) not in steps]
    ahead = [p for p in (run / READINGS).glob("step-*") if (step_of(p) or 0) > last]
    removed = [p for p in (*cut_off, *unmarked, *ahead) if p.is_dir()]
    for folder in removed:
        shutil.rmtree(folder)
    return removed


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Hold the run folder for this process; the kernel lets go of it however the process ends.

    Raises: RevprobeError, when another process is writing the run.
    """
    try:
        import fcntl
    except ImportError:  # Windows: nothing to hold, two writers are the caller's care
        yield
        return
    with (run / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RevprobeError(
                f"{run} is being written by another process; wait for it, or stop it, then run again"
            ) from error
        yield


def _remove(paths: Iterator[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)
