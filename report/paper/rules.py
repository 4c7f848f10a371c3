"""The rules by which a prediction about runs is judged, and nothing else: numbers in, a word out.

Every value is held against its limit with the slack of `comparisons`, so that a verdict is the same before a table is
written and after it is read back.

The unit is the run. A claim with a threshold holds if every seed passes, fails if any misses by more than 0.1, and is
"cannot tell" otherwise; a claim of no change holds if the 90 % t-interval of the differences, paired by seed, lies
within ±0.15. A seed that has not been run, or that does not count (its forward accuracy is below 0.97), cannot pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

from .comparisons import all_pass, passes

HOLDS, FAILS, CANNOT, NOT_RUN, GATE = "holds", "fails", "cannot tell", "not run", "gate not met"
VERDICTS = (FAILS, CANNOT, GATE, NOT_RUN, HOLDS)  # what contradicts first
MARGIN, EQUAL, CONFIDENCE = 0.1, 0.15, 0.90
FORWARD = 0.97


@dataclass(frozen=True)
class Bound:
    """A threshold: `Bound(">", 0.9)` is what "above 0.9" says."""

    sign: str
    limit: float

    def passes(self, value: float) -> bool:
        """A value on the bound is on its closed side; NaN on neither."""
        return passes(value, self.sign, self.limit) is True

    def misses_by(self, value: float) -> float:
        """How far a value lies on the wrong side; negative on the right one."""
        return self.limit - value if self.sign[0] == ">" else value - self.limit

    def missed(self, value: float) -> bool:
        """Whether a value lies on the wrong side by more than `MARGIN`."""
        return passes(self.misses_by(value), ">", MARGIN) is True

    def __str__(self) -> str:
        words = {">": "above", ">=": "at least", "<": "below", "<=": "at most"}
        return f"{words[self.sign]} {self.limit:g}"


@dataclass(frozen=True)
class Seed:
    """One run's number for a claim; `value` is NaN where it was not run, `counts` whether it meets the gate."""

    seed: int
    value: float
    counts: bool = True

    @property
    def ran(self) -> bool:
        return not np.isnan(self.value)


def by_threshold(seeds: Sequence[Seed], bound: Bound) -> str:
    """The verdict on a claim that every seed's value keeps to a bound."""
    counted = [one for one in seeds if one.ran and one.counts]
    if any(bound.missed(one.value) for one in counted):
        return FAILS
    return _unless_all(seeds, [bound.passes(one.value) for one in counted])


def by_equality(seeds: Sequence[Seed]) -> str:
    """The verdict on a claim that a change is none; each value is a difference between two dials of one seed.

    It fails where the interval lies outside of ±0.15 altogether.
    """
    counted = [one for one in seeds if one.ran and one.counts]
    low, high = interval([one.value for one in counted])
    if passes(low, ">", EQUAL) or passes(high, "<", -EQUAL):
        return FAILS
    within = all_pass([passes(low, ">=", -EQUAL), passes(high, "<=", EQUAL)]) is True
    return _unless_all(seeds, [within] * len(counted))


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's t-interval of the mean; NaN of fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    reach = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean - reach, mean + reach


def by_order(times: Sequence[Sequence[float]], resolution: Sequence[float]) -> list[str]:
    """Whether each seed's times shorten from one dose to the next: "holds", "fails", or "cannot tell".

    Args:
        times: of each seed, for rising doses; infinite where it had not come by the end (later than any), NaN where it
            was not run.
        resolution: of each seed, the widest distance between two readings: times closer than this are alike.
    Returns: "fails" where a higher dose is later by more than the resolution; "holds" where none is later at all, and
        the last is earlier than the first; else "cannot tell".
    """
    found = []
    for own, apart in zip(times, resolution, strict=True):
        known = [time for time in own if not np.isnan(time)]
        later = [b - a if np.isfinite(a) else 0.0 for a, b in pairwise(known)]
        if any(delay > apart for delay in later):
            found.append(FAILS)
        elif len(known) < len(own):
            found.append(NOT_RUN)
        else:
            found.append(HOLDS if all(delay <= 0 for delay in later) and own[-1] < own[0] else CANNOT)
    return found


def combined(verdicts: Sequence[str]) -> str:
    """One verdict of many, of seeds or of parts: all must hold, and one that fails decides."""
    if FAILS in verdicts:
        return FAILS
    for alike in (HOLDS, NOT_RUN, GATE):
        if verdicts and all(verdict == alike for verdict in verdicts):
            return alike
    return CANNOT if verdicts else NOT_RUN


def _unless_all(seeds: Sequence[Seed], passed: Sequence[bool]) -> str:
    if not any(one.ran for one in seeds):
        return NOT_RUN
    if not passed:
        return GATE
    return HOLDS if all(passed) and len(passed) == len(seeds) else CANNOT
