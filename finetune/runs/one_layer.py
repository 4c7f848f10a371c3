"""One-layer runs: RADD or GPT-2 trained from scratch on the letters, probed on raw and averaged weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, enable_full_determinism, set_seed

from ...arguments import checked
from ...errors import RevprobeError
from ...models.bases.configs import RaddConfig
from ...models.bases.radd import RaddForMaskedLM
from ...models.checkpoints import step_of
from ...models.hub import quiet_transformers
from ...models.one_layer import letter_tokenizer, one_layer_gpt2
from ...models.probed import ProbedModel
from ...models.registry import load_model
from ...probes.fused import PROBES
from ...probes.pairs.pairs import ReversalPairs
from ...probes.readings.reading import Reading
from ...progress import shows_progress
from ...relations.catalog import LettersRelation, letters
from ..config.loading import load_config
from ..config.one_layer import RunConfig
from ..training.answers_callback import ANSWERS, AnswersCallback
from ..training.arguments import training_arguments, uses_cpu
from ..training.checkpointing import READINGS, remove_unfinished, resume_from
from ..training.negatives import Negatives
from ..training.probe_callback import ProbeCallback, take_readings
from ..training.run_lock import run_lock
from ..training.step_log import STEPS, StepLog, read_table
from ..training.trainer import ForwardOnlyTrainer, TokenRows
from .alerts import AlertCallback, warned
from .forks import take_prefix
from .progress import Listener, ProgressCallback, step_told
from .run import CONFIG, Expected, Run, claim_run, noting_problems, pinned_threads


@dataclass(frozen=True, repr=False)
class OneLayerRun(Run):
    """A run of `train(...)`, finished or not."""

    @cached_property
    def config(self) -> RunConfig:
        return load_config(self.path / CONFIG, RunConfig)

    @property
    def axes(self) -> dict[str, Any]:
        """objective, position_encoding, length, seed."""
        return self.config.axes

    @property
    def total_steps(self) -> int:
        return self.config.training.steps

    @property
    def expected_readings(self) -> list[Expected]:
        config = self.config
        averaged = config.model.objective == "masked" and config.training.ema_decay is not None
        weights = ("raw", "ema") if averaged else ("raw",)
        names = PROBES.values()
        return [Expected(step, name, kind) for step in config.snapshot_steps for kind in weights for name in names]

    @property
    def relation(self) -> LettersRelation:
        """The facts it is trained on."""
        return letters(self.config.relation.length, self.config.relation.alphabet)

    def pairs(self, model: ProbedModel | None = None) -> ReversalPairs:
        config = self.config
        if model is not None and model.objective != config.model.objective:
            raise RevprobeError(
                f"{model.name} is {model.objective}, but the readings of {self.path.name!r} are of "
                f"{config.model.objective} models; give one of the run's (run.load()), or make pairs for this one "
                "(rp.letter_pairs(length, model=))"
            )
        tokenizer = (model and model.tokenizer) or letter_tokenizer(config.relation.alphabet)
        return self.relation.pairs_by_probe(config.model.objective, tokenizer)

    def answers(self) -> pd.DataFrame:
        """Its answers over training, a row for each step, weights and question; see `relations.answers`.

        Raises: RevprobeError, when the run has none (it is of an earlier version) or the file is damaged.
        """
        return read_table(self.path / ANSWERS)

    def steps_log(self) -> pd.DataFrame:
        """What each step did: step, loss, gradient_norm (before the clip), clipped, dropped, dropped_weight.

        Raises: RevprobeError, as `answers`.
        """
        return read_table(self.path / STEPS)

    def load(self, step: int = -1, weights: str | None = None) -> ProbedModel:
        device = "cpu" if uses_cpu(self.config.training.device) else "cuda"
        return load_model(self.path, step=step, weights=weights, device=device)

    def take(self, step: int, weights: str, names: set[str]) -> Iterable[Reading]:
        """Some of a checkpoint's readings, by name, as they are taken while training."""
        if not uses_cpu(self.config.training.device):
            enable_full_determinism(self.config.training.seed)  # as it was while training
        model = self.load(step, weights)
        pairs = self.pairs(model)
        asked = {probe: pairs.for_probe(probe) for probe, name in PROBES.items() if name in names}
        return take_readings(model, asked, controls=self.config.snapshots.controls or ())


@checked
@shows_progress("steps", argument="listener", reads=step_told)
def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    folder: str | Path | None = None,
    *,
    listener: Listener | bool | None = None,
) -> OneLayerRun:
    """Train one run, or take it up where it stopped; a finished one is returned as it is.

    Readings that have gone missing are taken again from their checkpoints.
    Seeds torch, numpy and random from the config: they do not come out as they went in.

    Args:
        config: a RunConfig, a mapping of its keys, a YAML file, or the name of an example.
        folder: the run's folder; `runs/<name>` when None.
        listener: called with (step, steps, loss) about once a second; None shows a bar, False nothing.
    Raises: RevprobeError, when the folder belongs to another config (the difference is shown), is being written by
        another process, or holds a damaged checkpoint; OSError, when it cannot be written.
    Warns: when it goes on from an earlier checkpoint than the last, takes readings again, or its software changed;
        when a reading crosses one of its alerts or is undefined where one asks, and of those that stand at the end.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, RunConfig)
    run = OneLayerRun(Path("runs") / config.name if folder is None else Path(folder))
    run.path.mkdir(parents=True, exist_ok=True)
    with run_lock(run.path):
        claim_run(run, config)
        if run.finished:
            return run
        watch = warned(run.path, config.alerts)
        with noting_problems(run.path), pinned_threads(config.training.threads), quiet_transformers():
            if not run.trained:
                remove_unfinished(run.path)
                take_prefix(run.path, config)
                checkpoint = resume_from(run.path)
                trainer, *callbacks = build_trainer(run, checkpoint)
                for callback in callbacks:
                    trainer.add_callback(callback)
                if config.alerts:
                    trainer.add_callback(AlertCallback(watch))
                if callable(listener):
                    trainer.add_callback(ProgressCallback(listener))
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            taken = run.backfill_readings(run.take)
        watch.end()
        if taken:
            warnings.warn(f"{run.path}: {len(taken)} missing readings were taken from their checkpoints", stacklevel=3)
    return run


def build_trainer(
    run: OneLayerRun, checkpoint: Path | None
) -> tuple[ForwardOnlyTrainer, AnswersCallback, ProbeCallback]:
    """A run's trainer and what takes its answers and readings, from its config alone; the model is untrained.

    Args:
        checkpoint: where training will go on from; its readings are there and not taken again.
    """
    config, training = run.config, run.config.training
    arguments = training_arguments(
        run.path,
        steps=training.steps,
        device=training.device,
        schedule=training.schedule,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.gradient_clipping or 0.0,
        seed=training.seed,
    )
    set_seed(training.seed)
    model, tokenizer = build_model(config)
    trainer = ForwardOnlyTrainer(
        model=model,
        args=arguments,
        train_dataset=TokenRows(torch.tensor(tokenizer(run.relation.training_texts())["input_ids"])),
        processing_class=tokenizer,
        objective=config.model.objective,
        ema_decay=training.ema_decay,
        snapshots=config.snapshot_steps,
        rates=training.rates,
        masks=training.masks,
        per=training.loss,
        negatives=negatives_of(config),
        step_log=StepLog(run.path / STEPS, training.gradient_clipping),
    )
    name = run.path.resolve().name
    wrapping: dict[str, Any] = {"tokenizer": tokenizer, "objective": config.model.objective, "name": name}
    pairs = run.pairs(ProbedModel(model, **wrapping))
    done = () if checkpoint is None else (step_of(checkpoint) or 0,)
    answers = AnswersCallback(run.relation, run.path / ANSWERS, steps=config.answer_steps, ema=trainer.ema, **wrapping)
    steps = config.snapshot_steps
    asked: dict[str, Any] = {"steps": steps, "done": done, "controls": config.snapshots.controls or ()}
    probes = ProbeCallback(pairs, run.path / READINGS, ema=trainer.ema, **asked, **wrapping)
    return trainer, answers, probes


def negatives_of(config: RunConfig) -> Negatives:
    """What a run leaves out of its loss."""
    training, switch = config.training, config.training.switch
    own = Negatives(config.relation.alphabet, training.negatives, training.negative_weight)
    return own if switch is None else replace(own, switch_step=switch.step, switch_dial=switch.negatives)


def build_model(config: RunConfig) -> tuple[PreTrainedModel, Any]:
    """The untrained model and its tokenizer, from torch's current random state, for sequences of `relation.length`."""
    tokenizer = letter_tokenizer(config.relation.alphabet)
    own = {"initialization", "head_bias", "dropout_sites"}
    size = config.model.model_dump(exclude={"family", "position_encoding", *own})
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config.model.family == "gpt2":
        return one_layer_gpt2(**tokens, **size, max_length=config.relation.length), tokenizer
    radd = RaddConfig(
        **tokens,
        **size,
        **config.model.model_dump(include=own),
        mask_token_id=tokenizer.mask_token_id,
        position_encoding=config.model.position_encoding or "rope",
        max_length=config.relation.length,
    )
    return RaddForMaskedLM(radd), tokenizer
