"""LLaDA: transformers' Llama without the causal mask, reading and writing the published checkpoint layout.

The config keeps the published vocabulary (`d_model`, `n_heads`, ...), and tensors are renamed while loading and
renamed back while saving, so the published code reads what is saved here. Logits equal those of the published
modelling code (difference 0.0 in float32).

Source: Nie et al. 2025 (arXiv 2502.09992); the layout of GSAI-ML/LLaDA-8B-Base.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .bidirectional import BidirectionalDecoder
from .configs import LLaDAConfig

_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def official_name(name: str) -> str:
    """The published name of one of our tensors; other names stay as they are.

    >>> official_name("model.layers.3.mlp.down_proj.weight")
    'model.transformer.blocks.3.ff_out.weight'
    """
    for official, ours in _OUTSIDE.items():
        if name.startswith(f"{ours}."):
            return f"model.transformer.{official}{name.removeprefix(ours)}"
    for official, ours in _IN_BLOCK.items():
        if found := re.fullmatch(rf"model\.layers\.(\d+)\.{re.escape(ours)}\.(.+)", name):
            return f"model.transformer.blocks.{found[1]}.{official}.{found[2]}"
    return name


class LLaDAForMaskedDiffusion(BidirectionalDecoder, LlamaForCausalLM):  # type: ignore[misc]
    """LLaDA-8B-Base, Instruct, 1.5, and any model in their layout. The logits for position i stand in row i."""

    config_class = LLaDAConfig
    official_name = staticmethod(official_name)

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        # Llama zeroes the gradient of the padding token's row; the published code does not, and pads with its EOS.
        self.model.embed_tokens.padding_idx = None


# One anchored pattern a tensor: reversible, and without effect on a file that has Llama's names already. Keyed by
# model type, since a class's own key is not inherited by subclasses.
_RENAMINGS: list[Any] = [WeightRenaming(rf"^model\.transformer\.{a}\.", f"{b}.") for a, b in _OUTSIDE.items()]
_RENAMINGS += [
    WeightRenaming(rf"^model\.transformer\.blocks\.(\d+)\.{a}\.", rf"model.layers.\1.{b}.")
    for a, b in _IN_BLOCK.items()
]
register_checkpoint_conversion_mapping(LLaDAConfig.model_type, _RENAMINGS, overwrite=True)
