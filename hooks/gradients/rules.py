"""How one call of a module turns into the gradient of its parameters: closed rules, and a replay for the rest.

Linear, Conv1D and Embedding (also scaled) have rules that keep factors; any other module that holds parameters is run
again under vmap, one example at a time, through its own vector-Jacobian product.

Shapes below: batch, seq, out, in.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.pytorch_utils import Conv1D

from ...errors import first_line
from .graph import Call, CannotSplit
from .order import Rows
from .uses import FormedUse, LookupUse, OuterUse, Use


def carries_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def has_rule(module: nn.Module) -> bool:
    """Whether a closed rule covers the module; one whose forward or parameters are not the plain ones is replayed."""
    # accelerate puts a forward of its own on every module it places, around the plain one.
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    plain = any(type(module).forward is kind.forward for kind in (nn.Linear, nn.Embedding, Conv1D))
    own = {key for key, p in module._parameters.items() if p is not None}
    return plain and not replaced and own <= {"weight", "bias"} and not _counts_or_renorms(module)


def _counts_or_renorms(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq)


def lookup_scale(module: nn.Module, ids: Any, output: Any) -> float | None:
    """The constant by which a module's one call multiplied the rows it looked up; None for any other module.

    Scaled embeddings (Gemma, BART) are told by what they did: autograd's graph is a lookup in the weight times a
    constant, and the output equals `embed_scale` times the rows.
    """
    if not isinstance(module, nn.Embedding) or _counts_or_renorms(module) or set(module._parameters) != {"weight"}:
        return None
    if has_rule(module):
        return 1.0
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor):
        scale = scale.to(module.weight.dtype).item() if scale.numel() == 1 and not scale.requires_grad else None
    if not isinstance(scale, int | float) or not isinstance(ids, Tensor) or not _is_scaled_lookup(module, output):
        return None
    rows = nn.functional.embedding(ids, module.weight.detach()) * scale
    tolerance = 4 * torch.finfo(rows.dtype).eps
    same = rows.shape == output.shape and torch.allclose(rows, output.detach(), rtol=tolerance, atol=0.0)
    return float(scale) if same else None


def _is_scaled_lookup(module: nn.Module, output: Any) -> bool:
    """Whether the graph of `output` is a product of a constant and a lookup in the module's weight."""
    node = output.grad_fn if isinstance(output, Tensor) else None
    if node is None or node.name() != "MulBackward0":
        return False
    factors = [following for following, _ in node.next_functions if following is not None]
    if len(factors) != 1 or factors[0].name() != "EmbeddingBackward0":
        return False
    return getattr(factors[0].next_functions[0][0], "variable", None) is module.weight


def linear_use(module: nn.Module, key: str, gradient: Tensor, inputs: Tensor) -> Use:
    """What one call of a Linear or Conv1D adds to its weight or bias."""
    if key == "bias":
        return FormedUse(gradient.sum(1), gradient.pow(2).sum((1, 2)))
    return OuterUse(inputs, gradient) if isinstance(module, Conv1D) else OuterUse(gradient, inputs)


def lookup(module: nn.Embedding, ids: Tensor, gradient: Tensor, scale: float) -> LookupUse:
    """What one call of an Embedding adds to its weight, where it gave `scale` times the rows."""
    gradient = gradient if scale == 1.0 else gradient * scale
    ids = ids if ids.numel() == gradient[..., 0].numel() else ids.expand(gradient.shape[:-1])
    ids = ids.reshape(gradient.shape[0], -1)
    if module.padding_idx is not None:
        ids = ids.masked_fill(ids == module.padding_idx, -1)
    return LookupUse(ids, gradient.reshape(gradient.shape[0], -1, gradient.shape[-1]), module.num_embeddings)


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite. Their sum tells in one read; where it overflows, each entry is asked."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def drop_silent_tokens(gradient: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the tokens that carry gradient: the unembedding's readout rows, not the whole sequence.

    Where most of them do, picking them would cost more than it saves.
    """
    # The 1-norm: one read, and unlike a sum of squares it does not underflow to silence.
    carries = torch.linalg.vector_norm(gradient, 1, dim=-1) > 0
    keep = max(int(carries.sum(1).max()), 1)
    if keep > carries.shape[1] / 2:
        return gradient, inputs
    order = carries.int().argsort(dim=1, descending=True, stable=True)[:, :keep, None]
    return gradient.gather(1, order.expand(-1, -1, gradient.shape[-1])), inputs.gather(
        1, order.expand(-1, -1, inputs.shape[-1])
    )


def replay(
    call: Call, gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size], rows: Rows | None, batch: int
) -> dict[str, Use]:
    """Per-example gradients of the parameters a module answers for, by a vector-Jacobian product vmapped over them.

    Its forward is run again, one example at a time under vmap. Tensors whose first axis is `(batch seq)` give each
    example its own rows.
    Args:
        shapes: of the outputs' gradients: the outputs' own, or with the batch that they are spread over.
        rows: the examples' rows where they do not stand one example after the other; what goes in with as many rows
            is then put in that order too, which is right for modules that treat each row alike, and is checked.
    Raises: CannotSplit, for a module that vmap cannot run (experts chosen by their input), or that it runs wrongly:
        the outputs must be those of the recorded call, and the examples' gradients add up to the batch's own.
    """
    outputs = call.outputs
    weights = {key: p.detach() for key, p in call.own.items() if p.is_floating_point()}
    cotangents = [
        torch.zeros(shape, dtype=o.dtype, device=o.device) if g is None else g.to(o.dtype)
        for o, shape, g in zip(outputs, shapes, gradients, strict=True)
    ]
    recorded = [output.values for output in outputs]
    leaves, structure = tree_flatten((call.args, call.kwargs))
    if rows is not None:
        alike = [isinstance(leaf, Tensor) and leaf.shape[:-1] == outputs[0].shape[:-1] for leaf in leaves]
        leaves = [rows.of(leaf) if a else leaf for leaf, a in zip(leaves, alike, strict=True)]
        cotangents = [rows.gradient(c) for c in cotangents]
        recorded = [None if r is None else rows.of(r) for r in recorded]
    args, kwargs = tree_unflatten(leaves, structure)
    sizes = {len(c) for c in cotangents} | {batch}
    # What has the first axis of an output that is spread over the batch has no batch either.
    sizes -= {o.shape[0] for o, shape in zip(outputs, shapes, strict=True) if o.shape != shape}
    varies = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] in sizes for leaf in leaves]
    varying = [_by_example(leaf, batch) for leaf, v in zip(leaves, varies, strict=True) if v]

    def one_example(values: list[Tensor], cotangent: list[Tensor]) -> dict[str, Tensor]:
        remaining = iter(values)
        inputs = [next(remaining) if v else leaf for leaf, v in zip(leaves, varies, strict=True)]
        one_args, one_kwargs = tree_unflatten(inputs, structure)

        def forward(values: dict[str, Tensor]) -> list[Tensor]:
            # A child that shares a parameter is recorded by itself (BERT's decoder and its head's bias).
            used = call.with_aliases(values)
            return _leaves(functional_call(call.module, used, one_args, one_kwargs, tie_weights=False))

        return _pull_back(forward, weights, cotangent)

    with _without_forward_hooks(call.module), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # experts' kernels go example by example
        try:
            grads = vmap(one_example)(varying, [_by_example(cotangent, batch) for cotangent in cotangents])
        except Exception as error:  # whatever a module does under vmap that it cannot
            raise CannotSplit(
                f"{_cannot(call.module)}: {first_line(error)}; leave them out with parameters="
            ) from error
        _check_replay(call, (args, kwargs), weights, grads, recorded, cotangents)
    wide = torch.promote_types(outputs[0].dtype, torch.float32)
    flat = {key: g.detach().reshape(batch, -1).to(wide) for key, g in grads.items()}
    given = torch.stack([c.reshape(batch, -1).to(wide).pow(2).sum(1) for c in cotangents]).sum(0)
    return {key: FormedUse(g, torch.maximum(g.pow(2).sum(1), given)) for key, g in flat.items()}


def _pull_back(
    forward: Callable[[dict[str, Tensor]], list[Tensor]], weights: dict[str, Tensor], cotangent: list[Tensor]
) -> dict[str, Tensor]:
    """The vector-Jacobian product; an output without the batch lacks its axis of one."""
    found, back = vjp(forward, weights)[:2]
    return back([c.reshape(leaf.shape) for c, leaf in zip(cotangent, found, strict=True)])[0]


@contextmanager
def _without_forward_hooks(module: nn.Module) -> Iterator[None]:
    """What its forward hooks do comes after the recorded output; its pre-hooks and its children's belong to it."""
    hooks = module._forward_hooks
    module._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        module._forward_hooks = hooks


def _check_replay(
    call: Call,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    own: dict[str, Tensor],
    grads: dict[str, Tensor],
    recorded: Sequence[Tensor | None],
    cotangents: list[Tensor],
) -> None:
    """Hold a replay against the recorded call, and its examples' gradients against plain autograd's for the batch.

    The first tells a module that does something else the second time (its pre-hook changed what was recorded); the
    second a kernel that vmap is wrong about.
    """
    module = call.module
    with torch.enable_grad():
        weights = {key: p.requires_grad_() for key, p in own.items()}
        found = _leaves(functional_call(module, call.with_aliases(weights), *given, tie_weights=False))
        for leaf, values in zip(found, recorded, strict=True):
            if values is not None and _differ(leaf.detach(), values):
                raise CannotSplit(
                    f"{_cannot(module)}: run again it gives other outputs (a hook that changes its input, or a state "
                    "of its own); leave them out with parameters="
                )
        totals = _batch_gradients(found, list(weights.values()), cotangents)
    scale = torch.stack([c.double().norm() for c in cotangents]).sum()
    for key, total in zip(weights, totals, strict=True):
        each = grads[key].detach().double().reshape(len(grads[key]), -1)
        whole = torch.zeros_like(each[0]) if total is None else total.double().reshape(-1)
        size = each.norm(dim=1).sum() + whole.norm()
        # The second term: a gradient that is zero in theory is rounding on both sides.
        if (each.sum(0) - whole).norm() > _tolerance(grads[key].dtype) * size + 1e-5 * scale:
            raise CannotSplit(
                f"{_cannot(module)}: the examples' gradients of {key!r} do not add up to the batch's; leave them out "
                "with parameters="
            )


def _batch_gradients(found: list[Tensor], weights: list[Tensor], cotangents: list[Tensor]) -> Sequence[Tensor | None]:
    """The gradients of the whole batch; cotangents are summed where an output was broadcast over the batch."""
    reached = [(leaf, c) for leaf, c in zip(found, cotangents, strict=True) if leaf.requires_grad]
    if not reached:
        return [None] * len(weights)
    given = [c.to(leaf.dtype).sum_to_size(leaf.shape) for leaf, c in reached]
    return torch.autograd.grad([leaf for leaf, _ in reached], weights, given, allow_unused=True)


def _tolerance(dtype: torch.dtype) -> float:
    """What two kernels for one sum may differ by, relative; in float64 too, since norms work in float32 inside."""
    return max(1e-3, 32 * torch.finfo(dtype).eps)


def _differ(found: Tensor, recorded: Tensor) -> bool:
    if found.shape != recorded.shape and len(found) != 1:
        return True
    finite = recorded.isfinite()
    error = (found - recorded).masked_fill(~finite, 0.0).norm()
    return bool(error > _tolerance(recorded.dtype) * recorded.masked_fill(~finite, 0.0).norm())


def _cannot(module: nn.Module) -> str:
    return f"the parameters of a {type(module).__name__} cannot be split by example"


def _leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if carries_gradient(leaf)]


def _by_example(rows: Tensor, batch: int) -> Tensor:
    """Shapes: `(batch seq) ... -> batch seq ...`."""
    return rows.reshape(batch, len(rows) // batch, *rows.shape[1:])
