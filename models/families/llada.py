"""LLaDA: transformers' Llama without the causal mask, reading and writing the published checkpoint layout.

The config keeps the published vocabulary (`d_model`, `n_heads`, ...), and tensors are renamed while loading and
renamed back while saving, so the published code reads what is saved here. Logits equal those of the published
modelling code (difference 0.0 in float32).

Source: Nie et al. 2025 (arXiv 2502.09992); the layout of GSAI-ML/LLaDA-8B-Base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel

from ..bases.bidirectional import BidirectionalDecoder
from ..bases.configs import LLaDAConfig
from .family import Family, published_name, rename_by
from .files import Files

_OUTSIDE = {"wte": "model.embed_tokens", "wpe": "model.wpe", "ln_f": "model.norm", "ff_out": "lm_head"}
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
_KEY_MAP = {f"model.transformer.{published}": ours for published, ours in _OUTSIDE.items()}
_KEY_MAP |= {f"model.transformer.blocks.{{}}.{a}": f"model.layers.{{}}.{b}" for a, b in _IN_BLOCK.items()}


def official_name(name: str) -> str:
    """The published name of one of our tensors; other names stay as they are.

    >>> official_name("model.layers.3.mlp.down_proj.weight")
    'model.transformer.blocks.3.ff_out.weight'
    """
    return published_name(name, _KEY_MAP)


class _Unrotated(nn.Module):
    """What a Llama's attention takes for angles, all of them zero."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines. Shapes: `batch seq d, batch seq -> batch seq head_dim, batch seq head_dim`."""
        shape = (*position_ids.shape, self.head_dim)
        return states.new_ones(shape), states.new_zeros(shape)


class LearnedPositionsLlama(LlamaModel):
    """A Llama's body whose positions are learned vectors, `rope: false` in the published config."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]  # Llama's names read through its attribute_map
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.rotary_emb = _Unrotated(config.head_dim)  # type: ignore[assignment]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As LlamaModel's, each token's vector of its position added to it."""
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        places = torch.arange(states.shape[1], device=states.device)[None] if position_ids is None else position_ids
        return super().forward(
            None, attention_mask, places, past_key_values, inputs_embeds=states + self.wpe(places), **options
        )


class LLaDAForMaskedDiffusion(BidirectionalDecoder, LlamaForCausalLM):  # type: ignore[misc]
    """LLaDA-8B-Base, Instruct, 1.5, and any model in their layout. The logits for position i stand in row i."""

    config_class = LLaDAConfig
    official_name = staticmethod(official_name)
    mask_text = "<|mdm_mask|>"

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        if not config.rope:
            self.model = LearnedPositionsLlama(config)
            for part in self.model.modules():
                if hasattr(part, "is_causal"):
                    part.is_causal = False
        # Llama zeroes the gradient of the padding token's row; the published code does not, and pads with its EOS.
        self.model.embed_tokens.padding_idx = None

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """As in transformers; what is saved says the size where the published code reads it."""
        table: nn.Embedding = super().resize_token_embeddings(*args, **options)
        if self.config.embedding_size:
            self.config.embedding_size = self.config.vocab_size
        return table


_TABLE = "model.embed_tokens.weight"
rename_by(_KEY_MAP, LLaDAConfig.model_type)


def _recognises(files: Files) -> bool:
    """LLaDA-MoE says `llada` too."""
    return files.model_type == LLaDAConfig.model_type and "num_experts" not in files.settings


def _to_config(files: Files) -> dict[str, Any]:
    """A file that does not say by what base it turns is read as the published code reads it.

    Tokens that transformers added stand in vocab_size alone, in files that were saved before embedding_size followed.
    """
    said = files.settings.keys() & {"rope_theta", "rope_parameters"}
    settings = dict(files.settings) | ({} if said else {"rope_theta": 10000.0})
    rows, stated = files.rows(official_name(_TABLE), _TABLE), settings.get("embedding_size")
    return settings | ({"embedding_size": rows} if rows and stated and rows == settings.get("vocab_size") else {})


LLADA = Family(
    name="LLaDA",
    about="LLaDA-8B Base, Instruct and 1.5, and models in their layout",
    model_class=LLaDAForMaskedDiffusion,
    recognises=_recognises,
    to_config=_to_config,
    key_map=_KEY_MAP,
    streams=True,
    published={f"GSAI-ML/LLaDA-{kind}": {} for kind in ("8B-Base", "8B-Instruct", "1.5")},
    licence="MIT (weights, and the code beside them); LLaDA-1.5: see its model card",
    parity=0.0,
)
