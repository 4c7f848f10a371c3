"""How many bytes of tensors are alive at once, counted operation by operation; nothing needs to hold numbers.

On the meta device tensors have shapes and no memory, so a training step of an 8B model can be run through in seconds
on any machine. Attention is taken to be a fused kernel (flash or memory-efficient), which keeps its inputs, its
output and one number a row for the backward pass, and never the scores.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is entered: `live` now, `peak` the most so far, in bytes.

    Args:
        known: tensors that were there before; they, and views of them, are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._kept = [t.untyped_storage() for t in known]  # held, so that no id is given to another
        self._known = {storage._cdata for storage in self._kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return output

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


class AnsweredYes(TorchDispatchMode):
    """While entered, a yes-or-no question to a tensor without numbers is answered with yes.

    transformers asks whether a batch is unpadded and unpacked when it makes the causal mask; it is.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel allocates and keeps, without its numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        per_row = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, per_row)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let `F.scaled_dot_product_attention` on the meta device allocate what a fused kernel would.

    The function itself is replaced while inside: a mode would not be there when checkpointed layers run again.
    """
    plain = F.scaled_dot_product_attention

    def planned(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not query.is_meta:
            return plain(query, key, value, *args, **kwargs)
        return _FusedAttention.apply(query, key, value)

    F.scaled_dot_product_attention = planned
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
