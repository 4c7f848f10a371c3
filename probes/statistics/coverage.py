"""How many facts an interval needs, and how a sample is told.

Below that many facts 95 % intervals were seen to cover less than 90 % of the time.

Measured by `examples/benchmarks/coverage.py`, over the shapes of data it lists; its table stands in docs/statistics.md.
"""

from __future__ import annotations

# The fewest facts from which on every interval (value, control, excess) of every shape covers at least 90 %; 3 are the
# fewest that were simulated.
FEWEST = {"correlation": 3, "mean": 13, "proportion": 3}
# The same of the difference between two models on the same facts, and of how it exceeds that of the controls.
FEWEST_APART = {"correlation": 3, "mean": 13, "proportion": 5}
# What a sample holds where it is no pairs.
COUNTED = {"decoded_match": ("question", "questions"), "objective_terms": ("reverse query", "reverse queries")}


def caution(statistic: str, facts: int, *, apart: bool = False) -> str:
    """What a number over so few facts must be read with, or a difference of two; empty where there is nothing to say.

    >>> caution("mean", 5)
    'few facts (5): 95 % intervals of a mean were seen to cover 90 % only from 13 facts on'
    """
    fewest, what = (FEWEST_APART, f"difference of {statistic}s") if apart else (FEWEST, statistic)
    if facts >= fewest[statistic] or not facts:
        return ""
    few = f"few facts ({facts}): 95 % intervals of a {what}"
    return f"{few} were seen to cover 90 % only from {fewest[statistic]} facts on"


def counted(n: int, facts: int, name: str = "") -> str:
    """The size of a sample as people are told it.

    >>> counted(2106, 26), counted(1, 1), counted(40, 20, "decoded_match")
    ('n = 2,106 pairs of 26 facts', 'n = 1 pair of 1 fact', 'n = 40 questions of 20 facts')
    """
    one, many = COUNTED.get(name, ("pair", "pairs"))
    return f"n = {n:,} {one if n == 1 else many} of {facts:,} {'fact' if facts == 1 else 'facts'}"
