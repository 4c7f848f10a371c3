"""SDAR: transformers' Qwen3, block by block. Config keys and tensor names are Qwen3's own.

Checkpoints of other block sizes than 4 carry theirs in the name (-b32), and nothing makes sure that their config.json
does not still say 4.

TraDo is SDAR trained on by reinforcement: its code is SDAR's, its blocks are of 4 tokens.

Source: Cheng et al. 2025 (arXiv 2510.06303); the layout of JetLM/SDAR-4B-Chat (JetAstra/SDAR, training/model). TraDo:
Wang et al. 2025 (arXiv 2509.06949); mask token and block size as its sampler has them (Gen-Verse/dLLM-RL, sample).
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM

from ..bases.bidirectional import BidirectionalDecoder
from ..bases.masked_config import MaskedDiffusionConfig
from .family import Family, of_type, own_settings
from .files import Files


class SDARConfig(MaskedDiffusionConfig, Qwen3Config):
    model_type = "sdar"


class SDARForMaskedDiffusion(BidirectionalDecoder, Qwen3ForCausalLM):  # type: ignore[misc]
    config_class = SDARConfig
    attention = "block"
    mask_text = "<|MASK|>"


_BLOCKS = {"1.7B": (4, 16, 32), "4B": (4, 16, 32), "8B": (4, 8, 16, 32, 64)}


def _to_config(files: Files) -> dict[str, Any]:
    """Without the block size, where the name of a folder says another."""
    settings = own_settings(files)
    named, stated = re.search(r"-b(\d+)$", files.name), settings.get("block_size")
    if named is not None and stated not in (None, int(named[1])) and files.name not in SDAR.published:
        warnings.warn(
            f"{files.name!r} is named after blocks of {named[1]} tokens, and its config.json says {stated}; neither is "
            "taken: pass block_size=",
            stacklevel=2,
        )
        del settings["block_size"]
    return settings


SDAR = Family(
    name="SDAR",
    about="SDAR 1.7B, 4B and 8B, of any block size, and TraDo 4B and 8B; not the mixture of experts (30B-A3B)",
    model_class=SDARForMaskedDiffusion,
    recognises=of_type(SDARConfig.model_type),
    to_config=_to_config,
    published={
        f"JetLM/SDAR-{size}-Chat{'' if block == 4 else f'-b{block}'}": {"mask_token_id": 151669, "block_size": block}
        for size, blocks in _BLOCKS.items()
        for block in blocks
    }
    | {
        f"Gen-Verse/TraDo-{kind}": {"mask_token_id": 151669, "block_size": 4}
        for kind in ("4B-Instruct", "8B-Instruct", "8B-Thinking")
    },
    licence="MIT (code), Apache-2.0 (weights); TraDo: see its model cards",
    parity=3e-6,
)
