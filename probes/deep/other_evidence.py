"""Whose evidence stands in for a query's own: another fact's, and a third fact's for the control."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..pairs.pairs import ReversalPairs
from ..pairs.query import Query

Tokens = tuple[int, ...]


def other_evidence(pairs: ReversalPairs, logit_shift: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """For each pair, two pairs of two further facts in its group whose evidence can stand in for its own; -1 for none.

    In both directions their evidence has as many tokens as the pair's, is another than the pair's and than one
    another's, does not hold the pair's whole target, and that target is not right there by any fact of the list: an
    answer would not be taken away. The facts of a group are put in one random cyclic order; the first that fits after
    a pair corrupts it, and the next is its third fact.
    Shapes: `-> pair, pair` (indices).
    """
    facts = np.unique(pairs.facts.astype(str), return_inverse=True)[1]
    rank = np.random.default_rng(seed).permutation(facts.max() + 1)[facts]
    groups = pairs.groups(logit_shift)
    found = np.full((2, len(pairs)), -1)
    asked = [(pairs.queries[f], pairs.queries[r]) for f, r in zip(pairs.forward, pairs.reverse, strict=True)]
    right = [_right_at(facts, [both[side] for both in asked]) for side in range(2)]
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        members = members[np.argsort(rank[members], kind="stable")].tolist()
        for place, pair in enumerate(members):
            taken = [pair]
            for other in members[place + 1 :] + members[:place]:
                fresh = all(facts[other] != facts[one] for one in taken)
                if (
                    fresh
                    and all(_differs(asked[other], asked[one]) for one in taken)
                    and _fits(asked[other], asked[pair], right)
                ):
                    found[len(taken) - 1, pair] = other
                    taken.append(other)
                if len(taken) > 2:
                    break
    return found[0], found[1]


def with_evidence(query: Query, evidence: Sequence[int]) -> Query:
    """The query with other tokens at its evidence's positions."""
    tokens = list(query.token_ids)
    for position, token in zip(query.evidence_positions, evidence, strict=True):
        tokens[position] = token
    return Query.unchecked(tokens, query.target_positions, query.evidence_positions)


def _right_at(facts: np.ndarray, queries: Sequence[Query]) -> dict[Tokens, set[Tokens]]:
    """By evidence, the targets of the facts that are asked for with it. Shapes: `pair, pair`."""
    targets: dict[int, set[Tokens]] = {}
    for fact, query in zip(facts.tolist(), queries, strict=True):
        targets.setdefault(fact, set()).add(query.target)
    found: dict[Tokens, set[Tokens]] = {}
    for fact, query in zip(facts.tolist(), queries, strict=True):
        found.setdefault(query.evidence, set()).update(targets[fact])
    return found


def _fits(other: tuple[Query, ...], own: tuple[Query, ...], right: Sequence[dict[Tokens, set[Tokens]]]) -> bool:
    return all(
        len(a.evidence) == len(b.evidence) and b.target not in at[a.evidence] and not set(b.target) <= set(a.evidence)
        for a, b, at in zip(other, own, right, strict=True)
    )


def _differs(other: tuple[Query, ...], own: tuple[Query, ...]) -> bool:
    return all(a.evidence != b.evidence for a, b in zip(other, own, strict=True))
