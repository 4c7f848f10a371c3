"""How position reaches attention in our encoder: what is added to the scores, and by what queries and keys turn.

Shapes below: batch (1 where all rows stand at the same places), heads, seq, head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def alibi_slopes(n_heads: int) -> Tensor:
    """The standard ALiBi slopes: 2^(-8 k / n) for k = 1..n, interleaved from the next power of two otherwise.

    Shapes: `-> heads`. Source: Press et al. 2022, Sec. 3.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (k + 1) / power) for k in range(power)]
    between = [2 ** (-4 * (2 * k + 1) / power) for k in range(n_heads - power)]
    return torch.tensor(slopes + between)


def alibi_bias(n_heads: int, positions: Tensor, *, dtype: torch.dtype) -> Tensor:
    """-slope * |i - j|, symmetric in distance so that reversal leaves it unchanged.

    Shapes: `batch seq -> batch heads seq seq`.
    """
    distance = (positions[:, None, :, None] - positions[:, None, None, :]).abs()
    return (-alibi_slopes(n_heads).to(positions.device)[:, None, None] * distance).to(dtype)


def signed_offsets(positions: Tensor, max_length: int) -> Tensor:
    """The row of the table of offsets for query i and key j: (j - i) + max_length - 1.

    Shapes: `batch seq -> batch seq seq`.
    """
    return positions[:, None, :] - positions[:, :, None] + max_length - 1


def rope_tables(config: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta_k, theta_k = base^(-2k/d), each plane twice as in Llama.

    Shapes: `batch seq -> batch seq head_dim, batch seq head_dim`, float32.
    """
    head_dim = config.d_model // config.n_heads
    theta = config.rope_base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions.to(torch.float32)[..., None] * theta
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn plane k (entries k and k + d/2, as in Llama) of each position by its angle.

    Shapes: `batch heads seq head_dim, batch seq head_dim, batch seq head_dim -> batch heads seq head_dim`; the angles
    may have a batch of 1.
    """
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states * cos[:, None].to(states.dtype) + turned * sin[:, None].to(states.dtype)
