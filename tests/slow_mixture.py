"""A slow decoder with experts, in float64: one head, one row and one token at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import revprobe as rp
from tiny import tapped

Sees = Callable[[int, int], bool]


def rms(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(vector: Tensor, position: int, base: float, turning: int) -> Tensor:
    """Plane k of the first entries is entries k and k + half; an odd number of turning entries is one more."""
    planes = math.ceil(turning / 2)
    angles = position * base ** (-2 * torch.arange(planes, dtype=torch.float64) / turning)
    a, b, rest = vector[:planes], vector[planes : 2 * planes], vector[2 * planes :]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest])


def swiglu(token: Tensor, weights: dict[str, Tensor], at: str) -> Tensor:
    """Shapes: `d_model -> d_model`."""
    gate, up = (weights[f"{at}{part}_proj.weight"] @ token for part in ("gate", "up"))
    return weights[f"{at}down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)


@dataclass
class Layer:
    """Its two norms, its projections, the norms of queries and keys (None: none), its MLP for one token, and what is
    added to queries, keys and values."""

    before: Tensor
    after: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    mlp: Callable[[Tensor], Tensor]
    biases: tuple[Tensor, ...] = ()


@dataclass
class Slow:
    """Sizes and weights; `run` gives logits and, of every layer and head, the scores (NaN where nothing is seen)."""

    embed: Tensor
    norm: Tensor
    head: Tensor
    heads: int
    groups: int
    dim: int
    turning: int
    base: float
    eps: float
    layers: list[Layer] = field(default_factory=list)

    def run(self, ids: list[int], sees: Sees, positions: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Shapes: `-> seq vocab, layer head seq seq`."""
        positions = list(range(len(ids))) if positions is None else positions
        states, scores = self.embed[ids], []
        for layer in self.layers:
            mixed, seen = self._attend(layer, rms(states, layer.before, self.eps), sees, positions)
            states = states + mixed @ layer.out.T
            normed = rms(states, layer.after, self.eps)
            states = states + torch.stack([layer.mlp(token) for token in normed])
            scores.append(seen)
        return rms(states, self.norm, self.eps) @ self.head.T, torch.stack(scores)

    def _attend(self, layer: Layer, normed: Tensor, sees: Sees, positions: list[int]) -> tuple[Tensor, Tensor]:
        length = len(normed)
        mixed = torch.zeros(length, self.heads * self.dim, dtype=torch.float64)
        scores = torch.full((self.heads, length, length), torch.nan, dtype=torch.float64)
        for head in range(self.heads):
            own, shared = head * self.dim, head // (self.heads // self.groups) * self.dim
            query, key, value = (
                normed @ weight[at : at + self.dim].T + (bias[at : at + self.dim] if layer.biases else 0.0)
                for weight, bias, at in zip(
                    (layer.query, layer.key, layer.value),
                    layer.biases or (None,) * 3,
                    (own, shared, shared),
                    strict=True,
                )
            )
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = rms(query, layer.query_norm, self.eps), rms(key, layer.key_norm, self.eps)
            query, key = (
                torch.stack([turned(row, at, self.base, self.turning) for row, at in zip(rows, positions, strict=True)])
                for rows in (query, key)
            )
            for i in range(length):
                seen = [j for j in range(length) if sees(i, j)]
                scores[head, i, seen] = torch.stack([query[i] @ key[j] for j in seen]) / math.sqrt(self.dim)
                mixed[i, own : own + self.dim] = scores[head, i, seen].softmax(0) @ value[seen]
        return mixed, scores


def apart(found: Tensor, expected: Tensor) -> float:
    """In units of the largest expected number, where that is above 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def worst_apart(model: rp.ProbedModel, ids: Tensor, logits: Tensor, scores: Tensor) -> float:
    """Of one row's logits, alone and padded, and of its scores, which must be hidden where nothing is seen (NaN)."""
    length = ids.shape[1]
    everywhere, kept = torch.arange(length)[None], (torch.arange(length + 3) < length)[None].long()
    with tapped(model, everywhere, everywhere, length) as tap:
        alone = model.logits(ids)[0]
    seen = torch.stack([call.score[0] for _, call in sorted(tap.layers().items())])
    assert torch.equal(seen.isfinite(), scores.isfinite()), "exactly what is hidden"
    padded = model.logits(torch.cat([ids, torch.zeros_like(ids[:, :3])], 1), kept)[0, :length]
    there = scores.isfinite()
    return max(apart(alone, logits), apart(padded, logits), apart(seen[there], scores[there]))
