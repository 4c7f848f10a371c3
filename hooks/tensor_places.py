"""Where a tensor's numbers lie, and whether they are still the same: `tensor.data = ...` moves it, unseen by torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def where_it_lies(tensor: Tensor) -> tuple[object, ...] | None:
    """A tensor's memory and how it is laid out there; None of one without plain memory of its own."""
    if tensor.is_meta or tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    except (RuntimeError, NotImplementedError):  # not initialised yet, fake, spread
        return None


def same_values(one: Tensor, other: Tensor) -> bool | None:
    """Whether two tensors are equal to the bit, NaN included; None of kinds that cannot be compared so."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    try:
        return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
    except (RuntimeError, NotImplementedError, TypeError):  # sparse, quantised, spread
        return None
