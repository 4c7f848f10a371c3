"""The shapes of published checkpoints, so that a plan for them needs neither their files nor a network.

Only what sizes the tensors and the token ids stands here; a checkpoint that is loaded brings its own config.json.
Source: config.json of each repository; the parameter counts are those of the published weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..errors import RevprobeError, first_line
from .bases.configs import DreamConfig, LLaDAConfig, RaddConfig
from .families.known import read_config
from .families.radd import config_of as radd_config
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


def _radd(hidden_size: int, n_blocks: int, n_heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden_size, "n_blocks": n_blocks, "n_heads": n_heads, "length": 1024, "dropout": 0.02}
    return radd_config({"tokens": 50257, "model": sizes})


# name on the hub -> (config class, settings)
PUBLISHED: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "GSAI-ML/LLaDA-8B-Base": (LLaDAConfig, _LLADA_8B),
    "GSAI-ML/LLaDA-8B-Instruct": (LLaDAConfig, _LLADA_8B),
    "GSAI-ML/LLaDA-1.5": (LLaDAConfig, _LLADA_8B),
    "Dream-org/Dream-v0-Base-7B": (DreamConfig, _DREAM_7B),
    "Dream-org/Dream-v0-Instruct-7B": (DreamConfig, _DREAM_7B),
    "JingyangOu/radd-lambda-dce": (RaddConfig, _radd(768, 12, 12)),
    "JingyangOu/radd-t-dce": (RaddConfig, _radd(768, 12, 12)),
    "JingyangOu/radd-lambda-dce-medium": (RaddConfig, _radd(1024, 24, 16)),
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
