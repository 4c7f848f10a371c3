"""Sixteen hex digits that tell lists of pairs apart, whichever way a list stores its queries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from .query import Query

Columns = tuple[Sequence[Query], np.ndarray, np.ndarray]


def canonical(queries: Sequence[Query], forward: np.ndarray, reverse: np.ndarray) -> Columns:
    """The queries in the order in which pairs ask them, the forward ones first; equal ones, and those of no pair, once.

    So do lists that are read from a file, or made of single pairs, store them. Shapes: `pair, pair -> pair, pair`.
    """
    place: dict[Query, int] = {}
    number = np.full(len(queries), -1)
    asked = np.concatenate([forward, reverse])
    for query in asked[np.sort(np.unique(asked, return_index=True)[1])]:
        number[query] = place.setdefault(queries[query], len(place))
    return tuple(place), number[forward], number[reverse]


def digest_of(kind: str, columns: Columns, facts: Sequence[str]) -> str:
    """The digest of a list as its columns stand."""
    queries, forward, reverse = columns
    state = hashlib.sha256(kind.encode())
    for query in queries:
        state.update(repr(tuple(query.as_row().values())).encode())
    state.update(np.stack([forward, reverse]).astype("<i8").tobytes())
    state.update(json.dumps(list(facts)).encode())
    return state.hexdigest()[:16]
