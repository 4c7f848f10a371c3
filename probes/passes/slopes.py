"""How the loss of each query changes, to first order, when the parameters move along a given direction.

The slope is the product of a query's loss gradient with the direction. It is taken by forward-mode differentiation:
one run of the model carries the slope of every query, and no gradient is formed. A module that cannot carry
a slope forward (a quantized layer with a backward pass of its own) is read query by query through plain autograd.

Shapes below: query, direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...hooks.untouched import untouched
from ...models.probed import ProbedModel
from ..pairs.query import Query
from .alone import in_equal_lengths_if_need_be
from .batches import QueryBatch, in_batches, make_batch, queries_per_batch
from .likelihood import mean_nll, readout

Direction = Mapping[str, Tensor]


class Slopes(NamedTuple):
    """Losses in nats (mean over a query's target tokens, all hidden at once), and their slopes along each direction.

    Shapes: `loss`: `query`; `slope`: `direction query`; both float64.
    """

    loss: np.ndarray
    slope: np.ndarray


def loss_slopes(
    model: ProbedModel,
    queries: Sequence[Query],
    directions: Sequence[Direction] = (),
    *,
    batch_size: int | None = None,
) -> Slopes:
    """The loss of every query, and the product of its gradient with every direction; the model comes out as it went in.

    Args:
        queries: as `prepare_queries` returns them.
        directions: each a tensor of the parameter's shape for some of the model's parameters, by name; the others
            stay where they are.
    Raises: RevprobeError, for NaN logits, and as `passes.alone` does where a query alone has other numbers. KeyError,
        for a name that is no parameter.
    """
    if not queries:
        return Slopes(np.zeros(0), np.zeros((len(directions), 0)))
    size = queries_per_batch(model, queries, batch_size)

    def run() -> Slopes:
        found = Slopes(np.zeros(len(queries)), np.zeros((len(directions), len(queries))))
        with untouched(model.module):
            for numbers in in_batches(model, range(len(queries)), size, lambda q: len(queries[q].token_ids)):
                batch = make_batch(model, [queries[q] for q in numbers])
                # A run of its own: forward mode takes another attention kernel, whose last bits count as a change.
                with torch.no_grad():
                    found.loss[numbers] = mean_nll(readout(model, batch), batch).double().cpu().numpy()
                for place, along in enumerate(directions):
                    found.slope[place, numbers] = _slopes(model, batch, along).double().cpu().numpy()
        return found

    return in_equal_lengths_if_need_be(model, run)


def _slopes(model: ProbedModel, batch: QueryBatch, along: Direction) -> Tensor:
    """The slope of each query of one batch. Shapes: `-> query`, float64."""
    if not along:
        return torch.zeros(len(batch.rows), dtype=torch.float64, device=batch.rows.device)
    try:
        return _forward_mode(model, batch, along)
    except NotImplementedError:  # what autograd raises for an operation without a forward-mode rule
        return _query_by_query(model, batch, along)


@torch.no_grad()
def _forward_mode(model: ProbedModel, batch: QueryBatch, along: Direction) -> Tensor:
    with carrying(model, along) as moved:
        return slope_of(mean_nll(readout(moved, batch), batch))


@contextmanager
def carrying(model: ProbedModel, along: Direction) -> Iterator[ProbedModel]:
    """The model with a direction on its parameters, so that what it gives carries its slope; see `slope_of`."""
    parameters = dict(model.module.named_parameters())
    # The fused attention kernels have no forward-mode rule; the plain one has.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        moved = {
            name: forward_ad.make_dual(parameters[name].detach(), direction.to(parameters[name]))
            for name, direction in along.items()
        }
        yield model.with_module(_Moved(model, moved))


def slope_of(values: Tensor) -> Tensor:
    """The slope of what a model gave inside `carrying`, zero where it does not depend on the direction."""
    value, slope = forward_ad.unpack_dual(values)
    return torch.zeros_like(value) if slope is None else slope


def _query_by_query(model: ProbedModel, batch: QueryBatch, along: Direction) -> Tensor:
    """One backward pass for each query of the batch."""
    parameters = dict(model.module.named_parameters())
    chosen = {id(parameters[name]) for name in along}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in chosen)  # `untouched` puts the flags back
    with torch.enable_grad():
        losses = mean_nll(readout(model, batch), batch)
    slopes = []
    for n in range(len(losses)):
        keep = n + 1 < len(losses)
        wanted = [parameters[name] for name in along]
        grads = torch.autograd.grad(losses[n], wanted, retain_graph=keep, allow_unused=True)
        products = [
            (g.double() * direction.to(g).double()).sum()
            for g, direction in zip(grads, along.values(), strict=True)
            if g is not None
        ]
        slopes.append(torch.stack(products).sum() if products else losses.new_zeros(()))
    return torch.stack(slopes).detach()


class _Moved(nn.Module):
    """The model's module with some parameters replaced for the call, tied ones together; it returns the logits."""

    def __init__(self, model: ProbedModel, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.values = model, dict(values)  # no child: the model's parameters are not this module's

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the model it stands for, whose dtype a mask must have."""
        return self.model.module.parameters(recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model.logits_in(functional_call(self.model.module, self.values, args, kwargs))
