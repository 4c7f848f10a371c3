"""What an edit adds to the attention scores of a readout row, and what is noted of the scores before any edit.

An edit cuts a route, scales it, or sets it to another query's. Its control makes the same change at other positions.

Shapes below: batch, heads, rows (readout rows of a query, padded), seq, columns (positions of a query's evidence,
padded by repeating the first).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..pairs.query import Query

EDITS = ("knockout", "transplant", "scale")
MATCHES = ("log_odds", "score")


def route_strength(scores: Tensor, evidence: Tensor, match: str = "log_odds") -> Tensor:
    """How strongly a row's scores point at the evidence, taken as one set of keys.

    "log_odds": logsumexp of the evidence's scores less logsumexp of all others in the row, the log-odds of its
    attention weight; "score": the first term alone, which for one token is its score. Not finite where the evidence
    is hidden, or (log-odds) alone.
    Shapes: `batch heads rows seq, batch columns -> batch heads rows`, float64.
    """
    scores, at = scores.double(), evidence.to(scores.device)
    inside = torch.zeros(len(at), scores.shape[-1], dtype=torch.bool, device=at.device).scatter(1, at, True)
    inside = inside[:, None, None]
    strength = scores.masked_fill(~inside, float("-inf")).logsumexp(-1)
    return strength - scores.masked_fill(inside, float("-inf")).logsumexp(-1) if match == "log_odds" else strength


@dataclass
class StrengthRecorder:
    """A change that changes nothing and keeps each layer's route strength: layer -> `batch heads rows`.

    Shapes: `evidence`: `batch columns`.
    """

    evidence: Tensor
    match: str
    found: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, scores: Tensor) -> None:
        strength = route_strength(scores, self.evidence, self.match).cpu()
        # A layer that computes its heads in several calls shows those of the others as hidden.
        known = self.found.get(layer, strength)
        self.found[layer] = torch.where(strength.isfinite(), strength, known)


@dataclass
class VisibilityRecorder:
    """A change that changes nothing and keeps where a control may stand.

    `free` is True where a position is visible in every row, head and layer to be edited in which the evidence, or
    part of it, is: the model's own masks say so (causality, windows, chunks, padding), whatever makes them.
    Shapes: `evidence`: `batch columns`; `present` (readout rows that are not padding): `batch rows`; `free`: `batch
    seq`, on the CPU. `heads`: layer -> heads to be edited.
    """

    evidence: Tensor
    present: Tensor
    heads: Mapping[int, Sequence[int]]
    free: Tensor | None = None

    def __call__(self, layer: int, scores: Tensor) -> None:
        visible = scores[:, list(self.heads[layer])].isfinite()
        seen = _gathered(visible, self.evidence).any(-1) & self.present.to(scores.device)[:, None]
        free = (visible | ~seen[..., None]).flatten(1, 2).all(1).cpu()
        self.free = free if self.free is None else self.free & free


def other_positions(query: Query, visible: Sequence[bool] | np.ndarray, seed: int, mask: int | None) -> tuple[int, ...]:
    """As many random positions as the evidence has: visible, unmasked, neither target nor evidence.

    Empty where there are not enough; the same for equal queries, seeds and visible positions.
    """
    taken = {*query.target_positions, *query.evidence_positions}
    free = [p for p, token in enumerate(query.token_ids) if visible[p] and p not in taken and token != mask]
    if len(free) < len(query.evidence_positions):
        return ()
    draw = np.random.default_rng([seed, *query.token_ids, *query.target_positions, *query.evidence_positions])
    return tuple(sorted(int(p) for p in draw.choice(free, size=len(query.evidence_positions), replace=False)))


@dataclass(frozen=True)
class RouteChange:
    """One edit for every sequence of a batch, each in its own layers and heads.

    Every evidence token of a row moves by the same amount, so the weights within the evidence keep their ratios. A
    control moves the tokens at `at` by that amount, each in exactly the rows, heads and layers in which the evidence
    token whose place it takes is visible; where it is not visible itself, the edit has no meaning (NaN).

    Shapes: `evidence`, `at` (the evidence itself, or what stands in for each of its tokens): `batch columns`;
    `present` (readout rows that are not padding): `batch rows`; `active`: layer -> `batch heads`; `wanted` (transplant
    only): layer -> `batch heads rows`.
    """

    edit: str
    evidence: Tensor
    at: Tensor
    present: Tensor
    active: dict[int, Tensor]
    factor: float = 1.0
    match: str = "log_odds"
    wanted: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, scores: Tensor) -> Tensor | None:
        if layer not in self.active or not self.active[layer].any():
            return None
        visible, amount = scores.isfinite(), self._amount(layer, scores)
        seen = _gathered(visible, self.evidence)
        # Padded columns repeat the first one and write what it writes.
        moved = torch.zeros_like(visible).scatter(-1, _columns(self.at, scores), seen)
        amount = amount.masked_fill(~seen.any(-1) | (moved & ~visible).any(-1), float("nan"))
        cells = self.active[layer].to(scores.device)[:, :, None] & self.present.to(scores.device)[:, None]
        added = torch.where(cells[..., None] & moved, amount[..., None], 0.0)
        return added.masked_fill((cells & amount.isnan())[..., None], float("nan"))

    def _amount(self, layer: int, scores: Tensor) -> Tensor:
        """By how much the edit moves the evidence's scores; NaN where it has no meaning. `-> batch heads rows`"""
        if self.edit == "knockout":
            return torch.full(scores.shape[:3], float("-inf"), dtype=torch.float64, device=scores.device)
        if self.edit == "scale":
            return torch.full(scores.shape[:3], math.log(self.factor), dtype=torch.float64, device=scores.device)
        amount = self.wanted[layer].to(scores.device) - route_strength(scores, self.evidence, self.match)
        return amount.masked_fill(~amount.isfinite(), float("nan"))


def _columns(positions: Tensor, scores: Tensor) -> Tensor:
    """Positions as an index into rows of scores. Shapes: `batch columns -> batch heads rows columns`."""
    return positions.to(scores.device)[:, None, None].expand(*scores.shape[:3], -1)


def _gathered(rows: Tensor, positions: Tensor) -> Tensor:
    """Shapes: `batch heads rows seq, batch columns -> batch heads rows columns`."""
    return rows.gather(-1, _columns(positions, rows))
