"""Dream: transformers' Qwen2 without the causal mask; position i is still predicted at row i - 1.

Config keys and tensor names of the published checkpoints are Qwen2's own, so nothing is renamed. The tokenizer is
Qwen2's byte-level BPE with two tokens more, under a class name of its own. Logits equal those of the published
modelling code (difference 0.0 in float32).

Its relatives have the same sizes and the same mask (151666 of 152064 rows), and differ in what a reading does not
touch: DreamOn's config names an expand token (151667, an ordinary row; its deletion is the end token), DiffuCoder's
tokenizer pads with a token of its own (151667) where its config says the end token.

Source: Ye et al. 2025 (arXiv 2508.15487); the layout of Dream-org/Dream-v0-Base-7B, whose sampler shifts its logits
right by one. DreamLM/DreamOn and apple/ml-diffucoder.
"""

from __future__ import annotations

from transformers import Qwen2ForCausalLM

from ..bases.bidirectional import BidirectionalDecoder
from ..bases.configs import DreamConfig
from .family import Family, of_type


class DreamForMaskedDiffusion(BidirectionalDecoder, Qwen2ForCausalLM):  # type: ignore[misc]
    """Dream-v0 Base and Instruct, DiffuCoder, and any model in their layout."""

    config_class = DreamConfig
    logit_shift = 1
    mask_text = "<|mask|>"


DREAM = Family(
    name="Dream",
    about="Dream-v0 Base and Instruct, Dream-Coder, DreamOn, DiffuCoder, and models in their layout",
    model_class=DreamForMaskedDiffusion,
    recognises=of_type(DreamConfig.model_type),
    published={
        "Dream-org/Dream-v0-Base-7B": {},
        "Dream-org/Dream-v0-Instruct-7B": {},
        "Dream-org/Dream-Coder-v0-Base-7B": {},
        "Dream-org/Dream-Coder-v0-Instruct-7B": {},
        "Dream-org/DreamOn-v0-7B": {},
        "apple/DiffuCoder-7B-Base": {},
        "apple/DiffuCoder-7B-Instruct": {},
        "apple/DiffuCoder-7B-cpGRPO": {},
    },
    licence="Apache-2.0 (code; weights of Dream-v0); the others: see their model cards",
    parity=0.0,
)
