"""Where a run keeps its checkpoints: the one layout that training writes and `load_model` reads.

RUN/checkpoints/step-000500/        config.json, model.safetensors, tokenizer files, COMPLETE
RUN/checkpoints/step-000500/ema/    the same for the averaged weights, where the run keeps an average
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import RevprobeError

CHECKPOINTS = "checkpoints"
EMA = "ema"
# Written last: a checkpoint without it was cut off while being saved, and is never read or resumed from.
COMPLETE = "COMPLETE"

_STEP = re.compile(r"step-(\d+)$")


def step_name(step: int) -> str:
    """The folder name of a training step.

    >>> step_name(500)
    'step-000500'
    """
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The training step a folder name stands for; None for any other name."""
    match = _STEP.match(folder.name)
    return int(match[1]) if match else None


def has_checkpoints(folder: Path) -> bool:
    """Whether `folder` has a run's checkpoints folder, so that a step of it can be asked for."""
    return (folder / CHECKPOINTS).is_dir()


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of a run that have a complete checkpoint, ascending."""
    folders = [p for p in (run / CHECKPOINTS).glob("step-*") if (p / COMPLETE).is_file()]
    return sorted(step for p in folders if (step := step_of(p)) is not None)


def checkpoint_folder(run: Path, step: int = -1, weights: str | None = None) -> tuple[Path, int, str]:
    """The folder of one checkpoint, with its step and its weights ("raw" or "ema").

    Args:
        step: a training step, or a negative index from the last checkpoint as in a list.
        weights: None takes the average where there is one, as the run's own headline numbers do.
    Raises: RevprobeError, when the run has no complete checkpoint, not that step, or not those weights.
    """
    steps = checkpoint_steps(run)
    if not steps:
        raise RevprobeError(
            f"{run} has no complete checkpoint; train it first, or name a folder that holds a config.json"
        )
    if step < 0 and -step <= len(steps):
        step = steps[step]
    if step not in steps:
        raise RevprobeError(f"{run} has no checkpoint at step {step}; it has {', '.join(map(str, steps))}")
    folder = run / CHECKPOINTS / step_name(step)
    available = ["raw", "ema"] if (folder / EMA).is_dir() else ["raw"]
    weights = weights or available[-1]
    if weights not in available:
        raise RevprobeError(f"{folder} has no {weights!r} weights; it has {' and '.join(available)}")
    return (folder / EMA if weights == "ema" else folder), step, weights
