"""Llama as lit-gpt computes it, which SMDM's models and their autoregressive twins are made with.

Two things differ from transformers' Llama: the table of angles is rounded to bfloat16 whatever type the model computes
in (`rotary="exact"` leaves that out; scores of the tiny reference move by 2.5e-2), and the embedding of a masked model
has one row more than the unembedding, for the mask token, which is read and never predicted.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ...errors import RevprobeError, did_you_mean
from .bidirectional import BidirectionalDecoder
from .masked_config import MaskedDiffusionConfig

ROTARY = ("bfloat16", "exact")


class LitLlamaConfig(LlamaConfig):
    """Llama's, and how finely angles are held. Raises: RevprobeError, for an unknown `rotary`."""

    model_type = "smdm-ar"
    rotary: str = "bfloat16"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rotary not in ROTARY:
            raise RevprobeError(f"rotary={self.rotary!r}{did_you_mean(self.rotary, ROTARY)}")
        super().__post_init__(**kwargs)


@strict
class MaskedLitLlamaConfig(MaskedDiffusionConfig, LitLlamaConfig):
    """`vocab_size` is that of the logits; the mask token is the row of the embedding behind it."""

    model_type = "smdm"

    def __post_init__(self, **kwargs: Any) -> None:
        stated = kwargs.pop("mask_token_id", None)
        if stated not in (None, self.vocab_size):
            raise RevprobeError(
                f"mask_token_id {stated!r}: SMDM's mask token is the row behind the {self.vocab_size} of its logits; "
                "leave it out"
            )
        super().__post_init__(**kwargs, mask_token_id=self.vocab_size)

    def validate_token_ids(self) -> None:
        """Nothing: transformers would warn of a mask token behind the vocabulary, which is where it belongs."""


class RoundedRotaryEmbedding(LlamaRotaryEmbedding):
    """Cosines and sines rounded to bfloat16, then held in the type that the model computes in."""

    table_dtype = torch.bfloat16

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # In float32 first: rounded to float16 and from there, some would be another number.
        cos, sin = super().forward(torch.empty(0, dtype=torch.float32, device=x.device), position_ids)
        return cos.to(self.table_dtype).to(x.dtype), sin.to(self.table_dtype).to(x.dtype)


class LitLlamaForCausalLM(LlamaForCausalLM):
    """An autoregressive twin of SMDM: as many rows in the embedding as in the unembedding."""

    config_class: Any = LitLlamaConfig
    objective = "causal"
    logit_shift = 1

    def __init__(self, config: LitLlamaConfig) -> None:
        super().__init__(config)
        if config.rotary == "bfloat16":
            self.model.rotary_emb = RoundedRotaryEmbedding(config)


class LitLlamaForMaskedDiffusion(BidirectionalDecoder, LitLlamaForCausalLM):  # type: ignore[misc]
    """SMDM: the logits for position i stand in row i; there is none for the mask token."""

    config_class = MaskedLitLlamaConfig
    objective = "masked"
    logit_shift = 0

    def __init__(self, config: MaskedLitLlamaConfig) -> None:
        super().__init__(config)
        self.model.embed_tokens = nn.Embedding(config.vocab_size + 1, config.hidden_size)
        self.model.embed_tokens.weight.data.normal_(std=config.initializer_range)

    @property
    def mask_row(self) -> int:
        """The only token that can hide another: the embedding's last row."""
        return int(self.config.vocab_size)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> nn.Embedding:
        """The table as it is. Raises: RevprobeError, for another size: the mask token would be another's row."""
        table: nn.Embedding = self.model.embed_tokens
        if new_num_tokens not in (None, table.num_embeddings):
            raise RevprobeError(
                f"resize_token_embeddings({new_num_tokens}): SMDM's mask token is the last of the embedding's "
                f"{table.num_embeddings} rows, one more than the logits; leave the table as it is"
            )
        return table
