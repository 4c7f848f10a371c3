"""Digests of a model's weights and of its settings, by which two models of one name are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.gradients.spread_weights import is_piece
from .rotary import follows_length

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


# What changes while a model stays the same: where it lies, who saved it, how it is trained, how far it was run.
_NO_SETTINGS = {"_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
_NO_SETTINGS |= {"training", "use_cache", "gradient_checkpointing", "_attn_implementation"}
# What a rotation keeps of the longest row so far, of the whole model or of one type of layers.
_OF_LENGTH = ("max_seq_len_cached", "long_inv_freq")


def settings_digest(module: nn.Module) -> str:
    """What changes where a model answers otherwise by the same weights: adapters' scalings, rotary angles, its config.

    Of each part the plain values among its attributes, and the buffers that are not saved; of the model its config.
    """
    found = hashlib.sha256()
    config: Any = getattr(module, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else vars(config) if hasattr(config, "__dict__") else config
    found.update(_written(told).encode())
    for name, part in module.named_modules():
        found.update(f"{name} {type(part).__name__} {_written(_attributes(part))}".encode())
        for key in sorted(part._non_persistent_buffers_set):
            tensor = part._buffers.get(key)
            if tensor is not None and not follows_length(part, key):
                found.update(repr((key, tuple(tensor.shape), str(tensor.dtype))).encode())
                for some in () if tensor.is_meta else _bytes(tensor):
                    found.update(some.cpu().numpy().data)
    return found.hexdigest()[:16]


def _attributes(part: nn.Module) -> Mapping[str, Any]:
    """Those of a rotation whose types of layers have scalings of their own: without the one that a run sets."""
    own = vars(part)
    left = {"attention_scaling"} if isinstance(own.get("rope_type"), dict) else set()
    return {name: value for name, value in own.items() if name not in left}


def _written(values: Any) -> str:
    """The plain values of a mapping, in one order."""
    return json.dumps(_settings(values), sort_keys=True)


def _settings(value: Any) -> Any:
    """Numbers, texts, and lists and mappings of them; of anything else its type. Private names are none of a part's."""
    if isinstance(value, Mapping):
        kept = {str(key): one for key, one in value.items() if str(key) not in _NO_SETTINGS}
        kept = {key: one for key, one in kept.items() if not key.endswith(_OF_LENGTH)}
        return {key: _settings(one) for key, one in kept.items() if not key.startswith("_")}
    if isinstance(value, list | tuple | set | frozenset):
        return [_settings(one) for one in (sorted(value, key=repr) if isinstance(value, set | frozenset) else value)]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


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
