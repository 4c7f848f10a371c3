"""SDAR: transformers' Qwen3, block by block. Config keys and tensor names are Qwen3's own.

Source: Cheng et al. 2025 (arXiv 2510.06303); the layout of JetLM/SDAR-4B-Chat (JetAstra/SDAR, training/model).
"""

from __future__ import annotations

from transformers import Qwen3Config, Qwen3ForCausalLM

from ..bases.bidirectional import BidirectionalDecoder
from ..bases.masked_config import MaskedDiffusionConfig
from .family import Family, of_type


class SDARConfig(MaskedDiffusionConfig, Qwen3Config):
    model_type = "sdar"


class SDARForMaskedDiffusion(BidirectionalDecoder, Qwen3ForCausalLM):  # type: ignore[misc]
    config_class = SDARConfig
    attention = "block"
    mask_text = "<|MASK|>"


SDAR = Family(
    name="SDAR",
    about="SDAR 1.7B, 4B and 8B, of any block size; not the mixture of experts (30B-A3B)",
    model_class=SDARForMaskedDiffusion,
    recognises=of_type(SDARConfig.model_type),
    published={f"JetLM/SDAR-{size}-Chat": {} for size in ("1.7B", "4B", "8B")},
    licence="MIT (code), Apache-2.0 (weights)",
    parity=3e-6,
)
