"""Pairs from text: a table of facts and a template per direction become forward and reverse queries.

A masked model is asked for the target in both directions. A causal model is asked, in each direction, for what its
template names last (see `pairs_from_frame`). Either way the target and the evidence must be the same tokens in both
directions, or a reading would compare the storage of different tokens. Nothing is dropped unless asked for by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from ...models.probed import ProbedModel, as_probed
from .fact_rows import TextRow, read_rows
from .pairs import ReversalPairs
from .query import Query, ReversalPair
from .same_block import in_one_block, text_filler
from .spans import REFUSALS, Encoded, SpanError, encode_texts, entity_positions, require_fast_tokenizer
from .templates import ROLES, Filled, Template, pair_templates

DROPPABLE = (*REFUSALS, "shares_tokens", "too_long", "duplicate_fact")
CARRIER = "Fact: "  # the one that errors suggest

Phrasing = tuple[Template, Template]


@checked
def pairs_from_frame(
    frame: pd.DataFrame,
    *,
    forward: str | Sequence[str],
    reverse: str | Sequence[str],
    target: str = "target",
    evidence: str = "evidence",
    model: ProbedModel | nn.Module,
    carrier: str = "",
    fact: str | None = None,
    drop: str | Iterable[str] = (),
    allow_different_tokens: bool = False,
    same_block: bool = False,
    tokenizer: Any = None,
) -> ReversalPairs:
    """Forward and reverse queries for every row of a table.

        pairs_from_frame(
            df, forward="{target}'s child is {evidence}", reverse="{evidence}'s parent is {target}",
            target="parent", evidence="child", model=model, carrier="Fact: ",
        )

    A masked model gets kind "same_target": both queries ask for the target, given the evidence. A causal model sees
    only what comes before, so each of its queries asks for what its template names last, given what it names first:
    with the templates above the child given the parent forward, the parent given the child in reverse (kind
    "swapped"). Its queries end with the last token asked for; the model never sees what a template says after it.
    Special tokens that the tokenizer adds in front ([CLS], <s>) stay in the query.

    Args:
        frame: one row per fact; the columns used must hold text.
        forward, reverse: a template per direction, or lists of them: paired one by one, a single one with all of the
            other side. Slots are {target} and {evidence}, once each (their columns' names will do), and any column.
            The order of the two in forward and reverse templates must be opposite.
        target, evidence: the columns of the two entities.
        model: its tokenizer makes the tokens, its objective decides the kind, its context the flag `too_long`.
        carrier: literal text before every template. In byte-level BPE a name that starts a text is not the token it
            is after a space; behind a carrier such as "Fact: " no name starts the text.
        fact: the column that labels facts (intervals are over them); by default "target | evidence".
        drop: leave out pairs by flag (shares_tokens, too_long, duplicate_fact) or instead of an error
            (different_tokens, ambiguous_span, straddling_span, unreadable_span, special_token); counted in `.report`.
        allow_different_tokens: keep pairs whose target or evidence is not the same tokens in both directions. They
            are marked in the column `different_tokens`; bounds and the stored-evidence matrix do not apply to them.
        same_block: put begin tokens before a text until target and evidence share a block of the model as it is read
            (`model.block_size`), so that it sees both ways; see the columns `filled_forward`, `filled_reverse`. Where
            every token sees every other there is nothing to do.
        tokenizer: where the model has none, or instead of its own; a folder or hub name to read it from will do.
    Returns: the pairs, with the flags `shares_tokens` (target and evidence have a token in common), `too_long` (for
        the model's context), `duplicate_fact` (target and evidence are an earlier row's, as text or as tokens),
        `different_tokens`, and the column `template` (its place in the lists).
    Raises: RevprobeError, for a template, column or cell that cannot be used, and for entities whose tokens cannot be
        told or differ between the directions; it names the first row and counts the others.
    """
    roles = {"target": target, "evidence": evidence}
    drop = _known_drops(drop, allow_different_tokens)
    phrasings = pair_templates(forward, reverse, columns=_columns(frame), roles=roles)
    slots = {slot for pair in phrasings for template in pair for slot in template.slots}
    rows = read_rows(frame, {slot: roles.get(slot, slot) for slot in sorted(slots)}, fact)
    model = as_probed(model, tokenizer)
    pairs = _Builder(model, carrier, allow_different_tokens).build(rows, phrasings, drop)
    return in_one_block(pairs, model, text_filler(model)) if same_block else pairs


@checked
def pair_from_text(
    forward: str,
    reverse: str,
    *,
    target: str,
    evidence: str,
    model: ProbedModel | nn.Module,
    slots: Mapping[str, str] | None = None,
    carrier: str = "",
    fact: str = "",
    allow_different_tokens: bool = False,
    same_block: bool = False,
    tokenizer: Any = None,
) -> ReversalPair:
    """One pair from two templates such as "{target}'s child is {evidence}", aligned by the model's tokenizer.

    `slots` fills further slots; the rest is as in `pairs_from_frame`, which makes many pairs from a table.
    Raises: RevprobeError, as `pairs_from_frame` does.
    """
    row = pd.DataFrame([{**(slots or {}), "target": target, "evidence": evidence}])
    options: dict[str, Any] = {"carrier": carrier, "allow_different_tokens": allow_different_tokens}
    options |= {"same_block": same_block, "tokenizer": tokenizer}
    pair = pairs_from_frame(row, forward=forward, reverse=reverse, model=model, **options)[0]
    return replace(pair, fact=fact) if fact else pair


@dataclass(frozen=True)
class _Task:
    """One pair to be built: a row, the place of its templates in the lists, and its two texts."""

    row: TextRow
    template: int
    sides: tuple[Filled, Filled]


class _Builder:
    """What stays the same from row to row: the model, its tokenizer and the caller's choices."""

    def __init__(self, model: ProbedModel, carrier: str, allow_different_tokens: bool) -> None:
        if not isinstance(carrier, str):
            raise RevprobeError(f"carrier {carrier!r} is {type(carrier).__name__}, expected text such as {CARRIER!r}")
        self.model, self.carrier, self.allow = model, carrier, allow_different_tokens
        self.tokenizer = require_fast_tokenizer(model, can_be_given=True)

    def build(self, rows: list[TextRow], phrasings: list[Phrasing], drop: tuple[str, ...]) -> ReversalPairs:
        """Encode every text once, align, then flag and drop."""
        tasks = [
            _Task(row, place, (first.fill(row.values, self.carrier), second.fill(row.values, self.carrier)))
            for row in rows
            for place, (first, second) in enumerate(phrasings)
        ]
        texts = list(dict.fromkeys(side.text for task in tasks for side in task.sides))
        encoded = dict(zip(texts, encode_texts(self.tokenizer, texts), strict=True))
        kept: list[tuple[_Task, ReversalPair]] = []
        refused: list[tuple[_Task, SpanError]] = []
        for task in tasks:
            try:
                kept.append((task, self._pair(task, encoded)))
            except SpanError as error:
                refused.append((task, error))
        wrong = [(task, error) for task, error in refused if error.reason not in drop]
        if wrong:
            task, first = wrong[0]
            if len(tasks) == 1:  # the caller has the pair in hand, pair_from_text above all
                raise first
            counts = Counter(error.reason for _, error in wrong)
            among = ", ".join(f"{count} x {reason}" for reason, count in counts.items())
            among += f" among {len(tasks)} pairs; drop={list(counts)!r} leaves them out and counts them"
            raise SpanError(first.reason, f"{task.row.label}: {first} ({among})")
        dropped = Counter(error.reason for _, error in refused)
        if not kept:
            raise RevprobeError(f"all {len(tasks)} pairs were dropped: {dict(dropped)}; ask for fewer drops")
        return self._flag_and_drop(kept, drop, dropped)

    def _pair(self, task: _Task, encoded: Mapping[str, Encoded]) -> ReversalPair:
        """Align one pair. Raises: SpanError, when a span cannot be told or the directions differ in tokens."""
        texts = [encoded[side.text] for side in task.sides]
        places = [
            {role: entity_positions(self.tokenizer, text, side, role) for role in ROLES}
            for text, side in zip(texts, task.sides, strict=True)
        ]
        ids = [{r: [text.token_ids[p] for p in at[r]] for r in ROLES} for text, at in zip(texts, places, strict=True)]
        if any(side["target"] == side["evidence"] for side in ids):
            pieces = list(texts[0].pieces)
            raise SpanError("ambiguous_span", f"target and evidence are the same tokens in {pieces}; leave the row out")
        differ = ids[0] != ids[1]
        if differ and not self.allow:
            self._raise_difference(task, texts, places)
        forward, reverse = (self._query(text, at) for text, at in zip(texts, places, strict=True))
        kind = "swapped" if self.model.objective == "causal" else "same_target"
        return ReversalPair(forward, reverse, kind, task.row.fact, differ)

    def _query(self, text: Encoded, places: Mapping[str, list[int]]) -> Query:
        if self.model.objective == "masked":
            return Query(text.token_ids, places["target"], places["evidence"])
        given, asked = sorted(places.values())
        # What follows the answer is hidden from a causal model; left in, the table would claim that it was asked.
        return Query(text.token_ids[: asked[-1] + 1], asked, given)

    def _raise_difference(self, task: _Task, texts: list[Encoded], places: list[dict[str, list[int]]]) -> None:
        shown = [{r: [t.pieces[p] for p in at[r]] for r in ROLES} for t, at in zip(texts, places, strict=True)]
        role = next(r for r in ROLES if shown[0][r] != shown[1][r])
        remedy = (
            f"the carrier {self.carrier!r} does not help here, so put a space before both slots in every template"
            if self.carrier
            else f"put a carrier before both templates, carrier={CARRIER!r}, so that no name starts the text"
        )
        raise SpanError(
            "different_tokens",
            f"the {role} {task.row.values[role]!r} is {shown[0][role]} forward and {shown[1][role]} in reverse, but "
            f"must be the same tokens in both directions; {remedy}; or keep and mark such "
            "pairs with allow_different_tokens=True",
        )

    def _flag_and_drop(
        self, kept: list[tuple[_Task, ReversalPair]], drop: tuple[str, ...], dropped: Counter[str]
    ) -> ReversalPairs:
        pairs = ReversalPairs.from_pairs([pair for _, pair in kept], tokenizer=self.tokenizer)
        facts = [(task.row.values["target"], task.row.values["evidence"], task.template) for task, _ in kept]
        # An uncased tokenizer reads "Ann" and "ANN" alike: one fact in two spellings.
        read = [(task.template, *((q.target, q.evidence) for q in (p.forward, p.reverse))) for task, p in kept]
        shares = np.array([bool(set(q.target) & set(q.evidence)) for q in pairs.queries])
        long = self._too_long(pairs.queries)
        flags = {
            "shares_tokens": shares[pairs.forward] | shares[pairs.reverse],
            "too_long": long[pairs.forward] | long[pairs.reverse],
            "duplicate_fact": np.logical_or(*(pd.Series(some).duplicated().to_numpy(bool) for some in (facts, read))),
            "different_tokens": np.array([pair.different_tokens for _, pair in kept]),
            "template": np.array([task.template for task, _ in kept]),
        }
        keep = np.ones(len(pairs), dtype=bool)
        for name in (name for name in drop if name in flags):
            dropped[name] += int((keep & flags[name]).sum())
            keep &= ~flags[name]
        if not keep.any():
            raise RevprobeError(f"all pairs were dropped: {dict(+dropped)}; ask for fewer drops")
        return replace(pairs, flags=flags, dropped=dict(+dropped)).take(np.flatnonzero(keep))

    def _too_long(self, queries: Sequence[Query]) -> np.ndarray:
        """Whether each query exceeds the model's context, the begin token that probes will add included."""
        lengths = np.array([len(q.token_ids) for q in queries])
        begins = bool(self.model.logit_shift) and any(q.target_positions[0] == 0 for q in queries)
        added = np.array([int(begins or self.model.wants_begin(q.token_ids)) for q in queries])
        limit = self.model.max_length
        return np.zeros(len(queries), dtype=bool) if limit is None else lengths + added > limit


def _columns(frame: Any) -> list[str]:
    return [str(column) for column in frame.columns] if isinstance(frame, pd.DataFrame) else []


def _known_drops(drop: str | Iterable[str], allow_different_tokens: bool) -> tuple[str, ...]:
    names = (drop,) if isinstance(drop, str) else tuple(drop)
    for name in names:
        if name not in DROPPABLE:
            raise RevprobeError(f"cannot drop {name!r}{did_you_mean(name, DROPPABLE)}")
    if allow_different_tokens and "different_tokens" in names:
        raise RevprobeError("different_tokens cannot be both allowed and dropped; choose one")
    return names
