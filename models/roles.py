"""Which part of a transformer a parameter is: the roles by which gradient readings are split.

Roles: embed, position, q, k, v, qkv (fused, layout undeclared), o, mlp, norm, unembed, other. They only group
what is reported; no number depends on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

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
