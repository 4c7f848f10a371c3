"""The rows a model is trained on, with the part that each token plays: target, evidence, template, end.

In every row that is trained the target stands left of its evidence, so a template's token is on one side of the
evidence or the other; on letters it is a placeholder. An answer filled up with end tokens has these as a part of
their own.

Shapes below: row, seq.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import RevprobeError
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.pairs.query import Query
from ...probes.pairs.spans import encode_texts, entity_positions, require_fast_tokenizer
from ...probes.pairs.templates import ROLES, Filled
from ...probes.passes.batches import prepare_queries
from ...relations.letters import LettersRelation
from ...relations.text_relation import TextRelation
from ..training.dataset import RowOptions, StatementRows
from .mask_sets import Shape

PARTS = ("target", "evidence", "left", "right", "end", "other")
TARGET, EVIDENCE, LEFT, RIGHT, END, OTHER = range(len(PARTS))


class TermRow(NamedTuple):
    """One row: its ids, the part and the unit of each token (-1: never hidden), and how often it is trained."""

    token_ids: tuple[int, ...]
    part: tuple[int, ...]
    unit: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        units = {unit: part for unit, part in zip(self.unit, self.part, strict=True) if unit >= 0}
        counts = [list(units.values()).count(part) for part in (TARGET, EVIDENCE)]
        return Shape(len(units), *counts)


@dataclass(frozen=True)
class RowTable:
    """Rows of one length and one shape. Shapes: `token_ids`, `part`, `unit`: `row seq`."""

    shape: Shape
    token_ids: Tensor
    part: Tensor
    unit: Tensor
    counted: int  # tokens that can be hidden: what a row's loss is divided by

    def __len__(self) -> int:
        return len(self.token_ids)

    def hidden(self, rows: np.ndarray, sets: np.ndarray) -> Tensor:
        """The tokens that these sets of units hide. Shapes: `set, set unit -> set seq` (bool)."""
        unit = self.unit[rows]
        return torch.as_tensor(sets).gather(1, unit.clamp(min=0)) & (unit >= 0)


def rows_by_shape(rows: Iterable[TermRow]) -> list[RowTable]:
    """The rows in tables, each of one length and shape. Raises: RevprobeError, when there is none."""
    groups: dict[Any, list[TermRow]] = defaultdict(list)
    for row in rows:
        groups[row.shape, len(row.token_ids), sum(unit >= 0 for unit in row.unit)].append(row)
    if not groups:
        raise RevprobeError("no training row; a relation needs at least one fact that is not held out")
    tables = []
    for (shape, _, counted), some in groups.items():
        ids, part, unit = (torch.tensor(column) for column in zip(*some, strict=True))
        tables.append(RowTable(shape, ids, part, unit, counted))
    return tables


def rows_of_pairs(model: ProbedModel, pairs: ReversalPairs) -> list[TermRow]:
    """The forward queries of the pairs as training rows: every token but special ones can be hidden."""
    queries = prepare_queries(model, pairs.queries)
    special = set(getattr(model.tokenizer, "all_special_ids", None) or [])
    distinct = dict.fromkeys(queries[index] for index in pairs.forward)
    return [_row_of_query(model, query, special) for query in distinct]


def rows_of_relation(
    model: ProbedModel, relation: LettersRelation | TextRelation, direction: str | None, options: RowOptions
) -> list[TermRow]:
    """Every row that training in `direction` reads, as `fine_tune` and `train` make them."""
    if isinstance(relation, LettersRelation):
        return rows_of_pairs(model, relation.pairs(model, placements="mirror"))
    return list(_rows_of_statements(model, relation, direction or relation.directions[0], options))


def _row_of_query(model: ProbedModel, query: Query, special: set[int]) -> TermRow:
    free = [i >= model.logit_shift and token not in special for i, token in enumerate(query.token_ids)]
    parts = _parts(len(query.token_ids), query.target_positions, query.evidence_positions)
    parts = [part if free[i] or part in (TARGET, EVIDENCE) else OTHER for i, part in enumerate(parts)]
    return _row(query.token_ids, parts, free, range(len(free)))


def _rows_of_statements(
    model: ProbedModel, relation: TextRelation, direction: str, options: RowOptions
) -> Iterator[TermRow]:
    statements = relation.training_rows(direction)
    made = StatementRows(statements, model, options)
    tokenizer = require_fast_tokenizer(model)
    texts = encode_texts(tokenizer, [statement.text for statement in statements])
    for row, origin in zip(made.rows, made.origins, strict=True):
        text = texts[origin]
        filled = Filled(text.text, dict(zip(ROLES, statements[origin].spans, strict=True)))
        # The first entity is asked for in both directions, the second one given.
        target, evidence = (entity_positions(tokenizer, text, filled, role) for role in ROLES)
        parts = _parts(len(row), target, evidence)
        last = max(i for i, added in enumerate(text.is_added) if not added) + 1
        for i in range(last, last + len(row) - len(text.token_ids)):
            parts[i] = END
        parts = [part if row.maskable[i] or part not in (LEFT, RIGHT) else OTHER for i, part in enumerate(parts)]
        yield _row(row.token_ids, parts, row.maskable, row.leader)


def _parts(length: int, target: Sequence[int], evidence: Sequence[int]) -> list[int]:
    parts = [LEFT if i < min(evidence) else RIGHT if i > max(evidence) else OTHER for i in range(length)]
    for positions, part in ((evidence, EVIDENCE), (target, TARGET)):
        for i in positions:
            parts[i] = part
    return parts


def _row(ids: Sequence[int], parts: Sequence[int], free: Sequence[bool], leader: Sequence[int]) -> TermRow:
    """Units are numbered with those of the target first, then those of the evidence, then the rest."""
    led = dict.fromkeys(
        leader[i] for part in (TARGET, EVIDENCE, None) for i in range(len(ids)) if free[i] and part in (parts[i], None)
    )
    number = {first: unit for unit, first in enumerate(led)}
    units = [number[leader[i]] if free[i] else -1 for i in range(len(ids))]
    return TermRow(tuple(ids), tuple(parts), tuple(units))
