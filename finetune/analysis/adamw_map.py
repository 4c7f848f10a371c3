"""A checkpoint's AdamW as a linear map: what a part of the gradient, the momentum and the decay each do to the weights.

    m' = b1 m + (1 - b1) c g        v' = b2 v + (1 - b2) (c g)^2
    u = -lr (m' / (1 - b1^(n+1))) / (sqrt(v' / (1 - b2^(n+1))) + eps)  -  lr decay w

The gradient g is the sum of its classes. With the second moment v' held as the whole objective's gradient makes it, the
coming update is a sum over classes, plus what the momentum brings from earlier steps and what the decay takes: it is
AdamW's own step on that gradient. Without it in v', elements that have had no gradient yet would take steps without
bound. c is the factor of the clip, the mean over the run's own next batches, whose own spread about g is not in v'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...hooks.untouched import untouched
from ...models.checkpoints import checkpoint_folder
from ..runs.one_layer import OneLayerRun
from ..runs.run import pinned_threads
from ..training.adamw_update import innermost_optimizer
from .next_step import backward, batches, trainer_at
from .reverse_gradients import FlatParameters

NO_STATE = "the checkpoint keeps no state of the optimizer"
NO_MOMENTS = "the optimizer has taken no step yet, so it has no moments"
NO_RUN = "a model alone has no optimizer; pass the run"
BATCHES = 8


@dataclass(frozen=True)
class AdamWMap:
    """The coming update, apart. Shapes: `per_gradient`, `momentum`, `decay`: parameter.

    Attributes:
        learning_rate: the schedule's at this step.
        clip: the factor that the clip multiplies gradients by, a mean over batches; norms: theirs before it. Without
            moments neither is worked out.
        per_gradient: what the update holds of a gradient, element by element, clip included; None without moments.
        momentum, decay: what it holds whatever the gradient is.
        reason: why there are no moments; "" where there are.
    """

    learning_rate: float
    clip: float
    norms: list[float]
    per_gradient: Tensor | None = None
    momentum: Tensor | None = None
    decay: Tensor | None = None
    reason: str = ""


def adamw_map(run: OneLayerRun, step: int, flat: FlatParameters, gradient: Tensor) -> AdamWMap:
    """The optimizer of a run at a checkpoint; files, models and random generators stay as they are.

    Args:
        flat: the order of the parameters, those of the same checkpoint.
        gradient: of the whole objective as it is trained, dial included. Shapes: `parameter`.
    """
    checkpoint, step, _ = checkpoint_folder(run.path, step, "raw")
    before = run.load(step, "raw")
    with untouched(before.module), pinned_threads(run.config.training.threads):
        trainer, saved = trainer_at(run, checkpoint, before)
        module, optimizer = trainer.model, innermost_optimizer(trainer.optimizer)
        assert module is not None, "trainer_at gives it one"
        rate = float(optimizer.param_groups[0]["lr"])
        if not saved or not optimizer.state:
            return AdamWMap(rate, float("nan"), [], reason=NO_MOMENTS if step == 0 else NO_STATE)
        norms = []
        for ahead, rows in enumerate(batches(trainer, step, BATCHES)):
            module.zero_grad()
            norms.append(backward(trainer, step + ahead, rows))
        limit = trainer.args.max_grad_norm or float("inf")
        clip = float(np.mean([min(1.0, limit / norm) for norm in norms]))
        named, coming = dict(module.named_parameters()), flat.named(gradient.double() * clip)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        parts = [_of_parameter(named[name], groups, optimizer, clip, coming[name]) for name in flat.names]
    per_gradient, momentum, decay = (flat.flat(part) for part in zip(*parts, strict=True))
    return AdamWMap(rate, clip, norms, per_gradient, momentum, decay)


@torch.no_grad()
def _of_parameter(
    parameter: Tensor,
    groups: dict[int, dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    clip: float,
    coming: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`per_gradient`, `momentum` and `decay` of one parameter, float64; `coming` is its clipped gradient."""
    group, state = groups[id(parameter)], optimizer.state[parameter]
    first, second = group["betas"]
    taken = float(state["step"])
    square = second * state["exp_avg_sq"].double() + (1 - second) * coming.to(parameter.device).square()
    root = (square / (1 - second ** (taken + 1))).sqrt() + group["eps"]
    scale = -group["lr"] / (1 - first ** (taken + 1)) / root
    decay = -group["lr"] * group["weight_decay"] * parameter.double()
    return scale * (1 - first) * clip, scale * first * state["exp_avg"].double(), decay


def no_map() -> AdamWMap:
    """Of a model that no run trains."""
    return AdamWMap(float("nan"), float("nan"), [], reason=NO_RUN)
