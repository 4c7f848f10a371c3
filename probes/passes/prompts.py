"""Which facts share the prompts that a model is shown, and which cannot stand for one another in a control.

The target of a query is hidden. So "c1 | k3" and "c2 | k3", asked for c in one wording, are one input to a masked
model, and to a causal model, which sees what stands before the target: two facts, and one draw of what the model does.
They are drawn as one (`statistics.resampling.Facts`), by flags of the pairs that every frame carries on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

import numpy as np

from ...models.probed import ProbedModel
from ..pairs.pairs import ReversalPairs
from ..pairs.query import Query
from ..statistics.partners import PARTNER
from ..statistics.resampling import SHOWN, SHOWN_COLUMNS, SHOWN_IN, Facts, Rights, derangement, kin
from .batches import prepare_queries

DIRECTIONS = ("forward", "reverse")


def with_prompts(model: ProbedModel, pairs: ReversalPairs) -> ReversalPairs:
    """The pairs with the flags `shown`, `shown_forward` and `shown_reverse`, where some of their facts share a prompt.

    Each is the label of the first of all facts that share a shown query, directly or through others: in either
    direction, which is what numbers of both directions draw, and in the one that is named.
    """
    sides = shown_queries(model, pairs)
    units = {SHOWN: kin(pairs.facts, *sides)}
    shared = not np.array_equal(units[SHOWN], pairs.facts.astype(str))
    own = (*SHOWN_COLUMNS, PARTNER)
    if not shared and not any(name in pairs.flags for name in own):
        return pairs
    flags = {name: values for name, values in pairs.flags.items() if name not in own}
    if shared:
        units |= {name: kin(pairs.facts, side) for name, side in zip(SHOWN_IN.values(), sides, strict=True)}
    return replace(pairs, flags=flags | (units if shared else {}))


def shown_queries(model: ProbedModel, pairs: ReversalPairs, *, first: int = 0) -> tuple[list[Hashable], list[Hashable]]:
    """What the model is shown of each pair's forward and reverse query: token ids, and the places that are hidden.

    No number that the model makes of them, which may be equal by chance. A query whose evidence is out of sight of its
    rows has no number, and is one with no other, though all that is seen of it may be its template.
    Shapes: `-> pair, pair`.
    Args:
        first: queries of other parts of a list, whose numbers come before these.
    """
    # Blocks are counted from the first token that is run.
    queries = pairs.queries if model.block_size is None else prepare_queries(model, pairs.queries)
    shown = [_shown(model, query) or ("out of sight", place) for place, query in enumerate(queries, start=first)]
    forward, reverse = ([shown[q] for q in getattr(pairs, side)] for side in DIRECTIONS)
    return forward, reverse


def _shown(model: ProbedModel, query: Query) -> Hashable:
    """None where the evidence is out of sight."""
    sight, hidden = in_sight(model, query), set(query.target_positions)
    if query.evidence_positions[-1] not in sight:
        return None
    tokens = tuple(-1 if place in hidden else query.token_ids[place] for place in sight)
    return tokens, query.canvas_start


def in_sight(model: ProbedModel, query: Query) -> range:
    """The positions that all readout rows of a query (as it is run) may see: all, or those up to the end of a block."""
    # A causal model reads in blocks of one.
    size = 1 if model.objective == "causal" else model.block_size
    length, row = len(query.token_ids), query.target_positions[0] - model.logit_shift
    return range(length if size is None else min(length, (row // size + 1) * size))


def facts_of(pairs: ReversalPairs, direction: str | None = None) -> Facts:
    """The pairs' facts, and what is drawn of them, where `with_prompts` was asked. Shapes: `-> pair`.

    Args:
        direction: of the number, "forward" or "reverse"; of both where None.
    """
    return Facts.of(pairs.facts.astype(str), pairs.flags.get(SHOWN if direction is None else SHOWN_IN[direction]))


def null_partners(
    pairs: ReversalPairs, groups: np.ndarray, directions: Iterable[str] = DIRECTIONS, *, seed: int = 0
) -> np.ndarray:
    """For each pair one of another fact of its group that is a null of it; -1 where there is none.

    The two share neither target nor evidence nor prompt, and the target of the one is not among what some fact of the
    list holds for right at the evidence, or at the prompt, of the other. It is the next such pair along the one order
    of `derangement`: where no facts share anything, that is what `derangement` gives.
    Shapes: `pair -> pair` (indices).
    Args:
        groups: within which partners are sought.
        directions: those whose targets and evidence the control takes.
    """
    facts, rights = pairs.facts.astype(str), []
    for side in directions:
        asked = [pairs.queries[q] for q in getattr(pairs, side)]
        targets = [(query.target,) for query in asked]
        rights += [Rights.of(facts, targets, [query.evidence for query in asked])]
        rights += [Rights.of(facts, targets, [_hidden(query) for query in asked])]
    return derangement(facts, groups, seed=seed, rights=rights)


def _hidden(query: Query) -> Hashable:
    """The query with its target hidden, as far as pairs can say; what of it a model sees may be less."""
    hidden = set(query.target_positions)
    return tuple(-1 if place in hidden else token for place, token in enumerate(query.token_ids))
