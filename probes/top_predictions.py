"""What a model would say at a target's place of one question: its likeliest tokens, and where the right one stands."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import nn

from ..arguments import checked
from ..errors import RevprobeError
from ..hooks.untouched import untouched
from ..models.probed import ProbedModel, as_probed
from .pairs.display import token_texts
from .pairs.pairs import ReversalPairs
from .pairs.query import Query, ReversalPair
from .passes.asked import require_same_tokens
from .passes.batches import make_batch, prepare_queries
from .passes.likelihood import readout


@checked
def top_predictions(model: ProbedModel | nn.Module, question: ReversalPair | Query, *, top: int = 10) -> pd.DataFrame:
    """The likeliest tokens at each target's place of one question.

    A masked model sees all targets hidden at once, and the probabilities are the factors of
    `probe_reverse_probability(mode="parallel")`. A causal model hides nothing: each place is read behind the clean
    tokens before it, those of a target of several among them, and the probabilities are the factors of
    `mode="chain"`. Inside `with rp.edit_attention(...)` they are those of the edited model: see `probe_route_edit` for
    what an edit does to many pairs.

    Columns: direction ("forward" and "reverse" of a pair, "query" of a single query); position (the target's, in the
    sequence that the model is given: where a begin token is put before the query it is position 0), target (the token
    id asked for there), target_text; rank (1 is the likeliest; ties in the order of token ids), token, text (in
    letters, a blank as `␣`; the id without a tokenizer), probability, log_probability (nats), is_target. The right
    token has a row of its own below the others where it is not among them, with the rank it has.

    Args:
        top: how many tokens for each place.
    Raises: RevprobeError, for anything but one pair or query, fewer than one token, NaN logits, and a model that hides
        tokens behind random ones.
    """
    model = as_probed(model)
    if top < 1:
        raise RevprobeError(f"top={top!r}: expected at least 1 token for each place")
    if isinstance(question, ReversalPair):
        require_same_tokens(model, ReversalPairs.from_pairs([question]))
        asked = {"forward": question.forward, "reverse": question.reverse}
    elif isinstance(question, Query):
        asked = {"query": question}
    else:
        raise RevprobeError(f"expected one pair or query, got {type(question).__name__}; pass pairs[0] or a Query")
    queries = prepare_queries(model, list(asked.values()))
    rows: list[dict[str, Any]] = []
    with untouched(model.module), torch.no_grad():
        for direction, query in zip(asked, queries, strict=True):
            rows += [{"direction": direction, **row} for row in _of_query(model, query, top)]
    frame = pd.DataFrame(rows)
    for name, tokens in (("text", "token"), ("target_text", "target")):
        frame[name] = [token_texts([token], model.tokenizer)[0] for token in frame[tokens]]
    order = ["direction", "position", "target", "target_text", "rank", "token", "text"]
    return frame[[*order, "probability", "log_probability", "is_target"]]


def _of_query(model: ProbedModel, query: Query, top: int) -> list[dict[str, Any]]:
    log_probabilities = readout(model, make_batch(model, [query]))[0]
    rows = []
    for position, target, values in zip(query.target_positions, query.target, log_probabilities, strict=True):
        order = values.sort(descending=True, stable=True).indices.tolist()
        chosen = order[:top] if target in order[:top] else [*order[:top], target]
        for token in chosen:
            value = float(values[token])
            row = {"position": position, "target": target, "rank": 1 + order.index(token), "token": token}
            row |= {"probability": float(values[token].exp()), "log_probability": value, "is_target": token == target}
            rows.append(row)
    return rows
