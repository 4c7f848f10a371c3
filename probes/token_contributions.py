"""The readout logit of one question by token: what each position adds to it through each head, a_ij S[v, x_j]."""

from __future__ import annotations

from typing import Any

import numpy as np
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
from .passes.decomposition import LinearizedBatch


@checked
def token_contributions(model: ProbedModel | nn.Module, question: ReversalPair | Query) -> pd.DataFrame:
    """What every visible position adds to the target's logit, through every head: one row per position and head.

    Columns: direction ("forward" and "reverse" of a pair, "query" of a single query); row (the readout row), target
    (the token asked for there); position, token (its id as the model is shown it: a target is the mask token); text,
    target_text (both tokens in letters, a blank as `␣`; the ids without a tokenizer); layer, head; weight (a_ij, the
    attention of the row on the position), stored (S[v, x_j] of that head, logits), contribution (logits, to the logit
    of that row's target).

    The contribution is a_ij S[v, x_j] plus what the position's value is made of besides its token: position vectors,
    norms' centring and biases, and, beyond the first layer, what earlier layers wrote there. In a model that has none
    of them it is weight x stored. Summed over positions, layers and heads, and averaged over rows, the contributions
    are those of "evidence" and "others" of `probe_stored_evidence`. Positions that the mask hides from a row are left
    out. Where a begin token is put before the query it is position 0.

    Raises: RevprobeError, for anything but one pair or query, and as `probe_stored_evidence` for a model whose logit is
        no such sum.
    Source: paper Sec. 4.1: z_i[v] = sum_j a_ij S[v, x_j], with W_O and norms as they are on a real model.
    """
    model = as_probed(model)
    if isinstance(question, ReversalPair):
        require_same_tokens(model, ReversalPairs.from_pairs([question]))
        asked = {"forward": question.forward, "reverse": question.reverse}
    elif isinstance(question, Query):
        asked = {"query": question}
    else:
        raise RevprobeError(f"expected one pair or query, got {type(question).__name__}; pass pairs[0] or a Query")
    queries = prepare_queries(model, list(asked.values()))
    tables = []
    with untouched(model.module):
        for direction, query in zip(asked, queries, strict=True):
            tables.append(_of_query(model, query).assign(direction=direction))
    table = pd.concat(tables, ignore_index=True)
    return table[["direction", *table.columns.drop("direction")]]


def _of_query(model: ProbedModel, query: Query) -> pd.DataFrame:
    batch, tables = make_batch(model, [query]), []
    rows, targets, shown = batch.rows[0].cpu(), batch.targets[0].cpu(), batch.input_ids[0].cpu()
    texts = [np.array(token_texts(ids.tolist(), model.tokenizer), dtype=object) for ids in (shown, targets)]
    for call, shares in LinearizedBatch.run(model, batch).by_position():
        weight = call.weight[0].double()  # head row position
        whole = torch.stack(list(shares.values())).sum(0)[0] * weight
        head, row, position = (index.cpu() for index in torch.nonzero(~call.hidden[0].expand_as(weight), as_tuple=True))
        at = lambda values: values.cpu()[head, row, position].numpy()  # noqa: B023, E731
        columns: dict[str, Any] = {"row": rows[row].numpy(), "target": targets[row].numpy()}
        columns |= {"position": position.numpy(), "token": shown[position].numpy()}
        columns |= {"text": texts[0][position.numpy()], "target_text": texts[1][row.numpy()]}
        columns |= {"layer": call.layer, "head": call.first_head + head.numpy(), "weight": at(weight)}
        tables.append(pd.DataFrame(columns | {"stored": at(shares["token"][0]), "contribution": at(whole)}))
    return pd.concat(tables, ignore_index=True)
