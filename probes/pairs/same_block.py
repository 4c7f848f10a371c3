"""Pairs whose target and evidence stand in one block, so that a model that writes in blocks sees both ways.

Tokens are put before a query until the target, its readout row and the evidence share a block: as few as it takes, and
none where they share one already. Letters get placeholders, which stand everywhere else in them; text gets the model's
begin token, or what ends a text before it. Distances stay as they are; how many were put there stands in the columns
`filled_forward` and `filled_reverse`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...errors import RevprobeError
from ...models.probed import ProbedModel
from .pairs import ReversalPairs
from .query import Query
from .token_strings import token_strings


def in_one_block(pairs: ReversalPairs, model: ProbedModel, filler: int) -> ReversalPairs:
    """The pairs, and those of each probe's own list, with both queries of each inside one block of the model.

    Where every token sees every other the whole text is one block, and nothing is put anywhere.
    Raises: RevprobeError, for a causal model, and when a pair spans more tokens than a block has.
    """
    if model.objective == "causal":
        raise RevprobeError(
            f"same_block=True for {model.name}, a causal model, which reads token by token; leave it out, or ask a "
            "masked model"
        )
    if model.block_size is not None:
        _require_room(pairs, model, model.block_size)
    counts = np.array([_missing(query, model) for query in pairs.queries])
    moved = tuple(_behind(query, [filler] * count) for query, count in zip(pairs.queries, counts, strict=True))
    flags = dict(pairs.flags) | {"filled_forward": counts[pairs.forward], "filled_reverse": counts[pairs.reverse]}
    if "too_long" in flags and model.max_length is not None:
        long = np.array([len(query.token_ids) > model.max_length for query in moved])
        flags["too_long"] = flags["too_long"] | long[pairs.forward] | long[pairs.reverse]
    said = token_strings(pairs.tokenizer, [filler]) if counts.any() else {}
    own = {name: in_one_block(part, model, filler) for name, part in pairs.by_probe.items()}
    return replace(pairs, queries=moved, flags=flags, tokens={**pairs.tokens, **said}, by_probe=own)


def text_filler(model: ProbedModel) -> int:
    """The token that fills before a text: the begin token, else what ends or pads one.

    Raises: RevprobeError, when the model has none of them.
    """
    named = (getattr(model.tokenizer, f"{role}_token_id", None) for role in ("eos", "pad"))
    found = next((token for token in (model.begin_token_id, *named) if token is not None), None)
    if found is None:
        raise RevprobeError(
            f"same_block=True, but {model.name} has no begin, end or padding token to put before a text; pass "
            "begin_token_id= to load_model or ProbedModel"
        )
    return int(found)


def _span(query: Query, shift: int) -> tuple[int, int]:
    """The first and the last position that must share a block, the first readout row included; it may be -1."""
    places = [*query.target_positions, *query.evidence_positions]
    return min(query.target_positions[0] - shift, *places), max(places)


def _missing(query: Query, model: ProbedModel) -> int:
    """How many tokens must stand before a query."""
    first, last = _span(query, model.logit_shift)
    size = model.block_size
    if size is None or (first >= 0 and first // size == last // size):
        return 0
    # Any fewer leave the first in the block it is in, and the last in a later one.
    return -first % size


def _behind(query: Query, before: list[int]) -> Query:
    count = len(before)
    target, evidence = ([p + count for p in part] for part in (query.target_positions, query.evidence_positions))
    return Query([*before, *query.token_ids], target, evidence) if count else query


def _require_room(pairs: ReversalPairs, model: ProbedModel, size: int) -> None:
    """Raises: RevprobeError, naming the longest span and the size."""
    ends = np.array([_span(query, model.logit_shift) for query in pairs.queries])
    widths = ends[:, 1] - ends[:, 0] + 1
    widest = np.maximum(widths[pairs.forward], widths[pairs.reverse])
    if (widest > size).any():
        place = int(widest.argmax())
        row = ", the row that predicts it included," if model.logit_shift else ""
        raise RevprobeError(
            f"same_block=True: target and evidence of {pairs.facts[place]!r}{row} span {widest[place]} tokens, more "
            f"than a block of {size} of {model.name} ({int((widest > size).sum())} of {len(pairs)} pairs do); read it "
            f"in larger blocks, model.in_blocks({widest[place]}), ask for shorter texts, or leave same_block out"
        )
