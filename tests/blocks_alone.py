"""Queries of a model that is read in blocks, each run alone on the bare module: the measure of what the probes give."""

import math
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import revprobe as rp
from tiny import MASK


def random_pairs(count: int = 14, *, length: int = 11, width: int = 1, first: int = 1, seed: int = 0):
    """Same target and evidence at random places of random tokens, adjacent tokens where there are several."""
    rng, pairs = np.random.default_rng(seed), []
    for fact in range(count):
        target, evidence, rest = (part.tolist() for part in np.split(rng.permutation(50), [width, 2 * width]))
        asked = []
        for _ in range(2):
            size = length - int(rng.integers(3))
            places = [rng.integers(first, size - width + 1) for _ in range(2)]
            while abs(places[0] - places[1]) < width:
                places = [rng.integers(first, size - width + 1) for _ in range(2)]
            tokens = rest[:size]
            at = [list(range(start, start + width)) for start in places]
            for where, ids in zip(at, (target, evidence), strict=True):
                for place, token in zip(where, ids, strict=True):
                    tokens[place] = token
            asked.append(rp.Query(tokens, at[0], at[1]))
        pairs.append(rp.ReversalPair(*asked, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


def seen_by_hand(query: rp.Query, size: int, shift: int) -> bool:
    """Whether each token that predicts has every token of the evidence in its own block or in one before."""
    return all(e // size <= (t - shift) // size for t in query.target_positions for e in query.evidence_positions)


def run_alone(model: rp.ProbedModel, tokens: list[int], size: int) -> tuple[Tensor, dict[int, Tensor]]:
    """The bare module on one row, with a mask of 0 and -inf put together token by token.

    Returns: log-probabilities `seq vocab`, and scores before mask and softmax by layer `heads seq seq`.
    """
    mask = torch.zeros(1, 1, len(tokens), len(tokens))
    for i in range(len(tokens)):
        for j in range(len(tokens)):
            if j // size > i // size:
                mask[0, 0, i, j] = -math.inf
    plain, scores = torch.nn.functional.scaled_dot_product_attention, {}

    def watched(query, key, value, **options):
        key_of = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores[len(scores)] = (query @ key_of.mT * options.get("scale", query.shape[-1] ** -0.5))[0]
        return plain(query, key, value, **options)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", watched):
        logits = model.module(torch.tensor([tokens]), attention_mask=mask).logits[0]
    return logits.double().log_softmax(-1), scores


def hidden(query: rp.Query, places=None) -> list[int]:
    return [MASK if i in (places or query.target_positions) else t for i, t in enumerate(query.token_ids)]


def loss_alone(model: rp.ProbedModel, query: rp.Query, size: int) -> Tensor:
    logs = run_alone(model, hidden(query), size)[0]
    return -torch.stack([logs[p - model.logit_shift, query.token_ids[p]] for p in query.target_positions]).mean()


def gradient_alone(model: rp.ProbedModel, query: rp.Query, size: int) -> Tensor:
    parameters = list(model.module.parameters())
    found = torch.autograd.grad(loss_alone(model, query, size), parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in found]).double()


def chain_alone(model: rp.ProbedModel, query: rp.Query, size: int) -> float:
    """Each token after those before it, those behind it still masked."""
    total = 0.0
    for k, place in enumerate(query.target_positions):
        logs = run_alone(model, hidden(query, query.target_positions[k:]), size)[0]
        total += float(logs[place - model.logit_shift, query.token_ids[place]])
    return total
