"""RADD's published checkpoints, `JingyangOu/radd-lambda-dce` and others in their layout.

Its config.json is the whole configuration of the training run, without a `model_type`. Written from the public code's
model/transformer.py and model/rotary.py (ML-GSAI/RADD); logits equal that code's to 2e-5 in float32.

Source: Ou et al. 2025, arXiv 2406.03736.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import RevprobeError
from ..bases.configs import published_radd
from ..bases.radd import RaddForMaskedLM
from .family import Family, Fused
from .files import Files, Settings

_READ = ("hidden_size", "n_heads", "n_blocks", "dropout")
ROPE_BASE = 10000.0
GPT2_TOKENIZER = "openai-community/gpt2"
_BLOCK = "blocks.{}"


def _is_published(config: Settings) -> bool:
    sizes = config.get("model")
    named = config.get("model_type") in (None, "radd")  # tools that copy a checkpoint write one into it
    return named and "tokens" in config and isinstance(sizes, dict) and {*_READ} <= set(sizes)


def _recognises(files: Files) -> bool:
    """The published layout, or what is saved here."""
    return files.model_type == "radd" or _is_published(files.settings)


def _to_config(files: Files) -> dict[str, Any]:
    return published_radd(files.settings) if _is_published(files.settings) else dict(files.settings)


def rotation_check(head_dim_of: Callable[[Settings], int]) -> Callable[[Tensor, Settings], None]:
    """The file stores the angles, and the public code turns by those; ours works them out from the base."""

    def check(inv_freq: Tensor, config: Settings) -> None:
        head_dim = head_dim_of(config)
        expected = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        rounding = max(1e-5, torch.finfo(inv_freq.dtype).eps)  # of a file in a narrower type
        if inv_freq.shape != expected.shape or not torch.allclose(inv_freq.float(), expected, rtol=rounding, atol=0):
            raise RevprobeError(
                f"rotary_emb.inv_freq {tuple(inv_freq.shape)} holds other angles than base {ROPE_BASE:g} at a head "
                f"dimension of {head_dim}, by which the model turns; the checkpoint is of another model or a damaged "
                "one"
            )

    return check


def _head_dim(config: Settings) -> int:
    return config["model"]["hidden_size"] // config["model"]["n_heads"]


# MDLM and BD3-LM have these tensors as well.
KEY_MAP = {
    "vocab_embed.embedding": "embed_tokens.weight",  # a bare parameter
    f"{_BLOCK}.norm1": f"{_BLOCK}.attention_norm",
    f"{_BLOCK}.attn_out": f"{_BLOCK}.attention.o_proj",
    f"{_BLOCK}.norm2": f"{_BLOCK}.mlp_norm",
    f"{_BLOCK}.mlp.0": f"{_BLOCK}.mlp.up_proj",
    f"{_BLOCK}.mlp.2": f"{_BLOCK}.mlp.down_proj",
    "output_layer.norm_final": "final_norm",
    "output_layer.linear": "lm_head",
}
FUSED = {f"{_BLOCK}.attn_qkv": Fused([f"{_BLOCK}.attention.{letter}_proj" for letter in "qkv"])}
RADD = Family(
    name="RADD",
    about="radd-lambda-dce, radd-t-dce and others in their layout, and what `revprobe train` makes",
    model_class=RaddForMaskedLM,
    recognises=_recognises,
    to_config=_to_config,
    key_map=KEY_MAP,
    fused=FUSED,
    constants={
        "rotary_emb.inv_freq": rotation_check(
            lambda config: config["model"]["hidden_size"] // config["model"]["n_heads"]
        )
    },
    tokenizer=GPT2_TOKENIZER,
    published={f"JingyangOu/radd-{kind}": {} for kind in ("lambda-dce", "t-dce", "lambda-dce-medium")},
    licence="Apache-2.0 (code); weights: see the model card",
    parity=3e-6,
)
