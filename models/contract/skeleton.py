"""A copy of a module to try things on: the tree, its buffers and Python state are copied, the parameters are shared.

What a forward pass leaves behind in such a copy (a mode switched for good, a cache) never reaches the module itself.
Where no copy can be made (hooks that move weights, sharded or quantised tensors) the module itself is run, and what
its passes change is put back. What they would write into the weights is refused before it is written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.gradients.spread_weights import spread_units
from ...hooks.kept_state import SMALL_STATE
from ...hooks.tensor_places import same_values, where_it_lies
from ...hooks.untouched import untouched
from ...hooks.weight_writes import refused_writes, writes_into

# Buffers are copied; a module that keeps its weights in them (some quantised ones) is run itself.
_MOST_COPIED = 1 << 28  # bytes
# Weights of so many bytes in all are kept beside the module while it is tried.
_MOST_KEPT = 1 << 26


@contextmanager
def skeleton(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """A copy that shares the module's parameters, in eval mode; or the module itself, with its state put back.

    Raises: RevprobeError, when something inside would write into a parameter or into a large buffer, which no copy
        holds, or gives a parameter other values. The weights are as before, but for those of more than 64 MB in all
        where what writes is not torch's own (arrays over the same memory, compiled graphs, other kernels).
    """
    copied = _copy(module)
    tried = module if copied is None else copied
    weights = _Weights(tried, name)
    try:
        with untouched(tried), weights.guard:
            try:
                yield tried
            finally:
                weights.look()
    finally:
        weights.put_back()
        if weights.written:  # also where the refusal was caught inside, or an error of its own came of it
            raise writes_into(name, weights.written)


class _Weights:
    """What a trial would leave changed, watched; `written`: the path of the first that it wrote into, or would have."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.written = module, ""
        self.tensors = dict(_not_put_back(module))
        self.before = {path: (tensor._version, tensor.detach()) for path, tensor in self.tensors.items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        self.kept = {path: t.detach().clone() for path, t in self.tensors.items()} if size <= _MOST_KEPT else {}
        # Pieces of spread weights are gathered into whole ones, by writing.
        self.refusal = None if spread_units(module) else refused_writes(self.tensors.items(), name)

    @property
    def guard(self) -> AbstractContextManager[object]:
        return nullcontext() if self.refusal is None else self.refusal

    def look(self) -> None:
        """See what was written; before tensors are put back where they lay."""
        self.written = "" if self.refusal is None else self.refusal.found
        now = dict(self.module.named_parameters()) if self._owns_its_parameters() else {}
        for path, tensor in self.tensors.items():
            version, alias = self.before[path]
            new = now.get(path, tensor)
            elsewhere = new is not tensor or where_it_lies(new) != where_it_lies(alias)
            if tensor._version != version or (elsewhere and same_values(new, alias) is False):
                self.written = self.written or path

    def _owns_its_parameters(self) -> bool:
        """Whether nothing else puts parameters into the module while it runs."""
        return not (spread_units(self.module) or any(hasattr(part, "_hf_hook") for part in self.module.modules()))

    def put_back(self) -> None:
        """Undo what reached the memory of weights past torch."""
        with torch.no_grad():
            for path, values in self.kept.items():
                if same_values(self.tensors[path], values) is False:
                    self.tensors[path].copy_(values)
                    self.written = self.written or path


def _copy(module: nn.Module) -> nn.Module | None:
    """The copy; None where none can be made."""
    moved = any(hasattr(part, "_hf_hook") for part in module.modules())
    size = sum(b.numel() * b.element_size() for b in module.buffers())
    if moved or size > _MOST_COPIED or any(p.is_meta for p in module.parameters()):
        return None
    try:
        memo: dict[Any, Any] = {id(p): p for p in module.parameters()}
        # As torch notes storages: a view of a weight, kept as an attribute, is one of the same weight in the copy.
        plain = (p for p in module.parameters() if where_it_lies(p) is not None)
        memo["torch"] = {storage._cdata: storage for storage in (p.untyped_storage() for p in plain)}
        return copy.deepcopy(module, memo)
    except Exception:  # whatever a foreign attribute raises: locks, process groups, tensors of a graph
        return None


def _not_put_back(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that would stay changed; `untouched` restores small buffers only."""
    buffers = (pair for pair in module.named_buffers() if pair[1].numel() > SMALL_STATE)
    for name, tensor in (*module.named_parameters(), *buffers):
        if not tensor.is_meta and not tensor.is_inference():
            yield name, tensor
