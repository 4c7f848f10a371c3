"""A digest of a model's weights, by which two models of one name are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.gradients.spread_weights import is_piece

_AT_A_TIME = 2**26  # bytes, so that weights on a GPU are not held here a second time


def weights_digest(module: nn.Module) -> str:
    """What changes when a weight does: names, shapes, types and every byte of the state, and which adapters are on.

    Read to the last byte, as an edit of one head would slip through a sample: 16 GB take about ten seconds. It does not
    depend on the device. Of a weight that is on disk (device "meta") only name, shape and type are read; of a model
    that is spread over processes the whole weights, so all processes must ask together.
    """
    found = hashlib.sha256()
    for name, part in module.named_modules():
        if "_active_adapter" in vars(part):
            adapters = (str(vars(part)["_active_adapter"]), bool(vars(part).get("_disable_adapters", False)))
            found.update(repr((name, adapters)).encode())
    for name, value in sorted(module.state_dict().items()):
        for tensor in _plain(value) if isinstance(value, Tensor) else ():
            found.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
            for some in () if tensor.is_meta else _bytes(tensor):
                found.update(some.cpu().numpy().data)
    return found.hexdigest()[:16]


def _plain(tensor: Any) -> Iterator[Tensor]:
    """The tensors with the numbers of this one, which may be a piece of one, or made of several, as quantized ones."""
    if is_piece(tensor):
        yield tensor.full_tensor()
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _bytes(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.numel():
        yield from tensor.detach().contiguous().view(-1).view(torch.uint8).split(_AT_A_TIME)
