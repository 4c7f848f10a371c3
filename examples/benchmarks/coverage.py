"""How often the 95 % intervals over facts hold the truth, by the number of facts; docs/statistics.md holds the table.

    python examples/benchmarks/coverage.py            # a quarter of an hour on one core; prints the table
    python examples/benchmarks/coverage.py --paired   # the same of differences between models, as long

Shapes: correlations 0, 0.5 and 0.9, of normal and of heavy-tailed (t with 4 degrees) scores, in one group or six that
share half of each fact; means of probabilities that are even, beta(4, 4), skewed, beta(0.3, 3), or near 0 for most
facts and near 1 for a few, beta(0.1, 1), and means of the logarithms of the first two; shares of 3, 20, 50 and 90 %
over ten questions of each fact, with intra-fact correlation 0, 0.5 and 1. The control of the correlation is held to
what it claims, that it holds the value of scores that have nothing to do with each other. Every cell is the lowest
coverage of any shape.

Differences between two models on the same facts, which share 0 or 70 % of what varies: correlations 0 and 0, 0.5 and
0.5, 0.9 and 0.9, 0.9 and 0.5, 0.9 and 0, of normal scores in one group and of heavy-tailed ones in six; means of the
three kinds of probabilities, of one kind and of two; shares of 3 and 3, 3 and 20, 20 and 50, 90 and 90, 5 and 90 %,
with one and with ten questions of each fact.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from scipy import special, stats

from revprobe.probes.statistics.estimators import Measured
from revprobe.probes.statistics.group_correlation import group_correlation
from revprobe.probes.statistics.intervals import (
    FRACTION,
    difference_over_facts,
    mean_over_facts,
    proportion_over_facts,
)
from revprobe.probes.statistics.paired import Answers, Correlations, measured_difference

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


def correlations_apart(generator: np.random.Generator, facts: int, runs: int) -> Iterator[dict[str, float]]:
    """Coverage of the difference between two correlations."""
    rhos = ((0.0, 0.0), (0.5, 0.5), (0.9, 0.9), (0.9, 0.5), (0.9, 0.0))
    kinds = ((1, False), (6, True))
    for (own, other), (groups, heavy), share in [(pair, k, s) for pair in rhos for k in kinds for s in (0.0, 0.7)]:
        held = 0
        fact, group = np.tile(np.arange(facts), groups), np.repeat(np.arange(groups), facts)
        for _ in range(runs):
            size = (6, groups * facts)
            drawn = generator.standard_t(4, size) if heavy else generator.standard_normal(size)
            x, noise = drawn[0], drawn[1]
            x2, noise2 = (share**0.5 * a + (1 - share) ** 0.5 * b for a, b in ((x, drawn[2]), (noise, drawn[3])))
            sides = [(x, own * x + (1 - own**2) ** 0.5 * noise), (x2, other * x2 + (1 - other**2) ** 0.5 * noise2)]
            both = [Correlations(a[:, None], b[:, None], fact.astype(str), group) for a, b in sides]
            found = measured_difference(*both, control=False).estimate
            held += found.low <= own - other <= found.high
        yield {"difference": held / runs, "excess": held / runs}  # the nulls' mean is 0


def means_apart(generator: np.random.Generator, facts: int, runs: int) -> Iterator[dict[str, float]]:
    """The same of two mean probabilities, and of what each is over a control that shares part of each fact."""
    even, skewed, rare = (4, 4), (0.3, 3), (0.1, 1)
    kinds = ((even, even), (skewed, skewed), (rare, rare), (even, skewed), (even, rare))
    names = np.arange(facts).astype(str)
    for (own, other), share in [(kind, s) for kind in kinds for s in (0.0, 0.7)]:
        held, truth = {"difference": 0, "excess": 0}, own[0] / sum(own) - other[0] / sum(other)
        for _ in range(runs):
            z, mine = generator.standard_normal((2, facts))
            drawn = [stats.norm.cdf(one) for one in (z, share**0.5 * z + (1 - share) ** 0.5 * mine)]
            sides = []
            for chance, shape in zip(drawn, (own, other), strict=True):
                values = stats.beta.ppf(chance, *shape)
                null = 0.5 * (0.2 * values + 0.8 * generator.beta(*shape, facts))
                sides.append(Answers(values, null, names, FRACTION))
            _count(held, measured_difference(*sides), truth, truth / 2)
        yield {name: count / runs for name, count in held.items()}


def proportions_apart(generator: np.random.Generator, facts: int, runs: int) -> Iterator[dict[str, float]]:
    """The same of two accuracies, whose controls are right by chance one time in twenty."""
    shares = ((0.03, 0.03), (0.03, 0.2), (0.2, 0.5), (0.9, 0.9), (0.05, 0.9))
    for (own, other), questions, share in [(pair, q, s) for pair in shares for q in (1, 10) for s in (0.0, 0.7)]:
        held, names = {"difference": 0, "excess": 0}, np.repeat(np.arange(facts), questions).astype(str)
        for _ in range(runs):
            hard = np.repeat(generator.standard_normal((2, facts)), questions, axis=1)
            both = hard[0], share**0.5 * hard[0] + (1 - share) ** 0.5 * hard[1]
            sides = []
            for one, right in zip(both, (own, other), strict=True):
                score = 0.8 * one + 0.6 * generator.standard_normal(len(names))
                null = (generator.random(len(names)) < 0.05).astype(float)
                answers = (stats.norm.cdf(score) < right).astype(float)
                sides.append(Answers(answers, null, names, FRACTION, binary=True))
            _count(held, measured_difference(*sides), own - other, own - other)
        yield {name: count / runs for name, count in held.items()}


def _count(held: dict[str, int], found: Measured, truth: float, over: float) -> None:
    """Whether the difference and the excess hold the truth."""
    assert found.excess is not None, "there is a control"
    held["difference"] += found.estimate.low <= truth <= found.estimate.high
    held["excess"] += found.excess.low <= over <= found.excess.high


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--correlations", type=int, default=400, help="simulated readings of each shape")
    parser.add_argument("--means", type=int, default=1500, help="the same of means and of proportions")
    parser.add_argument("--paired", action="store_true", help="differences between models")
    parser.add_argument("--facts", type=int, nargs="+", default=FACTS, help="numbers of facts, a column for each")
    names = ("correlation", "mean", "proportion")
    parser.add_argument("--statistics", nargs="+", default=names, choices=names, help="a row or more for each")
    asked = parser.parse_args()
    single = ("correlation", correlations), ("mean", means), ("proportion", proportions)
    paired = ("correlation", correlations_apart), ("mean", means_apart), ("proportion", proportions_apart)
    columns = " | ".join(f"{facts} facts" for facts in asked.facts)
    print(f"| statistic | interval | shapes x readings | {columns} |")
    print("|---|---|---|" + "---|" * len(asked.facts))
    for name, simulate in paired if asked.paired else single:
        if name not in asked.statistics:
            continue
        runs = asked.correlations if name == "correlation" else asked.means
        generator = np.random.default_rng(0)
        found = [list(simulate(generator, facts, runs)) for facts in asked.facts]
        for interval in ("difference", "excess") if asked.paired else ("value", "control", "excess"):
            of = [[shape[interval] for shape in shapes if interval in shape] for shapes in found]
            cells = " | ".join(f"{min(shapes):.3f}" for shapes in of)
            print(f"| {name} | {interval} | {len(of[0])} x {runs} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
