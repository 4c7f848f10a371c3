"""What a pass is asked for and what it collects, also when several processes run it in parts.

Two parts never disagree: a query or pair measured by one is NaN (or absent) in the others, except where batches of
different parts hold the same query; then the first part's value stands, and the other equals it up to rounding.

Shapes are those of `PassResult`: query (distinct queries), pair, parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ...models.probed import ProbedModel
from ...progress import Progress
from ..pairs.pairs import ReversalPairs
from ..statistics.estimators import LATER_BLOCK, LATER_BLOCK_CONTROL
from .likelihood import Likelihoods, Request

# Gets `work(part, parts)`, which runs one part of a pass; returns the whole result.
Share = Callable[["Work"], "PassResult"]
_TABLES = ("inner", "inner_control", "norm", "floor")


@dataclass(frozen=True)
class Plan:
    """What a pass measures.

    Args:
        attention, probability, gradient: which probes take part.
        mode: how multi-token targets are priced, "chain" or "parallel".
        parameters: the parameters of the gradient, by name; all when None.
        control: also measure each pair's forward query against the reverse query of another fact.
        summed: keep gradient products summed over all parameters, not one by one.
        share: divides the batches among several processes, and puts what they found together.
    """

    attention: bool = False
    probability: bool = False
    gradient: bool = False
    mode: str = "chain"
    parameters: Sequence[str] | None = None
    control: bool = True
    batch_size: int | None = None
    seed: int = 0
    progress: Progress | bool | None = None
    summed: bool = False
    share: Share | None = None

    @property
    def reader(self) -> str:
        """Whose list is run, of pairs that give probes lists of their own: that of the first probe taking part."""
        taking_part = {"attention": self.attention, "gradient": self.gradient, "probability": self.probability}
        return next((name for name, on in taking_part.items() if on), "")


@dataclass(frozen=True)
class Work:
    """A pass that several can do: `work(part, parts)` runs one part of it here, `prepared()` none of it.

    `model`, `pairs` and `plan` are what another process needs to do the same.
    """

    model: ProbedModel
    pairs: ReversalPairs
    plan: Plan
    run: Callable[[int, int], PassResult]
    prepared: Callable[[], PassResult]

    def __call__(self, part: int, parts: int) -> PassResult:
        return self.run(part, parts)


@dataclass
class PassResult:
    """What one pass collected.

    Shapes: `score`, `weight`: layer -> `query head`; `inner`, `inner_control`: `pair parameter`; `norm`, `floor`:
    `query parameter`, where a fused parameter has a column for each part. `partner` is the pair each pair is shuffled
    with, -1 for none. `without_attention`: layer -> why it has no scores, or none for some queries; `left_out`: path of
    a module -> why the attention that it computes is not read.
    `reached`: parameters that some query's loss reaches; `one_by_one`: those read one query at a time, and why.
    `unseen`: the queries whose evidence lies in a later block, `query`; their numbers are not those of the question.
    `without`: of a model of random tokens, the same without each of its draws.
    `place`: what it was computed on and in, as readings say it: device, threads, dtype.
    """

    pairs: ReversalPairs
    partner: np.ndarray
    parameters: list[str]
    score: dict[int, np.ndarray] = field(default_factory=dict)
    weight: dict[int, np.ndarray] = field(default_factory=dict)
    without_attention: dict[int, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    likelihoods: Likelihoods | None = None
    reached: set[str] = field(default_factory=set)
    one_by_one: dict[str, str] = field(default_factory=dict)
    inner: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    inner_control: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    norm: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    floor: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    unseen: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    without: list[PassResult] = field(default_factory=list)
    place: dict[str, Any] = field(default_factory=dict)

    def empty_copy(self, kept: Sequence[int]) -> PassResult:
        """Tables of the same pass for means over fewer draws, with nothing measured yet; what is told is shared."""
        likelihoods = None if self.likelihoods is None else replace(self.likelihoods, kept=kept, answers={}, begun={})
        tables: dict[str, Any] = {name: getattr(self, name).copy() for name in _TABLES}
        return replace(self, score={}, weight={}, likelihoods=likelihoods, **tables)

    def unseen_reasons(self, queries: np.ndarray, control: np.ndarray) -> dict[str, np.ndarray]:
        """Columns that say which pairs have no number, or no control, since evidence lies in a later block.

        Args:
            queries: those a pair's number rests on; `control`: the query of its control, -1 for none.
        Shapes: `pair query, pair -> pair`.
        """
        own = self.unseen[queries].any(1)
        other = (control >= 0) & self.unseen[control] & ~own
        return {"reason": np.where(own, LATER_BLOCK, ""), "reason_control": np.where(other, LATER_BLOCK_CONTROL, "")}


class Rows(NamedTuple):
    """The rows of a table that hold a number; of a part's tables most are NaN."""

    shape: tuple[int, ...]
    rows: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Part:
    """What one process found, without the model and the pairs, so that it can be sent."""

    score: dict[int, Rows]
    weight: dict[int, Rows]
    without_attention: dict[int, str]
    left_out: dict[str, str]
    reached: set[str]
    one_by_one: dict[str, str]
    answers: dict[Request, tuple[float, int]]
    tables: dict[str, Rows]
    place: dict[str, Any]


def part_of(result: PassResult) -> Part:
    """The part of a result that was measured here."""
    answers = {} if result.likelihoods is None else result.likelihoods.answers
    tables = {name: _rows(getattr(result, name)) for name in _TABLES}
    score, weight = ({layer: _rows(own) for layer, own in kept.items()} for kept in (result.score, result.weight))
    seen = result.without_attention, result.left_out, result.reached, result.one_by_one
    return Part(score, weight, *seen, answers, tables, result.place)


def merged(own: PassResult, parts: Sequence[Part]) -> PassResult:
    """The whole result: what `own` says about pairs and parameters, and the measurements of all parts."""
    likelihoods = None
    if own.likelihoods is not None:
        answers: dict[Request, tuple[float, int]] = {}
        for part in reversed(parts):  # so that the first part's answer stands
            answers |= part.answers
        likelihoods = replace(own.likelihoods, answers=answers)
    tables: dict[str, Any] = {name: _filled([part.tables[name] for part in parts]) for name in _TABLES}
    return replace(
        own,
        score=_by_layer([part.score for part in parts]),
        weight=_by_layer([part.weight for part in parts]),
        without_attention={layer: why for part in parts for layer, why in part.without_attention.items()},
        left_out={path: why for part in parts for path, why in part.left_out.items()},
        likelihoods=likelihoods,
        reached={name for part in parts for name in part.reached},
        one_by_one={name: why for part in reversed(parts) for name, why in part.one_by_one.items()},
        place=parts[0].place,
        **tables,
    )


def _rows(table: np.ndarray) -> Rows:
    rows = np.flatnonzero(~np.isnan(table).all(1))
    return Rows(table.shape, rows, table[rows])


def _by_layer(parts: Sequence[dict[int, Rows]]) -> dict[int, np.ndarray]:
    layers = sorted({layer for part in parts for layer in part})
    return {layer: _filled([part[layer] for part in parts if layer in part]) for layer in layers}


def _filled(tables: Sequence[Rows]) -> np.ndarray:
    """The first value that is not NaN in each cell."""
    whole = np.full(tables[0].shape, np.nan)
    for _, rows, values in tables:
        there = whole[rows]
        whole[rows] = np.where(np.isnan(there), values, there)
    return whole
