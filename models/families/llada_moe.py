"""LLaDA-MoE: transformers' Qwen3-MoE without the causal mask; the chosen experts' weights are not renormalised.

Row i predicts token i. The published file has one tensor for each expert, and where there is a shared expert it lies
beside `mlp`: both are put in their places while they are read, and taken apart when they are saved. Its config.json
calls itself `llada`, as dense LLaDA's does, and does not name the mask token. Logits equal those of the published
modelling code to 1e-6 in float32.

Source: Zhu et al. 2025 (arXiv 2509.24389); the layout of inclusionAI/LLaDA-MoE-7B-A1B-Base.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP, Qwen3MoeSparseMoeBlock

from ...errors import RevprobeError
from ..bases.bidirectional import BidirectionalDecoder
from ..bases.experts import GroupedExperts, require_experts
from ..bases.masked_config import MaskedDiffusionConfig
from .family import Family, published_name, rename_by
from .files import Files

_KEY_MAP = {"model.layers.{}.shared_expert": "model.layers.{}.mlp.shared_expert"}
# The published code has no default for these that works, and no tensor's shape contradicts a wrong one.
_NEEDED = ("vocab_size", "num_attention_heads", "num_experts", "num_experts_per_tok", "moe_layer_freq", "rope_theta")
_WIDTHS = ("dense_intermediate_size", "expert_intermediate_size")  # of a layer without experts, and of one with them


@strict  # fields here have other types than their namesakes of Qwen3-MoE
class LLaDAMoEConfig(MaskedDiffusionConfig, Qwen3MoeConfig):
    """The published config.json, key by key; Qwen3-MoE's names read through `attribute_map`.

    Raises: RevprobeError, for a setting that the class does not have, or layers whose kind is not said.
    """

    model_type = "llada_moe"  # under the published `llada` transformers would rename dense LLaDA's tensors
    attribute_map = {
        "intermediate_size": "dense_intermediate_size",
        "moe_intermediate_size": "expert_intermediate_size",
        "num_local_experts": "num_experts",
    }
    only = {
        "use_sliding_window": False,
        "clip_qkv": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": False,
        "partial_rotary_factor": 1,
        "routed_scaling_factor": 1,
        "router_num_group": 1,
        "router_topk_group": 1,
    }
    dense_intermediate_size: int | None = None
    expert_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    moe_layer_freq: list[int] | None = None
    qk_layernorm: bool = False
    norm_topk_prob: bool | None = None  # type: ignore[assignment]  # the published file says null
    rms_norm_eps: float = 1e-5
    rope_theta: float | None = None  # a field, so that saving keeps the key

    def __post_init__(self, **kwargs: Any) -> None:
        kinds = self.moe_layer_freq
        if kinds is not None and (not isinstance(kinds, list) or len(kinds) < self.num_hidden_layers):
            raise RevprobeError(
                f"LLaDAMoEConfig: moe_layer_freq={kinds!r} does not say of each of {self.num_hidden_layers} layers "
                "whether it has experts; expected a list with 0 for a dense layer and 1 for one with experts"
            )
        self.mlp_only_layers = [layer for layer, kind in enumerate(kinds or []) if kind == 0]
        super().__post_init__(**kwargs)


class SharedExpertBlock(Qwen3MoeSparseMoeBlock):
    """Experts that are chosen, and one beside them that every token passes through."""

    shared_expert: Qwen3MoeMLP

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + self.shared_expert(hidden_states)


class LLaDAMoEForMaskedDiffusion(GroupedExperts, BidirectionalDecoder, Qwen3MoeForCausalLM):  # type: ignore[misc]
    """LLaDA-MoE-7B-A1B Base and Instruct, and any model in their layout."""

    config_class = LLaDAMoEConfig
    mask_text = "<|mask|>"

    @staticmethod
    def official_name(name: str) -> str:
        return published_name(name, _KEY_MAP)

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            if not config.qk_layernorm:
                layer.self_attn.q_norm, layer.self_attn.k_norm = nn.Identity(), nn.Identity()
            if config.shared_expert_intermediate_size and isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
                # The class alone is changed: the experts, already built, are the greater part of the model.
                layer.mlp.__class__ = SharedExpertBlock
                layer.mlp.shared_expert = Qwen3MoeMLP(config, config.shared_expert_intermediate_size)
        if config.shared_expert_intermediate_size:
            self.init_weights()  # of what was added


rename_by(_KEY_MAP, LLaDAMoEConfig.model_type, like="qwen3_moe")


def _recognises(files: Files) -> bool:
    """By what dense LLaDA's config does not have, or as it is saved here."""
    published = "LLaDAMoEModelLM" in files.architectures or "num_experts" in files.settings
    return files.model_type == LLaDAMoEConfig.model_type or (files.model_type == "llada" and published)


def _to_config(files: Files) -> dict[str, Any]:
    """The published file writes null for what it does not say."""
    said = {key: value for key, value in files.settings.items() if value is not None}
    rotary, kinds = said.get("rope_parameters"), said.get("moe_layer_freq")
    if isinstance(rotary, dict) and "rope_theta" in rotary:  # as newer releases of transformers write it
        said = {"rope_theta": rotary["rope_theta"]} | said
    widths = {_WIDTHS[kind != 0] for kind in kinds} if isinstance(kinds, list) else set()
    missing = [key for key in (*_NEEDED, *sorted(widths)) if key not in said]
    if missing:
        raise RevprobeError(
            f"{files.name}: its config.json does not say {', '.join(missing)}; expected the published file of a "
            "LLaDA-MoE"
        )
    require_experts(files.shapes, said["num_experts"], files.name)
    return {"num_key_value_heads": said["num_attention_heads"]} | said


LLADA_MOE = Family(
    name="LLaDA-MoE",
    about="LLaDA-MoE-7B-A1B Base and Instruct",
    model_class=LLaDAMoEForMaskedDiffusion,
    recognises=_recognises,
    to_config=_to_config,
    key_map=_KEY_MAP,
    streams=True,
    published={
        f"inclusionAI/LLaDA-MoE-7B-A1B-{kind}": {"mask_token_id": 156895}
        for kind in ("Base", "Instruct", "Instruct-TD")
    },
    licence="Apache-2.0 (code), Apache-2.0 (weights)",
    parity=0.0,
)
