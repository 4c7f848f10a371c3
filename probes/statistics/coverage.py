"""How many facts an interval needs, why a number has none, and how a sample is told.

Below that many facts 95 % intervals were seen to cover less than 90 % of the time. A proportion needs the more facts
the more questions each has: of few, chance in the answers is most of what varies, and its size is known; of many, each
fact's own rate is known, their proportion is a mean of rates, and what varies is as unknown as it is for means.

Measured by `examples/benchmarks/coverage.py`, over the shapes of data it lists; its table stands in docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Protocol

import numpy as np

from .intervals import Estimate

# For up to so many questions of each fact, the fewest facts from which on every interval (value, control, excess) of
# every shape covers at least 90 %; 3 are the fewest that were simulated.
FEWEST = {"correlation": {inf: 3}, "mean": {inf: 13}, "proportion": {10: 3, 30: 13, inf: 26}}
# The same of the difference between two models on the same facts, and of how it exceeds that of the controls.
FEWEST_APART = {"correlation": {inf: 3}, "mean": {inf: 13}, "proportion": {30: 3, inf: 26}}
# Why a number has no interval.
ONE_ASKED = "of controls that nearly all ask about one fact, so without an interval"
ONE_FACT = "of one fact, so without an interval"
ONE_PROMPT = "of facts that all share prompts, directly or through others, so without an interval"
SAME_FOR_ALL = "the same for every fact, so without an interval"
# What a sample holds where it is no pairs.
COUNTED = dict.fromkeys(("candidate_rank", "decoded_match"), ("question", "questions"))
COUNTED["objective_terms"] = ("reverse query", "reverse queries")


class Counted(Protocol):
    """What says how many pairs or questions it rests on, and how many facts, or prompts that show them."""

    @property
    def n(self) -> int: ...
    @property
    def facts(self) -> int: ...
    @property
    def prompts(self) -> int: ...


def caution(statistic: str, facts: int, n: int = 0, *, apart: bool = False, of: str = "facts") -> str:
    """What a number over so few facts must be read with, or a difference of two; empty where there is nothing to say.

    >>> caution("mean", 5)
    'few facts (5): 95 % intervals of a mean were seen to cover 90 % only from 13 facts on'
    >>> caution("proportion", 5, 40)
    ''
    >>> caution("proportion", 3, 60, of="seeds")
    'few seeds (3) of 20 questions each: 95 % intervals of a proportion were seen to cover 90 % only from 13 seeds on'

    Args:
        n: how many questions they have in all; one each when 0.
        of: what the questions stand together by, in the plural.
    """
    if not facts:
        return ""
    limits, what = (FEWEST_APART, f"difference of {statistic}s") if apart else (FEWEST, statistic)
    each = max(n, facts) / facts
    fewest = next(least for most, least in limits[statistic].items() if each <= most)
    if facts >= fewest:
        return ""
    many = f" of {each:,.0f} questions each" if fewest > min(limits[statistic].values()) else ""
    few = f"few {of} ({facts}){many}: 95 % intervals of a {what}"
    return f"{few} were seen to cover 90 % only from {fewest} {of} on"


def first_caution(statistic: str, *found: Counted, apart: bool = False) -> str:
    """The same of several numbers that are told together: of the first that has anything to say."""
    return next(filter(None, (caution_of(statistic, one, apart=apart) for one in found)), "")


def caution_of(statistic: str, found: Counted, *, apart: bool = False) -> str:
    """`caution` for a number: of what its interval draws, which are sets of facts where some share prompts."""
    of = "sets of facts" if found.prompts else "facts"
    return caution(statistic, found.prompts or found.facts, found.n, apart=apart, of=of)


def counted(n: int, facts: int, name: str = "", prompts: int = 0) -> str:
    """The size of a sample as people are told it.

    >>> counted(2106, 26), counted(1, 1), counted(40, 20, "decoded_match")
    ('n = 2,106 pairs of 26 facts', 'n = 1 pair of 1 fact', 'n = 40 questions of 20 facts')
    >>> counted(60, 60, prompts=3)
    'n = 60 pairs of 60 facts, drawn as 3 by the prompts they share'

    Args:
        prompts: as how many the facts are drawn, where some share prompts; else 0.
    """
    one, many = COUNTED.get(name, ("pair", "pairs"))
    told = f"n = {n:,} {one if n == 1 else many} of {facts:,} {'fact' if facts == 1 else 'facts'}"
    return told + (f", drawn as {prompts:,} by the prompts they share" if prompts else "")


def missing_interval(found: Estimate) -> str:
    """Why a number has no interval; empty where it has one, or is itself undefined."""
    if np.isnan(found.value) or not np.isnan(found.low):
        return ""
    if found.drawn < 2:
        return ONE_PROMPT if found.facts > 1 else ONE_FACT
    return SAME_FOR_ALL


def missing_intervals(found: Mapping[str, Estimate]) -> str:
    """Which of several numbers have no interval, and why; empty where all have one.

    >>> missing_intervals({"loss": Estimate(2.0, float("nan"), float("nan"), 4, 1)})
    'loss: of one fact, so without an interval'
    """
    names: dict[str, list[str]] = {}
    for name, estimate in found.items():
        names.setdefault(missing_interval(estimate), []).append(name)
    return "; ".join(f"{', '.join(some)}: {why}" for why, some in names.items() if why)
