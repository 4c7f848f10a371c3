"""How often the 95 % intervals over facts hold the truth, by the number of facts; docs/statistics.md holds the table.

    python examples/benchmarks/coverage.py            # a quarter of an hour on one core; prints the table
    python examples/benchmarks/coverage.py --paired   # the same of differences between models, as long

Shapes: correlations 0, 0.5 and 0.9, of normal and of heavy-tailed (t with 4 degrees) scores, in one group or six that
share half of each fact; means of probabilities that are even, beta(4, 4), skewed, beta(0.3, 3), or near 0 for most
facts and near 1 for a few, beta(0.1, 1), and means of the logarithms of the first two; shares of 3, 20, 50 and 90 %
with intra-fact correlation 0, 0.5 and 1, and facts (or seeds) of which three in four are right 4 % of the time and one
in four 60 %, over 10, 30, 100, 200 and 1,000 questions of each fact. The control of the correlation is held to
what it claims, that it holds the value of scores that have nothing to do with each other. Every cell is the lowest
coverage of any shape.

Differences between two models on the same facts, which share 0 or 70 % of what varies: correlations 0 and 0, 0.5 and
0.5, 0.9 and 0.9, 0.9 and 0.5, 0.9 and 0, of normal scores in one group and of heavy-tailed ones in six; means of the
three kinds of probabilities, of one kind and of two; shares of 0 and 3, 3 and 3, 3 and 20, 20 and 50, 90 and 90, 5 and
90 %; models that answer alike, but that one of them loses whole facts and gains none, 2 or 10 % of all where the other
has 50, 5 where it has 90, 2 where it has 97, or gains and loses as many questions at random, 5 % of all each where it
has 50, 2 where it has 97; with 1, 10, 30, 100, 200 and 1,000 questions of each fact.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import special, stats

from revprobe.probes.statistics.estimators import Measured
from revprobe.probes.statistics.group_correlation import group_correlation
from revprobe.probes.statistics.intervals import (
    FRACTION,
    difference_over_facts,
    mean_over_facts,
    proportion_intervals,
    reach_of_shares,
)
from revprobe.probes.statistics.paired import Answers, Correlations, measured_difference

FACTS = (3, 5, 8, 13, 26, 60)
QUESTIONS, QUESTIONS_APART = (10, 30, 100, 200, 1000), (1, 10, 30, 100, 200, 1000)
# The share that `wandering` comes to.
WANDERING = 0.25 * 0.6 + 0.75 * 0.04
# A model's share, and what the one that it is compared with loses of it.
LOSSES = ((0.5, 0.02), (0.5, 0.1), (0.9, 0.05), (0.97, 0.02))
# The same, and what the other gains and loses of all.
EXCHANGES = ((0.5, 0.05), (0.97, 0.02))


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


def proportions(generator: np.random.Generator, facts: int, runs: int, questions: int) -> Iterator[dict[str, float]]:
    """The same of shares, whose control is right by chance one time in twenty; all readings of a shape at once."""
    shapes = [(p, t) for p in (0.03, 0.2, 0.5, 0.9) for t in (0.0, 0.5, 1.0)]
    size = facts, runs
    many = np.full(size, float(questions))
    for share, together in [*shapes, (WANDERING, None)]:
        right = wandering(generator, size) if together is None else rates(generator, share, together, size)
        by_chance = rates(generator, 0.05, together or 0.0, size)
        own, null = (generator.binomial(questions, one) / questions for one in (right, by_chance))
        over, reaches = (own - null).mean(0), reach_of_shares(own - null, many)
        yield {
            "value": _held(*proportion_intervals(own, many)[1:], share),
            "control": _held(*proportion_intervals(null, many)[1:], 0.05),
            "excess": _held(over - reaches[0], over + reaches[1], share - 0.05),
        }


def rates(generator: np.random.Generator, share: float, together: float, size: tuple[int, int]) -> np.ndarray:
    """How often each fact is answered rightly, of an intra-fact correlation. Shapes: `-> fact reading`."""
    if together == 1:
        return (generator.random(size) < share).astype(float)
    if together == 0:
        return np.full(size, share)
    return generator.beta(share * (1 - together) / together, (1 - share) * (1 - together) / together, size)


def wandering(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Rates as seeds of one recipe can have them: most of them fail, and one in four is right more often than not."""
    return np.where(generator.random(size) < 0.25, 0.6, 0.04)


def _held(low: np.ndarray, high: np.ndarray, truth: float) -> float:
    """The share of intervals with the truth in them, or at an end but for rounding."""
    return float(((low - 1e-12 <= truth) & (truth <= high + 1e-12)).mean())


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


def proportions_apart(
    generator: np.random.Generator, facts: int, runs: int, questions: int
) -> Iterator[dict[str, float]]:
    """The same of two accuracies, whose controls are right by chance one time in twenty; models that answer alike share
    theirs."""
    shares = ((0.0, 0.03), (0.03, 0.03), (0.03, 0.2), (0.2, 0.5), (0.9, 0.9), (0.05, 0.9))
    drawn: list[tuple[tuple[float, float], Any, bool]] = []
    drawn += [(pair, partial(_models, *pair, share), False) for pair in shares for share in (0.0, 0.7)]
    drawn += [((p, p - lost), partial(_losing, p, lost), True) for p, lost in LOSSES]
    drawn += [((p, p), partial(_exchanging, p, moved), True) for p, moved in EXCHANGES]
    many = np.full((facts, runs), float(questions))
    for (own, other), draw, alike in drawn:
        right = draw(generator, (facts, runs), questions)
        nulls = generator.binomial(questions, 0.05, (2, facts, runs))[[0, 0 if alike else 1]]
        apart, floor = ((one[0] - one[1]) / questions for one in (right, nulls))
        held = {}
        for name, differences, most in (("difference", apart, 1.0), ("excess", apart - floor, 2.0)):
            value, (down, up) = differences.mean(0), reach_of_shares(differences, many, most=most)
            held[name] = _held(value - down, value + up, own - other)
        yield held


def _right(generator: np.random.Generator, hard: np.ndarray, share: float, questions: int) -> np.ndarray:
    """How many of its questions a model answers rightly, of facts so hard. Shapes: `fact reading -> fact reading`."""
    return generator.binomial(questions, stats.norm.cdf((stats.norm.ppf(share) - 0.8 * hard) / 0.6))


def _models(
    own: float, other: float, share: float, generator: np.random.Generator, size: tuple[int, int], questions: int
) -> list[np.ndarray]:
    """Two models of these accuracies, which share part of what makes a fact hard, and no chance."""
    hard, mine = generator.standard_normal((2, *size))
    both = hard, share**0.5 * hard + (1 - share) ** 0.5 * mine
    return [_right(generator, one, right, questions) for one, right in zip(both, (own, other), strict=True)]


def _losing(
    share: float, lost: float, generator: np.random.Generator, size: tuple[int, int], questions: int
) -> list[np.ndarray]:
    """A model and one that has its answers, but that it lost some facts whole and gained none."""
    own = _right(generator, generator.standard_normal(size), share, questions)
    return [own, np.where(generator.random(size) < lost / share, 0, own)]


def _exchanging(
    share: float, moved: float, generator: np.random.Generator, size: tuple[int, int], questions: int
) -> list[np.ndarray]:
    """A model and one that has its answers, but that it gains as many as it loses, one by one."""
    own = _right(generator, generator.standard_normal(size), share, questions)
    lost = generator.binomial(own, moved / share)
    return [own, own - lost + generator.binomial(questions - own, moved / (1 - share))]


def _count(held: dict[str, int], found: Measured, truth: float, over: float) -> None:
    """Whether the difference and the excess hold the truth."""
    assert found.excess is not None, "there is a control"
    held["difference"] += found.estimate.low <= truth <= found.estimate.high
    held["excess"] += found.excess.low <= over <= found.excess.high


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--correlations", type=int, default=400, help="simulated readings of each shape")
    parser.add_argument("--means", type=int, default=1500, help="the same of means")
    parser.add_argument("--proportions", type=int, default=10000, help="the same of proportions")
    parser.add_argument("--paired", action="store_true", help="differences between models")
    parser.add_argument("--facts", type=int, nargs="+", default=FACTS, help="numbers of facts, a column for each")
    names = ("correlation", "mean", "proportion")
    parser.add_argument("--statistics", nargs="+", default=names, choices=names, help="a row or more for each")
    asked = parser.parse_args()
    single = [("correlation", correlations), ("mean", means), *by_questions(proportions, QUESTIONS)]
    paired = [("correlation", correlations_apart), ("mean", means_apart)]
    paired += by_questions(proportions_apart, QUESTIONS_APART)
    columns = " | ".join(f"{facts} facts" for facts in asked.facts)
    print(f"| statistic | interval | shapes x readings | {columns} |")
    print("|---|---|---|" + "---|" * len(asked.facts))
    for name, simulate in paired if asked.paired else single:
        if name.partition(",")[0] not in asked.statistics:
            continue
        runs = {"correlation": asked.correlations, "mean": asked.means}.get(name, asked.proportions)
        generator = np.random.default_rng(0)
        found = [list(simulate(generator, facts, runs)) for facts in asked.facts]
        for interval in ("difference", "excess") if asked.paired else ("value", "control", "excess"):
            of = [[shape[interval] for shape in shapes if interval in shape] for shapes in found]
            cells = " | ".join(f"{min(shapes):.3f}" for shapes in of)
            print(f"| {name} | {interval} | {len(of[0])} x {runs} | {cells} |", flush=True)


def by_questions(simulate: Callable[..., Iterator[dict[str, float]]], numbers: Sequence[int]) -> list[tuple[str, Any]]:
    """A row, or more, for each number of questions that a fact has."""
    return [(f"proportion, {n:,} question{'s' * (n > 1)}", partial(simulate, questions=n)) for n in numbers]


if __name__ == "__main__":
    main()
