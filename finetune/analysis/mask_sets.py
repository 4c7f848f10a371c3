"""Which tokens a masked objective hides together, and how much each set of them counts.

The loss of a row is an expectation over sets of hidden tokens. Given its rates, the weight of a set depends on its size
alone; it has a closed form, so nothing has to be drawn to know it. What is drawn, in rows too long to enumerate, are
sets of one size with the target and the evidence hidden or not: a stratum.

A unit is what one draw hides: a token, or the tokens of an entity that are masked together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np
from scipy import special

from ...errors import RevprobeError, did_you_mean
from ..config.one_layer import TrainingConfig
from ..training.objectives import EPS

RATES = ("independent", "t", "lambda", "k")
_ONE_RATE = 1e-6  # rates closer than this are one rate


@dataclass(frozen=True)
class MaskLaw:
    """How many tokens a run hides, and what it divides by; the keys of a run's config.

    Args:
        rates: "independent" (t ~ U(eps, 1), masks with probability t, weight 1/t), "t" (masks with probability
            (1 - eps) t), "lambda" (t ~ U(0, 1)) or "k" (a uniform number k of L tokens, weight L/k).
        masks: "rate", or "single" or a number K: always so many tokens, weight L/K.
        eps, highest: rates lie between them ("independent" and "t"); both alike for one fixed rate.
    Raises: RevprobeError, for other words.
    """

    rates: str = "independent"
    masks: str | int = "rate"
    eps: float = EPS
    highest: float = 1.0

    def __post_init__(self) -> None:
        if self.rates not in RATES:
            raise RevprobeError(f"unknown rates {self.rates!r}{did_you_mean(str(self.rates), RATES)}")
        if self.masks not in ("rate", "single") and (isinstance(self.masks, str) or self.masks < 1):
            raise RevprobeError(f"masks {self.masks!r}: expected 'rate', 'single' or a whole number of at least 1")

    def weight(self, units: int, hidden: int) -> float:
        """The expected 1/t of one set: E[P(exactly these are hidden | t) / t], for `hidden` of `units`.

        >>> law = MaskLaw("lambda")
        >>> round(law.weight(4, 2) * 2 * 4 * 3 / 2, 9), MaskLaw("k").weight(4, 2) == law.weight(4, 2)
        (1.0, True)

        With rates from 0 to 1 it is B(m, L - m + 1) = 1 / (m C(L, m)), the same for lambda and k; rates from eps to
        `highest` hold the incomplete beta function's worth between the two.
        """
        if not 1 <= hidden <= units:
            return 0.0
        if self.masks != "rate":
            count = 1 if self.masks == "single" else int(self.masks)
            return units / count / comb(units, count) if hidden == count else 0.0
        whole = 1.0 / (hidden * comb(units, hidden))
        if self.rates in ("lambda", "k"):
            return whole
        scale = 1.0 if self.rates == "independent" else 1 - self.eps
        low, high = scale * self.eps, scale * self.highest
        if self.highest - self.eps < _ONE_RATE:  # the integrand itself, where a difference would have no digits left
            rate = (low + high) / 2
            return float(scale * rate ** (hidden - 1) * (1 - rate) ** (units - hidden))
        at = [special.betainc(hidden, units - hidden + 1, edge) for edge in (low, high)]
        return float(whole * max(at[1] - at[0], 0.0) / (self.highest - self.eps))


class Shape(NamedTuple):
    """What rows share whose sets of masks can be listed together: units that can be hidden, and whose they are."""

    units: int
    of_target: int
    of_evidence: int


class Stratum(NamedTuple):
    """Sets of one size: so many units of the target hidden, so many of the evidence, the rest elsewhere."""

    shape: Shape
    hidden: int
    in_target: int
    in_evidence: int

    @property
    def parts(self) -> list[tuple[range, int]]:
        """The units of target, evidence and the rest, and how many of each are hidden."""
        shape, first = self.shape, self.shape.of_target + self.shape.of_evidence
        spans = [range(shape.of_target), range(shape.of_target, first), range(first, shape.units)]
        return list(zip(spans, (self.in_target, self.in_evidence, self.elsewhere), strict=True))

    @property
    def elsewhere(self) -> int:
        return self.hidden - self.in_target - self.in_evidence

    @property
    def sets(self) -> int:
        """How many sets of one row it holds."""
        return int(np.prod([comb(len(span), count) for span, count in self.parts], dtype=object))

    def listed(self) -> np.ndarray:
        """All of them. Shapes: `-> set unit` (bool)."""
        found = np.zeros((1, self.shape.units), dtype=bool)
        for span, count in self.parts:
            chosen = np.zeros((comb(len(span), count), self.shape.units), dtype=bool)
            for row, units in enumerate(combinations(span, count)):
                chosen[row, list(units)] = True
            found = (found[:, None] | chosen[None]).reshape(-1, self.shape.units)
        return found

    def drawn(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """`count` of them, each uniform and independent. Shapes: `-> set unit` (bool)."""
        found = np.zeros((count, self.shape.units), dtype=bool)
        for span, hidden in self.parts:
            order = generator.random((count, len(span))).argsort(1)
            found[:, span.start : span.stop] = order.argsort(1) < hidden
        return found


def strata(shape: Shape, law: MaskLaw) -> Iterator[tuple[Stratum, float]]:
    """The strata of a row that count, each with the weight of one of its sets."""
    for hidden in range(1, shape.units + 1):
        weight = law.weight(shape.units, hidden)
        for in_target in range(shape.of_target + 1):
            for in_evidence in range(shape.of_evidence + 1):
                stratum = Stratum(shape, hidden, in_target, in_evidence)
                if weight > 0 and stratum.elsewhere >= 0 and stratum.sets:
                    yield stratum, weight


def law_of(training: TrainingConfig) -> MaskLaw:
    """The law of a run's training config."""
    return MaskLaw(training.rates, training.masks)
