"""Nemotron-Labs-Diffusion: transformers' Ministral 3 with one output head, read as a diffusion or as a causal model.

The same weights are trained in both ways at once: over noised blocks that see each other's tokens and the clean text
before them (row i predicts token i), and over that clean text from left to right (row i predicts token i + 1). So a
block that is being written sees all of itself, and a finished one is read causally: what stands before a block is the
causal model's own context. `objective="causal"` reads the causal model.

When the published `generate` writes, blocks begin where the prompt ends and the first token of each is the causal
model's; here blocks are counted from the first token, as in training, where any token of a block may be hidden.

Sources, no reference logits being at hand: the implementations of SGLang, vLLM, mlx-swift-lm and NVIDIA's
Megatron-Bridge and NeMo AutoModel, which agree on tensors, rotary positions, attention and shift; mask token and block
size stand in config.json. The layout of nvidia/Nemotron-Labs-Diffusion-8B.
"""

from __future__ import annotations

from typing import Any

from transformers import Ministral3Config, Ministral3ForCausalLM

from ...errors import RevprobeError
from ..bases.bidirectional import BidirectionalDecoder
from ..bases.masked_config import MaskedDiffusionConfig
from .family import Family, of_type, published_name, rename_by

_IN_A_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{letter}_proj" for letter in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
_KEY_MAP = {f"encoder.layers.{{}}.{part}": f"model.layers.{{}}.{part}" for part in _IN_A_LAYER}
_KEY_MAP |= {f"encoder.{part}": f"model.{part}" for part in ("embed_tokens", "norm")} | {"diffusion_head": "lm_head"}
# What no published checkpoint has, and Ministral 3 would ignore or act on in its own way.
_ONLY: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "sliding_window": None}
# How the published class builds its attention, for training or not; with the last there is no diffusion model.
_PARADIGMS = (None, "bidirectional", "block_diff", "sbd_block_diff", "autoregressive")


def official_name(name: str) -> str:
    """The published name of one of our tensors; other names stay as they are.

    >>> official_name("model.layers.3.mlp.down_proj.weight")
    'encoder.layers.3.mlp.down_proj.weight'
    """
    return published_name(name, _KEY_MAP)


class NemotronConfig(MaskedDiffusionConfig, Ministral3Config):
    """The published config.json: Ministral 3's with mask token and block size.

    Raises: RevprobeError, for biases, sliding windows, another paradigm, or a file that says nothing of positions.
    """

    model_type = "nemotron_labs_diffusion"

    def __post_init__(self, **kwargs: Any) -> None:
        for key, only in _ONLY.items():
            if (given := kwargs.get(key, getattr(self, key, only))) != only:
                raise RevprobeError(f"Nemotron config: {key}={given!r} is not supported; expected {only!r}")
        if (paradigm := kwargs.get("dlm_paradigm")) not in _PARADIGMS:
            known = ", ".join(repr(one) for one in _PARADIGMS if one)
            raise RevprobeError(f"Nemotron config: dlm_paradigm={paradigm!r} is not supported; expected one of {known}")
        if self.rope_parameters is None and not kwargs.get("rope_scaling"):
            raise RevprobeError(  # Ministral 3 would take those of its own 8B model
                "Nemotron config: no rope_parameters; expected the published config.json, which has them"
            )
        super().__post_init__(**kwargs)
        # Queries far behind the first are scaled where the file says by how much, and not elsewhere.
        rotary: Any = self.rope_parameters
        rotary.setdefault("llama_4_scaling_beta", 0.0)
        rotary.setdefault("original_max_position_embeddings", self.max_position_embeddings)


class NemotronForMaskedDiffusion(BidirectionalDecoder, Ministral3ForCausalLM):  # type: ignore[misc]
    """The diffusion model: read block by block, and whole with `block_size="whole"`."""

    config_class = NemotronConfig
    attention = "block"
    finished_blocks = "causal"
    official_name = staticmethod(official_name)

    def __init__(self, config: NemotronConfig) -> None:
        if getattr(config, "dlm_paradigm", None) == "autoregressive":
            raise RevprobeError(
                "this checkpoint was trained from left to right alone, as its dlm_paradigm='autoregressive' says; load "
                "it with objective='causal'"
            )
        super().__init__(config)
        # Ministral 3 takes a padding token where the file names none, and zeroes its row's gradient.
        self.model.embed_tokens.padding_idx = None


class NemotronForCausalLM(Ministral3ForCausalLM):
    """The causal model of the same weights."""

    config_class = NemotronConfig
    objective = "causal"

    def __init__(self, config: NemotronConfig) -> None:
        config.is_causal = True  # transformers masks by it, and a folder that is saved says it
        super().__init__(config)
        self.model.embed_tokens.padding_idx = None


rename_by(_KEY_MAP, NemotronConfig.model_type)

NEMOTRON = Family(
    name="Nemotron-Labs-Diffusion",
    about="Nemotron-Labs-Diffusion 3B, 8B and 14B; objective='causal' reads the causal model of the same weights",
    model_class=NemotronForMaskedDiffusion,
    causal_class=NemotronForCausalLM,
    recognises=of_type(NemotronConfig.model_type),
    key_map=_KEY_MAP,
    streams=True,
    published={
        f"nvidia/Nemotron-Labs-Diffusion-{size}{kind}": {} for size in ("3B", "8B", "14B") for kind in ("", "-Base")
    },
    licence="NVIDIA Nemotron Open Model License (code and weights)",
)
