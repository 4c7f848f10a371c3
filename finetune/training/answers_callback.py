"""Read a letters run's answers while it trains, at more steps than its checkpoints: they cost little.

A file beside the readings holds a row for each step, weights and question (see `relations.answers`). A resumed run
keeps the rows up to its own step.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...atomic_files import written_whole
from ...hooks.untouched import untouched
from ...relations.answers import Asked, answers_of, questions
from ...relations.letters import LettersRelation
from .probe_callback import Wrapping
from .step_log import read_table

ANSWERS = "answers.parquet"


class AnswersCallback(TrainerCallback):
    """Take the answers of a one-layer model, as it is and averaged, at the steps asked for.

    Args:
        relation: the letters it is trained on.
        path: `RUN/answers.parquet`.
        steps: when; step 0 is read before training.
        ema: an average whose `.module` is read too, labelled "ema".
        wrapping: as in `ProbeCallback`.
    """

    def __init__(
        self,
        relation: LettersRelation,
        path: Path,
        *,
        steps: Collection[int],
        ema: nn.Module | None = None,
        **wrapping: Any,
    ) -> None:
        self.relation, self.path, self.steps, self.ema = relation, path, frozenset(steps), ema
        self.wrap = Wrapping(**wrapping)
        self.table: pd.DataFrame | None = None
        self._asked: Asked | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        self.resume(state.global_step)
        if state.global_step == 0 and 0 in self.steps:
            self.take(at["model"], 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        if state.global_step in self.steps:
            self.take(at["model"], state.global_step)

    def resume(self, step: int) -> None:
        """Take up the rows up to `step` that are there. Raises: RevprobeError, for a damaged file."""
        self.wrap.forget()
        self.table = None
        if step and self.path.is_file():
            table = read_table(self.path)
            self.table = table[table["step"] <= step]

    def take(self, model: nn.Module, step: int) -> None:
        """Read one step and write the file."""
        rows = [] if self.table is None else [self.table]
        for weights, module in (("raw", model), ("ema", getattr(self.ema, "module", None))):
            if module is not None:
                with untouched(module):
                    probed = self.wrap(module, step=step, weights=weights)
                    self._asked = self._asked or questions(self.relation, probed)
                    found = answers_of(probed, self._asked)
                rows.append(found.assign(step=step, weights=weights))
        table = pd.concat(rows, ignore_index=True)
        self.table = table[["step", "weights", *(c for c in table.columns if c not in ("step", "weights"))]]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as part:
            self.table.to_parquet(part, compression="zstd", index=False)
