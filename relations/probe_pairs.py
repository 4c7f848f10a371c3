"""Probe pairs of a relation: its statements, forward and reverse, aligned to a model's tokens."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from ..errors import RevprobeError, did_you_mean
from ..models.probed import ProbedModel
from ..probes.pairs.pairs import ReversalPairs
from ..probes.pairs.query import KINDS, Query
from ..probes.pairs.same_block import in_one_block, text_filler
from ..probes.pairs.spans import SpanError, require_fast_tokenizer
from ..probes.pairs.text import pairs_from_frame
from ..probes.pairs.token_strings import joined_strings
from .cells import shown
from .spelling import plain_name
from .statements import Statement, slot_source

Wording = tuple[str, str]


def make_pairs(
    table: pd.DataFrame,
    columns: Sequence[str],
    forward: Sequence[Statement],
    reverse: Sequence[Statement],
    model: ProbedModel,
    *,
    kind: str | None,
    swap: bool,
    carrier: str,
    drop: str | Iterable[str],
    same_block: bool = False,
) -> ReversalPairs:
    """Pairs of each fact's forward statements with its reverse ones.

    Args:
        columns: target and evidence: the forward direction names the target first.
        swap: whether the relation's own first column is the evidence here.
    Raises: RevprobeError, as `TextRelation.pairs` says.
    """
    kind = _known_kind(kind, model)
    drop = (drop,) if isinstance(drop, str) else tuple(drop)
    require_entities_fit(table.loc[sorted({one.fact for one in forward})], columns, model)
    align = partial(pairs_from_frame, target=columns[0], evidence=columns[1], model=model, carrier=carrier, fact="fact")
    groups, unpaired = _group(forward, reverse, swap)
    parts, dropped = [], Counter(no_wording=unpaired)
    for (first, second), members in groups.items():
        frame = table.loc[[fact for fact, _ in members]]
        worded = partial(align, forward=first, reverse=second)
        try:
            part = worded(frame, drop=drop)
        except RevprobeError:
            reasons = _reasons(frame, worded, drop)
            if reasons.total() < len(frame):
                raise
            dropped.update(reasons)
            continue
        template_of = {table.at[fact, "fact"]: template for fact, template in members}
        numbers = np.array([template_of[fact] for fact in part.facts])
        parts.append(replace(part, flags={**part.flags, "template": numbers}))
    if not parts:
        raise RevprobeError(
            f"no pair of {len(forward)} statements could be made: {dict(+dropped)}; drop=() tells the first of them "
            "in full"
        )
    pairs = _as_kind(_joined(parts, dropped), kind)
    return in_one_block(pairs, model, text_filler(model)) if same_block else pairs


def require_entities_fit(facts: pd.DataFrame, columns: Sequence[str], model: ProbedModel) -> None:
    """Raises: RevprobeError, naming row and column, for an entity of more tokens than the model's context."""
    tokenizer = require_fast_tokenizer(model)
    if model.max_length is None:
        return
    for column in columns:
        names = facts[column].tolist()
        ids = tokenizer(names, add_special_tokens=False, verbose=False)["input_ids"]
        for place, tokens in enumerate(ids):
            if len(tokens) > model.max_length:
                raise RevprobeError(
                    f"{facts['row'].iloc[place]}: column {column!r} holds an entity of {len(tokens)} tokens, longer "
                    f"than the {model.max_length} that {model.name} takes ({names[place][:40]!r}...); leave the row out"
                )


def require_texts_fit(texts: Sequence[tuple[str, str]], model: ProbedModel) -> None:
    """Raises: RevprobeError, naming the row, for a text (row, text) of more tokens than the model's context."""
    tokenizer = require_fast_tokenizer(model)
    if model.max_length is None:
        return
    ids = tokenizer([text for _, text in texts], verbose=False)["input_ids"]
    for (row, text), tokens in zip(texts, ids, strict=True):
        if len(tokens) > model.max_length:
            raise RevprobeError(
                f"{row}: the training text {text[:60]!r}... has {len(tokens)} tokens, more than the {model.max_length} "
                f"that {model.name} takes; leave the row out, or shorten the template"
            )


def warn_of_names_read_alike(
    table: pd.DataFrame, columns: Sequence[str], model: ProbedModel, name: str, *, ignore_case: bool
) -> None:
    """Warn when the tokenizer gives two names the same tokens, as one without case or accents does.

    To such a model they are one name, which the split has not kept on one side.
    """
    if model.tokenizer is None:
        return
    for column in columns:
        names = list(dict.fromkeys(table[column]))
        first: dict[tuple[int, ...], str] = {}
        alike = []
        ids = model.tokenizer(names, add_special_tokens=False, verbose=False)["input_ids"]
        for one, tokens in zip(names, ids, strict=True):
            other = first.setdefault(tuple(tokens), one)
            if plain_name(one, ignore_case=ignore_case) != plain_name(other, ignore_case=ignore_case):
                alike.append((other, one))
        if alike:
            warnings.warn(
                f"the tokenizer of {model.name} reads {shown(alike[0][0])} and {shown(alike[0][1])} of column "
                f"{column!r} as the same tokens ({len(alike)} such names), so a "
                f"held-out fact of {name} may be trained under another spelling; make the relation with "
                "ignore_case=True, or spell each name in one way",
                stacklevel=3,
            )


def _known_kind(kind: str | None, model: ProbedModel) -> str:
    own = "swapped" if model.objective == "causal" else "same_target"
    if kind is None:
        return own
    if kind not in KINDS:
        raise RevprobeError(f"unknown kind of pair {kind!r}{did_you_mean(kind, KINDS)}")
    if kind == "same_target" and own != kind:
        raise RevprobeError(f"{model.name} is causal: it can be asked for what comes last only, kind='swapped'")
    return kind


def _group(
    forward: Sequence[Statement], reverse: Sequence[Statement], swap: bool
) -> tuple[dict[Wording, list[tuple[int, int]]], int]:
    """Facts by the two wordings they are asked in, with the forward template's number; and how many have none."""
    backwards: dict[int, list[str]] = {}
    sources: dict[int, str] = {}

    def source(one: Statement) -> str:
        return sources.setdefault(id(one.wording), slot_source(one.wording, swap=swap))  # type: ignore[arg-type]

    for one in reverse:
        if one.wording is not None:
            backwards.setdefault(one.fact, []).append(source(one))
    groups: dict[Wording, list[tuple[int, int]]] = {}
    used: Counter[int] = Counter()
    unpaired = 0
    for one in forward:
        others = backwards.get(one.fact)
        if one.wording is None or not others:
            unpaired += 1
            continue
        wording = (source(one), others[used[one.fact] % len(others)])
        used[one.fact] += 1
        groups.setdefault(wording, []).append((one.fact, one.template))
    return groups, unpaired


def _reasons(frame: pd.DataFrame, align: Callable[..., ReversalPairs], drop: tuple[str, ...]) -> Counter[str]:
    """Why each row of a group was left out, when all were; a row with none of the reasons in `drop` has none here."""
    reasons: Counter[str] = Counter()
    for place in range(len(frame)):
        try:
            report = align(frame.iloc[[place]]).report
            reasons.update([name for name in drop if report.get(name)][:1])
        except SpanError as error:
            reasons.update([error.reason] if error.reason in drop else [])
    return reasons


def _joined(parts: Sequence[ReversalPairs], dropped: Counter[str]) -> ReversalPairs:
    """Lists of pairs as one, equal queries stored once, flags and counts kept."""
    index: dict[Query, int] = {}
    columns: dict[str, list[np.ndarray]] = {"forward": [], "reverse": []}
    for part in parts:
        places = np.array([index.setdefault(query, len(index)) for query in part.queries])
        columns["forward"].append(places[part.forward])
        columns["reverse"].append(places[part.reverse])
        dropped.update(part.dropped)
    return ReversalPairs(
        tuple(index),
        np.concatenate(columns["forward"]),
        np.concatenate(columns["reverse"]),
        np.concatenate([part.facts for part in parts]),
        parts[0].kind,
        {name: np.concatenate([part.flags[name] for part in parts]) for name in parts[0].flags},
        parts[0].tokenizer,
        dict(+dropped),
        joined_strings(part.tokens for part in parts),
    )


def _as_kind(pairs: ReversalPairs, kind: str) -> ReversalPairs:
    """Same-target pairs as swapped ones when asked: forward then asks for the evidence given the target."""
    if pairs.kind == kind:
        return pairs
    queries = list(pairs.queries)
    place_of = {}
    for i in np.unique(pairs.forward):
        query = queries[i]
        place_of[i] = len(queries)
        queries.append(Query(query.token_ids, query.evidence_positions, query.target_positions))
    forward = np.array([place_of[i] for i in pairs.forward])
    both = replace(pairs, queries=tuple(queries), forward=forward, kind=kind)
    return both.take(np.arange(len(both)))
