"""Small models with random weights in the published layouts, and the tokenizer that goes with their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from ...models.bases.configs import DreamConfig, LLaDAConfig
from ...models.families.dream import DreamForMaskedDiffusion
from ...models.families.llada import LLaDAForMaskedDiffusion

CONTEXT = 128
_BEGIN, _END, _PAD, _MASK = "<|begin|>", "<|end|>", "<|pad|>", "<|mask|>"
_UNKNOWN = "<|endoftext|>"
# Those that are trained to predict the next token.
CAUSAL = ("llama", "qwen2")
_CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "dream": (DreamConfig, DreamForMaskedDiffusion),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


class Sizes(Protocol):
    """What a config says of a small model."""

    @property
    def layout(self) -> str: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...


def train_tokenizer(
    texts: Sequence[str], vocabulary: int, context: int = CONTEXT, *, as_qwen2: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE over these texts, with begin, end, padding and mask tokens; it adds none of them by itself.

    Args:
        as_qwen2: split and normalized as Qwen2's, with its token for the unknown too: transformers reads the tokenizer
            of any Qwen2 as that class, whatever class its files name.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [_BEGIN, _END, _PAD, _MASK]
    if as_qwen2:
        published = Qwen2Tokenizer().backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = published.normalizer, published.pre_tokenizer
        tokens.append(_UNKNOWN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": _BEGIN, "eos_token": _END, "pad_token": _PAD, "mask_token": _MASK}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **special)


def untrained(
    sizes: Sizes, tokenizer: PreTrainedTokenizerFast, *, context: int = CONTEXT, rope: bool = True
) -> PreTrainedModel:
    """The model of a layout with random weights, from torch's current random state.

    Args:
        rope: of the layout of LLaDA, whether queries and keys turn; else positions are learned vectors.
    """
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    mask = {"mask_token_id": tokenizer.mask_token_id}
    if sizes.layout == "llada":
        return LLaDAForMaskedDiffusion(
            LLaDAConfig(
                d_model=sizes.d_model,
                n_heads=sizes.n_heads,
                n_layers=sizes.n_layers,
                mlp_hidden_size=4 * sizes.d_model,
                max_sequence_length=context,
                rope=rope,
                rope_theta=10000.0,
                vocab_size=len(tokenizer),
                **mask,
                **ids,
            )
        )
    config, model = _CLASSES[sizes.layout]
    built: PreTrainedModel = model(
        config(
            vocab_size=len(tokenizer),
            hidden_size=sizes.d_model,
            num_hidden_layers=sizes.n_layers,
            num_attention_heads=sizes.n_heads,
            num_key_value_heads=sizes.n_heads,
            intermediate_size=4 * sizes.d_model,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            **({} if sizes.layout in CAUSAL else mask),
            **ids,
        )
    )
    return built
