"""How one call of a module turns into the gradient of its parameters: closed rules, and a replay for the rest.

Linear, Conv1D and Embedding have rules that keep factors; any other module that holds parameters is run again under
vmap, one example at a time, through its own vector-Jacobian product.

Shapes below: batch, seq, out, in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.pytorch_utils import Conv1D

from ..errors import RevprobeError, first_line
from .gradient_products import FormedUse, LookupUse, OuterUse, Use


def carries_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def has_rule(module: nn.Module) -> bool:
    """Whether a closed rule covers the module; subclasses with a forward of their own are replayed instead."""
    plain = (type(module).forward is kind.forward for kind in (nn.Linear, nn.Embedding, Conv1D))
    return any(plain) and not (
        isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq)
    )


def linear_use(module: nn.Module, key: str, gradient: Tensor, inputs: Tensor) -> Use:
    """What one call of a Linear or Conv1D adds to its weight or bias."""
    if key == "bias":
        return FormedUse(gradient.sum(1), gradient.pow(2).sum((1, 2)))
    return OuterUse(inputs, gradient) if isinstance(module, Conv1D) else OuterUse(gradient, inputs)


def lookup(module: nn.Embedding, ids: Tensor, gradient: Tensor) -> LookupUse:
    ids = ids if ids.numel() == gradient[..., 0].numel() else ids.expand(gradient.shape[:-1])
    ids = ids.reshape(gradient.shape[0], -1)
    if module.padding_idx is not None:
        ids = ids.masked_fill(ids == module.padding_idx, -1)
    return LookupUse(ids, gradient.reshape(gradient.shape[0], -1, gradient.shape[-1]), module.num_embeddings)


def drop_silent_tokens(gradient: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the tokens that carry gradient: the unembedding's readout rows, not the whole sequence."""
    loud = (gradient != 0).any(-1)
    keep = max(int(loud.sum(1).max()), 1)
    if keep == loud.shape[1]:
        return gradient, inputs
    order = loud.int().argsort(dim=1, descending=True, stable=True)[:, :keep, None]
    return gradient.gather(1, order.expand(-1, -1, gradient.shape[-1])), inputs.gather(
        1, order.expand(-1, -1, inputs.shape[-1])
    )


def replay(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: list[Tensor],
    gradients: Sequence[Tensor | None],
    batch: int,
) -> dict[str, Use]:
    """Per-example gradients of a module's own parameters, by a vector-Jacobian product vmapped over the batch.

    Its forward is run again, one example at a time under vmap. Tensors whose first axis is `(batch seq)` give each
    example its own rows.
    Raises: RevprobeError, for a module that vmap cannot run (experts chosen by their input), or that it runs wrongly:
        the examples' gradients must add up to the batch's own.
    """
    own = {key: p.detach() for key, p in module._parameters.items() if p is not None}
    cotangents = [torch.zeros_like(o) if g is None else g.to(o.dtype) for o, g in zip(outputs, gradients, strict=True)]
    leaves, structure = tree_flatten((args, kwargs))
    sizes = {len(output) for output in outputs} | {batch}
    varies = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] in sizes for leaf in leaves]
    varying = [_by_example(leaf, batch) for leaf, v in zip(leaves, varies, strict=True) if v]

    def one_example(values: list[Tensor], cotangent: list[Tensor]) -> dict[str, Tensor]:
        remaining = iter(values)
        inputs = [next(remaining) if v else leaf for leaf, v in zip(leaves, varies, strict=True)]
        one_args, one_kwargs = tree_unflatten(inputs, structure)

        def forward(weights: dict[str, Tensor]) -> list[Tensor]:
            # A child that shares a parameter is recorded by itself (BERT's decoder and its head's bias).
            found = functional_call(module, weights, one_args, one_kwargs, tie_weights=False)
            return _leaves(found)

        return vjp(forward, own)[1](cotangent)[0]

    try:
        grads = vmap(one_example)(varying, [_by_example(cotangent, batch) for cotangent in cotangents])
    except RuntimeError as error:
        raise RevprobeError(f"{_cannot(module)}: {first_line(error)}; leave them out with parameters=") from error
    _check_sum(module, args, kwargs, own, grads, cotangents)
    wide = torch.promote_types(outputs[0].dtype, torch.float32)
    flat = {key: g.flatten(1).to(wide) for key, g in grads.items()}
    return {key: FormedUse(g, g.pow(2).sum(1)) for key, g in flat.items()}


def _check_sum(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    own: dict[str, Tensor],
    grads: dict[str, Tensor],
    cotangents: list[Tensor],
) -> None:
    """Hold the examples' gradients against plain autograd's for the whole batch: vmap is wrong about some kernels."""
    with torch.enable_grad():
        weights = {key: p.requires_grad_() for key, p in own.items()}
        found = functional_call(module, weights, args, kwargs, tie_weights=False)
        reached = [(leaf, c) for leaf, c in zip(_leaves(found), cotangents, strict=True) if leaf.requires_grad]
        if not reached:
            return
        leaves, given = ([pair[n] for pair in reached] for n in (0, 1))
        given = [
            c.to(leaf.dtype).expand_as(leaf) if len(leaf) == len(c) else c.sum_to_size(leaf.shape)
            for leaf, c in zip(leaves, given, strict=True)
        ]
        totals = torch.autograd.grad(leaves, list(weights.values()), given, allow_unused=True)
    for key, total in zip(weights, totals, strict=True):
        each = grads[key].detach().float()
        wrong = (each.sum(0) - (0 if total is None else total.float())).norm()
        size = each.flatten(1).norm(dim=1).sum() if total is None else each.flatten(1).norm(dim=1).sum() + total.norm()
        tolerance = max(1e-3, 32 * torch.finfo(grads[key].dtype).eps)
        # The second term: a gradient that is zero in theory is rounding on both sides.
        if wrong > tolerance * size + 1e-5 * torch.stack([c.float().norm() for c in cotangents]).sum():
            raise RevprobeError(
                f"{_cannot(module)}: the examples' gradients of {key!r} do not add up to the batch's; leave them out "
                "with parameters="
            )


def _cannot(module: nn.Module) -> str:
    return f"the parameters of a {type(module).__name__} cannot be split by example"


def _leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if carries_gradient(leaf)]


def _by_example(rows: Tensor, batch: int) -> Tensor:
    """Shapes: `(batch seq) ... -> batch seq ...`."""
    return rows.reshape(batch, len(rows) // batch, *rows.shape[1:])
