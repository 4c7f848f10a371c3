"""One model's side of a comparison, and what keeps two of them from being compared, or must be said where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ...errors import shown
from ..statistics.estimators import Measured
from ..statistics.intervals import Estimate
from ..statistics.paired import Answers, Correlations, facts_with_value, side_of
from .reading import Reading, summary_row

NO_COMMON, NONE_DEFINED = "no fact in common", "no common fact with a value in both"
HIDDEN_AT_ONCE = (
    "targets of up to {tokens} tokens: the masked model has them hidden all at once, the causal one reads each after "
    "the token before it"
)


@dataclass(frozen=True)
class Asked:
    """What a model was asked, as far as its readings do not say it: the words of its facts, by label, and the most
    tokens of a target.
    """

    words: Mapping[str, str] = field(default_factory=dict)
    target_tokens: int = 1


@dataclass(frozen=True, eq=False)
class Side:
    """One model's reading of one measure."""

    name: str
    reading: Reading
    measure: str
    told: Asked

    @property
    def kind(self) -> str:
        return str(self.reading.meta.get("kind") or "")

    @cached_property
    def values(self) -> Correlations | Answers:
        return side_of(self.measure, self.reading.frame)

    @cached_property
    def facts(self) -> np.ndarray:
        """Those with a value."""
        return facts_with_value(self.values)

    @cached_property
    def asked(self) -> np.ndarray:
        """All of them."""
        return np.unique(self.reading.frame["fact"].to_numpy().astype(str))

    def row(self, part: str, against: str, facts: np.ndarray | None = None, why: str = NO_COMMON) -> dict[str, Any]:
        """The measure on all facts, or on some of them, as a row of the comparison; `why` there are none, if so."""
        return self.placed(part, against, self._numbers(facts, why))

    def placed(self, part: str, against: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
        place = {"measure": self.measure, "part": part, "model": self.name, "against": against, "kind": self.kind}
        return {**numbers, **place}

    def _numbers(self, facts: np.ndarray | None, why: str) -> dict[str, Any]:
        reading = self.reading
        if facts is not None and not len(facts):
            return summary_row(Measured(Estimate.undefined(), undefined={why: 1}))
        if facts is not None and len(facts) < len(self.asked):
            reading = reading.part(reading.frame[reading.frame["fact"].astype(str).isin(facts)])
        measures = reading.measures()
        return dict(measures[measures["measure"] == self.measure].iloc[0])


def incomparable(own: Side, other: Side) -> str:
    """Why two readings ask different things, so that neither is more or less than the other; else empty."""
    for key, what in (("kind", "pairs of different kinds"), ("mode", "targets priced by different modes")):
        one, two = own.reading.meta.get(key), other.reading.meta.get(key)
        if one != two:
            return f"{what}: {one or 'unknown'} and {two or 'unknown'}"
    return nothing_shared(own, other)


def nothing_shared(own: Side, other: Side) -> str:
    """Why two models have no fact of which both have a value; empty where they have one."""
    if len(np.intersect1d(own.facts, other.facts)):
        return ""
    return NONE_DEFINED if len(np.intersect1d(own.asked, other.asked)) else NO_COMMON


def left_out(own: Side, other: Side) -> dict[str, int]:
    """Facts without a difference, counted by reason."""
    counts = {}
    for side, beside in ((other, own), (own, other)):
        counts[f"asked of {side.name} alone"] = len(np.setdiff1d(side.asked, beside.asked))
        without = np.setdiff1d(np.intersect1d(side.asked, beside.asked), side.facts)
        counts[f"without a value in {side.name}"] = len(without)
    return {reason: count for reason, count in counts.items() if count}


def undefined_on_common(rows: Iterable[Mapping[str, Any]], facts: int) -> dict[str, int]:
    """Why a model has no number on the common facts."""
    return {f"{row['model']}: {row['reason']}": facts for row in rows if np.isnan(row["value"])}


def cautions(own: Side, other: Side) -> list[str]:
    """What a difference must be read with, beyond its statistics."""
    return [said for said in (_told_otherwise(own, other), _hidden_at_once(own, other)) if said]


def _told_otherwise(own: Side, other: Side) -> str:
    """Where a label that joins two models is of another fact in each, as row numbers may be."""
    shared, words, beside = np.intersect1d(own.facts, other.facts), own.told.words, other.told.words
    apart = [fact for fact in shared if fact in words and fact in beside and words[fact] != beside[fact]]
    if not apart:
        return ""
    first = apart[0]
    told = f"{shown(words[first])} to {own.name!r}, {shown(beside[first])} to {other.name!r}"
    return f"{len(apart)} of {len(shared)} labels are of another fact in each: {shown(str(first))} is {told}"


def _hidden_at_once(own: Side, other: Side) -> str:
    """Where one model sees part of a target that the other does not; probabilities reveal it to both in one way."""
    objectives = {side.reading.meta.get("objective") for side in (own, other)}
    tokens = max(own.told.target_tokens, other.told.target_tokens)
    token_by_token = own.measure.endswith(("probability", "accuracy"))
    if objectives != {"masked", "causal"} or tokens == 1 or token_by_token:
        return ""
    return HIDDEN_AT_ONCE.format(tokens=tokens)
