"""Ask a model while it trains: letters at more steps than there are checkpoints, since they cost little, and facts told
in text at every snapshot.

For letters a file beside the readings holds a row for each step, weights and question (see `relations.answers`); a
resumed run keeps the rows up to its own step. Facts in text leave readings, a folder for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...atomic_files import folder_written_whole, written_whole
from ...hooks.untouched import untouched
from ...models.checkpoints import step_name
from ...models.probed import ProbedModel
from ...probes.readings.readings import Readings
from ...relations.answers import Asked, answers_of, questions
from ...relations.evaluation import save_evaluation
from ...relations.letters import LettersRelation
from .distributed import require_whole
from .probe_callback import Wrapping, in_its_own_dtype
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
                with in_its_own_dtype(module), untouched(module):
                    probed = self.wrap(module, step=step, weights=weights)
                    self._asked = self._asked or questions(self.relation, probed)
                    found = answers_of(probed, self._asked)
                rows.append(found.assign(step=step, weights=weights))
        table = pd.concat(rows, ignore_index=True)
        self.table = table[["step", "weights", *(c for c in table.columns if c not in ("step", "weights"))]]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as part:
            self.table.to_parquet(part, compression="zstd", index=False)


class SnapshotAnswers(TrainerCallback):
    """Ask for the facts at step 0 and at the steps named; the first process asks and writes, the others go on.

    Taken before the checkpoint of the same step is completed, and without a trace, as readings are.

    Args:
        ask: what is asked of a model, as readings with `asked` and `split` in their meta.
        folder: where `step-000500/<reading>.<asked>.<split>.parquet` appear.
        done: steps whose answers are there already (a resumed run's own step).
        wrapping: as in `ProbeCallback`.
    """

    def __init__(
        self,
        ask: Callable[[ProbedModel], Readings],
        folder: Path,
        *,
        steps: Collection[int],
        done: Collection[int] = (),
        **wrapping: Any,
    ) -> None:
        self.ask, self.folder, self.steps, self.done = ask, folder, frozenset(steps), frozenset(done)
        self.wrap = Wrapping(**wrapping)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        self.wrap.forget()
        if state.global_step == 0:
            self._take(at["model"], state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        self._take(at["model"], state)

    def _take(self, model: nn.Module, state: TrainerState) -> None:
        step = state.global_step
        if step not in self.steps or step in self.done or not state.is_world_process_zero:
            return
        require_whole(model)
        with in_its_own_dtype(model), untouched(model):
            save_answers(self.ask(self.wrap(model, step=step, weights="raw")), self.folder / step_name(step))


def save_answers(readings: Readings, folder: Path) -> None:
    """The answers of one step; the folder appears whole or not at all."""
    with folder_written_whole(folder, lambda entry: entry.suffix == ".parquet") as part:
        save_evaluation(readings, part)
