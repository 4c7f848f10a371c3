"""A fine-tuning on one direction of a relation, LoRA or all weights: one folder, probed at every snapshot, asked both
ways afterwards.

RUN/config.yaml, versions.json, problem.txt    as in any run
RUN/resolved.json      what the config came to on this model and relation: steps, snapshots, rows, LoRA targets, and
                       digests of rows, pairs, facts and base, which a resume is held against
RUN/relation/          a copy of the file or folder of its facts, up to 16 MB
RUN/base/              the model it built for itself, where it did
RUN/checkpoints/step-000500/                   the adapter, as peft saves it, or the model, and what a resume needs
RUN/readings/step-000500/<probe>.raw.parquet
RUN/predictions.parquet                        what the gradients foretold of the step after each snapshot
RUN/evaluation/decoded_match.<asked>.<split>.parquet
RUN/answers/step-000500/decoded_match.<asked>.<split>.parquet    the same at a snapshot, where the config asks there
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ...arguments import checked
from ...atomic_files import folder_written_whole, write_text
from ...errors import RevprobeError, first_line
from ...models.checkpoints import step_name
from ...models.hub import quiet_transformers
from ...models.probed import ProbedModel
from ...models.registry import load_model
from ...probes.pairs.pairs import ReversalPairs
from ...probes.readings.readings import Readings
from ...progress import shows_progress
from ...relations.evaluation import save_evaluation
from ..config.finetuning import FinetuneConfig
from ..config.loading import load_config
from ..training.arguments import training_arguments
from ..training.checkpointing import ANSWERED, READINGS, remove_unfinished, resume_from
from ..training.distributed import ProcessGroup
from ..training.probe_callback import GRADIENT, LORA_GRADIENT, in_its_own_dtype, take_readings
from ..training.run_lock import run_lock
from .alerts import AlertCallback, Watch, warned
from .finetune_setup import (
    Prepared,
    answer_steps,
    build_finetuning,
    placed_options,
    prepare,
    snapshot_pairs,
    text_relation,
)
from .progress import Listener, ProgressCallback, step_told
from .relation_copy import keep_relation
from .run import CONFIG, Expected, Run, claim_run, noting_problems, pinned_threads
from .snapshot_answers import answer_table, backfill_answers
from .started_with import require_same_start

RESOLVED, EVALUATION = "resolved.json", "evaluation"


@dataclass(frozen=True, repr=False)
class FinetuneRun(Run):
    """A fine-tuning's folder, finished or not; `open_run(path)` and `fine_tune(...)` return it."""

    @cached_property
    def config(self) -> FinetuneConfig:
        return load_config(self.path / CONFIG, FinetuneConfig)

    @property
    def name(self) -> str:
        """The folder's name, which is the config's."""
        return self.path.resolve().name

    @property
    def resolved(self) -> dict[str, Any]:
        """What the config came to: objective, steps, snapshots, rows, targets, ...; empty before it was prepared.

        Raises: RevprobeError, when the file is damaged.
        """
        file = self.path / RESOLVED
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (ValueError, TypeError) as error:
            raise RevprobeError(f"{file} is damaged ({first_line(error)}); delete it and run again") from error

    @property
    def axes(self) -> dict[str, Any]:
        """objective (with what it leaves out), seed, model, dataset, direction."""
        objective = self.resolved.get("objective")
        about = self.config.objective.about if objective == "masked" else []
        only = f" ({', '.join(about)})" if about else ""
        return {"objective": objective and objective + only} | self.config.axes

    @property
    def total_steps(self) -> int | None:
        return self.resolved.get("steps")

    @property
    def snapshots(self) -> list[int]:
        """The steps that are checkpointed and probed."""
        return list(self.resolved.get("snapshots", []))

    @property
    def expected_readings(self) -> list[Expected]:
        gradients = {"all": [GRADIENT], "lora": [LORA_GRADIENT], "both": [GRADIENT, LORA_GRADIENT]}
        names = ["attention_correlation", "reverse_probability", *gradients[self.config.snapshots.parameters]]
        return [Expected(step, name, "raw") for step in self.snapshots for name in names]

    @property
    def lacks(self) -> str | None:
        if missing := self.missing_answers:
            return f"answers of step {missing[0]} are missing ({len(missing)} snapshots lack some)"
        there = (self.path / EVALUATION).is_dir() or not self.asks
        return None if there else "its evaluation is missing"

    @property
    def asks(self) -> bool:
        """Whether its config asks for any fact; `evaluation.facts: 0` asks for none."""
        return self.config.evaluation.facts != 0

    @property
    def missing_answers(self) -> list[int]:
        """The snapshots, up to the last complete checkpoint, whose answers should be there and are not."""
        last = max(self.steps, default=-1)
        return [
            step
            for step, names in self.expected_answers.items()
            if step <= last and not all((self.path / ANSWERED / step_name(step) / name).is_file() for name in names)
        ]

    @property
    def expected_answers(self) -> dict[int, list[str]]:
        """The files of answers that each snapshot should have, by step; none unless they are asked there."""
        chosen = self.config.evaluation
        names = ["decoded_match"] * (chosen.at == "snapshots") + ["candidate_rank"] * chosen.candidates
        sides = self.resolved.get("asked", [])
        files = [f"{name}.{asked}.{split}.parquet" for name in names for asked, split in sides]
        return {step: files for step in answer_steps(self.config, self.snapshots) if files}

    def pairs(self, model: ProbedModel | None = None) -> ReversalPairs:
        return snapshot_pairs(self.config, text_relation(self.config), model or self.load())

    def load(self, step: int = -1, weights: str | None = None) -> ProbedModel:
        return load_model(self.path, step=step, weights=weights, **placed_options(self.config))

    def evaluation(self) -> Readings:
        """Exact match forward and reverse, on trained and held-out facts.

        Raises: RevprobeError, before it is taken, and for a run whose config asks nothing.
        """
        if not self.asks:
            raise RevprobeError(f"{self.path} asked for no fact (evaluation.facts: 0), so it has no exact match")
        return Readings.load(self.path / EVALUATION)

    def answers(self) -> Readings:
        """What it answered, each reading with its `step`, `asked` and `split` in its meta: at every snapshot where the
        config says `evaluation.at: snapshots`, else at the end; with the ranks among candidates where it asks for them.

        Raises: RevprobeError, as `evaluation`.
        """
        at_snapshots = Readings.load(self.path / ANSWERED) if self.expected_answers else Readings([])
        return (
            at_snapshots if self.config.evaluation.at == "snapshots" else Readings([*self.evaluation(), *at_snapshots])
        )

    def answer_table(self) -> pd.DataFrame:
        """`answers` as one tidy table; see `answer_table` in `snapshot_answers`."""
        return answer_table(self.answers()).assign(run=self.name)

    def readings_so_far(self) -> Readings:
        """The readings there are; none before the first snapshot."""
        return self.readings() if (self.path / READINGS).is_dir() else Readings([])


@checked
@shows_progress("steps", argument="listener", reads=step_told)
def fine_tune(
    config: FinetuneConfig | Mapping[str, Any] | str | Path,
    folder: str | Path | None = None,
    *,
    listener: Listener | bool | None = None,
) -> FinetuneRun:
    """Fine-tune one model, or take it up where it stopped; a finished run is returned as it is.

    Under `accelerate launch` or `torchrun` every process runs it: they share the batches and the pairs, and the first
    one writes. Seeds torch, numpy and random from the config: they do not come out as they went in.

    Args:
        config: a FinetuneConfig, a mapping of its keys, a YAML file, or the name of an example.
        folder: the run's folder; `runs/<name>` when None.
        listener: called with (step, steps, loss) about once a second; None shows a bar, False nothing.
    Raises: RevprobeError, as `train`, and for a model, relation or direction that does not fit the config.
    Source: paper Sec. 6 and App. D.2.
    """
    config = config if isinstance(config, FinetuneConfig) else load_config(config, FinetuneConfig)
    folder = Path("runs") / config.name if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    team, run = ProcessGroup(), FinetuneRun(folder)
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:  # TrainingArguments are what joins the processes
        team = ProcessGroup.of(training_arguments(Path("."), steps=1, device=config.training.device))
    with run_lock(folder) if team.rank == 0 else nullcontext():
        if team.on_rank_zero(lambda: _claimed(run, config)):
            return run
        with noting_problems(folder), pinned_threads(config.training.threads), quiet_transformers():
            prepared, watch = prepare(config, folder, team), warned(folder, config.alerts)
            team.on_rank_zero(lambda: require_same_start(folder, run.resolved, prepared.resolved, config))
            model = None if run.trained else _train(run, prepared, team, listener, watch)
            team.on_rank_zero(lambda: _complete(run, prepared, model))
        if team.rank == 0:
            watch.end()
    return run


def finetuning_runs(runs: Iterable[Run]) -> list[FinetuneRun]:
    """The fine-tunings among some runs."""
    return [run for run in runs if isinstance(run, FinetuneRun)]


def _train(
    run: FinetuneRun, prepared: Prepared, team: ProcessGroup, listener: Listener | bool | None, watch: Watch
) -> ProbedModel:
    """Train from the newest checkpoint with its state, or from step 0; returns the model as it ends."""

    def start() -> Path | None:
        # What a checkpoint was trained on is said once; before there is one, nothing was.
        if not (run.steps and run.resolved):
            write_text(run.path / RESOLVED, json.dumps(prepared.resolved, indent=2) + "\n")
        keep_relation(run.path, run.config.relation.path, anew=not run.steps)
        remove_unfinished(run.path)
        return resume_from(run.path)

    checkpoint = team.on_rank_zero(start)
    trainer = build_finetuning(run.config, run.path, prepared, checkpoint)
    if watch.alerts and team.rank == 0:
        trainer.add_callback(AlertCallback(watch))
    if callable(listener) and team.rank == 0:
        trainer.add_callback(ProgressCallback(listener))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert trainer.model is not None, "it has just been trained"
    return prepared.wrapped(trainer.model, name=run.name, step=run.resolved["steps"], weights="raw")


def _claimed(run: FinetuneRun, config: FinetuneConfig) -> bool:
    """Whether the folder, now this config's, holds a finished run."""
    claim_run(run, config)
    return run.finished


def _complete(run: FinetuneRun, prepared: Prepared, model: ProbedModel | None) -> None:
    """Take what is missing: readings from their checkpoints, and the answers of the last one."""
    config = run.config

    def take(step: int, weights: str, names: set[str]) -> Readings:
        options: dict[str, Any] = {"batch_size": config.snapshots.batch_size, "parameters": config.snapshots.parameters}
        options["controls"] = config.snapshots.controls or ()
        return take_readings(run.load(step, weights), prepared.pairs, **options)

    taken = run.backfill_readings(take)
    if config.snapshots.during_training:
        for step in dict.fromkeys(one.step for one in taken):
            warnings.warn(f"{run.path}: missing readings of step {step} were taken from its checkpoint", stacklevel=4)
    if run.asks:
        backfill_answers(run, prepared)
        if not (run.path / EVALUATION).is_dir():
            _evaluate(run, prepared, model)


def _evaluate(run: FinetuneRun, prepared: Prepared, model: ProbedModel | None) -> None:
    """Ask the last step's model, or take over what its snapshot was asked."""
    with folder_written_whole(run.path / EVALUATION, lambda entry: entry.suffix == ".parquet") as working:
        if run.config.evaluation.at == "snapshots":
            answered = run.path / ANSWERED / step_name(run.snapshots[-1])
            for file in answered.glob("decoded_match.*.parquet"):
                shutil.copyfile(file, working / file.name)
        else:
            asked = model or run.load()
            with in_its_own_dtype(asked.module):
                save_evaluation(prepared.ask(asked), working)
