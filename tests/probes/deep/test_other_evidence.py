"""Whose evidence corrupts a query: a fact's at which the query's own answer is wrong, and so is the third fact's."""

import numpy as np
import pytest

import revprobe as rp
from revprobe.probes.deep.other_evidence import other_evidence


def many_to_many(seed: int, size: int = 12, count: int = 50) -> tuple[rp.ReversalPairs, list[tuple[int, int]]]:
    """Persons and cities, each with several of the others; forward asks for the city."""
    rng, told = np.random.default_rng(seed), set()
    while len(told) < count:
        told.add((int(rng.integers(size)), int(20 + rng.integers(size))))
    facts = sorted(told)
    return rp.ReversalPairs.from_pairs(
        rp.ReversalPair(rp.Query([50, a, 51, b], [3], [1]), rp.Query([a, 52, b], [0], [2]), "swapped", f"{a} {b}")
        for a, b in facts
    ), facts


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_is_right_neither_where_it_is_corrupted_nor_at_the_third_fact(seed: int) -> None:
    pairs, facts = many_to_many(seed)
    known, both = {*facts}, other_evidence(pairs, 0, seed=seed)
    for found in both:
        assert (found >= 0).all()
        for (a, b), place in zip(facts, found.tolist(), strict=True):
            assert {(a, facts[place][1]), (facts[place][0], b)}.isdisjoint(known)
    for pair, (one, two) in enumerate(zip(*(found.tolist() for found in both), strict=True)):
        assert len({facts[place][side] for place in (pair, one, two) for side in (0, 1)}) == 6


def test_a_relation_where_every_answer_is_right_everywhere_has_none() -> None:
    facts = [(a, 20 + b) for a in range(4) for b in range(4)]
    pairs = rp.ReversalPairs.from_pairs(
        rp.ReversalPair(rp.Query([50, a, 51, b], [3], [1]), rp.Query([a, 52, b], [0], [2]), "swapped", f"{a} {b}")
        for a, b in facts
    )
    assert all((found == -1).all() for found in other_evidence(pairs, 0))


def test_where_each_answer_is_right_at_its_own_evidence_alone_the_next_two_facts_are_taken() -> None:
    facts = [(i, 20 + i) for i in range(10)]
    pairs = rp.ReversalPairs.from_pairs(
        rp.ReversalPair(rp.Query([50, a, 51, b], [3], [1]), rp.Query([a, 52, b], [0], [2]), "swapped", f"f{a}")
        for a, b in facts
    )
    order = np.argsort(np.random.default_rng(3).permutation(10)).tolist()
    for turn, found in enumerate(other_evidence(pairs, 0, seed=3), start=1):
        assert [found[one] for one in order] == [order[(place + turn) % 10] for place in range(10)]
