"""What a model answers to one question: both queries read side by side, and the same after an edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

import numpy as np
import pandas as pd

from ...errors import RevprobeError
from ...models.probed import ProbedModel
from ...probes.edits import edit_attention
from ...probes.pairs.pairs import ReversalPairs
from ...probes.pairs.query import Query, ReversalPair
from ...probes.passes.batches import prepare_queries
from ...probes.probability import probe_reverse_probability
from ...probes.top_predictions import top_predictions
from .edits import (
    COLUMNS,
    ROUTE,
    Edit,
    Progress,
    counterpart,
    mask_numbers,
    mask_row,
    masked_at,
    route_numbers,
    swap_row,
    with_evidence,
)
from .read_query import ReadQuery, read_query

TOP = 5
NOT_SHOWN = "not shown for a transplant: its strength differs from layer to layer"


@dataclass(frozen=True)
class AnsweredQuery:
    """One query, as it is and after the edit.

    Attributes:
        direction: "forward", "reverse", or "query" for a single sentence.
        read: the query as the model saw it.
        top: the likeliest tokens at the hidden place, as `rp.top_predictions` tells them.
        log_probability, rank: of the target, by `rp.probe_reverse_probability`.
        edited: the query that was asked instead, where the edit is one of its tokens.
        top_edited: the likeliest tokens after the edit; None where there is none, or `unshown` says why.
        by_token: what masking each token alone does to the target's log-probability, nats; NaN where it cannot be.
    """

    direction: str
    read: ReadQuery
    top: pd.DataFrame
    log_probability: float
    rank: float
    edited: ReadQuery | None = None
    top_edited: pd.DataFrame | None = None
    by_token: np.ndarray | None = None
    unshown: str = ""


@dataclass(frozen=True)
class Answer:
    """Both queries of a question, and the numbers of the edit: columns `edits.COLUMNS`, a row for each direction.

    `hidden` says whether the model sees a mask at the targets, `maskable` whether other tokens can be masked.
    """

    queries: list[AnsweredQuery]
    edit: Edit
    numbers: pd.DataFrame
    hidden: bool
    maskable: bool
    fact: str


def answer(
    model: ProbedModel,
    pair: ReversalPair,
    edit: Edit | None = None,
    *,
    top: int = TOP,
    check: Callable[[], None] = lambda: None,
) -> Answer:
    """Ask a model one question, and again after an edit.

    Args:
        pair: both queries; one query twice is a single sentence.
        top: likeliest tokens for each hidden place.
        check: called between runs of the model; raises to end the work.
    Raises: RevprobeError, for an edit that this model or question does not have, and as the probes do.
    """
    return _Asking(model, pair, edit or Edit(), top, check).answer()


class _Asking:
    def __init__(self, model: ProbedModel, pair: ReversalPair, edit: Edit, top: int, check: Callable[[], None]) -> None:
        self.model, self.edit, self.top, self.check = model, edit, top, check
        # With the begin token, where one of the two needs it: from here on every place is that of the strip.
        forward, reverse = prepare_queries(model, [pair.forward, pair.reverse])
        self.pair = replace(pair, forward=forward, reverse=reverse)
        self.asked = {"query": forward} if forward == reverse else {"forward": forward, "reverse": reverse}
        self.progress: Progress = lambda done, total: check()

    def answer(self) -> Answer:
        self._require_possible()
        plain = self._plain()
        numbers, queries = pd.DataFrame(columns=COLUMNS), plain
        if self.edit.name in ROUTE:
            numbers, queries = self._route(plain)
        elif self.edit.name == "mask":
            numbers, queries = self._mask(plain)
        elif self.edit.name == "swap" and self.edit.evidence is not None:
            numbers, queries = self._swap(plain)
        masks = self.model.objective == "masked"
        return Answer(queries, self.edit, numbers, masks, masks, self.pair.fact)

    def _require_possible(self) -> None:
        if self.edit.name == "transplant" and len(self.asked) == 1:
            raise RevprobeError("a transplant gives each query the other's route: type the reverse sentence too")
        if self.edit.name == "mask" and self.model.objective == "causal":
            masked_at(self.model, self.pair.forward, 0)  # says why not

    def _plain(self) -> list[AnsweredQuery]:
        pairs = ReversalPairs.from_pairs([self.pair], tokenizer=self.model.tokenizer)
        priced = probe_reverse_probability(self.model, pairs, control=False, progress=self.progress).frame
        priced = priced.set_index("direction")
        rows = {str(direction): row for direction, row in priced.to_dict("index").items()}
        found = []
        for direction, query in self.asked.items():
            self.check()
            row = rows["forward" if direction == "query" else direction]
            read, likely = self._read(query)
            found.append(AnsweredQuery(direction, read, likely, float(row["log_probability"]), float(row["rank"])))
        return found

    def _read(self, query: Query) -> tuple[ReadQuery, pd.DataFrame]:
        self.check()
        return read_query(self.model, query), top_predictions(self.model, query, top=self.top)

    def _route(self, plain: Sequence[AnsweredQuery]) -> tuple[pd.DataFrame, list[AnsweredQuery]]:
        directions = ["forward", "reverse"][: len(self.asked)]
        numbers = route_numbers(self.model, self.pair, self.edit, directions=directions, progress=self.progress)
        numbers["direction"] = list(self.asked)
        queries = []
        for one, row in zip(plain, numbers.itertuples(), strict=True):
            self.check()
            if self.edit.name == "transplant":
                queries.append(replace(one, unshown=NOT_SHOWN))
            elif row.reason:
                queries.append(replace(one, unshown=str(row.reason)))
            else:
                queries.append(replace(one, top_edited=self._top_under_edit(one.direction)))
        return numbers, queries

    def _top_under_edit(self, direction: str) -> pd.DataFrame:
        query = self.asked[direction]
        rows = [place - self.model.logit_shift for place in query.target_positions]
        bias = float("-inf") if self.edit.name == "knockout" else log(self.edit.factor)
        where: dict[str, Any] = {name: self.edit.options()[name] for name in ("layers", "heads")}
        with edit_attention(self.model, [rows], [list(query.evidence_positions)], bias, **where):
            return top_predictions(self.model, query, top=self.top)

    def _mask(self, plain: Sequence[AnsweredQuery]) -> tuple[pd.DataFrame, list[AnsweredQuery]]:
        places = self._places()
        rows, queries = [], []
        for one in plain:
            query, place = self.asked[one.direction], places.get(one.direction)
            found = mask_numbers(self.model, query, self.progress)
            changes = [found.get(str(at), float("nan")) - found["before"] for at in range(len(query.token_ids))]
            one = replace(one, by_token=np.array(changes))
            if self.edit.at is not None:
                rows.append(mask_row(one.direction, query, place, found))
                if place is not None:
                    read, likely = self._read(masked_at(self.model, query, place))
                    one = replace(one, edited=read, top_edited=likely)
            queries.append(one)
        return pd.DataFrame(rows, columns=COLUMNS), queries

    def _places(self) -> dict[str, int | None]:
        """The token to mask in each query: the one that was chosen, and its like in the other query."""
        chosen = self.edit.place
        if chosen is None:
            return {}
        direction, place = chosen
        if direction not in self.asked:
            raise RevprobeError(f"no {direction} query here: expected {' or '.join(self.asked)}")
        query = self.asked[direction]
        masked_at(self.model, query, place)  # says why it cannot be
        found: dict[str, int | None] = {direction: place}
        for other, theirs in self.asked.items():
            if other != direction:
                found[other] = counterpart(theirs, query.token_ids[place])
        return found

    def _swap(self, plain: Sequence[AnsweredQuery]) -> tuple[pd.DataFrame, list[AnsweredQuery]]:
        assert self.edit.evidence is not None, "asked for before"
        rows, queries = [], []
        for one in plain:
            query, tokens = self.asked[one.direction], self.edit.evidence[one.direction]
            rows.append(swap_row(self.model, one.direction, query, tokens, self.progress))
            read, likely = self._read(with_evidence(query, tokens))
            queries.append(replace(one, edited=read, top_edited=likely))
        return pd.DataFrame(rows, columns=COLUMNS), queries


def evidence_of(pair: ReversalPair, other: ReversalPair) -> dict[str, tuple[int, ...]]:
    """The evidence of another pair, for each direction of this one."""
    if pair.forward == pair.reverse:
        return {"query": other.forward.evidence}
    return {"forward": other.forward.evidence, "reverse": other.reverse.evidence}
