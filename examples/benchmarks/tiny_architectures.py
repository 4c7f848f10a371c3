"""Every language model of transformers with random weights and a handful of units: `tiny_models()`.

A config says what its sizes are by the names of its attributes, so one table of small sizes serves them all; where a
first try does not make a model that runs, a few variations are tried. What is left over comes with the reason.
"""

from __future__ import annotations

import inspect
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

VOCABULARY, MASK = 120, 4
# The most parameters that still count as tiny, in millions, and the seconds that one try may take.
MOST, SECONDS = 4e6, 20
NOISE = 0.08  # standard deviation of what is added to every weight

_TOKENS = {"pad": 0, "bos": 2, "eos": 3, "sep": 5, "cls": 6, "mask": MASK, "unk": 1, "decoder_start": 2}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_SIZES: dict[str, Any] = {
    **{f"{name}_token_id": token for name, token in _TOKENS.items()},
    **dict.fromkeys(("pad_index", "pad_idx"), 0),
    **dict.fromkeys(("vocab_size", "n_vocab", "vocab_size_per_layer_input", "hf_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "true_hidden_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embed_dim", "intra_bottleneck_size", "n_embed"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_kv_shared_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "d_head", "d_kv", "kv_channels", "global_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input", "o_lora_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "mlp_hidden_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_ffn_hidden_size", "ffn_size", "block_ff_dim"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "moe_shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx"), 64),
    **dict.fromkeys(("seq_length", "max_seqlen", "max_encoder_position_embeddings"), 64),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_shared_experts"), 1),
    **dict.fromkeys(("num_nextn_predict_layers",), 0),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    "linear_num_key_heads": 2,
    "linear_num_heads": 4,
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "conv_dim"), 32),
    **dict.fromkeys(("sliding_window", "attention_window", "local_attention", "attention_chunk_size"), 64),
    **dict.fromkeys(("chunk_size_feed_forward",), 0),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "mamba_dt_rank", "time_step_rank"), 8),
    "rotary_dim": 4,
    "use_cache": False,
}
# Hybrids, of which every third or fourth layer attends.
_EVERY_FOURTH = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "recurrent_gemma", "lfm3")
_ONE_OF_EACH = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
# What single kinds need besides.
_OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "mamba2": {"num_heads": 8, "expand": 2},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds": False, "hash_seed": 0, "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16},
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
    "perceiver": {"d_latents": 32, "num_latents": 16, "num_self_attends_per_block": 1, "num_self_attention_heads": 4},
    **{kind: {"num_hidden_layers": 4} for kind in _EVERY_FOURTH},
    **{kind: _ONE_OF_EACH for kind in ("kimi_linear", "bailing_hybrid")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
}
# What a second and a third try say otherwise; the last one leaves more at its default.
_VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4, "num_kv_heads": 4, "n_kv_heads": 4, "head_dim": 8},
    {"num_hidden_layers": 4, "n_layers": 4, "num_layers": 4, "n_layer": 4, "num_kv_shared_layers": 0},
    {"num_hidden_layers": 6, "num_layers": 6, "n_layer": 6, "num_key_value_heads": 4, "first_k_dense_replace": 0},
    {"head_dim": 16, "hidden_size": 64, "d_model": 64, "num_key_value_heads": 1, "num_kv_heads": 1},
)


class OutOfTime(BaseException):
    """Past every `except Exception` on the way."""


class NotTiny(Exception):
    """A model could not be made small, or does not run; the text says why."""


def architectures() -> list[tuple[str, str, str]]:
    """All architectures with a causal or a masked head: objective, model type, class name."""
    found = []
    for objective, names in (
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("masked", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ):
        for kind, name in names.items():
            found.append((objective, kind, name if isinstance(name, str) else name[0]))
    return sorted(found)


def tiny_model(objective: str, kind: str, class_name: str) -> nn.Module:
    """A tiny model of one class, with noise on every weight, in eval mode. Raises: NotTiny, when no try makes one."""
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        raise NotTiny(f"transformers has no class {class_name}")
    first = ""
    for variation in _VARIATIONS:
        try:
            with warnings.catch_warnings(), at_most(SECONDS):
                warnings.simplefilter("ignore")
                return _made(model_class, kind, variation | {"is_decoder": objective == "causal"})
        except (Exception, OutOfTime) as error:  # whatever the class raises; the first try's reason is shown
            text = str(error).strip().splitlines()
            first = first or f"{type(error).__name__}: {text[0] if text else ''}"
    raise NotTiny(first)


def _made(model_class: Any, kind: str, variation: dict[str, Any]) -> nn.Module:
    config_class = model_class.config_class or configuration_auto.CONFIG_MAPPING[kind]
    own = variation | _OWN.get(kind, {})
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(tiny_config(config_class, own)).parameters())
    if size > MOST:
        raise NotTiny(f"{size / 1e6:.0f} million parameters, which no attribute of the table makes fewer")
    torch.manual_seed(0)
    module = model_class._from_config(tiny_config(config_class, own))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += NOISE * torch.randn_like(parameter)
    module = module.float().eval()
    with torch.no_grad():
        logits = module(input_ids=torch.arange(20, 29)[None]).logits
    if not bool(logits.isfinite().any()):
        raise NotTiny("gives no finite logits")
    return module


def tiny_config(config_class: Any, variation: dict[str, Any] | None = None) -> Any:
    """A config of a class, and of those inside it, with the small sizes that it has attributes for."""
    sizes = _SIZES | (variation or {})
    told = inspect.signature(config_class.__init__).parameters
    known = set(told) | set(getattr(config_class, "__dataclass_fields__", {})) | set(config_class.attribute_map)
    chosen: dict[str, Any] = {}
    for name, size in sizes.items():
        if name in known:
            chosen[config_class.attribute_map.get(name, name)] = size
    for name, inner in getattr(config_class, "sub_configs", {}).items():
        if "PreTrainedConfig" not in inner.__name__ and inner.__name__ != "AutoConfig":
            chosen[name] = tiny_config(inner, variation)
    return config_class(**chosen)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise OutOfTime inside the block after some seconds."""

    def over(*_: Any) -> None:
        raise OutOfTime(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
