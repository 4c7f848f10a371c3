"""Whole or absent: how a run's files appear, and what a killed run leaves behind.

A checkpoint is written under a working name, completed, marked and renamed; a rename is atomic, so whatever kills
the process (SIGKILL, SIGTERM, Ctrl-C, no memory left) leaves either the old state or the new one. That is a promise
about processes, not about power: nothing is forced to the disk, and after a power loss or a crash of the machine a
marked checkpoint can be damaged. Its checksums tell: what is not what was written is not resumed from, and deleting
the folder goes back to the one before.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ...atomic_files import require_held, write_text
from ...errors import RevprobeError, first_line
from ...models.checkpoints import CHECKPOINTS, COMPLETE, checkpoint_steps, step_name, step_of

READINGS = "readings"
# What a fine-tuned model answered at its snapshots.
ANSWERED = "answers"
# What a resume cannot do without. transformers skips the ones that are absent, which trains another run in silence.
RESUME_STATE = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
# What only a resume needs; without these files a checkpoint is still a model to load and probe.
_RESUME_ONLY = (*RESUME_STATE, "scaler.pt")
# Checkpoints that keep it: the last one may turn out damaged, or be deleted.
_RESUMABLE = 2
# One line for each file of a checkpoint, as sha256sum writes and checks it. Checkpoints of version 0.1 have none.
CHECKSUMS = "SHA256SUMS"
_CHECKSUM = re.compile(r"([0-9a-f]{64})  (.+)")
FROM_THE_ONE_BEFORE = "delete that checkpoint's folder to resume from the one before"
# A pickle of the TrainingArguments that nothing here reads.
_UNUSED = ("training_args.bin",)


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
    files = sorted(path for path in working.rglob("*") if path.is_file() and path.name not in (COMPLETE, CHECKSUMS))
    lines = (f"{checksum(path)}  {path.relative_to(working).as_posix()}\n" for path in files)
    write_text(working / CHECKSUMS, "".join(lines))
    (working / COMPLETE).touch()
    final = run / CHECKPOINTS / step_name(step)
    require_held(final)
    if final.exists():  # a user saved the same step twice; the newer one holds
        shutil.rmtree(final)
    working.rename(final)
    prune_optimizer_state(run)
    return final


def prune_optimizer_state(run: Path) -> None:
    """Drop optimizer and RNG state from all complete checkpoints but the last two that have it."""
    kept = resumable_steps(run)[-_RESUMABLE:]
    for step in checkpoint_steps(run):
        if step not in kept:
            for pattern in _RESUME_ONLY:
                _remove((run / CHECKPOINTS / step_name(step)).glob(pattern))


def missing_state(checkpoint: Path) -> list[str]:
    """Which of the files that a resume needs a checkpoint lacks."""
    return [pattern for pattern in RESUME_STATE if not any(checkpoint.glob(pattern))]


def changed_file(checkpoint: Path) -> str | None:
    """The first file of a checkpoint whose bytes are not those that were written, or that is gone; None when all are.

    What only a resume needs may be gone (`missing_state` tells). A checkpoint without checksums passes.
    """
    sums = checkpoint / CHECKSUMS
    if not sums.is_file():
        return None
    listed = [_CHECKSUM.fullmatch(line) for line in sums.read_bytes().decode(errors="replace").splitlines()]
    if not listed or None in listed:
        return CHECKSUMS
    slimmed = {path for pattern in _RESUME_ONLY for path in _named_like(pattern, listed)}
    for found in filter(None, listed):
        path = checkpoint / found[2]
        if not path.is_file() and found[2] in slimmed:
            continue
        if not path.is_file() or checksum(path) != found[1]:
            return found[2]
    return None


def has_other_names(checkpoint: Path, model: nn.Module) -> bool:
    """Whether a checkpoint of a whole model names its tensors otherwise than the module does."""
    own = set(model.state_dict())
    for file in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if not own.issuperset(weights.keys()):
                return isinstance(model, PreTrainedModel)
    return False


@contextmanager
def resuming(checkpoint: str | Path | None, *names: str) -> Iterator[None]:
    """Name the file of a checkpoint that cannot be taken up, and the way out."""
    try:
        yield
    except RevprobeError:
        raise
    except Exception as error:
        folder = Path(checkpoint or ".")
        # A whole torch archive has its directory at the end, which a truncated one lacks.
        archives = [name for name in names if name.endswith((".pt", ".pth"))]
        damaged = [name for name in archives if not zipfile.is_zipfile(folder / name)] or list(names)
        raise RevprobeError(
            f"cannot resume from {folder}: {' or '.join(damaged)} is damaged ({first_line(error)}); "
            f"{FROM_THE_ONE_BEFORE}"
        ) from error


def _named_like(pattern: str, listed: list[re.Match[str] | None]) -> list[str]:
    return fnmatch.filter([found[2] for found in listed if found], pattern)


def checksum(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resumable_steps(run: Path) -> list[int]:
    """The steps of a run whose checkpoint is complete and can be resumed from, ascending."""
    return [step for step in checkpoint_steps(run) if not missing_state(run / CHECKPOINTS / step_name(step))]


def resume_from(run: Path) -> Path | None:
    """The newest checkpoint that can be resumed from; None to start from step 0.

    Warns: when a newer one cannot, since the steps from there on are then trained again.
    """
    complete, resumable = checkpoint_steps(run), resumable_steps(run)
    if complete and complete[-1:] != resumable[-1:]:
        lacking = run / CHECKPOINTS / step_name(complete[-1])
        start = f"step {resumable[-1]}" if resumable else "step 0"
        warnings.warn(
            f"{lacking} has no {' and no '.join(missing_state(lacking))}, which a resume needs: training goes on from "
            f"{start}",
            stacklevel=2,
        )
    return run / CHECKPOINTS / step_name(resumable[-1]) if resumable else None


def remove_unfinished(run: Path) -> list[Path]:
    """Delete what a killed run left half-written: checkpoints without a mark, and readings without a checkpoint.

    A reading is written before its checkpoint is completed, so a reading that is later than the last complete
    checkpoint belongs to steps that will be trained again.

    Returns: the folders deleted.
    """
    steps = checkpoint_steps(run)
    last = steps[-1] if steps else -1
    taken = (run / READINGS, run / ANSWERED)
    cut_off = list((run / CHECKPOINTS).glob("checkpoint-*")) + [p for home in taken for p in home.glob(".step-*.part")]
    unmarked = [p for p in (run / CHECKPOINTS).glob("step-*") if step_of(p) not in steps]
    later = [p for home in taken for p in home.glob("step-*") if (step_of(p) or 0) > last]
    removed = [p for p in (*cut_off, *unmarked, *later) if p.is_dir()]
    for folder in removed:
        shutil.rmtree(folder)
    return removed


def _remove(paths: Iterator[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)
