"""LLaDA2.0 and 2.1: transformers' GLM-4-MoE, block by block, with a router of its own.

Row i predicts token i. Queries, keys and values are one tensor in the published file, and each expert has its own;
both are put in their places while they are read, and back again when they are saved. Its config.json names neither
the mask token nor the length of a block. Logits equal those of the published modelling code to 2e-6 in float32.

Source: Bie et al. 2025 (arXiv 2512.15745); the layout of inclusionAI/LLaDA2.0-mini.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from ...errors import RevprobeError
from ..bases.bidirectional import BidirectionalDecoder
from ..bases.experts import GroupedExperts, require_experts
from ..bases.masked_config import MaskedDiffusionConfig
from .family import Family, Fused, rename_by
from .files import Files

_LAYER = "model.layers.{}"
_KEY_MAP = {
    "model.word_embeddings": "model.embed_tokens",
    f"{_LAYER}.attention.query_layernorm": f"{_LAYER}.self_attn.q_norm",
    f"{_LAYER}.attention.key_layernorm": f"{_LAYER}.self_attn.k_norm",
    f"{_LAYER}.attention.dense": f"{_LAYER}.self_attn.o_proj",
    f"{_LAYER}.mlp.gate.expert_bias": f"{_LAYER}.mlp.gate.e_score_correction_bias",
}


def _by_heads(tensor: Tensor, config: Any, parts: int) -> Sequence[Tensor]:
    """All queries, then all keys, then all values, of which there are fewer heads."""
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    rows = [count * config.head_dim for count in heads]
    return tensor.split(rows) if sum(rows) == tensor.shape[0] else []


_FUSED = {
    f"{_LAYER}.attention.query_key_value": Fused([f"{_LAYER}.self_attn.{part}_proj" for part in "qkv"], _by_heads)
}


class LLaDA2Config(MaskedDiffusionConfig, Glm4MoeConfig):
    """The published config.json, key by key, and its defaults; GLM-4-MoE's names read through `attribute_map`.

    Raises: RevprobeError, for a setting that the class does not have, or groups that the experts cannot form.
    """

    model_type = "llada2_moe"
    attribute_map = {
        "n_routed_experts": "num_experts",
        "num_local_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "attention_bias": "use_qkv_bias",
    }
    only = {
        "use_sliding_window": False,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "use_bias": False,
        "use_rmsnorm": True,
    }
    num_attention_heads: int = 16
    num_key_value_heads: int = 0
    head_dim: int | None = None
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    num_experts: int = 16
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        size = self.num_experts // self.n_group
        if size * self.n_group != self.num_experts or size < 2 or self.num_experts_per_tok > self.topk_group * size:
            raise RevprobeError(
                f"LLaDA2Config: {self.num_experts} experts in {self.n_group} groups, of which {self.topk_group} are "
                f"kept and {self.num_experts_per_tok} experts chosen; expected equal groups of two or more, and no "
                "more chosen than kept"
            )
        # GLM-4-MoE's own default stands before the field's value, where it is not said again.
        super().__post_init__(**kwargs | {"partial_rotary_factor": self.partial_rotary_factor})


class LLaDA2Router(Glm4MoeTopkRouter):
    """The experts of each token and their weights.

    GLM-4-MoE's own, as older releases of transformers have it, counts experts of dropped groups as 0: where a bias
    makes all others negative, it would choose among them.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes: `... d_model -> token expert, token chosen, token chosen`: logits, weights, experts."""
        logits = F.linear(hidden_states.flatten(0, -2).float(), self.weight.float())
        scores = logits.sigmoid()
        offered = (scores + self.e_score_correction_bias).unflatten(-1, (self.num_group, -1))
        groups = offered.topk(2).values.sum(-1)
        dropped = torch.ones_like(groups, dtype=torch.bool).scatter(-1, groups.topk(self.topk_group).indices, False)
        chosen = offered.masked_fill(dropped[..., None], float("-inf")).flatten(-2).topk(self.top_k).indices
        weights = scores.gather(-1, chosen)
        if self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, chosen


class LLaDA2ForMaskedDiffusion(GroupedExperts, BidirectionalDecoder, Glm4MoeForCausalLM):  # type: ignore[misc]
    """LLaDA2.0 and 2.1, mini and flash, and any model in their layout."""

    config_class = LLaDA2Config
    attention = "block"
    mask_text = "<|mask|>"

    @staticmethod
    def official_name(name: str) -> str:
        return LLADA2.official_name(name)

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(config)
        for part in self.modules():
            if type(part) is Glm4MoeTopkRouter:
                part.__class__ = LLaDA2Router  # the weights stay where they are
        # GLM-4.5's own: layers 46 and 92, which a deeper checkpoint must not lose.
        self._keys_to_ignore_on_load_unexpected = []


rename_by(_KEY_MAP, LLaDA2Config.model_type, fused=_FUSED, like="glm4_moe")


def _recognises(files: Files) -> bool:
    """The name of 2.1 is that of dLLM's copy."""
    return files.model_type in (LLaDA2Config.model_type, "llada21_moe")


def _to_config(files: Files) -> dict[str, Any]:
    """The published file writes null for what it does not say."""
    said = {key: value for key, value in files.settings.items() if value is not None}
    require_experts(files.shapes, said.get("num_experts", LLaDA2Config.num_experts), files.name)
    return said


LLADA2 = Family(
    name="LLaDA2",
    about="LLaDA2.0 and 2.1, mini (16B) and flash (100B)",
    model_class=LLaDA2ForMaskedDiffusion,
    recognises=_recognises,
    to_config=_to_config,
    key_map=_KEY_MAP,
    fused=_FUSED,
    streams=True,
    published={
        f"inclusionAI/LLaDA{kind}": {"mask_token_id": 156895, "block_size": 32}
        for kind in (
            "2.0-mini-preview",
            "2.0-flash-preview",
            "2.0-mini",
            "2.0-flash",
            "2.0-mini-CAP",
            "2.0-flash-CAP",
            "2.1-mini",
            "2.1-flash",
        )
    },
    licence="Apache-2.0 (code), Apache-2.0 (weights)",
    parity=5e-6,
)
