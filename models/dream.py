"""Dream: transformers' Qwen2 without the causal mask; position i is still predicted at row i - 1.

Config keys and tensor names of the published checkpoints are Qwen2's own, so nothing is renamed. The tokenizer is
Qwen2's byte-level BPE with two tokens more, under a class name of its own. Logits equal those of the published
modelling code (difference 0.0 in float32); DiffuCoder has the same layout.

Source: Ye et al. 2025 (arXiv 2508.15487); the layout of Dream-org/Dream-v0-Base-7B, whose sampler shifts its logits
right by one.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from ..errors import RevprobeError
from .bidirectional import BidirectionalDecoder

# What the published code ignores or never had; Qwen2 would act on the first.
_ONLY: dict[str, Any] = {"use_sliding_window": False, "use_mrope": False}


class DreamConfig(Qwen2Config):
    """The published config.json, which is Qwen2's plus the mask token.

    Raises: RevprobeError, for sliding windows and multimodal positions.
    """

    model_type = "Dream"
    is_causal = False
    mask_token_id: int | None = None
    # A field, so that saving keeps the key: the published code falls back to 1e4 without it.
    rope_theta: float = 10000.0

    def __post_init__(self, **kwargs: Any) -> None:
        for key, only in _ONLY.items():
            given = kwargs.get(key, getattr(self, key, only))
            if given not in (only, None):
                raise RevprobeError(f"Dream config: {key}={given!r} is not supported; expected {only!r}")
        super().__post_init__(**kwargs)
        self.use_cache = False  # the published file says true, for its own sampler


class DreamForMaskedDiffusion(BidirectionalDecoder, Qwen2ForCausalLM):  # type: ignore[misc]
    """Dream-v0 Base and Instruct, DiffuCoder, and any model in their layout."""

    config_class = DreamConfig
    logit_shift = 1


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's byte-level BPE under the class name that Dream's tokenizer_config.json asks for.

    The mask is `<|mask|>`, the begin token `<|beginoftext|>`; their ids are those the file lists.
    """


AutoConfig.register(DreamConfig.model_type, DreamConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
    _auto.register(DreamConfig, DreamForMaskedDiffusion, exist_ok=True)
AutoTokenizer.register(DreamConfig, fast_tokenizer_class=DreamTokenizer, exist_ok=True)
