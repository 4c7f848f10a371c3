"""The step that AdamW is about to take, worked out from its state and the gradients that are there, without taking it.

Preconditioner, bias correction, weight decay and learning rate are all in it; clipping is in the gradients already.

Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), Alg. 2; torch.optim.AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import RevprobeError


def innermost_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrapper, or inside several."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


@torch.no_grad()
def adamw_update(optimizer: Any) -> dict[int, Tensor]:
    """What the coming step adds to each parameter that has a gradient, by `id(parameter)`; nothing is changed.

    Shapes: each of its parameter's shape, in float32 or wider.
    Raises: RevprobeError, for an optimizer other than torch's Adam and AdamW, and for gradients still scaled for fp16.
    """
    if getattr(optimizer, "scaler", None) is not None:
        raise RevprobeError("the gradients are scaled for fp16 and the step may be skipped; train in bf16")
    optimizer = innermost_optimizer(optimizer)
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):  # a subclass may step in its own way
        raise RevprobeError(f"no formula for {type(optimizer).__name__}; expected torch's Adam or AdamW")
    return {
        id(parameter): _step(parameter, group, optimizer.state.get(parameter, {}))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    }


def _step(parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    weight, gradient = parameter.detach().to(wide), parameter.grad
    assert gradient is not None, "parameters without gradient are left out"
    gradient = gradient.to(wide) * (-1 if group["maximize"] else 1)
    (beta1, beta2), rate, decay = group["betas"], float(group["lr"]), group["weight_decay"]
    decoupled = group.get("decoupled_weight_decay", False)
    if decay and not decoupled:
        gradient = gradient + decay * weight
    count = float(state["step"]) + 1 if state else 1.0
    zero = torch.zeros_like(gradient)
    mean = beta1 * state.get("exp_avg", zero).to(wide) + (1 - beta1) * gradient
    square = beta2 * state.get("exp_avg_sq", zero).to(wide) + (1 - beta2) * gradient**2
    if group["amsgrad"]:
        square = torch.maximum(square, state.get("max_exp_avg_sq", zero).to(wide))
    scale = (square / (1 - beta2**count)).sqrt() + group["eps"]
    update = -rate / (1 - beta1**count) * mean / scale
    return update - rate * decay * weight if decay and decoupled else update
