"""Inner products of per-example gradients by plain autograd, which the recorder's are held against."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from revprobe.hooks.gradients.recorder import record_gradients


def worst_product_error(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[slice], Tensor],
    batch: int,
    *,
    one_by_one: bool = True,
    unread: dict[str, str] | None = None,
) -> float:
    """The largest error of any inner product, as a share of the whole gradients' norms.

    Args:
        loss: one number for each of the examples that a slice names.
        one_by_one: whether the recorder may run examples by themselves for what the batch does not tell apart; `unread`
            then names those parameters.
    """
    left, right = torch.cartesian_prod(torch.arange(batch), torch.arange(batch)).T
    alone = lambda n: loss(slice(n, n + 1))[0]  # noqa: E731
    recording = record_gradients(module, dict(parameters), batch, loss_of=alone if one_by_one else None, unread=unread)
    with recording as recorder:
        found = recorder.backward(loss(slice(None)), left, right).inner
    rows = [torch.autograd.grad(alone(n), list(parameters.values()), materialize_grads=True) for n in range(batch)]
    whole = torch.stack([torch.cat([g.flatten() for g in grads]).norm() for grads in rows])
    errors = []
    for k, name in enumerate(parameters):
        each = torch.stack([grads[k].flatten() for grads in rows])
        errors.append(((found[name] - (each @ each.T).flatten()).abs() / (whole[left] * whole[right])).max())
    return float(torch.stack(errors).max())
