"""The step that AdamW is about to take, worked out from its state and the gradients that are there, without taking it.

Preconditioner, bias correction, weight decay and learning rate are all in it, since torch itself takes the step, on
copies; clipping is in the gradients already.

Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), Alg. 2; torch.optim.AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

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
    """torch's own step on copies in float64, where the difference of two weights keeps the digits of a small update."""
    assert parameter.grad is not None, "parameters without gradient are left out"
    weight = parameter.detach().double()
    moved, zero = weight.clone(), torch.zeros_like(weight)
    mean, square, largest = (
        state.get(key, zero).double().clone() for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    )
    adam(
        [moved],
        [parameter.grad.double()],
        [mean],
        [square],
        [largest] if group["amsgrad"] else [],
        [torch.tensor(float(state["step"]) if state else 0.0)],
        foreach=False,
        fused=False,
        amsgrad=group["amsgrad"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        decoupled_weight_decay=group.get("decoupled_weight_decay", False),
    )
    return (moved - weight).to(torch.promote_types(parameter.dtype, torch.float32))
