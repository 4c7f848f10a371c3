"""A run that switches its negatives goes on from the run that does not, where one stands beside it.

Up to the switch both take the same steps, bit for bit: weights, optimizer and random states of the checkpoint at that
step are copied, and what was read until then. Where there is no such run, the steps are taken here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ...atomic_files import written_whole
from ...errors import RevprobeError
from ...models.checkpoints import CHECKPOINTS, step_name
from ..config.loading import load_config
from ..config.one_layer import RunConfig
from ..training.answers_callback import ANSWERS
from ..training.checkpointing import READINGS, changed_file, resumable_steps
from ..training.step_log import STEPS, read_table
from .run import CONFIG


def take_prefix(run: Path, config: RunConfig) -> Path | None:
    """Copy what a run has in common with one beside it that has come as far as its switch.

    Only a run that cannot go on from a checkpoint of its own takes anything, only where the step of the switch is one
    of its snapshots, and only under a constant rate, since a cosine depends on all the steps to come.
    Returns: the run that it was copied from; None where nothing was.
    """
    switch = config.training.switch
    if switch is None or switch.step not in config.snapshot_steps or config.training.schedule != "constant":
        return None
    if resumable_steps(run):
        return None
    shared = [step for step in config.snapshot_steps if step <= switch.step]
    for source in sorted(run.resolve().parent.iterdir()):
        if source != run.resolve() and _comes_as_far(source, config, switch.step, shared):
            _copy(source, run, config, shared)
            return source
    return None


def _comes_as_far(source: Path, config: RunConfig, step: int, shared: list[int]) -> bool:
    """Whether this folder holds a run that is the same until `step`, with that checkpoint and all shared readings."""
    if not (source / CONFIG).is_file():
        return False
    try:
        other = load_config(source / CONFIG, RunConfig)
    except RevprobeError:
        return False
    if _until_the_switch(other) != _until_the_switch(config) or other.training.switch is not None:
        return False
    if other.snapshots.controls != config.snapshots.controls:  # its readings are taken along
        return False
    if not _answers(config, step) <= _answers_there(source, step):
        return False
    folders = [source / CHECKPOINTS / step_name(one) for one in shared]
    readings = [source / READINGS / step_name(one) for one in shared]
    whole = step in resumable_steps(source) and all(path.is_dir() for path in (*folders, *readings))
    return whole and not any(changed_file(folder) for folder in folders)


def _answers(config: RunConfig, step: int) -> set[int]:
    """The steps up to this one whose answers a config asks for."""
    return {one for one in config.answer_steps if one <= step}


def _answers_there(source: Path, step: int) -> set[int]:
    """The steps up to this one whose answers a run holds; none where its file cannot be read."""
    if not (source / ANSWERS).is_file():
        return set()
    try:
        steps = read_table(source / ANSWERS)["step"]
    except RevprobeError:
        return set()
    return {int(one) for one in steps if one <= step}


def _until_the_switch(config: RunConfig) -> dict[str, Any]:
    own: Any = {"name": True, "snapshots": True, "training": {"steps", "switch"}}
    return config.model_dump(exclude=own)


def _copy(source: Path, run: Path, config: RunConfig, shared: list[int]) -> None:
    """The checkpoint to go on from comes last: without it nothing counts."""
    for table, steps in ((STEPS, None), (ANSWERS, set(config.answer_steps))):
        if (source / table).is_file():
            rows = read_table(source / table)
            kept = rows[rows["step"] <= shared[-1]]
            kept = kept if steps is None else kept[kept["step"].isin(steps)]
            with written_whole(run / table) as part:
                kept.to_parquet(part, compression="zstd", index=False)
    for step in shared:
        for kind in (READINGS, CHECKPOINTS):
            working = run / kind / f".{step_name(step)}.part"
            shutil.rmtree(working, ignore_errors=True)
            shutil.copytree(source / kind / step_name(step), working)
            # What a copy that was cut off has left: nothing can be resumed from it.
            shutil.rmtree(run / kind / step_name(step), ignore_errors=True)
            working.rename(run / kind / step_name(step))
