"""How fused query-key-value projections are laid out, declared per architecture.

Only a declared layout is split: an undeclared fused projection is reported whole, under the role "qkv". Declare one
for your own architecture with `declare_fused(model_type, pattern, order)`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import RevprobeError, did_you_mean
from ..hooks.gradients.rules import has_rule

ORDERS = ("blocked", "per_head")
# model_type of the config -> (pattern of the module's path, order of its output features):
#   blocked   all of q, then all of k, then all of v
#   per_head  q, k, v of the first head, then of the second, ...
_FUSED: dict[str, tuple[str, str]] = {
    "gpt2": (r"attn\.c_attn$", "blocked"),
    "modernbert": (r"attn\.Wqkv$", "blocked"),
    "phi3": (r"self_attn\.qkv_proj$", "blocked"),
    "gpt_neox": (r"attention\.query_key_value$", "per_head"),
    "bloom": (r"self_attention\.query_key_value$", "per_head"),
}


def declare_fused(model_type: str, pattern: str, order: str) -> None:
    """Say how the fused projections of an architecture are laid out.

    Args:
        model_type: of its transformers config.
        pattern: a regular expression that the path of each fused module matches.
        order: "blocked" or "per_head".
    Raises: RevprobeError, for an unknown order.
    """
    if order not in ORDERS:
        raise RevprobeError(f"unknown order {order!r} of a fused projection{did_you_mean(order, ORDERS)}")
    _FUSED[model_type] = (pattern, order)


def fused_parts(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The output features of q, k and v in every fused projection whose layout is declared.

    Returns: parameter name -> {"q": indices, "k": indices, "v": indices}; empty for other architectures.
    """
    config = getattr(module, "config", None)
    declared = _FUSED.get(getattr(config, "model_type", None) or "")
    if declared is None:
        return {}
    pattern, order = declared
    parts: dict[str, dict[str, Tensor]] = {}
    for path, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D) and has_rule(child) and re.search(pattern, path):
            features = child.weight.shape[1] if isinstance(child, Conv1D) else child.weight.shape[0]
            split = _split(features, config, order)
            parts |= {f"{path}.{name}": split for name, _ in child.named_parameters(recurse=False)}
    return parts


def _split(features: int, config: Any, order: str) -> dict[str, Tensor]:
    """Feature indices of q, k and v. Grouped keys make k and v narrower than q."""
    heads = config.num_attention_heads
    every = torch.arange(features)
    if order == "per_head":
        per_head = every.reshape(heads, 3, -1)
        return {part: per_head[:, i].reshape(-1) for i, part in enumerate("qkv")}
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = features // (heads + 2 * kv_heads)
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    return dict(zip("qkv", every.split(sizes), strict=True))
