"""A run's next optimizer step, taken on a copy: the rows, masks, dropout, clipping, AdamW and schedule of the run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ...errors import RevprobeError
from ...hooks.untouched import set_eval_mode, untouched
from ...models.checkpoints import checkpoint_folder, step_of
from ...models.probed import ProbedModel
from ..runs.one_layer import OneLayerRun, build_trainer
from ..runs.run import pinned_threads
from ..training.checkpointing import missing_state
from ..training.trainer import ForwardOnlyTrainer, Permutations, TokenRows


@dataclass(frozen=True)
class Step:
    """A checkpoint before and after its run's next optimizer step; two models that share nothing.

    `optimizer`: "saved" (the checkpoint's own state) or "fresh"; `update`: what was added to each parameter, float64.
    """

    before: ProbedModel
    after: ProbedModel
    update: dict[str, Tensor]
    learning_rate: float
    optimizer: str


def next_step(run: OneLayerRun, step: int = -1, *, learning_rate: float | None = None) -> Step:
    """The run's next optimizer step from a checkpoint; files, models and random generators stay as they are.

    Raises: RevprobeError, when the run has no such checkpoint, or none comes after it and no learning rate is given.
    """
    checkpoint, step, _ = checkpoint_folder(run.path, step, "raw")
    if step >= run.config.training.steps and learning_rate is None:
        raise RevprobeError(f"step {step} is the last of {run.path}; pass learning_rate= to take another")
    before = run.load(step, "raw")
    with untouched(before.module), pinned_threads(run.config.training.threads):
        trainer, saved = trainer_at(run, checkpoint, before, learning_rate=learning_rate)
        module = trainer.model
        assert module is not None and trainer.optimizer is not None, "trainer_at gives it both"
        rate = float(trainer.optimizer.param_groups[0]["lr"])
        if saved:  # last: dropout then draws what the run drew
            trainer._load_rng_state(str(checkpoint))
        _take_step(trainer, step)
    start, end = (before.with_module(set_eval_mode(copy.deepcopy(one).double())) for one in (before.module, module))
    moved = dict(end.module.named_parameters())
    update = {name: (moved[name] - p).detach() for name, p in start.module.named_parameters()}
    return Step(start, end, update, rate, "saved" if saved else "fresh")


def trainer_at(
    run: OneLayerRun, checkpoint: Path, before: ProbedModel, *, learning_rate: float | None = None
) -> tuple[ForwardOnlyTrainer, bool]:
    """The run's trainer as it stands at a checkpoint, with a copy of its weights, and whether the optimizer's state is
    the saved one; the caller holds the random generators.

    Args:
        before: the checkpoint's raw model.
        learning_rate: instead of the schedule's.
    """
    trainer, *_ = build_trainer(run, None)
    module = trainer.model
    assert module is not None, "build_trainer gives it one"
    before.module.to(trainer.args.device)
    module.to(trainer.args.device)
    module.load_state_dict(before.module.state_dict())
    trainer.create_optimizer_and_scheduler(num_training_steps=run.config.training.steps)
    saved = not missing_state(checkpoint)
    if saved:
        trainer._load_optimizer_and_scheduler(str(checkpoint))
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None, "they were created just before"
    step = step_of(checkpoint) or 0
    # The rate of step number `step` by the run's schedule, unless one is asked for.
    for group, schedule in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * schedule(step) if learning_rate is None else learning_rate
    return trainer, saved


def batches(trainer: ForwardOnlyTrainer, step: int, count: int = 1) -> Iterator[Tensor]:
    """The rows of the run's next steps, in its order. Shapes: `-> batch seq` each."""
    table = cast(TokenRows, trainer.train_dataset)  # build_trainer's own
    size = trainer.get_total_train_batch_size(trainer.args)
    order = islice(Permutations(len(table), (step + count) * size, trainer.args.seed), step * size, None)
    for _ in range(count):
        yield table.__getitems__(list(islice(order, size)))


def backward(trainer: ForwardOnlyTrainer, step: int, rows: Tensor) -> float:
    """Loss and gradient as in the run, clipped, on the masks the run drew there; the norm before the clip."""
    module, arguments = trainer.model, trainer.args
    assert module is not None, "the caller made it"
    trainer.state.global_step = step
    module.train()
    loss = trainer.compute_loss(module, {"input_ids": rows.to(arguments.device)})
    loss.backward()
    limit = arguments.max_grad_norm or float("inf")  # 0 clips nothing
    return float(torch.nn.utils.clip_grad_norm_(module.parameters(), limit))


def _take_step(trainer: ForwardOnlyTrainer, step: int) -> None:
    """Loss, gradient, clipping and update as in the run."""
    assert trainer.optimizer is not None, "the caller made it"
    backward(trainer, step, next(batches(trainer, step)))
    trainer.optimizer.step()
