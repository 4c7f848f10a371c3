"""One query as a model reads it: its tokens, what its readout row attends to, and the evidence's scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...hooks.attention import tap_attention
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel
from ...models.structure import attention_of
from ...probes.pairs.display import token_texts
from ...probes.pairs.query import Query
from ...probes.passes.batches import make_batch
from ...probes.passes.likelihood import readout


@dataclass(frozen=True)
class ReadQuery:
    """One query as the model saw it, and where its readout row looked.

    Attributes:
        tokens: each token as text; the target's are what was hidden (a causal model reads before them).
        parts: "target", "evidence" or "" for each token.
        weights: by layer, attention weights of the readout row (mean over rows of a longer target), `head token`.
        scores: by layer, the pre-softmax score of the evidence (mean over readout rows and evidence tokens), `head`.
        probability: of all target tokens, hidden together.
    """

    tokens: list[str]
    parts: list[str]
    weights: dict[int, np.ndarray]
    scores: dict[int, np.ndarray]
    probability: float

    def weights_at(self, layer: int | None, head: int | None) -> np.ndarray | None:
        """The weights at a layer and head, the mean over all where None; None where that layer has no attention.

        Shapes: `-> token`.
        """
        chosen = list(self.weights.values()) if layer is None else [self.weights[layer]] * (layer in self.weights)
        if head is not None:
            chosen = [one for one in chosen if head < len(one)]
        return np.mean([one.mean(0) if head is None else one[head] for one in chosen], axis=0) if chosen else None


def read_query(model: ProbedModel, query: Query) -> ReadQuery:
    """Run one prepared query and keep the readout row's attention over all its tokens; the model stays as it is.

    Raises: RevprobeError, when no attention is seen or the logits are NaN.
    """
    batch = make_batch(model, [query])
    columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None]
    evidence = list(query.evidence_positions)
    at = batch.attention_rows, columns + batch.ahead[1]
    with (
        untouched(model.module),
        torch.no_grad(),
        tap_attention(model.module, *at, attention_of(model), batch.size) as tap,
    ):
        log_probabilities = readout(model, batch)
    target = log_probabilities[0].gather(-1, batch.targets[0][:, None])
    layers = tap.layers(model.name)
    parts = dict.fromkeys(query.target_positions, "target") | dict.fromkeys(query.evidence_positions, "evidence")
    return ReadQuery(
        tokens=token_texts(query.token_ids, model.tokenizer),
        parts=[parts.get(place, "") for place in range(len(query.token_ids))],
        weights={layer: call.weight[0].mean(1).double().cpu().numpy() for layer, call in layers.items()},
        scores={
            layer: call.score[0][..., evidence].double().mean((1, 2)).cpu().numpy() for layer, call in layers.items()
        },
        probability=float(target.sum().exp()),
    )
