"""The shapes of published checkpoints, so that a plan for them needs neither their files nor a network.

Only what sizes the tensors and the token ids stands here; a checkpoint that is loaded brings its own config.json.
Source: config.json of each repository; the parameter counts are those of the published weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..errors import RevprobeError, first_line
from .bases.configs import RaddConfig
from .bases.configs import published_radd as radd_config
from .families.a2d import A2D_QWEN2, A2D_QWEN3
from .families.dream import DREAM
from .families.family import Family
from .families.known import read_config
from .families.llada import LLADA
from .families.nemotron import NEMOTRON
from .families.sdar import SDAR
from .hub import hub_options

_LLADA_8B: dict[str, Any] = {
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "pad_token_id": 126081,
    "eos_token_id": 126081,
}
_DREAM_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "mask_token_id": 151666,
    "bos_token_id": 151665,
    "pad_token_id": 151643,
    "eos_token_id": 151643,
}
_QWEN3_600M: dict[str, Any] = {
    "hidden_size": 1024,
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN2_500M: dict[str, Any] = {
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def _radd(hidden_size: int, n_blocks: int, n_heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden_size, "n_blocks": n_blocks, "n_heads": n_heads, "length": 1024, "dropout": 0.02}
    return radd_config({"tokens": 50257, "model": sizes})


def _grouped(hidden_size: int, layers: int, intermediate_size: int, vocab_size: int) -> dict[str, Any]:
    """32 query heads of 128 on 8 key heads, untied: the sizes of SDAR 4B and 8B, and of Nemotron-Labs-Diffusion."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "intermediate_size": intermediate_size}
    return heads | sizes | {"vocab_size": vocab_size}


def _nemotron(hidden_size: int, layers: int, intermediate_size: int) -> dict[str, Any]:
    rotary = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
    told = {"rope_parameters": rotary, "mask_token_id": 100, "block_size": 32}
    return _grouped(hidden_size, layers, intermediate_size, 131072) | told


def _named(family: Family, sizes: dict[str, Any], part: str = "") -> dict[str, tuple[Any, dict[str, Any]]]:
    """A family's published names, or those with `part` in them, with these sizes and what their files do not say."""
    kind: Any = family.model_class.config_class
    return {name: (kind, sizes | dict(said)) for name, said in family.published.items() if part in name}


# name on the hub -> (config class, settings)
PUBLISHED: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    **_named(LLADA, _LLADA_8B),
    **_named(DREAM, _DREAM_7B),
    "JingyangOu/radd-lambda-dce": (RaddConfig, _radd(768, 12, 12)),
    "JingyangOu/radd-t-dce": (RaddConfig, _radd(768, 12, 12)),
    "JingyangOu/radd-lambda-dce-medium": (RaddConfig, _radd(1024, 24, 16)),
    **_named(A2D_QWEN3, _QWEN3_600M),
    **_named(A2D_QWEN2, _QWEN2_500M),
    **_named(SDAR, _grouped(2560, 36, 9728, 151936), "-4B-"),
    **_named(SDAR, _grouped(4096, 36, 12288, 151936), "-8B-"),
    **_named(NEMOTRON, _nemotron(3072, 26, 9216), "-3B"),
    **_named(NEMOTRON, _nemotron(4096, 34, 14336), "-8B"),
    **_named(NEMOTRON, _nemotron(5120, 40, 16384), "-14B"),
}
_DTYPES: dict[type[PreTrainedConfig], str] = {RaddConfig: "float32"}  # the others are published in bfloat16


def published_config(name: str) -> PreTrainedConfig | None:
    """The config of a published checkpoint by its name on the hub; None for one that is not listed here."""
    known = PUBLISHED.get(name)
    return None if known is None else known[0](**known[1])


def published_dtype(config: PreTrainedConfig) -> str:
    """The dtype that the published checkpoints with a config of this class are stored in."""
    return _DTYPES.get(type(config), "bfloat16")


def config_of(source: str) -> PreTrainedConfig:
    """The config.json of a folder or hub name. Raises: RevprobeError, when it cannot be read."""
    folder = Path(source)
    place: str | Path = folder if folder.exists() else source
    try:
        return read_config(place, **hub_options(place))[0]
    except Exception as error:
        raise RevprobeError(
            f"no config.json for {source!r} ({first_line(error)}); give a folder that has one, or one of the published "
            f"names: {', '.join(PUBLISHED)}"
        ) from error
