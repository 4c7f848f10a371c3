"""Many runs of one shape trained as one: their weights are stacked, and each step is one batched step of all of them.

Runs that differ only in seed, in what is masked and priced and, for RADD, in position encoding go together. Each keeps
its own rows, masks, clipping and average, drawn and computed as if it trained alone, and writes an ordinary run folder;
only dropout draws from a stream that the batch shares. Without dropout the weights equal those of separate training up
to rounding.

A run that fails stops none of the others: its slice of the stack is carried along unread, and as every operation keeps
to its own slice, the others end with the bits that they would have had beside a sound run. (A batch that is stopped
and taken up without it draws another dropout.)

Meant for a GPU, most of which a one-layer model leaves idle, but run on CPUs only so far: with `device: cuda` torch is
asked for deterministic kernels, and whether every operation of the batched step has one (the backward pass of an
embedding under vmap, above all) has not been tried.

A checkpoint written here holds what `revprobe train` writes (optimizer, schedule and random state of its own run), so
either can take the other's run up.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.trainer_callback import TrainerState

from ...atomic_files import write_text
from ...errors import RevprobeError, first_line
from ...models.hub import quiet_transformers
from ..config.one_layer import RunConfig
from ..training.answers_callback import AnswersCallback
from ..training.checkpointing import remove_unfinished, resume_from
from ..training.objectives import PICKS, draw_masks, step_generator
from ..training.probe_callback import ProbeCallback
from ..training.run_lock import run_lock
from ..training.stacked_models import StackedModels, clip_each
from ..training.trainer import ForwardOnlyTrainer, Permutations, TokenRows
from .forks import take_prefix
from .one_layer import OneLayerRun, build_trainer
from .progress import EVERY_SECONDS, Listener
from .run import PROBLEM, Run, claim_run, pinned_threads

# What may differ between runs that train together.
_OWN: dict[str, Any] = {
    "name": True,
    "training": {"seed", "rates", "masks", "negatives", "negative_weight", "switch", "gradient_clipping"},
    "model": {"position_encoding"},
}


def groups_of_one_shape(configs: Iterable[RunConfig]) -> list[list[RunConfig]]:
    """The configs sorted into groups that can train together, in the order of their first members."""
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(config.model_dump_json(exclude=_OWN), []).append(config)
    return list(groups.values())


def train_together(
    configs: Iterable[RunConfig],
    folder: str | Path,
    *,
    listeners: Mapping[str, Listener] | None = None,
    readings: bool = True,
) -> dict[str, str]:
    """Train runs in `folder/<name>`, all of one shape at a time; each goes on from its newest checkpoint.

    Runs of one shape that stand at different checkpoints are trained in turn. Finished runs are left as they are, and
    readings that have gone missing are taken again. Seeds torch, numpy and random from the configs.

    Args:
        listeners: by run name, called with (step, steps, loss).
        readings: whether the probes are read as well; where not, `train` and `sweep` take them from the checkpoints.
    Returns: what went wrong, by run name: training, a damaged checkpoint, or a folder that belongs to another config
        or is being written by another process. None stops the others. All but the last two stand in the run's
        problem.txt too, until the same call takes it up again from its newest checkpoint.
    """
    problems: dict[str, str] = {}
    for group in groups_of_one_shape(configs):
        with ExitStack() as held:
            runs = []
            for config in group:
                run = OneLayerRun(Path(folder) / config.name)
                try:
                    run.path.mkdir(parents=True, exist_ok=True)
                    held.enter_context(run_lock(run.path))
                    claim_run(run, config)
                    if not run.finished:
                        (run.path / PROBLEM).unlink(missing_ok=True)
                        runs.append(run)
                except (RevprobeError, OSError) as error:
                    problems[config.name] = _line(error)
            problems |= _train_group(runs, listeners or {}, readings) if runs else {}
    return problems


def _line(error: Exception) -> str:
    return first_line(error, with_type=not isinstance(error, RevprobeError))


class Problems(dict[str, str]):
    """What went wrong, by run name; a run's first problem stands, and is in its folder from then on."""

    @contextmanager
    def of(self, *runs: Run) -> Iterator[None]:
        """An error inside is the problem of these runs and goes no further."""
        try:
            yield
        except Exception as error:
            for run in runs:
                if run.path.name not in self:
                    self[run.path.name] = _line(error)
                    with suppress(OSError):  # the disk may be what is wrong
                        write_text(run.path / PROBLEM, f"{_line(error)}\n")


def _train_group(runs: list[OneLayerRun], listeners: Mapping[str, Listener], readings: bool) -> Problems:
    """Train runs of one shape and take what readings they lack; returns the problem of each that failed."""
    problems = Problems()
    with pinned_threads(runs[0].config.training.threads), quiet_transformers():
        # Runs that can go on from the same step train together.
        at: dict[str, list[OneLayerRun]] = {}
        for run in [run for run in runs if not run.trained]:
            with problems.of(run):
                remove_unfinished(run.path)
                take_prefix(run.path, run.config)
                checkpoint = resume_from(run.path)
                at.setdefault("" if checkpoint is None else checkpoint.name, []).append(run)
        for together in at.values():
            with problems.of(*together):
                Batch(together, listeners, problems, readings=readings).train()
        for run in [run for run in runs if readings and run.path.name not in problems]:
            with problems.of(run):
                run.backfill_readings(run.take)
    return problems


@dataclass
class _Member:
    """One run of a batch: its trainer never trains, it holds the run's model and average and writes its files."""

    run: OneLayerRun
    model: PreTrainedModel
    trainer: ForwardOnlyTrainer
    answers: AnswersCallback
    probes: ProbeCallback
    checkpoint: Path | None

    @classmethod
    def open(cls, run: OneLayerRun) -> _Member:
        checkpoint = resume_from(run.path)
        trainer, answers, probes = build_trainer(run, checkpoint)
        trainer.create_optimizer_and_scheduler(run.config.training.steps)
        # What Trainer.train() writes into its state, and looks for when it takes a checkpoint up.
        trainer.state.max_steps = run.config.training.steps
        trainer.state.train_batch_size = run.config.training.batch_size
        trainer.state.compute_steps(trainer.args, run.config.training.steps)
        if checkpoint is not None:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer._load_optimizer_and_scheduler(str(checkpoint))
            trainer._load_rng_state(str(checkpoint))  # so that a damaged one is this run's problem, not the batch's
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        answers.resume(trainer.state.global_step)
        assert trainer.step_log is not None, "build_trainer makes one"
        trainer.step_log.resume(trainer.state.global_step)
        assert isinstance(trainer.model, PreTrainedModel), "build_trainer makes it one"
        return cls(run, trainer.model, trainer, answers, probes, checkpoint)

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
    """Runs of one shape and one step, stepping as one; `listeners` as in `train_together`.

    A run that fails gets into `problems` and is neither written nor told of any more; among `members`, those that
    could be opened, it keeps its place. Raises: RevprobeError, when none could be opened.
    """

    def __init__(
        self,
        runs: Sequence[OneLayerRun],
        listeners: Mapping[str, Listener],
        problems: Problems | None = None,
        *,
        readings: bool = True,
    ) -> None:
        self.readings = readings
        self.problems = Problems() if problems is None else problems
        self.members: list[_Member] = []
        for run in runs:
            with self.problems.of(run):
                self.members.append(_Member.open(run))
        if not self.members:
            raise RevprobeError("; ".join(self.problems[run.path.name] for run in runs))
        self.listeners, self._told = listeners, 0.0
        trainers = [member.trainer for member in self.members]
        self.first, self.config = trainers[0], self.members[0].run.config
        self.step = self.first.state.global_step
        masked = self.first.objective == "masked"
        mask_token_id = self.first.mask_token_id if masked else None
        self.stack = StackedModels([m.model for m in self.members], mask_token_id, self.first.per)
        self.optimizer, self.scheduler = self.stack.optimizer(trainers)
        self.average = self.stack.average([trainer.ema for trainer in trainers], updates=self.step)
        self.snapshots, self.answers = (frozenset(s) for s in (self.config.snapshot_steps, self.config.answer_steps))
        clipping = [member.run.config.training.gradient_clipping for member in self.members]
        self.limits = torch.tensor([math.inf if c is None else c for c in clipping], device=self.stack.device)
        # Of each step since the last snapshot: losses, norms, terms left out, their weight. `models` each.
        self._log: list[tuple[Tensor, ...]] = []
        # Each model's last loss, or its first that was not finite, and the step before that one.
        self._losses = torch.zeros(len(self.members), device=self.stack.device)
        self._sound_until = torch.full_like(self._losses, self.step, dtype=torch.long)

    @property
    def going(self) -> list[tuple[int, _Member]]:
        """The members without a problem, each with its place in the stack."""
        return [(place, m) for place, m in enumerate(self.members) if m.run.path.name not in self.problems]

    def train(self) -> None:
        """Take the steps that are left, for as long as any member is going."""
        set_seed(self.config.training.seed)  # of the dropout
        if self.members[0].checkpoint is not None:
            self.first._load_rng_state(str(self.members[0].checkpoint))
        else:
            self._read_answers()
            if 0 in self.snapshots:
                self._write_snapshots()
        self.stack.base.train()
        for token_ids in self.rows():
            if not self.going:
                return
            self._watch(self.take_step(token_ids))
            self.step += 1
            if self.step in self.answers:
                self._read_answers()
            if self.step in self.snapshots:
                self._write_snapshots()
            self._tell()

    def rows(self) -> Iterator[Tensor]:
        """Every run's own batch of each step that is left. Shapes: `-> models batch seq`."""
        own = (member.batches(self.step) for member in self.members)
        return (torch.stack(batches) for batches in zip(*own, strict=True))

    def take_step(self, token_ids: Tensor) -> Tensor:
        """One optimizer step of every model. Shapes: `models batch seq -> models` (the losses)."""
        device = self.first.args.device
        drawn = self._draw(token_ids.shape)
        dropped, weight, weights = self._weights(token_ids, *drawn)
        losses = self.stack.losses(*(table.to(device) for table in (token_ids, weights, *drawn)))
        losses.sum().backward()
        norms = clip_each(self.stack.weights, self.limits)
        self._log.append((losses.detach(), norms, dropped, weight))
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
        drawn = [
            draw_masks(
                (shape[1], shape[2]),
                generator=step_generator(training.seed, self.step),
                rates=training.rates,
                masks=training.masks,
            )
            for training in (member.run.config.training for member in self.members)
        ]
        return torch.stack([rate for rate, _ in drawn]), torch.stack([is_masked for _, is_masked in drawn])

    def _weights(self, token_ids: Tensor, *masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The terms that each run's dial leaves out, the sum of their 1/t, and the weight of every term.

        Shapes: `models batch seq, models batch, models batch seq (bool) -> models, models, models batch seq`.
        """
        dropped = torch.zeros(token_ids.shape, dtype=torch.bool)
        weights = torch.ones(token_ids.shape)
        rates, is_masked = masks or (torch.ones(token_ids.shape[:2]), torch.ones_like(dropped))
        for place, member in enumerate(self.members):
            negatives = member.trainer.negatives
            if negatives is not None:
                picks = step_generator(member.run.config.training.seed, self.step, phase=PICKS)
                dropped[place] = negatives.dropped(self.step, token_ids[place], is_masked[place], picks)
                weights[place].masked_fill_(dropped[place], negatives.weight)
        count = dropped.sum(2)
        return count.sum(1), (count / rates).sum(1), weights

    def _watch(self, losses: Tensor) -> None:
        """Keep the step at which a loss broke, without reading it: that would make a GPU wait."""
        self._losses = torch.where(self._losses.isfinite(), losses, self._losses)
        self._sound_until += self._losses.isfinite()

    def _tell(self) -> None:
        """About once a second and at the end, since it reads the losses."""
        now, steps = time.monotonic(), self.config.training.steps
        if self.listeners and (now - self._told >= EVERY_SECONDS or self.step == steps):
            self._told = now
            losses = self._losses.tolist()
            for place, member in self.going:
                if tell := self.listeners.get(member.run.path.name):
                    tell(self.step, steps, losses[place])

    def _read_answers(self) -> None:
        """Of every run that is going, from its own slice of the stack."""
        for place, member in self._sound():
            with self.problems.of(member.run):
                self._unstack_weights(place, member)
                member.answers.take(member.model, self.step)

    def _unstack_weights(self, place: int, member: _Member) -> None:
        self.stack.unstack_weights(self.stack.weights, place, member.model)
        if self.average is not None and member.trainer.ema is not None:
            self.stack.unstack_weights(self.average.module, place, member.trainer.ema.module)

    def _log_steps(self) -> None:
        """Hand every run its rows since the last snapshot."""
        if not self._log:
            return
        columns = [
            torch.stack([values.cpu() for values in column]).T.tolist() for column in zip(*self._log, strict=True)
        ]
        first = self.step - len(self._log) + 1
        for place, member in self.going:
            assert member.trainer.step_log is not None, "build_trainer makes one"
            for number, values in enumerate(zip(*(column[place] for column in columns), strict=True)):
                member.trainer.step_log.add(first + number, *values)
        self._log = []

    def _write_snapshots(self) -> None:
        """Readings, then the checkpoint, of every run that is going and whose loss has not broken since the last."""
        self._log_steps()
        for place, member in self._sound():
            with self.problems.of(member.run):
                self._write_snapshot(place, member)

    def _sound(self) -> list[tuple[int, _Member]]:
        """The members that are going, once those whose loss has broken since this was last asked are told of it."""
        losses, sound_until = self._losses.tolist(), self._sound_until.tolist()
        for place, member in self.going:
            with self.problems.of(member.run):
                if not math.isfinite(losses[place]):
                    raise RevprobeError(
                        f"the training loss of {member.run.path.name} is {losses[place]} at step "
                        f"{sound_until[place] + 1}; lower learning_rate or raise warmup_steps"
                    )
        return self.going

    def _write_snapshot(self, place: int, member: _Member) -> None:
        """Of one run, from its own slice of the stack."""
        trainer = member.trainer
        self.stack.unstack(place, trainer, self.optimizer)
        self._unstack_weights(place, member)
        assert trainer.lr_scheduler is not None, "made when the run was opened"
        trainer.lr_scheduler.load_state_dict(copy.deepcopy(self.scheduler.state_dict()))
        trainer.state.global_step = self.step
        at = (trainer.args, trainer.state, trainer.control)
        if not self.readings:
            pass
        elif self.step == 0:
            member.probes.on_train_begin(*at, model=member.model)
        else:
            member.probes.on_step_end(*at, model=member.model)
        trainer._save_checkpoint(member.model, None)
