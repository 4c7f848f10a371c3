"""Random tokens in place of a mask token: which ones, and how they are asked for.

A model of uniform noise has no mask token: what is not known yet holds any token. Here it holds one of an id beyond the
vocabulary, `vocab_size + draw`, which its module replaces by the token that this draw has at that place of the canvas.
So the tokens depend on the draw and the place alone: they are the same for forward and reverse queries, controls and
batches of any size, and nobody's random state moves.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

UNIFORM = "uniform"


def noise_of(module: nn.Module) -> str:
    """What hides a token, as the class of the (inner) module states it: "mask", or "uniform"."""
    return str(getattr(module, "noise", "mask"))


@lru_cache(maxsize=64)
def drawn_tokens(draws: int, length: int, vocab_size: int) -> Tensor:
    """The tokens of each draw, uniform over the vocabulary. Shapes: `-> draw place`, long.

    A draw is the same however many there are.
    """
    rows = [
        torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(draw)) for draw in range(draws)
    ]
    return torch.stack(rows)


def in_noise(ids: Tensor, places: Tensor, length: int, vocab_size: int) -> Tensor:
    """The ids with those beyond the vocabulary replaced by the tokens of their draws.

    Shapes: `batch seq, batch seq -> batch seq`; `places`: of a canvas of `length` tokens.
    """
    draw = ids - vocab_size
    if not bool((draw >= 0).any()):
        return ids
    tokens = drawn_tokens(int(draw.max()) + 1, length, vocab_size).to(ids.device)
    return torch.where(draw >= 0, tokens[draw.clamp(min=0), places.clamp(0, length - 1)], ids)
