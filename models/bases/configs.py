"""Config and tokenizer classes of the model families, without modelling code.

They are registered with transformers' Auto classes while those are being imported, when no model class can be
imported yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, Qwen2Config, Qwen2Tokenizer

from ...errors import RevprobeError, did_you_mean
from .masked_config import require_only

POSITION_ENCODINGS = ("rope", "alibi", "absolute", "none", "scalar")
INITIALIZATIONS = ("normal", "published")
DROPOUT_SITES = ("embedding", "attention_weights", "attention", "mlp")
# What the published LLaDA code can be switched to and a Llama cannot.
_LLADA_ONLY: dict[str, Any] = {
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "clip_qkv": None,
    "embedding_dropout": 0.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "residual_dropout": 0.0,
    "partial_rotary_factor": 1,
    "rope_type": "default",  # its code turns by the base alone
    "scale_logits": False,
    "type": "default",  # of a rope_scaling, as older releases of transformers wrote it
}
_LLADA_ACTIVATIONS = ("silu", "gelu", "relu")
# What the published Dream code ignores or never had; Qwen2 would act on the first and leave the last out.
_DREAM_ONLY: dict[str, Any] = {"use_sliding_window": False, "use_mrope": False, "partial_rotary_factor": 1}


def published_radd(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `RaddConfig` from the config.json of RADD's published code."""
    sizes = config["model"]
    return {
        "vocab_size": config["tokens"] + 1,
        "mask_token_id": config["tokens"],  # the last row
        "pad_token_id": None,
        "bos_token_id": None,
        "d_model": sizes["hidden_size"],
        "n_layers": sizes["n_blocks"],
        "n_heads": sizes["n_heads"],
        "dropout": sizes["dropout"],
        "dropout_sites": ["attention", "mlp"],
        # Of all public models; no part of the model, which rotates: a file that leaves it out is held to this one.
        "max_length": sizes.get("length") or 1024,
        "position_encoding": "rope",
        "rope_base": 10000.0,
        "initialization": "published",
        "head_bias": True,
    }


class RaddConfig(PreTrainedConfig):
    """Sizes and position encoding of a RADD model; the defaults are the one-layer preset of the letters relation.

    Attributes:
        initialization: "normal", N(0, initializer_range) and zero biases; or "published", that of RADD's own code
            (see `models.radd.RaddForMaskedLM`).
        head_bias: whether the unembedding has a bias, as the published one has.
        dropout_sites: where `dropout` applies: "embedding", "attention_weights", "attention" (its output) and "mlp"
            (its output); the published code has the last two.
        published_layout: whether it was made from the published code's own config.json, whose tensors have other names.
    Raises: RevprobeError, for an unknown encoding, initialization or dropout site, heads that do not divide d_model, an
        odd RoPE head dimension, or a mask token outside the vocabulary.
    """

    model_type = "radd"
    published_layout = False
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_length",
    }
    # Of the encoder, and fixed in RADD.
    norm_bias, adaln = True, False

    vocab_size: int = 56
    mask_token_id: int = 53
    pad_token_id: int | None = 55
    bos_token_id: int | None = 54
    d_model: int = 64
    n_layers: int = 1
    n_heads: int = 1
    mlp_ratio: int = 4
    dropout: float = 0.0
    position_encoding: str = "rope"
    rope_base: float = 10000.0
    max_length: int = 64
    initialization: str = "normal"
    initializer_range: float = 0.02
    head_bias: bool = False
    dropout_sites: tuple[str, ...] | list[str] = DROPOUT_SITES
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "tokens" in kwargs and isinstance(kwargs.get("model"), dict):
            for key, value in published_radd({"model": kwargs.pop("model"), "tokens": kwargs.pop("tokens")}).items():
                setattr(self, key, value)
            kwargs["published_layout"] = True
        for key, known in (("position_encoding", POSITION_ENCODINGS), ("initialization", INITIALIZATIONS)):
            if (value := getattr(self, key)) not in known:
                raise RevprobeError(f"unknown {key} {value!r}{did_you_mean(value, known)}")
        self.dropout_sites = _dropout_sites(self.dropout_sites)
        require_sizes(self)
        super().__post_init__(**kwargs)


def require_sizes(config: Any, width: str = "d_model") -> None:
    """Hold the sizes of an encoder (`models.radd.MaskedEncoder`) together.

    Args:
        width: what its config calls d_model.
    Raises: RevprobeError, for heads that do not divide the width, an odd RoPE head dimension, or a mask token outside
        the vocabulary.
    """
    head_dim, rest = divmod(config.d_model, config.n_heads)
    if rest:
        raise RevprobeError(
            f"{width} {config.d_model} is not divisible by n_heads {config.n_heads}; change one of them"
        )
    if config.position_encoding == "rope" and head_dim % 2:
        raise RevprobeError(f"rope needs an even head dimension, got {head_dim}; change {width} or n_heads")
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise RevprobeError(
            f"mask_token_id {config.mask_token_id} is outside the vocabulary of {config.vocab_size} tokens"
        )


def _dropout_sites(given: Any) -> tuple[str, ...]:
    """In the order of the forward pass, each once. Raises: RevprobeError, for what is no list of known sites."""
    if not isinstance(given, list | tuple):
        raise RevprobeError(f"dropout_sites {given!r}: expected a list of some of {', '.join(DROPOUT_SITES)}")
    for site in given:
        if site not in DROPOUT_SITES:
            raise RevprobeError(f"unknown dropout site {site!r}{did_you_mean(site, DROPOUT_SITES)}")
    return tuple(site for site in DROPOUT_SITES if site in given)


class LLaDAConfig(PreTrainedConfig):
    """The published config.json, key by key; Llama's names read through `attribute_map`.

    Raises: RevprobeError, for a setting that the Llama architecture does not have.
    """

    model_type = "llada"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "hidden_act": "activation_type",
        "initializer_range": "init_std",
        "tie_word_embeddings": "weight_tying",
    }
    is_causal = False
    attention_bias = False
    mlp_bias = False

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    n_layers: int = 32
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    activation_type: str = "silu"
    attention_dropout: float = 0.0
    max_sequence_length: int = 4096
    rms_norm_eps: float = 1e-5
    # False: positions are learned vectors, added to the embeddings, as in the code that the published one grew out of.
    rope: bool = True
    rope_theta: float = 500000.0
    rope_parameters: dict | None = None
    vocab_size: int = 126464
    embedding_size: int | None = None
    # No default: the published file names it, and a file that does not must be asked about, not guessed for.
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    init_std: float = 0.02
    weight_tying: bool = False
    multi_query_attention: bool | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        require_only(self, _LLADA_ONLY, kwargs, "LLaDA config")
        if self.activation_type not in _LLADA_ACTIVATIONS:
            raise RevprobeError(
                f"LLaDA config: activation_type={self.activation_type!r} is not supported; expected one of "
                f"{', '.join(_LLADA_ACTIVATIONS)}"
            )
        if self.n_kv_heads is None:
            self.n_kv_heads = 1 if self.multi_query_attention else self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        if self.embedding_size:  # the published code sizes both tables by it
            self.vocab_size = self.embedding_size
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


class DreamConfig(Qwen2Config):
    """The published config.json, which is Qwen2's plus the mask token (and DreamOn's expand token, which is kept).

    Scaled rotary positions are read and written under both of transformers' names, since the published code knows the
    older, `rope_scaling`, and would take the plain ones without a word where it is missing.
    Raises: RevprobeError, for sliding windows that are in use, and multimodal positions.
    """

    model_type = "Dream"
    is_causal = False
    mask_token_id: int | None = None
    # A field, so that saving keeps the key: the published code falls back to 1e4 without it.
    rope_theta: float = 10000.0

    def __post_init__(self, **kwargs: Any) -> None:
        require_only(self, _DREAM_ONLY, kwargs, "Dream config")
        self.layer_types = None  # a sliding layer of the parent's gets the same mask as the others
        super().__post_init__(**kwargs)
        self.layer_types = ["full_attention"] * self.num_hidden_layers  # whatever a file says of windows not in use
        rotary: Any = self.rope_parameters
        self.rope_theta = float(rotary["rope_theta"])
        self.use_cache = False  # the published file says true, for its own sampler

    def to_dict(self) -> dict[str, Any]:
        written: dict[str, Any] = super().to_dict()
        rotary = written.get("rope_parameters") or {}
        if rotary.get("rope_type", "default") != "default":
            written["rope_scaling"] = {key: value for key, value in rotary.items() if key != "rope_theta"}
        return written


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's byte-level BPE under the class name that Dream's tokenizer_config.json asks for.

    The mask is `<|mask|>`, the begin token `<|beginoftext|>`; their ids are those the file lists.
    """
