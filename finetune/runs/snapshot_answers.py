"""What a fine-tuned model answered over training: missing answers taken from checkpoints, all of them as a table."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from ...errors import RevprobeError
from ...models.checkpoints import CHECKPOINTS, step_name
from ...models.probed import ProbedModel
from ...probes.decoding.exact_match import ERRORS
from ...probes.readings.reading import Reading
from ..training.answers_callback import save_answers
from ..training.checkpointing import ANSWERED, changed_file
from .finetune_setup import Prepared


class Answering(Protocol):
    """What is asked of a run here; `FinetuneRun` is one."""

    @property
    def path(self) -> Path: ...
    @property
    def missing_answers(self) -> list[int]: ...
    @property
    def steps(self) -> list[int]: ...
    @property
    def config(self) -> Any: ...
    def load(self, step: int = -1, weights: str | None = None) -> ProbedModel: ...


def backfill_answers(run: Answering, prepared: Prepared) -> list[int]:
    """Ask the checkpoints of the snapshots whose answers are missing; the caller holds the run's lock.

    A checkpoint holds the weights that were asked, so an answer taken again is the one that was lost, byte for byte (on
    the same software and machine).

    Returns: the steps asked.
    Raises: RevprobeError, for a checkpoint that is gone or damaged.
    """
    missing = run.missing_answers
    for step in missing:
        checkpoint = run.path / CHECKPOINTS / step_name(step)
        if changed := changed_file(checkpoint):
            raise RevprobeError(
                f"{checkpoint / changed} is damaged (its bytes are not those that were written), so no answer can be "
                "taken from it; delete the run's folder to train it anew"
            )
        if step not in run.steps:
            raise RevprobeError(
                f"{run.path}: the answers of step {step} are missing, and its checkpoint with them; delete the run's "
                "folder to train it anew"
            )
        save_answers(prepared.ask_at_snapshot(run.load(step, "raw")), run.path / ANSWERED / step_name(step))
    if missing and run.config.snapshots.during_training:
        warnings.warn(f"{run.path}: missing answers of {len(missing)} steps were taken from checkpoints", stacklevel=5)
    return missing


def answer_table(readings: Iterable[Reading]) -> pd.DataFrame:
    """Readings of answers, tidy: a row for each step, side and measure.

    Columns: step, asked ("forward", "reverse"), split, templates (whose wordings), measure, value, low, high (95 %,
        over facts), n (questions), facts, control, undefined, reason, caution; of an exact match how many wrong answers
        are what (end, prompt, own_entity, ..., see `decoded_match`), missing where a run did not tell them.
    """
    columns = ["measure", "value", "low", "high", "n", "facts", "control", "undefined", "reason", "caution"]
    rows: list[dict[str, Any]] = []
    for reading in readings:
        about = {key: reading.meta.get(key) for key in ("step", "asked", "split", "templates")}
        about |= reading.meta.get("errors", {})
        rows += [about | {key: row[key] for key in columns} for row in reading.measures().to_dict("records")]
    table = pd.DataFrame(rows, columns=["step", "asked", "split", "templates", *columns, *ERRORS])
    return table.astype(dict.fromkeys(ERRORS, "Int64"))
