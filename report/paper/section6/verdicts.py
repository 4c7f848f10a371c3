"""A verdict per seed: what a claim compares, and the words for what comes out; numbers in, a word out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..comparisons import all_pass
from ..comparisons import passes as passes  # the rules of this folder take it from here, beside its words

HOLDS, FAILS, CANNOT, NOT_RUN = "holds", "fails", "cannot be told", "not run"
WORDS = (FAILS, CANNOT, NOT_RUN, HOLDS)  # what contradicts first
_SAID = {True: HOLDS, False: FAILS, None: CANNOT}


class Judged(NamedTuple):
    """One seed of one cell under one claim.

    `settled`: why no other verdict was possible, as with what is compared with 0 %, which nothing is below; or "".
    """

    seed: int
    verdict: str
    numbers: str
    settled: str = ""

    @property
    def told(self) -> str:
        """The numbers, and why they decided nothing where they did not."""
        return f"{self.numbers}; {self.settled}" if self.settled else self.numbers


@dataclass(frozen=True)
class Claim:
    """What is said of some runs.

    Args:
        name: of the prediction ("T1", "one-span"), or of what the paper or the one-layer results say.
        source: "prediction", "paper" or "one layer".
        plain: the claim in words.
        cell: which runs, in words.
        seeds: the verdict of each.
    """

    name: str
    source: str
    plain: str
    cell: str
    seeds: Sequence[Judged]

    @property
    def verdicts(self) -> list[str]:
        return [one.verdict for one in self.seeds]


def of_parts(parts: Sequence[bool | None]) -> str:
    """One word for conditions that must all hold: one that does not decides, then one that cannot be told."""
    return _SAID[all_pass(parts)]


def probability(value: float) -> str:
    """With digits that tell a small one from none.

    >>> probability(0.3456), probability(0.00019)
    ('0.346', '1.9e-04')
    """
    return "undefined" if math.isnan(value) else f"{value:.1e}" if 0 < value < 0.01 else f"{value:.3f}"


def per_cent(value: float | None) -> str:
    """As numbers stand in a verdict: 48.3, undefined, not run."""
    return NOT_RUN if value is None else "undefined" if math.isnan(value) else f"{100 * value:.1f}"


def span(values: Sequence[float]) -> str:
    """Lowest to highest of shares in per cent; how many are missing is said."""
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return NOT_RUN
    low, high = (f"{100 * value:.1f}" for value in (min(defined), max(defined)))
    missing = f" ({len(defined)} of {len(values)} cells)" if len(defined) < len(values) else ""
    return f"{low} %{missing}" if low == high else f"{low} to {high} %{missing}"


def share(value: float) -> str:
    """Of all, in per cent with its sign."""
    return NOT_RUN if math.isnan(value) else f"{100 * value:.1f} %"
