"""See the query vectors of attention at the rows asked for, as the scores see them: after RoPE, before the scale.

Read from F.scaled_dot_product_attention calls, which is where they can be seen; the calls are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import RevprobeError
from .attention import _LAYER, _running_module


@dataclass(frozen=True)
class QueryRows:
    """The queries of one attention call. Shapes: `query`: `batch heads rows dim`, float32 or wider."""

    site: str
    query: Tensor


@dataclass
class QueryTap:
    """The calls a tap saw, in their order."""

    calls: list[QueryRows] = field(default_factory=list)

    def layers(self) -> dict[int, QueryRows]:
        """The calls by layer, numbered as `AttentionTap.layers` numbers them; empty when no call was seen."""
        numbers = [_LAYER.search(call.site) for call in self.calls]
        by_path = [int(number[1]) for number in numbers if number]
        distinct = len(by_path) == len(self.calls) == len(set(by_path))
        return dict(zip(by_path if distinct else range(len(self.calls)), self.calls, strict=True))


@contextmanager
def tap_queries(module: nn.Module, rows: Tensor) -> Iterator[QueryTap]:
    """Record the queries at `rows` of every SDPA call of `module` while open. Shapes: `rows`: `batch rows` (long).

    Adds hooks to the module tree and removes exactly those, also when the forward pass raises.
    Raises: RevprobeError, when a call's batch is not the batch that was asked about.
    """
    tap = QueryTap()
    with _running_module(module) as running, _QueryMode(tap, rows, running):
        yield tap


class _QueryMode(TorchFunctionMode):
    """Keep the query rows of every SDPA call, then make it unchanged."""

    def __init__(self, tap: QueryTap, rows: Tensor, running: list[str]) -> None:
        super().__init__()
        self.tap, self.rows, self.running = tap, rows, running

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self._keep(args[0] if args else (kwargs or {})["query"])
        return func(*args, **(kwargs or {}))

    def _keep(self, query: Tensor) -> None:
        site = self.running[-1] if self.running else ""
        if query.dim() != 4 or query.shape[0] != self.rows.shape[0]:
            raise RevprobeError(
                f"{site or 'attention'}: query {tuple(query.shape)}, expected {self.rows.shape[0]} sequences x heads x "
                "seq x dim; the model reshapes its batch"
            )
        batch = torch.arange(len(self.rows), device=query.device)[:, None]
        at_rows = query.detach().transpose(1, 2)[batch, self.rows.to(query.device)].transpose(1, 2)
        self.tap.calls.append(QueryRows(site, at_rows.to(torch.promote_types(query.dtype, torch.float32))))
