"""A copy of a module to try things on: the tree, its buffers and Python state are copied, the parameters are shared.

What a forward pass leaves behind in such a copy (a mode switched for good, a cache) never reaches the module itself.
Where no copy can be made (hooks that move weights, sharded or quantised tensors) the module itself is run, and what
its passes change is put back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ...errors import RevprobeError
from ...hooks.kept_state import SMALL_STATE
from ...hooks.untouched import untouched

# Buffers are copied; a module that keeps its weights in them (some quantised ones) is run itself.
_MOST_COPIED = 1 << 28  # bytes


@contextmanager
def skeleton(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """A copy that shares the module's parameters, in eval mode; or the module itself, with its state put back.

    Raises: RevprobeError, when something inside has written into a parameter or into a large buffer, which no copy
        holds.
    """
    copied = _copy(module)
    tried = module if copied is None else copied
    watched = {name: (tensor, tensor._version) for name, tensor in _not_put_back(tried)}
    with untouched(tried):
        yield tried
    written = [n for n, (tensor, version) in watched.items() if tensor._version != version]
    if written:
        raise RevprobeError(
            f"{name} writes into its own {written[0]!r} when it is run, so no two runs read the same model; keep state "
            "out of its forward pass"
        )


def _copy(module: nn.Module) -> nn.Module | None:
    """The copy; None where none can be made."""
    moved = any(hasattr(part, "_hf_hook") for part in module.modules())
    size = sum(b.numel() * b.element_size() for b in module.buffers())
    if moved or size > _MOST_COPIED or any(p.is_meta for p in module.parameters()):
        return None
    try:
        return copy.deepcopy(module, {id(p): p for p in module.parameters()})
    except Exception:  # whatever a foreign attribute raises: locks, process groups, tensors of a graph
        return None


def _not_put_back(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that would stay changed; `untouched` restores small buffers only."""
    buffers = (pair for pair in module.named_buffers() if pair[1].numel() > SMALL_STATE)
    for name, tensor in (*module.named_parameters(), *buffers):
        if not tensor.is_meta and not tensor.is_inference():
            yield name, tensor
