"""The gradients of some parameters, formed one example at a time: the plain way, for what no recorded call tells apart.

Each example is run by itself and autograd asked for these parameters alone. That is exact whatever the model does with
them (tables without a batch, weights used outside their modules, experts stored in one tensor, outputs written
into), and costs one more forward and backward pass per example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import RevprobeError, first_line
from .backward import Products, Selection, part_labels
from .products import multiply
from .uses import FormedUse

LossOf = Callable[[int], Tensor]  # the loss of one example, run by itself
# Most elements of gradients held at once, of all examples; parameters beyond it are read in another round.
_HELD = 2**28


def read_one_by_one(
    module: nn.Module,
    selection: Selection,
    names: Sequence[str],
    loss_of: LossOf,
    pairs: tuple[Tensor, Tensor],
    batch: int,
) -> Products:
    """Form the gradients of the parameters `names` for every example and multiply them.

    Shapes: `pairs`: `pair, pair`.
    Raises: RevprobeError, when autograd itself refuses, or a gradient is not finite.
    """
    found = Products({}, {})
    for part in _rounds(selection.parameters, names, batch):
        parameters = [selection.parameters[name] for name in part]
        each = [_gradients(part, parameters, loss_of(n)) for n in range(batch)]
        for place, (name, parameter) in enumerate(zip(part, parameters, strict=True)):
            grads, noise = (torch.stack([one[side][place] for one in each]) for side in (0, 1))
            axis = 1 + _output_axis(module, name, parameter)
            for label, features in part_labels(name, selection.parts).items():
                g, n = (x if features is None else x.index_select(axis, features.to(x.device)) for x in (grads, noise))
                found.inner[label], found.floor[label] = multiply([_use(g, n, parameter)], parameter, *pairs)
    return found


def _rounds(parameters: Mapping[str, nn.Parameter], names: Sequence[str], batch: int) -> Iterator[list[str]]:
    part: list[str] = []
    for name in names:
        if part and batch * sum(parameters[n].numel() for n in (*part, name)) > _HELD:
            yield part
            part = []
        part.append(name)
    yield part


def _gradients(names: Sequence[str], parameters: Sequence[Tensor], loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients, and by how much they change when they are rounded otherwise."""
    try:
        found, again = (_backward(loss * factor, parameters, factor) for factor in (1.0, 3.0))
    except RuntimeError as error:
        raise RevprobeError(
            f"autograd gives no gradient of {names[0]!r} ({len(names)} parameters): {first_line(error)}; leave them "
            "out with parameters="
        ) from error
    for name, g in zip(names, found, strict=True):
        if not bool(g.isfinite().all()):
            raise RevprobeError(
                f"the gradient of {name!r} is not finite: the loss overflows; use a wider dtype, or check the weights "
                "for NaN"
            )
    return found, [a - b for a, b in zip(found, again, strict=True)]


def _backward(loss: Tensor, parameters: Sequence[Tensor], factor: float) -> list[Tensor]:
    if loss.grad_fn is None:
        return [_wide(torch.zeros_like(p)) for p in parameters]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=factor == 1.0)
    return [_wide(torch.zeros_like(p) if g is None else g) / factor for g, p in zip(found, parameters, strict=True)]


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _use(grads: Tensor, noise: Tensor, parameter: Tensor) -> FormedUse:
    """What is zero in theory is rounding, and changes as a whole with it: then the change stands for the terms."""
    grads, noise = grads.flatten(1), noise.flatten(1)
    change = torch.linalg.vector_norm(noise, dim=1) / torch.finfo(parameter.dtype).eps
    return FormedUse(grads, torch.maximum(grads.pow(2).sum(1), change.pow(2)))


def _output_axis(module: nn.Module, name: str, parameter: Tensor) -> int:
    """The axis of a projection's output features, along which fused parts lie."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return 1 if isinstance(owner, Conv1D) and parameter.dim() == 2 else 0
