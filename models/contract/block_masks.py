"""Who sees whom in a model that writes block by block, as masks over one sequence. True: the query sees the key.

Blocks are counted from the first token of the input: position i lies in block i // size. Families differ in one thing:
how a block is read once it is finished. Mostly as it was written, each token seeing its whole block; in some
(Nemotron-Labs-Diffusion) from left to right, as by the causal model that they are beside.

Source: Arriola et al. 2025 (block diffusion, arXiv 2503.09573); SDAR, Fast-dLLM v2, LLaDA2 and A2D use the same rules.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE = "whole"  # the block size of a model in which every token sees every other, where that must be said


def block_mask(length: int, size: int, *, device: torch.device | None = None) -> Tensor:
    """While writing: a query sees finished blocks and its own. Shapes: `-> seq seq (bool)`."""
    block = torch.arange(length, device=device) // size
    return block[None, :] <= block[:, None]


def finished_causal_mask(hidden: Tensor, size: int) -> Tensor:
    """The same where finished blocks are read from left to right: those without a hidden token.

    In a finished block a token sees only what stands before it, and itself.
    Shapes: `batch seq (bool) -> batch seq seq (bool)`.
    """
    length = hidden.shape[1]
    block = torch.arange(length, device=hidden.device) // size
    unfinished = (hidden[:, None, :] & (block[:, None] == block[None, :])).any(-1)
    to_the_left = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    return block_mask(length, size, device=hidden.device) & (to_the_left | unfinished[:, :, None])


def training_mask(
    length: int, size: int, *, finished_causal: bool = False, device: torch.device | None = None
) -> Tensor:
    """In training, the noised sequence stands before the clean one, both at positions 0 to length - 1.

    A noised token sees its own noised block and the clean blocks before it; a clean one sees clean blocks up to its
    own (`finished_causal`: only what stands before it, and itself), and nothing noised.
    Shapes: `-> 2*seq 2*seq (bool)`.
    """
    block = torch.arange(length, device=device) // size
    own, before = block[:, None] == block[None, :], block[None, :] < block[:, None]
    noised = torch.cat([own, before], dim=1)
    clean = torch.cat([torch.zeros_like(own), (own | before).tril() if finished_causal else own | before], dim=1)
    return torch.cat([noised, clean])


def added_to_scores(sees: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The mask as it is added to the scores: 0 where a query sees a key, -inf elsewhere, padding hidden.

    Shapes: `seq seq or batch seq seq (bool), batch seq or None -> batch 1 seq seq`, a batch of 1 where neither has
    one. A query that would see nothing sees itself: an attention of nothing is NaN, and would reach other tokens
    through their zero weights.
    """
    sees = sees if sees.dim() == 3 else sees[None]
    if attention_mask is not None:
        sees = sees & attention_mask.bool()[:, None, :]
        alone = torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device)
        sees = sees | (alone & ~sees.any(-1, keepdim=True))
    added = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return added.masked_fill(~sees, -torch.inf)[:, None]
