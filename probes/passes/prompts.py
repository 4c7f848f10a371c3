"""Which facts a model is shown as one prompt, and which cannot stand for one another in a control.

The target of a query is hidden. So "c1 | k3" and "c2 | k3", asked for c in one wording, are one input to a masked
model, and to a causal model, which sees what stands before the target: two facts, and one draw of what the model does.
They are drawn as one (`statistics.resampling.Facts`), by a flag of the pairs that every frame carries on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

import numpy as np

from ...models.probed import ProbedModel
from ..pairs.pairs import ReversalPairs
from ..pairs.query import Query
from ..statistics.resampling import SHOWN, Facts, kin
from .batches import prepare_queries

DIRECTIONS = ("forward", "reverse")


def with_prompts(model: ProbedModel, pairs: ReversalPairs) -> ReversalPairs:
    """The pairs with the flag `shown`, where some of their facts are shown to the model as one prompt.

    It is the label of the first of all facts that share a shown forward query, or a shown reverse query, directly or
    through others.
    """
    units = kin(pairs.facts, *shown_queries(model, pairs))
    shared = not np.array_equal(units, pairs.facts.astype(str))
    if not shared and SHOWN not in pairs.flags:
        return pairs
    flags = {name: values for name, values in pairs.flags.items() if name != SHOWN}
    return replace(pairs, flags=flags | ({SHOWN: units} if shared else {}))


def shown_queries(model: ProbedModel, pairs: ReversalPairs) -> tuple[list[Hashable], list[Hashable]]:
    """What the model is shown of each pair's forward and reverse query: token ids, and the places that are hidden.

    No number that the model makes of them, which may be equal by chance. A query whose evidence is out of sight of its
    rows has no number, and is one with no other, though all that is seen of it may be its template.
    Shapes: `-> pair, pair`.
    """
    # Blocks are counted from the first token that is run.
    queries = pairs.queries if model.block_size is None else prepare_queries(model, pairs.queries)
    shown = [_shown(model, query) or ("out of sight", place) for place, query in enumerate(queries)]
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


def facts_of(pairs: ReversalPairs) -> Facts:
    """The pairs' facts, and what is drawn of them, where `with_prompts` was asked. Shapes: `-> pair`."""
    return Facts.of(pairs.facts.astype(str), pairs.flags.get(SHOWN))


def unlike(pairs: ReversalPairs, directions: Iterable[str] = DIRECTIONS) -> np.ndarray:
    """Labels of facts, equal where one is no null of the other; a control takes another fact of another label.

    Facts that share a target or its evidence, or are shown as one prompt, directly or through others: what is right of
    the one is right of the other, or is one and the same number. Shapes: `-> pair`.
    Args:
        directions: those whose targets and evidence the control takes.
    """
    asked = [[pairs.queries[q] for q in getattr(pairs, side)] for side in directions]
    traits = [[getattr(query, part) for query in side] for side in asked for part in ("target", "evidence")]
    return kin(pairs.facts, facts_of(pairs).unit.tolist(), *traits)
