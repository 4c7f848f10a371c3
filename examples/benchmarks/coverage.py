"""How often the 95 % intervals over facts hold the truth, by the number of facts; docs/statistics.md holds the table.

    python examples/benchmarks/coverage.py            # a quarter of an hour on one core; prints the table

Shapes: correlations 0, 0.5 and 0.9, of normal and of heavy-tailed (t with 4 degrees) scores, in one group or six that
share half of each fact; means of probabilities that are even, beta(4, 4), skewed, beta(0.3, 3), or near 0 for most
facts and near 1 for a few, beta(0.1, 1), and means of the logarithms of the first two; shares of 3, 20, 50 and 90 %
over ten questions of each fact, with intra-fact correlation 0, 0.5 and 1. The control of the correlation is held to
what it claims, that it holds the value of scores that have nothing to do with each other. Every cell is the lowest
coverage of any shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from scipy import special

from revprobe.probes.statistics.group_correlation import group_correlation
from revprobe.probes.statistics.intervals import (
    FRACTION,
    difference_over_facts,
    mean_over_facts,
    proportion_over_facts,
)

FACTS = (3, 5, 8, 13, 26, 60)


def correlations(generator: np.random.Generator, facts: int, runs: int) -> Iterator[dict[str, float]]:
    """Coverage of value, excess and (at 0) control, one shape after the other."""
    for rho, groups, heavy in [(r, g, h) for r in (0.0, 0.5, 0.9) for g in (1, 6) for h in (False, True)]:
        held = {"value": 0, "control": 0, "excess": 0}
        fact, group = np.tile(np.arange(facts), groups), np.repeat(np.arange(groups), facts)
        for seed in range(runs):
            size = (2, (groups + 1) * facts)
            drawn = generator.standard_t(4, size) if heavy else generator.standard_normal(size)
            shared, own = drawn[:, :facts], drawn[:, facts:]
            x, z = 0.5**0.5 * (shared[:, fact] + own) if groups > 1 else own
            y = rho * x + (1 - rho**2) ** 0.5 * z
            found = group_correlation(x[:, None], y[:, None], fact.astype(str), group, seed=seed % 3)
            null, low, high = found.null.mean(), *np.percentile(found.null, [2.5, 97.5])
            held["value"] += found.low <= rho <= found.high
            held["excess"] += found.low - null <= rho <= found.high - null
            held["control"] += low - 1e-9 <= found.value <= high + 1e-9
        yield {name: count / runs for name, count in held.items() if name != "control" or rho == 0}


def means(generator: np.random.Generator, facts: int, runs: int) -> Iterator[dict[str, float]]:
    """The same of mean probabilities, and of mean log-probabilities, beside a control that shares part of each fact."""
    names = np.repeat(np.arange(facts), 2).astype(str)
    for a, b, logarithm in ((4, 4, False), (0.3, 3, False), (0.1, 1, False), (4, 4, True), (0.3, 3, True)):
        truth = special.psi(a) - special.psi(a + b) if logarithm else a / (a + b)
        bounds, held = None if logarithm else FRACTION, {"value": 0, "control": 0, "excess": 0}
        for _ in range(runs):
            drawn = generator.beta(a, b, (2, facts))
            own, other = np.log(drawn) if logarithm else drawn
            own, null = np.repeat(own, 2), np.repeat(0.5 * (own * 0.2 + other * 0.8), 2)
            value, control = (mean_over_facts(part, names, bounds=bounds) for part in (own, null))
            excess = difference_over_facts(own, null, names, bounds=bounds)
            held["value"] += value.low <= truth <= value.high
            held["control"] += control.low <= truth / 2 <= control.high
            held["excess"] += excess.low <= truth / 2 <= excess.high
        yield {name: count / runs for name, count in held.items()}


def proportions(generator: np.random.Generator, facts: int, runs: int) -> Iterator[dict[str, float]]:
    """The same of shares, whose control is right by chance one time in twenty."""
    names = np.repeat(np.arange(facts), 10).astype(str)
    for share, together in [(p, t) for p in (0.03, 0.2, 0.5, 0.9) for t in (0.0, 0.5, 1.0)]:
        held = {"value": 0, "control": 0, "excess": 0}
        for _ in range(runs):
            own, null = (answers(generator, p, together, facts) for p in (share, 0.05))
            value, control = proportion_over_facts(own, names), proportion_over_facts(null, names)
            excess = difference_over_facts(own, null, names, bounds=FRACTION, binary=True)
            held["value"] += value.low <= share <= value.high
            held["control"] += control.low <= 0.05 <= control.high
            held["excess"] += excess.low <= share - 0.05 <= excess.high
        yield {name: count / runs for name, count in held.items()}


def answers(generator: np.random.Generator, share: float, together: float, facts: int) -> np.ndarray:
    """1 and 0, ten for each fact, of an intra-fact correlation."""
    if together == 1:
        rates = (generator.random(facts) < share).astype(float)
    elif together == 0:
        rates = np.full(facts, share)
    else:
        rates = generator.beta(share * (1 - together) / together, (1 - share) * (1 - together) / together, facts)
    return (generator.random((facts, 10)) < rates[:, None]).astype(float).reshape(-1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--correlations", type=int, default=400, help="simulated readings of each shape")
    parser.add_argument("--means", type=int, default=1500, help="the same of means and of proportions")
    asked = parser.parse_args()
    print("| statistic | interval | shapes x readings | " + " | ".join(f"{facts} facts" for facts in FACTS) + " |")
    print("|---|---|---|" + "---|" * len(FACTS))
    for name, simulate, runs in (
        ("correlation", correlations, asked.correlations),
        ("mean", means, asked.means),
        ("proportion", proportions, asked.means),
    ):
        generator = np.random.default_rng(0)
        found = [list(simulate(generator, facts, runs)) for facts in FACTS]
        for interval in ("value", "control", "excess"):
            of = [[shape[interval] for shape in shapes if interval in shape] for shapes in found]
            cells = " | ".join(f"{min(shapes):.3f}" for shapes in of)
            print(f"| {name} | {interval} | {len(of[0])} x {runs} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
