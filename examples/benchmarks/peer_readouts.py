"""The ways to one attention weight of every head: eager attention's output, TransformerLens, nnsight, and ours.

Each is a function that returns weights after softmax, `layer batch head`, of `row_and_column(T)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peer_inputs import Inputs, row_and_column
from torch import Tensor

import revprobe as rp
from revprobe.hooks.attention import tap_attention
from revprobe.models.structure import attention_of

Readout = Callable[[Tensor], Tensor]


def readouts(inputs: Inputs, peer: str) -> dict[str, Readout]:
    """What is measured in the process of a peer: a plain forward (no weights), ours, and the peer's."""
    probed = rp.ProbedModel(inputs.model, objective="causal", name="llama")
    theirs: dict[str, Callable[[Inputs, rp.ProbedModel], dict[str, Readout]]] = {
        "plain": _plain,
        "nnsight": lambda given, _: _nnsight(given),
    }
    none: dict[str, Readout] = {}
    ours = {"plain forward": partial(_forward, inputs), "revprobe, tap": _tap(inputs, probed)}
    return ours | (theirs[peer](inputs, probed) if peer in theirs else none)


def _forward(inputs: Inputs, ids: Tensor) -> Tensor:
    logits: Tensor = inputs.model(ids, use_cache=False).logits
    return logits


def _eager(inputs: Inputs) -> Any:
    model = copy.deepcopy(inputs.model)
    model.set_attn_implementation("eager")
    return model


def _tap(inputs: Inputs, probed: rp.ProbedModel) -> Readout:
    attention = attention_of(probed)

    def run(ids: Tensor) -> Tensor:
        length = ids.shape[1]
        row, column = (torch.full((len(ids), 1), place) for place in row_and_column(length))
        with tap_attention(inputs.model, row, column, attention, (length, length)) as tap:
            inputs.model(ids, use_cache=False)
        return torch.stack([read.weight.flatten(2)[..., 0] for read in tap.layers().values()])

    return run


def _plain(inputs: Inputs, probed: rp.ProbedModel) -> dict[str, Readout]:
    eager, bridge = _eager(inputs), probed.to_bridge()

    def outputs(ids: Tensor) -> Tensor:
        row, column = row_and_column(ids.shape[1])
        found = eager(ids, output_attentions=True, use_cache=False).attentions
        return torch.stack([weights[:, :, row, column] for weights in found])

    def cached(ids: Tensor) -> Tensor:
        row, column = row_and_column(ids.shape[1])
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
        return torch.stack([cache["pattern", n][:, :, row, column] for n in range(len(inputs.model.model.layers))])

    def hooked(ids: Tensor) -> Tensor:
        row, column = row_and_column(ids.shape[1])
        found: list[Tensor] = []

        def keep(weights: Tensor, hook: Any) -> None:
            found.append(weights[:, :, row, column].clone())

        bridge.run_with_hooks(ids, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), keep)])
        return torch.stack(found)

    return {
        "eager, output_attentions": outputs,
        "TransformerLens, run_with_cache": cached,
        "TransformerLens, run_with_hooks": hooked,
    }


def _nnsight(inputs: Inputs) -> dict[str, Readout]:
    from nnsight import NNsight

    eager, own = NNsight(_eager(inputs)), NNsight(copy.deepcopy(inputs.model))

    def outputs(ids: Tensor) -> Tensor:
        row, column = row_and_column(ids.shape[1])
        with eager.trace(ids, use_cache=False):
            found = list().save()  # their idiom: a list that outlives the trace
            for layer in eager.model.layers:
                found.append(layer.self_attn.output[1][:, :, row, column].clone())
        return torch.stack(found)

    def sourced(ids: Tensor) -> Tensor:
        row, column = row_and_column(ids.shape[1])
        with own.trace(ids, use_cache=False):
            heads = list().save()
            for layer in own.model.layers:
                _, query, key, *_ = layer.self_attn.source.attention_interface_1.inputs[0]
                heads.append((query[:, :, row].clone(), key[:, :, : row + 1].clone()))
        scores = [(key @ query[..., None])[..., 0] * query.shape[-1] ** -0.5 for query, key in heads]
        return torch.stack([score.softmax(-1)[..., column] for score in scores])

    return {"nnsight, eager attention's output": outputs, "nnsight, queries and keys by source": sourced}
