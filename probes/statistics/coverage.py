"""How many facts an interval needs: below that, 95 % intervals were seen to cover less than 90 % of the time.

Measured by `examples/benchmarks/coverage.py`, over the shapes of data it lists; its table stands in docs/statistics.md.
"""

from __future__ import annotations

# The fewest facts from which on every interval (value, control, excess) of every shape covers at least 90 %; 3 are the
# fewest that were simulated.
FEWEST = {"correlation": 3, "mean": 13, "proportion": 3}


def caution(statistic: str, facts: int) -> str:
    """What a number over so few facts must be read with; empty where there is nothing to say.

    >>> caution("mean", 5)
    'few facts (5): 95 % intervals of a mean were seen to cover 90 % only from 13 facts on'
    """
    if facts >= FEWEST[statistic] or not facts:
        return ""
    few = f"few facts ({facts}): 95 % intervals of a {statistic}"
    return f"{few} were seen to cover 90 % only from {FEWEST[statistic]} facts on"
