"""A pass in parts: each process runs some of the batches, and the parts are put together to one result.

Two parts never disagree: a query or pair measured by one is NaN (or absent) in the others, except where batches of
different parts hold the same query; then the first part's value stands, and the other equals it up to rounding.

Shapes are those of `PassResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .likelihood import Ask

if TYPE_CHECKING:
    from .run import PassResult

# Gets `work(part, parts)`, which runs one part of a pass; returns the whole result.
Share = Callable[[Callable[[int, int], "PassResult"]], "PassResult"]
_TABLES = ("inner", "inner_control", "norm", "floor")


@dataclass(frozen=True)
class Part:
    """What one process found, without the model and the pairs, so that it can be sent."""

    score: dict[int, np.ndarray]
    weight: dict[int, np.ndarray]
    silent: list[int]
    answers: dict[Ask, tuple[float, int]]
    tables: dict[str, np.ndarray]


def part_of(result: PassResult) -> Part:
    """The part of a result that was measured here."""
    answers = {} if result.pricing is None else result.pricing.answers
    tables = {name: getattr(result, name) for name in _TABLES}
    return Part(result.score, result.weight, result.silent, answers, tables)


def merged(own: PassResult, parts: Sequence[Part]) -> PassResult:
    """The whole result: what `own` says about pairs and parameters, and the measurements of all parts."""
    pricing = None
    if own.pricing is not None:
        answers: dict[Ask, tuple[float, int]] = {}
        for part in reversed(parts):  # so that the first part's answer stands
            answers |= part.answers
        pricing = replace(own.pricing, answers=answers)
    return replace(
        own,
        score=_by_layer([part.score for part in parts]),
        weight=_by_layer([part.weight for part in parts]),
        silent=sorted({layer for part in parts for layer in part.silent}),
        pricing=pricing,
        inner=_table("inner", parts),
        inner_control=_table("inner_control", parts),
        norm=_table("norm", parts),
        floor=_table("floor", parts),
    )


def _by_layer(parts: Sequence[dict[int, np.ndarray]]) -> dict[int, np.ndarray]:
    layers = sorted({layer for part in parts for layer in part})
    return {layer: _filled([part[layer] for part in parts if layer in part]) for layer in layers}


def _table(name: str, parts: Sequence[Part]) -> np.ndarray:
    return _filled([part.tables[name] for part in parts])


def _filled(tables: Sequence[np.ndarray]) -> np.ndarray:
    """The first value that is not NaN in each cell."""
    whole = tables[0].copy()
    for table in tables[1:]:
        whole = np.where(np.isnan(whole), table, whole)
    return whole
