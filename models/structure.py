"""What the module tree says of a model: each parameter's role, the layout of fused projections, layers without softmax.

Roles: embed, position, q, k, v, qkv (fused, layout undeclared), o, mlp, norm, unembed, other. They only group
what is reported; no number depends on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..arguments import checked
from ..errors import RevprobeError, did_you_mean, shown
from ..hooks.gradients.rules import has_rule

# First match wins; matched against the parameter's path without the final ".weight"/".bias".
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("position", r"(wpe|embed_positions|position_embeddings|pos_emb\w*)$"),
    ("norm", r"(\w*norm\w*|ln_\w+|ln\d|LayerNorm)$"),
    ("unembed", r"((\w*lm_head|head)(\.\w+)*|unembed|decoder|embed_out|\w*predictions(\.\w+)*|vocab_\w+)$"),
    ("embed", r"(embed_tokens|wte|word_embeddings|tok_embeddings|token_type_embeddings|embed|embed_in|embeddings)$"),
    ("qkv", r"(c_attn|in_proj_qkv|qkv\w*|Wqkv|query_key_value)$"),
    ("q", r"(q_proj|q_lin|query|q)$"),
    ("k", r"(k_proj|k_lin|key|k)$"),
    ("v", r"(v_proj|v_lin|value|v)$"),
    ("o", r"(o_proj|out_proj|out_lin|attn_out|attn\.(c_proj|Wo)|\w*(attention|attn)\.(output\.)?dense)$"),
    ("mlp", r"((mlp|ffn)(\.\w+)*|fc\d|intermediate\.dense|output\.dense|(up|down|gate)_proj|dense_\w+)$"),
)
_LAYER = re.compile(r"\.(\d+)\.")
_WRAPPERS = re.compile(
    r"(\.base_layer|\.lora_(embedding_)?[AB](\.\w+)?|\.lora_magnitude_vector\.\w+|\.modules_to_save\.\w+|"
    r"\.original_module|\.(weight|bias))+$"
)
_STACK = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<layer>\d+)(?:\.|$)")
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


@dataclass(frozen=True)
class ParameterRole:
    """Where a parameter sits: its role and the index of its layer (None outside the layers)."""

    role: str
    layer: int | None


def parameter_role(name: str) -> ParameterRole:
    """The role of a parameter by its path, e.g. "blocks.0.attention.q_proj.weight".

    >>> parameter_role("blocks.0.attention.q_proj.weight")
    ParameterRole(role='q', layer=0)
    >>> parameter_role("transformer.wpe.weight")
    ParameterRole(role='position', layer=None)
    """
    path = _WRAPPERS.sub("", name)
    role = next((role for role, pattern in _PATTERNS if re.search(rf"(^|\.){pattern}", path)), "other")
    layer = _LAYER.search(name)
    return ParameterRole(role, int(layer[1]) if layer else None)


def parameter_roles(module: nn.Module) -> dict[str, ParameterRole]:
    """The role of every parameter, tied ones once under their first name."""
    return {name: parameter_role(name) for name, _ in module.named_parameters()}


def layers_without_attention(module: nn.Module, sites: Iterable[str]) -> list[int]:
    """The layers without attention, in the stacks of layers where the modules at `sites` made some.

    Qwen3.5 alternates softmax and linear attention: its linear layers make no call and are listed here. Empty where
    paths do not number the layers one to one (shared layers, attention outside any list).

    Args:
        sites: paths of the modules that were seen to attend, e.g. "model.layers.3.self_attn".
    """
    found = [_STACK.match(site) for site in sites]
    places = [(match["stack"] or "", int(match["layer"])) for match in found if match]
    stacks = {stack for stack, _ in places}
    if len(places) != len(found) or len(set(places)) != len(places) or len(stacks) != 1:
        return []
    layers = {int(name) for name, _ in module.get_submodule(stacks.pop()).named_children() if name.isdigit()}
    return sorted(layers - {layer for _, layer in places})


@checked
def declare_fused(model_type: str, pattern: str, order: str) -> None:
    """Say how the fused projections of an architecture are laid out.

    Args:
        model_type: of its transformers config.
        pattern: a regular expression that the path of each fused module matches.
        order: "blocked" or "per_head".
    Raises: RevprobeError, for an unknown order or a pattern that is no regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise RevprobeError(
            f"pattern={shown(pattern)} is no regular expression: {error}; escape it or close it"
        ) from error
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
            split = _split(features, config, order, path)
            parts |= {f"{path}.{name}": split for name, _ in child.named_parameters(recurse=False)}
    return parts


def _split(features: int, config: Any, order: str, path: str) -> dict[str, Tensor]:
    """Feature indices of q, k and v. Grouped keys make k and v narrower than q.

    Raises: RevprobeError, when so many features do not come apart that way.
    """
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    parts = 3 * heads if order == "per_head" else heads + 2 * groups
    if features % parts:
        raise RevprobeError(
            f"{path} has {features} output features, which are no q, k and v of {heads} heads in the order {order!r} "
            f"({parts} parts); declare_fused with a pattern that leaves it out, or the other order"
        )
    every = torch.arange(features)
    if order == "per_head":
        per_head = every.reshape(heads, 3, -1)
        return {part: per_head[:, i].reshape(-1) for i, part in enumerate("qkv")}
    width = features // parts
    sizes = [heads * width, groups * width, groups * width]
    return dict(zip("qkv", every.split(sizes), strict=True))
