"""Many runs of one shape trained as one: their weights are stacked, and each step is one batched step of all of them.

Runs that differ only in seed and, for RADD, in position encoding go together. Each keeps its own rows, masks, clipping
and average, drawn and computed as if it trained alone, and writes an ordinary run folder; only dropout draws from a
stream that the batch shares. Without dropout the weights equal those of separate training up to rounding. On a GPU,
where a one-layer model leaves most of the device idle, that many runs take about the time of one.

A checkpoint written here holds what `revprobe train` writes (optimizer, schedule and random state of its own run), so
either can take the other's run up.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.trainer_callback import TrainerState

from ..errors import RevprobeError, first_line
from ..models.hub import quiet_transformers
from ..whole_files import write_text
from .config import RunConfig
from .missing import retake_missing
from .model_stack import StackedModels, clip_each
from .objectives import draw_masks, step_generator
from .progress import EVERY_SECONDS, Listener
from .runs import PROBLEM, Run, build_trainer, claim_run, pinned_threads
from .saving import only_writer, remove_unfinished, resume_from
from .snapshots import ProbeCallback
from .trainer import ForwardOnlyTrainer, Permutations, TokenRows

# What may differ between runs that train together.
_OWN: dict[str, Any] = {"name": True, "training": {"seed"}, "model": {"position_encoding"}}


def groups_of_one_shape(configs: Iterable[RunConfig]) -> list[list[RunConfig]]:
    """The configs sorted into groups that can train together, in the order of their first members."""
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(config.model_dump_json(exclude=_OWN), []).append(config)
    return list(groups.values())


def train_together(
    configs: Iterable[RunConfig], folder: str | Path, *, listeners: Mapping[str, Listener] | None = None
) -> dict[str, str]:
    """Train runs in `folder/<name>`, all of one shape at a time; each goes on from its newest checkpoint.

    Runs of one shape that stand at different checkpoints are trained in turn. Finished runs are left as they are, and
    readings that have gone missing are taken again. Seeds torch, numpy and random from the configs.

    Args:
        listeners: by run name, called with (step, steps, loss).
    Returns: what went wrong, by run name: training, or a folder that belongs to another config or is being written by
        another process. Neither stops the others.
    """
    problems: dict[str, str] = {}
    for group in groups_of_one_shape(configs):
        with ExitStack() as held:
            runs = []
            for config in group:
                try:
                    runs.append(_claim(Path(folder) / config.name, config, held))
                except (RevprobeError, OSError) as error:
                    problems[config.name] = _line(error)
            problems |= _train_group([run for run in runs if not run.finished], listeners or {})
    return problems


def _claim(folder: Path, config: RunConfig, held: ExitStack) -> Run:
    """Hold a run's folder until `held` is left."""
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(only_writer(folder))
    return claim_run(folder, config)


def _line(error: Exception) -> str:
    return first_line(error, with_type=not isinstance(error, RevprobeError))


def _train_group(runs: list[Run], listeners: Mapping[str, Listener]) -> dict[str, str]:
    """Train runs of one shape and take what readings they lack; returns the problem of each that failed."""
    problems: dict[str, str] = {}
    for together in _by_checkpoint(run for run in runs if not run.trained):
        try:
            with pinned_threads(together[0].config.training.threads), quiet_transformers():
                Batch(together, listeners).train()
        except Exception as error:
            problems |= dict.fromkeys((run.path.name for run in together), _line(error))
    for run in runs:
        if run.path.name in problems:
            write_text(run.path / PROBLEM, f"{problems[run.path.name]}\n")
            continue
        (run.path / PROBLEM).unlink(missing_ok=True)
        with pinned_threads(run.config.training.threads), quiet_transformers():
            retake_missing(run.path, run.config)
    return problems


def _by_checkpoint(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that can go on from the same step, together."""
    at: dict[str, list[Run]] = {}
    for run in runs:
        remove_unfinished(run.path)
        checkpoint = resume_from(run.path)
        at.setdefault("" if checkpoint is None else checkpoint.name, []).append(run)
    return list(at.values())


@dataclass
class _Member:
    """One run of a batch: its trainer never trains, it holds the run's model and average and writes its files."""

    run: Run
    model: PreTrainedModel
    trainer: ForwardOnlyTrainer
    probes: ProbeCallback
    checkpoint: Path | None

    @classmethod
    def open(cls, run: Run) -> _Member:
        checkpoint = resume_from(run.path)
        trainer, probes = build_trainer(run, checkpoint)
        trainer.create_optimizer_and_scheduler(run.config.training.steps)
        # What Trainer.train() writes into its state, and looks for when it takes a checkpoint up.
        trainer.state.max_steps = run.config.training.steps
        trainer.state.train_batch_size = run.config.training.batch_size
        trainer.state.compute_steps(trainer.args, run.config.training.steps)
        if checkpoint is not None:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer._load_optimizer_and_scheduler(str(checkpoint))
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        assert isinstance(trainer.model, PreTrainedModel), "build_trainer makes it one"
        return cls(run, trainer.model, trainer, probes, checkpoint)

    @property
    def rows(self) -> Tensor:
        assert isinstance(self.trainer.train_dataset, TokenRows), "build_trainer makes it one"
        return self.trainer.train_dataset.token_ids

    def batches(self, done: int) -> Iterator[Tensor]:
        """The run's own batches from step `done` on. Shapes: `-> batch seq`, on the CPU."""
        training = self.run.config.training
        order = iter(Permutations(len(self.rows), training.steps * training.batch_size, training.seed))
        next(itertools.islice(order, done * training.batch_size, done * training.batch_size), None)
        for _ in range(done, training.steps):
            yield self.rows[list(itertools.islice(order, training.batch_size))]


class Batch:
    """Runs of one shape and one step, stepping as one; `listeners` as in `train_together`."""

    def __init__(self, runs: Sequence[Run], listeners: Mapping[str, Listener]) -> None:
        self.members = [_Member.open(run) for run in runs]
        self.listeners, self._told = listeners, 0.0
        trainers = [member.trainer for member in self.members]
        self.first, self.config = trainers[0], runs[0].config
        self.step = self.first.state.global_step
        masked = self.first.objective == "masked"
        self.stack = StackedModels([m.model for m in self.members], self.first.mask_token_id if masked else None)
        self.optimizer, self.scheduler = self.stack.optimizer(trainers)
        self.average = self.stack.average([trainer.ema for trainer in trainers], updates=self.step)
        self.snapshots = frozenset(self.config.snapshot_steps)

    def train(self) -> None:
        """Take the steps that are left. Raises: RevprobeError, when a run's loss is not finite at a snapshot."""
        set_seed(self.config.training.seed)  # of the dropout
        if self.members[0].checkpoint is not None:
            self.first._load_rng_state(str(self.members[0].checkpoint))
        elif 0 in self.snapshots:
            self._write_snapshots()
        self.stack.base.train()
        for token_ids in self.rows():
            losses = self.take_step(token_ids)
            self.step += 1
            if self.step in self.snapshots:
                self._require_finite(losses)
                self._write_snapshots()
            self._tell(losses)

    def rows(self) -> Iterator[Tensor]:
        """Every run's own batch of each step that is left. Shapes: `-> models batch seq`."""
        own = (member.batches(self.step) for member in self.members)
        return (torch.stack(batches) for batches in zip(*own, strict=True))

    def take_step(self, token_ids: Tensor) -> Tensor:
        """One optimizer step of every model. Shapes: `models batch seq -> models` (the losses)."""
        device = self.first.args.device
        losses = self.stack.losses(token_ids.to(device), *(drawn.to(device) for drawn in self._draw(token_ids.shape)))
        losses.sum().backward()
        clip_each(self.stack.weights, self.config.training.gradient_clipping)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.stack.weights)
        self.scheduler.step()
        self.optimizer.zero_grad()
        return losses.detach()

    def _draw(self, shape: torch.Size) -> tuple[Tensor, ...]:
        """Each run's own masks of this step. Shapes: `-> models batch, models batch seq`; nothing for causal models."""
        if self.first.objective == "causal":
            return ()
        seeds = [member.run.config.training.seed for member in self.members]
        drawn = [draw_masks((shape[1], shape[2]), generator=step_generator(seed, self.step)) for seed in seeds]
        return torch.stack([rate for rate, _ in drawn]), torch.stack([is_masked for _, is_masked in drawn])

    def _tell(self, losses: Tensor) -> None:
        """About once a second and at the end: reading the losses makes a GPU wait."""
        now, steps = time.monotonic(), self.config.training.steps
        if self.listeners and (now - self._told >= EVERY_SECONDS or self.step == steps):
            self._told = now
            for member, loss in zip(self.members, losses.tolist(), strict=True):
                if tell := self.listeners.get(member.run.path.name):
                    tell(self.step, steps, loss)

    def _require_finite(self, losses: Tensor) -> None:
        for member, loss in zip(self.members, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise RevprobeError(
                    f"the training loss of {member.run.path.name} is {loss} at step {self.step}; lower learning_rate "
                    "or raise warmup_steps, or leave that run out"
                )

    def _write_snapshots(self) -> None:
        """Readings, then the checkpoint, of every run, from its own slice of the stack."""
        for place, member in enumerate(self.members):
            trainer = member.trainer
            self.stack.unstack(place, trainer, self.optimizer)
            if self.average is not None and trainer.ema is not None:
                self.stack.unstack_weights(self.average.module, place, trainer.ema.module)
            assert trainer.lr_scheduler is not None, "made when the run was opened"
            trainer.lr_scheduler.load_state_dict(copy.deepcopy(self.scheduler.state_dict()))
            trainer.state.global_step = self.step
            at = (trainer.args, trainer.state, trainer.control)
            if self.step == 0:
                member.probes.on_train_begin(*at, model=member.model)
            else:
                member.probes.on_step_end(*at, model=member.model)
            trainer._save_checkpoint(member.model, None)
