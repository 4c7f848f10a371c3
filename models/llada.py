"""LLaDA: transformers' Llama without the causal mask, reading and writing the published checkpoint layout.

The config keeps the published vocabulary (`d_model`, `n_heads`, ...), and tensors are renamed while loading and
renamed back while saving, so the published code reads what is saved here. Logits equal those of the published
modelling code (difference 0.0 in float32).

Source: Nie et al. 2025 (arXiv 2502.09992); the layout of GSAI-ML/LLaDA-8B-Base.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaForCausalLM,
    PreTrainedConfig,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ..errors import RevprobeError
from .bidirectional import BidirectionalDecoder

# What the published code can be switched to and a Llama cannot.
_ONLY: dict[str, Any] = {
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "clip_qkv": None,
    "embedding_dropout": 0.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "residual_dropout": 0.0,
    "rope": True,
    "scale_logits": False,
}
_ACTIVATIONS = ("silu", "gelu", "relu")


class LLaDAConfig(PreTrainedConfig):
    """The published config.json, key by key; Llama's names read through `attribute_map`.

    Raises: RevprobeError, for a setting that the Llama architecture does not have.
    """

    model_type = "llada"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "hidden_act": "activation_type",
        "initializer_range": "init_std",
        "tie_word_embeddings": "weight_tying",
    }
    is_causal = False
    attention_bias = False
    mlp_bias = False

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    n_layers: int = 32
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    activation_type: str = "silu"
    attention_dropout: float = 0.0
    max_sequence_length: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_parameters: dict | None = None
    vocab_size: int = 126464
    embedding_size: int | None = None
    # No default: the published file names it, and a file that does not must be asked about, not guessed for.
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    init_std: float = 0.02
    weight_tying: bool = False
    multi_query_attention: bool | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for key, only in _ONLY.items():
            if kwargs.get(key, only) not in (only, None):
                raise RevprobeError(f"LLaDA config: {key}={kwargs[key]!r} is not supported; expected {only!r}")
        if self.activation_type not in _ACTIVATIONS:
            raise RevprobeError(
                f"LLaDA config: activation_type={self.activation_type!r} is not supported; expected one of "
                f"{', '.join(_ACTIVATIONS)}"
            )
        if self.n_kv_heads is None:
            self.n_kv_heads = 1 if self.multi_query_attention else self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        if self.embedding_size:  # the published code sizes both tables by it
            self.vocab_size = self.embedding_size
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


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
AutoConfig.register(LLaDAConfig.model_type, LLaDAConfig, exist_ok=True)
# The published auto_map names AutoModel and AutoModelForCausalLM: a class that is registered is loaded in its place.
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
    _auto.register(LLaDAConfig, LLaDAForMaskedDiffusion, exist_ok=True)
