"""The gradient with respect to the stored-evidence matrix S of a one-layer model, which is no parameter.

With z = sum_j a_j S[:, x_j] the gradient of a query's loss is an outer product, dL/dS = (p - 1_v) (x) m, where p is
the predicted distribution, v the target and m[u] the attention mass on token u. So its cosine between two queries is
a product of two (App. C.1): that of the prediction errors p - 1_v, and that of the attention masses m. With several
heads S has a block per head and the masses are joined; a target of several tokens sums its outer products.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ...arguments import checked
from ...errors import RevprobeError
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel, as_probed
from ...models.structure import attention_of
from ...progress import Progress, counted, shows_progress
from ..pairs.pairs import ReversalPairs
from ..pairs.query import Query
from ..passes.alone import in_equal_lengths_if_need_be
from ..passes.asked import asked_pairs, out_of_sight, require_one_entry
from ..passes.batches import in_batches, logits_at_rows, make_batch, prepare_queries, queries_per_batch, tapped
from ..statistics.estimators import LATER_BLOCK


@checked
@shows_progress("batches")
def storage_gradient_cosines(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    batch_size: int | None = None,
    progress: Progress | bool | None = None,
) -> pd.DataFrame:
    """The two cosines whose product is the cosine of the gradients with respect to S, for every pair.

    Args:
        progress: called with (batches done, batches in all); None shows a bar, False nothing.
    Returns: one row per pair: pair, fact, cosine, cosine_error (of p - 1_v), cosine_attention (of m); of a model that
        is read in blocks also reason, why they are NaN.
    Raises: RevprobeError, when the model has not exactly one attention layer, a target has several tokens, or the
        pairs are of kind "swapped" (S couples one target with one evidence token).
    Source: paper Sec. 4.3 (Thm 4.6) and App. C.1.
    """
    model = as_probed(model)
    model.require_mask_token("the stored-evidence matrix")
    pairs = asked_pairs(model, pairs, "storage_gradient")
    require_one_entry(pairs)
    if any(len(query.target_positions) > 1 for query in pairs.queries):
        raise RevprobeError("a target of several tokens has no single prediction error; use single-token targets")
    prepared = prepare_queries(model, pairs.queries)  # a begin token is one of those that S has a column for
    queries = [Query.unchecked(q.token_ids, q.target_positions, range(len(q.token_ids))) for q in prepared]
    size = queries_per_batch(model, queries, batch_size)

    def run() -> tuple[list[list[int]], list[tuple[Tensor, Tensor]]]:
        with untouched(model.module), torch.no_grad():
            batches = list(in_batches(model, range(len(queries)), size, lambda q: len(queries[q].token_ids)))
            return batches, [_factors(model, [queries[q] for q in batch]) for batch in counted(batches, progress)]

    batches, parts = in_equal_lengths_if_need_be(model, run)
    place = torch.tensor([q for batch in batches for q in batch]).argsort()
    forward, reverse = place[torch.as_tensor(pairs.forward)], place[torch.as_tensor(pairs.reverse)]
    of_error, of_mass = (
        torch.nn.functional.cosine_similarity(values[forward], values[reverse], dim=-1).numpy()
        for values in map(torch.cat, zip(*parts, strict=True))
    )
    columns = {"pair": np.arange(len(pairs)), "fact": pairs.facts.astype(str), "cosine": of_error * of_mass}
    table = pd.DataFrame(columns | {"cosine_error": of_error, "cosine_attention": of_mass})
    if model.block_size is None:
        return table
    unseen = out_of_sight(model, prepared)
    later = unseen[pairs.forward] | unseen[pairs.reverse]
    table.loc[later, ["cosine", "cosine_error", "cosine_attention"]] = np.nan
    return table.assign(reason=np.where(later, LATER_BLOCK, ""))


def _factors(model: ProbedModel, queries: list[Query]) -> tuple[Tensor, Tensor]:
    """p - 1_v and the attention mass per token of each query. Shapes: `query vocab, query (head vocab)`, float64."""
    attention = attention_of(model)
    batch = make_batch(model, queries, attention=attention)
    with tapped(model, batch, attention) as tap:
        logits = logits_at_rows(model, batch)
    layers = tap.layers(model.name)
    if len(layers) != 1:
        raise RevprobeError(f"{model.name} has {len(layers)} attention layers; S is defined for one")
    probability = logits[:, 0].double().softmax(-1)
    error = probability - torch.nn.functional.one_hot(batch.targets[:, 0], probability.shape[-1])
    (call,) = layers.values()
    weight = call.weight[:, :, 0].double().masked_fill(~batch.is_evidence[:, None], 0.0)  # query head seq
    shown = batch.input_ids.gather(1, batch.columns)[:, None].expand_as(weight)
    mass = weight.new_zeros(*weight.shape[:2], model.vocab_size).scatter_add_(2, shown, weight)
    return error.cpu(), mass.flatten(1).cpu()
