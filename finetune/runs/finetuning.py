"""A fine-tuning: LoRA on one direction of a relation, in one folder, probed at every snapshot, then asked both ways.

RUN/config.yaml, versions.json, problem.txt    as in any run
RUN/resolved.json      what the config came to on this model and relation: steps, snapshots, rows, LoRA targets
RUN/base/              the model it built for itself, where it did
RUN/checkpoints/step-000500/                   the adapter, as peft saves it, and what a resume needs
RUN/readings/step-000500/<probe>.raw.parquet
RUN/predictions.parquet                        what the gradients foretold of the step after each snapshot
RUN/evaluation/decoded_match.<asked>.<split>.parquet
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...atomic_files import write_text
from ...errors import RevprobeError, first_line
from ...models.checkpoints import step_name
from ...models.hub import quiet_transformers
from ...models.probed import ProbedModel
from ...models.registry import load_model
from ...probes.readings.readings import Readings
from ...relations.evaluation import evaluate_relation, save_evaluation
from ..config.finetuning import FinetuneConfig
from ..config.one_layer import load_config
from ..training.checkpointing import READINGS, only_writer, remove_unfinished, resume_from
from ..training.distributed import Team
from ..training.lora_readings import GRADIENT, LORA_GRADIENT
from ..training.probe_callback import take_readings
from ..training.trainer import ForwardOnlyTrainer
from .building import lean_arguments
from .finetune_setup import Prepared, build_finetuning, placed_options, prepare
from .progress import Listener, ProgressCallback
from .run import CONFIG, PROBLEM, Run, claim_run, noting_problems, pinned_threads

if TYPE_CHECKING:
    from ...report.html.report import ReportRun

RESOLVED, EVALUATION = "resolved.json", "evaluation"


@dataclass(frozen=True)
class FinetuneRun(Run):
    """A fine-tuning's folder, finished or not; `open_run(path)` and `fine_tune(...)` return it."""

    @cached_property
    def config(self) -> FinetuneConfig:  # type: ignore[override]  # what every run shares is what it writes
        """What was asked for. Raises: RevprobeError, when config.yaml is damaged."""
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
    def trained(self) -> bool:
        return bool(self.resolved) and self.resolved["steps"] in self.steps

    @property
    def finished(self) -> bool:
        """Whether it is trained, no snapshot lacks a reading, and both directions have been asked."""
        return self.trained and not self.missing_steps and (self.path / EVALUATION).is_dir()

    @property
    def missing_steps(self) -> list[int]:
        """Snapshots up to the last checkpoint that lack a reading."""
        last = max(self.steps, default=-1)
        there = {step: {p.name for p in self._readings_of(step).glob("*.parquet")} for step in self.snapshots}
        return [step for step in self.snapshots if step <= last and not self.expected <= there[step]]

    @property
    def snapshots(self) -> list[int]:
        """The steps that are checkpointed and probed."""
        return list(self.resolved.get("snapshots", []))

    @property
    def expected(self) -> set[str]:
        """The files of one snapshot's readings."""
        gradients = {"all": [GRADIENT], "lora": [LORA_GRADIENT], "both": [GRADIENT, LORA_GRADIENT]}
        names = ["attention_correlation", "reverse_probability", *gradients[self.config.snapshots.parameters]]
        return {f"{name}.raw.parquet" for name in names}

    @property
    def axes(self) -> dict[str, Any]:
        """objective (with what it leaves out), seed, model, dataset, direction."""
        objective = self.resolved.get("objective")
        only = " (response only)" if self.config.objective.scope == "response_only" and objective == "masked" else ""
        return {"objective": objective and objective + only} | self.config.axes

    @property
    def problem(self) -> str | None:
        """Why the run is not finished; None when it is."""
        if self.finished:
            return None
        if self._noted:
            return self._noted
        if not self.resolved:
            return "stopped before training; run the same command again to go on"
        if not self.trained:
            at = self.steps[-1] if self.steps else 0
            return f"stopped at step {at} of {self.resolved['steps']}; run the same command again to go on"
        lacking = f"the readings of step {self.missing_steps[0]} are" if self.missing_steps else "its evaluation is"
        return f"{lacking} missing; run the same command again"

    def evaluation(self) -> Readings:
        """Exact match forward and reverse, on trained and held-out facts. Raises: RevprobeError, before it is taken."""
        return Readings.load(self.path / EVALUATION)

    def readings_so_far(self) -> Readings:
        """The readings there are; none before the first snapshot."""
        return self.readings() if (self.path / READINGS).is_dir() else Readings([])

    def for_report(self) -> ReportRun:
        return replace(super().for_report(), axes=self.axes)

    def report_sections(self) -> list[str]:
        """What a report shows besides: Table 7's numbers and Fig. 4."""
        from ...report.html.finetune_sections import finetune_sections

        return finetune_sections([self])

    @property
    def _noted(self) -> str | None:
        file = self.path / PROBLEM
        return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None

    def _readings_of(self, step: int) -> Path:
        return self.path / READINGS / step_name(step)


def fine_tune(
    config: FinetuneConfig | str | Path, folder: str | Path | None = None, *, listener: Listener | None = None
) -> FinetuneRun:
    """Fine-tune one model, or take it up where it stopped; a finished run is returned as it is.

    Under `accelerate launch` or `torchrun` every process runs it: they share the batches and the pairs, and the first
    one writes. Seeds torch, numpy and random from the config: they do not come out as they went in.

    Args:
        config: a FinetuneConfig, a YAML file, or the name of an example.
        folder: the run's folder; `runs/<name>` when None.
        listener: called with (step, steps, loss) about once a second.
    Raises: RevprobeError, as `train`, and for a model, relation or direction that does not fit the config.
    Source: paper Sec. 6 and App. D.2.
    """
    config = config if isinstance(config, FinetuneConfig) else load_config(config, FinetuneConfig)
    folder = Path("runs") / config.name if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    team, run = _team(config), FinetuneRun(folder)
    with only_writer(folder) if team.rank == 0 else nullcontext():
        if team.first_does(lambda: claim_run(folder, config, FinetuneRun).finished):
            return run
        with noting_problems(folder), pinned_threads(config.training.threads), quiet_transformers():
            prepared = prepare(config, folder, team)
            model = None if run.trained else _train(run, prepared, team, listener)
            team.first_does(lambda: _complete(run, prepared, model))
    return run


def finetuning_runs(runs: Iterable[Run]) -> list[FinetuneRun]:
    """The fine-tunings among some runs."""
    return [run for run in runs if isinstance(run, FinetuneRun)]


def _team(config: FinetuneConfig) -> Team:
    """The processes of this run; TrainingArguments are what joins them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team()
    return Team.of(lean_arguments(Path("."), steps=1, device=config.training.device))


def _train(run: FinetuneRun, prepared: Prepared, team: Team, listener: Listener | None) -> ProbedModel:
    """Train from the newest checkpoint with its state, or from step 0; returns the model as it ends."""

    def start() -> Path | None:
        write_text(run.path / RESOLVED, json.dumps(prepared.resolved, indent=2) + "\n")
        remove_unfinished(run.path)
        return resume_from(run.path)

    checkpoint = team.first_does(start)
    trainer = build_finetuning(run.config, run.path, prepared, checkpoint)
    if listener is not None and team.rank == 0:
        trainer.add_callback(ProgressCallback(listener))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return _as_it_ends(trainer, prepared, run)


def _as_it_ends(trainer: ForwardOnlyTrainer, prepared: Prepared, run: FinetuneRun) -> ProbedModel:
    assert trainer.model is not None, "it has just been trained"
    return prepared.wrapped(trainer.model, name=run.name, step=run.resolved["steps"], weights="raw")


def _complete(run: FinetuneRun, prepared: Prepared, model: ProbedModel | None) -> None:
    """Take what is missing: readings from their checkpoints, and the answers of the last one."""
    config = run.config
    for step in run.missing_steps:
        if step not in run.steps:
            raise RevprobeError(
                f"{run.path}: the readings of step {step} are missing, and its checkpoint with them; delete the run's "
                "folder to train it anew"
            )
        options = {"batch_size": config.snapshots.batch_size, "parameters": config.snapshots.parameters}
        probed = load_model(run.path, step=step, **placed_options(config))
        take_readings(probed, prepared.pairs, **options).save(run._readings_of(step))  # type: ignore[arg-type]
        if config.snapshots.during_training:
            warnings.warn(f"{run.path}: missing readings of step {step} were taken from its checkpoint", stacklevel=3)
    if not (run.path / EVALUATION).is_dir():
        probed = model or load_model(run.path, **placed_options(config))
        readings = evaluate_relation(
            probed,
            prepared.relation,
            config.relation.direction,
            templates=config.evaluation.templates,
            max_new_tokens=prepared.answer_tokens,
            batch_size=config.evaluation.batch_size,
        )
        working = run.path / f".{EVALUATION}.part"
        shutil.rmtree(working, ignore_errors=True)
        save_evaluation(readings, working)
        working.rename(run.path / EVALUATION)
