"""Rules that say when a run should be looked at: `alerts: [{measure: forward_accuracy, below: 0.95, after: 2000}]`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated

from pydantic import Field, StrictInt, model_validator

from ...errors import did_you_mean
from .fields import Number, Section

# What the readings of every run give, as `summary.csv` names it.
MEASURES = (
    "attention_correlation",
    "gradient_cosine",
    "forward_probability",
    "reverse_probability",
    "forward_accuracy",
    "reverse_accuracy",
)
ADAPTER = "lora_gradient_cosine"


class Alert(Section):
    """One rule: a measure, the threshold that it should not cross, and the step from which on it is asked."""

    measure: str
    below: Number | None = None
    above: Number | None = None
    after: Annotated[StrictInt, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_threshold(self) -> Alert:
        if (self.below is None) == (self.above is None):
            given = "neither" if self.below is None else f"below: {self.below:g} and above: {self.above:g}"
            raise ValueError(f"{given} for {self.measure}; give one of below and above (two rules for both)")
        return self

    @property
    def words(self) -> str:
        """The rule as people read it: "forward accuracy below 0.95 from step 2,000 on"."""
        side, threshold = ("below", self.below) if self.below is not None else ("above", self.above)
        since = f" from step {self.after:,} on" if self.after else ""
        return f"{self.measure.replace('_', ' ')} {side} {threshold:g}{since}"

    def crossed(self, value: float) -> bool:
        """Whether a defined value crosses the threshold; on it, it does not."""
        return value < self.below if self.below is not None else self.above is not None and value > self.above


def check_alerts(alerts: Sequence[Alert], measures: Collection[str], steps: int | None) -> None:
    """Raises: ValueError, for a measure that the run does not take, or a rule that begins after its last step."""
    for alert in alerts:
        if alert.measure not in measures:
            known = did_you_mean(alert.measure, measures)
            listed = f" (of {', '.join(measures)})" if "closest" in known else ""
            raise ValueError(f"alerts has the measure {alert.measure!r}{known}{listed}")
        if steps is not None and alert.after > steps:
            raise ValueError(
                f"alerts has after: {alert.after}, but training.steps is {steps}; lower it or leave it out"
            )
