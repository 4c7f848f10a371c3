"""Whom a control takes: the next fact of one random order that is a null of the pair itself, not of its relatives."""

from collections.abc import Hashable, Sequence

import numpy as np
import pytest

import revprobe as rp
from revprobe.probes.passes.prompts import null_partners
from revprobe.probes.statistics.resampling import Rights, derangement

Asked = tuple[list[list[int]], list[int]]


def slow_partners(facts: Sequence[str], groups: np.ndarray, every: Sequence[Asked], seed: int) -> list[int]:
    """Fact after fact, pair after pair, with sets."""
    names = sorted(set(facts))
    rank = dict(zip(names, np.random.default_rng(seed).permutation(len(names)).tolist(), strict=True))
    answers: list[dict[str, set[int]]] = [{} for _ in every]
    right: list[dict[Hashable, set[int]]] = [{} for _ in every]
    for number, (given, asked) in enumerate(every):
        for fact, some in zip(facts, given, strict=True):
            answers[number].setdefault(fact, set()).update(some)
        for fact, prompt in zip(facts, asked, strict=True):
            right[number].setdefault(prompt, set()).update(answers[number][fact])

    def meet(i: int, j: int) -> bool:
        return any(
            answers[number][facts[a]] & right[number][asked[b]]
            for number, (_, asked) in enumerate(every)
            for a, b in ((i, j), (j, i))
        )

    found = []
    for i, own in enumerate(facts):
        there = [j for j in range(len(facts)) if groups[j] == groups[i]]
        within = [j for j in there if facts[j] == own].index(i)
        others = {facts[j] for j in there} - {own}
        candidates = []
        for fact in sorted(others, key=lambda one: (rank[one] - rank[own]) % len(names)):
            run = [j for j in there if facts[j] == fact]
            candidates += [run[(within + further) % len(run)] for further in range(len(run))]
        found.append(next((j for j in candidates if not meet(i, j)), -1))
    return found


@pytest.mark.parametrize("crowd", [4, 40])
def test_partners_are_those_of_a_slow_search(crowd: int) -> None:
    """Of a few answers in all nearly every pair meets all others; of many nearly none does."""
    rng, found = np.random.default_rng(crowd), []
    for seed in range(60):
        count = int(rng.integers(2, 40))
        facts = [f"f{one}" for one in rng.integers(0, count, count)]
        groups = rng.integers(0, 3, count)
        every = [
            (
                [rng.integers(0, 3 * crowd, rng.integers(1, 3)).tolist() for _ in range(count)],
                rng.integers(0, 3 * crowd, count).tolist(),
            )
            for _ in range(2)
        ]
        rights = [Rights.of(np.array(facts), *one) for one in every]
        partner = derangement(np.array(facts), groups, seed=seed, rights=rights)
        assert partner.tolist() == slow_partners(facts, groups, every, seed)
        found.append(float((partner >= 0).mean()))
    assert 0.02 < np.mean(found) < 0.98, "some have a partner, and some have none"


def told(born: int, lives: int, persons: int = 30, *, places: int = 10) -> rp.ReversalPairs:
    """Of each person two cities: a city is the target of many persons, a person the evidence of two cities."""
    rng, pairs = np.random.default_rng(0), []
    for a, b in ((born, born + 1), (lives, lives + 1)):
        for person in range(persons):
            city = 30 + int(rng.integers(places))
            forward, reverse = (
                rp.Query([a, person, b, city, 49], [3], [1]),
                rp.Query([a, city, b, person, 49], [1], [3]),
            )
            pairs.append(rp.ReversalPair(forward, reverse, "same_target", f"{a} {person} {city}"))
    return rp.ReversalPairs.from_pairs(pairs)


def test_facts_that_hang_together_in_one_chain_have_nulls_all_the_same() -> None:
    """Each of them has dozens of others that share nothing with it, and none had a control: all were relatives."""
    pairs = told(45, 47)
    partner = null_partners(pairs, pairs.groups(0))
    assert (partner >= 0).all()
    asked = [(pair.forward.target, pair.forward.evidence) for pair in pairs]
    for own, other in zip(asked, [asked[j] for j in partner], strict=True):
        assert (own[0], other[1]) not in asked and (other[0], own[1]) not in asked, "right by another relation"


def test_where_nothing_is_shared_partners_are_the_derangement() -> None:
    """The numbers of such lists do not change; one order serves both directions and all groups."""
    pairs = rp.ReversalPairs.from_pairs(
        rp.ReversalPair(
            rp.Query([i, *[50] * more, 25 + i], [0], [1 + more]), rp.Query([25 + i, 51, i], [2], [0]), fact=f"f{i:02}"
        )
        for i in range(20)
        for more in range(3)
    )
    groups = pairs.groups(0)
    for seed in range(5):
        expected = derangement(pairs.facts.astype(str), groups, seed=seed)
        assert null_partners(pairs, groups, seed=seed).tolist() == expected.tolist()
        assert null_partners(pairs, groups, ["reverse"], seed=seed).tolist() == expected.tolist()


def test_a_fact_is_no_null_at_the_evidence_of_its_siblings() -> None:
    """c1 is right at k2 by "c1 | k2": "c2 | k2" asks what "c1 | k1" is right for, though the two share nothing."""
    told_of = [(10, 30), (10, 31), (11, 31), (12, 32)]
    pairs = rp.ReversalPairs.from_pairs(
        rp.ReversalPair(rp.Query([c, 2, k], [0], [2]), rp.Query([k, 5, c], [2], [0]), fact=f"{c} {k}")
        for c, k in told_of
    )
    for seed in range(10):
        assert null_partners(pairs, pairs.groups(0), seed=seed).tolist()[:3] == [3, 3, 3]
