"""What an edit adds to the attention scores of a readout row: cut a route, scale it, or set it to another query's.

Shapes below: batch, heads, rows (readout rows of a query, padded), seq.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

EDITS = ("knockout", "transplant", "scale")
MATCHES = ("log_odds", "score")


def route_strength(scores: Tensor, evidence: Tensor, match: str = "log_odds") -> Tensor:
    """How strongly a row's scores point at the evidence, taken as one set of keys.

    "log_odds": logsumexp of the evidence's scores less logsumexp of all others in the row, the log-odds of its
    attention weight; "score": the first term alone, which for one token is its score. Not finite where the evidence
    is hidden, or (log-odds) alone.
    Shapes: `batch heads rows seq, batch seq (bool) -> batch heads rows`, float64.
    """
    scores, inside = scores.double(), evidence.to(scores.device)[:, None, None]
    strength = scores.masked_fill(~inside, float("-inf")).logsumexp(-1)
    return strength - scores.masked_fill(inside, float("-inf")).logsumexp(-1) if match == "log_odds" else strength


@dataclass
class StrengthRecorder:
    """A change that changes nothing and keeps each layer's route strength: layer -> `batch heads rows`."""

    evidence: Tensor
    match: str
    found: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, scores: Tensor) -> None:
        self.found[layer] = route_strength(scores, self.evidence, self.match).cpu()


@dataclass(frozen=True)
class RouteChange:
    """One edit for every sequence of a batch, each in its own layers and heads.

    Every evidence token of a row moves by the same amount, so the weights within the evidence keep their ratios. A
    control moves the tokens at `at` by the amount that the evidence would move.

    Shapes: `evidence`, `at`: `batch seq`; `present` (readout rows that are not padding): `batch rows`; `active`: layer
    -> `batch heads`; `wanted` (transplant only): layer -> `batch heads rows`.
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
        at = self.at.to(scores.device)[:, None, None]
        amount = self._amount(layer, scores)
        # Nothing to move: the mask hides these tokens from the row.
        visible = (scores.isfinite() & at).any(-1)
        amount = amount.masked_fill(~visible | amount.isnan(), float("nan"))
        cells = self.active[layer].to(scores.device)[:, :, None] & self.present.to(scores.device)[:, None]
        return torch.where(cells[..., None] & at, amount[..., None], 0.0)

    def _amount(self, layer: int, scores: Tensor) -> Tensor:
        """By how much the edit moves the evidence's scores; NaN where it has no meaning. `-> batch heads rows`"""
        if self.edit == "knockout":
            return torch.full(scores.shape[:3], float("-inf"), dtype=torch.float64, device=scores.device)
        if self.edit == "scale":
            return torch.full(scores.shape[:3], math.log(self.factor), dtype=torch.float64, device=scores.device)
        amount = self.wanted[layer].to(scores.device) - route_strength(scores, self.evidence, self.match)
        return amount.masked_fill(~amount.isfinite(), float("nan"))
