"""A TransformerLens view of a model: hook points on the right attention, weights shared, the model left as it is.

`to_bridge(model)` builds a TransformerBridge over a second module tree that shares the model's parameters, so later
training steps are seen by the bridge and gradients land on the model. Where TransformerLens folds and centres weights
(compatibility mode), the bridge takes copies first: it then answers alike by other parameters.

TransformerLens' stock adapters for Llama, Qwen2 and GPT-2 put the causal mask back on their bidirectional relatives;
the adapters here, registered through its own extension point, do not.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformer_lens.config.transformer_bridge_config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PositionEmbeddingsAttentionBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.supported_architectures.glm4_moe import Glm4MoeArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.gpt2 import GPT2ArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.qwen2 import Qwen2ArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.qwen3_moe import Qwen3MoeArchitectureAdapter

from ..errors import RevprobeError
from .bases.radd import MaskedEncoder

_TL_POSITIONS = {
    "rope": "rotary",
    "alibi": "alibi",
    "absolute": "standard",
    "none": "none",
    "scalar": "relative_positional_bias",  # as TransformerLens calls T5's
}


class _Bidirectional:
    """Set before the bridge is built from its components: writing the flag afterwards has no effect."""

    supports_generation = False
    supports_causal_loss = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)  # type: ignore[call-arg]
        self.cfg.attention_dir = "bidirectional"  # type: ignore[attr-defined]
        self.component_mapping["blocks"].submodules["attn"].is_causal = False  # type: ignore[attr-defined]


class LLaDAAdapter(_Bidirectional, LlamaArchitectureAdapter):
    """Llama's adapter without the causal mask."""


class DreamAdapter(_Bidirectional, Qwen2ArchitectureAdapter):
    """Qwen2's adapter without the causal mask."""


class LLaDAMoEAdapter(_Bidirectional, Qwen3MoeArchitectureAdapter):
    """Qwen3-MoE's adapter without the causal mask."""


class LLaDA2Adapter(_Bidirectional, Glm4MoeArchitectureAdapter):
    """GLM-4-MoE's adapter without the causal mask; in blocks where the model is called so."""


class DiffuGPTAdapter(GPT2ArchitectureAdapter):
    """GPT-2's adapter without the causal mask."""

    supports_generation = False
    supports_causal_loss = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.attention_dir = "bidirectional"
        parts: Any = self.component_mapping
        parts["blocks"].submodules["attn"].is_causal = False


class EncoderAdapter(ArchitectureAdapter):
    """The blocks of RADD's encoder under TransformerLens' names."""

    supports_generation = False
    supports_causal_loss = False
    # TransformerLens' name of what a sublayer adds to the residual stream -> where it is, if not at its own output.
    added_at: ClassVar[dict[str, str]] = {}

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        c = self.cfg
        c.normalization_type, c.final_rms, c.gated_mlp, c.attn_only = "LN", False, False, False
        c.attention_dir = "bidirectional"
        self.weight_processing_conversions = {**self._qkvo_weight_conversions()}
        self.component_mapping = {
            "embed": EmbeddingBridge(name="embed_tokens"),
            "blocks": BlockBridge(
                name="blocks", config=c, submodules=self._block(c), hook_alias_overrides=dict(self.added_at)
            ),
            "ln_final": NormalizationBridge(name="final_norm", config=c),
            "unembed": UnembeddingBridge(name="lm_head", config=c),
        }
        if c.positional_embedding_type == "standard":
            self.component_mapping["pos_embed"] = EmbeddingBridge(name="embed_positions")

    @staticmethod
    def _block(c: Any) -> dict[str, Any]:
        projections = {letter: LinearBridge(name=f"{letter}_proj") for letter in "qkvo"}
        attention = PositionEmbeddingsAttentionBridge(
            name="attention", config=c, is_causal=False, submodules=projections
        )
        mlp: dict[str, Any] = {"in": LinearBridge(name="up_proj"), "out": LinearBridge(name="down_proj")}
        return {
            "ln1": NormalizationBridge(name="attention_norm", config=c),
            "attn": attention,
            "ln2": NormalizationBridge(name="mlp_norm", config=c),
            "mlp": MLPBridge(name="mlp", config=c, submodules=mlp),
        }


class AdaptiveEncoderAdapter(EncoderAdapter):
    """The same with adaptive norms: what norms give is scaled and shifted, and what sublayers give is gated.

    So no norm's weight may be folded and no output centred; TransformerLens' analyses of weights alone see neither.
    """

    supports_fold_ln = supports_center_writing_weights = False
    added_at: ClassVar[dict[str, str]] = {"hook_attn_out": "attn_added.hook_out", "hook_mlp_out": "mlp_added.hook_out"}

    @staticmethod
    def _block(c: Any) -> dict[str, Any]:
        gated = {letter: GeneralizedComponent(f"{letter}_dropout", c) for letter in ("attention", "mlp")}
        return EncoderAdapter._block(c) | {"attn_added": gated["attention"], "mlp_added": gated["mlp"]}


_ADAPTERS = {
    "RaddForMaskedLM": EncoderAdapter,
    "MDLMForMaskedDiffusion": AdaptiveEncoderAdapter,
    "BD3LMForMaskedDiffusion": AdaptiveEncoderAdapter,
    "LLaDAForMaskedDiffusion": LLaDAAdapter,
    "DreamForMaskedDiffusion": DreamAdapter,
    "DiffuGPTForMaskedDiffusion": DiffuGPTAdapter,
    "DiffuLlamaForMaskedDiffusion": LLaDAAdapter,
    "LitLlamaForMaskedDiffusion": LLaDAAdapter,
    "LitLlamaForCausalLM": LlamaArchitectureAdapter,
    "LLaDAMoEForMaskedDiffusion": LLaDAMoEAdapter,
    "LLaDA2ForMaskedDiffusion": LLaDA2Adapter,
}
for _architecture, _adapter in _ADAPTERS.items():
    ArchitectureAdapterFactory.register_adapter(_architecture, _adapter)


class SharedBridge(TransformerBridge):
    """A bridge over a model's own parameters, until TransformerLens rewrites them: then over copies of them."""

    def process_weights(self, *args: Any, **options: Any) -> None:
        """As TransformerLens does, which writes some of them in place (those of a mixture's experts)."""
        if not self._weights_processed:
            _unshare(self)
        super().process_weights(*args, **options)


def _unshare(bridge: TransformerBridge) -> None:
    """Give a bridge parameters of its own; those that share their memory, as parts of a fused weight, still do."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for part in {id(m): m for tree in (bridge, bridge.original_model) for m in tree.modules()}.values():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if id(parameter) not in copies:
                        copies[id(parameter)] = nn.Parameter(_copied(parameter, storages), parameter.requires_grad)
                    part._parameters[name] = copies[id(parameter)]


def _copied(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """The tensor in a copy of its memory, one for all tensors that lie in it."""
    here = tensor.untyped_storage()
    if here.data_ptr() not in storages:
        storages[here.data_ptr()] = here.clone()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storages[here.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())


def to_bridge(module: nn.Module) -> TransformerBridge:
    """A TransformerBridge of a model, whose `hook_attn_scores` and `hook_pattern` are those of its own attention.

    Its logits equal the model's to 1e-4; parameters are shared, the module tree is not. `enable_compatibility_mode()`
    folds and centres copies: the model stays as it is, and a gradient cosine over the bridge's other parameters is
    another number than the model's.
    Raises: RevprobeError, when TransformerLens has no adapter for the architecture.
    """
    architecture = type(module).__name__
    config: Any = module.config
    described: dict[str, Any] = (
        {"tl_config": _encoder_config(config)} if isinstance(module, MaskedEncoder) else {"hf_config": config}
    )
    try:
        # The bridge replaces submodules of the tree it is given, so it is given a second one over the same parameters.
        second = copy.deepcopy(module, {id(p): p for p in module.parameters()})
        bridge = build_bridge_from_module(second, architecture, **described)
    except (ValueError, KeyError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise RevprobeError(
            f"TransformerLens cannot bridge {architecture}: {reason}; register an adapter for it"
        ) from error
    bridge.__class__ = SharedBridge
    return bridge


def _encoder_config(config: Any) -> TransformerBridgeConfig:
    return TransformerBridgeConfig(
        d_model=config.d_model,
        d_head=config.d_model // config.n_heads,
        n_heads=config.n_heads,
        n_layers=config.n_layers,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        d_mlp=config.mlp_ratio * config.d_model,
        act_fn="gelu_new",
        attention_dir="bidirectional",
        positional_embedding_type=_TL_POSITIONS[config.position_encoding],
    )
