"""The x axis of everything drawn over training: log-spaced checkpoints, and step 0 among them.

A logarithmic axis has no place for step 0, which is the reading of the untrained model and the first thing to compare
with. So positions are computed here and plotly draws them on a linear axis with our ticks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepScale:
    """Where a training step stands on the x axis; step 0 has its place also among log-spaced checkpoints."""

    ticks: tuple[int, ...]
    unit: float | None  # None: linear; else position = log10(1 + step / unit)

    @classmethod
    def over(cls, steps: Iterable[int]) -> StepScale:
        """Log-like for log-spaced checkpoints (the last gap dwarfs the first), linear for even ones."""
        found = sorted(set(steps))
        positive = [step for step in found if step > 0]
        if len(positive) < 3 or positive[-1] - positive[-2] <= 4 * (positive[1] - positive[0]):
            return cls(ticks=(), unit=None)
        scale = cls(ticks=(), unit=float(positive[0]))
        return cls(ticks=scale._spaced(found[0], found[-1]), unit=scale.unit)

    def position(self, step: float) -> float:
        """The x coordinate of a step."""
        return float(step) if self.unit is None else math.log10(1 + step / self.unit)

    def _spaced(self, first: int, last: int) -> tuple[int, ...]:
        """0 and round numbers, none so close to another that their labels would touch."""
        room = (self.position(last) - self.position(first)) / 7
        decades = [10**power for power in range(12) if first < 10**power <= last]
        between = [head * 10**power for power in range(12) for head in (2, 5) if first < head * 10**power <= last]
        kept = [first]
        for tick in decades + between:
            if all(abs(self.position(tick) - self.position(other)) > room for other in kept):
                kept.append(tick)
        return tuple(sorted(kept))

    def axis(self) -> dict[str, Any]:
        """The plotly settings of an x axis on this scale."""
        if self.unit is None:
            return {"title": {"text": "training step"}, "rangemode": "tozero"}
        places = [self.position(tick) for tick in self.ticks]
        title = {"text": "training step (log scale, with 0)"}
        return {"title": title, "tickvals": places, "ticktext": [f"{tick:,}" for tick in self.ticks]}
