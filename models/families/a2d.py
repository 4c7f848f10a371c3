"""A2D: Qwen3, Qwen2 and Llama trained on as diffusion models, under their parents' own tensor names.

Two kinds of checkpoints, `mdlm` (every token sees every other) and `bd3lm` (block by block), have one class and one
config: nothing in the files says which it is, nor how long a block is, nor which token is the mask. Row i predicts
token i.

Source: ZHZisZZ/dllm, dllm/pipelines/a2d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ..bases.bidirectional import BidirectionalDecoder
from ..bases.masked_config import MaskedDiffusionConfig
from ..contract.block_masks import WHOLE
from .family import Family, of_type


class A2DConfig(MaskedDiffusionConfig):
    """Of all parents. Sliding windows, which a file may have from its parent, are left out as its own code does."""

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("use_sliding_window", None)
        if hasattr(self, "use_sliding_window"):
            vars(self)["use_sliding_window"] = False
        super().__post_init__(**kwargs)


class A2DQwen3Config(A2DConfig, Qwen3Config):
    model_type = "a2d-qwen3"


class A2DQwen2Config(A2DConfig, Qwen2Config):
    model_type = "a2d-qwen2"


class A2DLlamaConfig(A2DConfig, LlamaConfig):
    model_type = "a2d-llama"


class A2DQwen3ForMaskedDiffusion(BidirectionalDecoder, Qwen3ForCausalLM):  # type: ignore[misc]
    config_class = A2DQwen3Config
    attention = "either"
    mask_text = "<|mask|>"


class A2DQwen2ForMaskedDiffusion(BidirectionalDecoder, Qwen2ForCausalLM):  # type: ignore[misc]
    config_class = A2DQwen2Config
    attention = "either"
    mask_text = "<|mask|>"


class A2DLlamaForMaskedDiffusion(BidirectionalDecoder, LlamaForCausalLM):  # type: ignore[misc]
    config_class = A2DLlamaConfig
    attention = "either"
    mask_text = "<|mask|>"


def _family(parent: str, model_class: type[BidirectionalDecoder], published: Mapping[str, Any]) -> Family:
    config = model_class.config_class
    return Family(
        name=f"A2D {parent}",
        about=f"{parent} trained on as a diffusion model by dLLM; the files do not say whether whole or in blocks",
        model_class=model_class,  # type: ignore[arg-type]
        recognises=of_type(config.model_type),
        published=published,
        licence="Apache-2.0 (code); weights: see their model cards",
        parity=0.0,
    )


def _published(name: str, mask_token_id: int) -> dict[str, dict[str, Any]]:
    """Both kinds of a parent, blocks as dLLM's scripts have them. The mask is the first id its tokenizer leaves."""
    kinds: dict[str, int | str] = {"mdlm": WHOLE, "bd3lm": 32}
    return {
        f"dllm-hub/{name}-diffusion-{kind}-v0.1": {"mask_token_id": mask_token_id, "block_size": size}
        for kind, size in kinds.items()
    }


A2D_QWEN3 = _family("Qwen3", A2DQwen3ForMaskedDiffusion, _published("Qwen3-0.6B", 151669))
A2D_QWEN2 = _family("Qwen2", A2DQwen2ForMaskedDiffusion, _published("Qwen2.5-Coder-0.5B-Instruct", 151665))
A2D = (A2D_QWEN3, A2D_QWEN2, _family("Llama", A2DLlamaForMaskedDiffusion, {}))
