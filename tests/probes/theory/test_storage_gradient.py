"""The gradient with respect to S against autograd through an explicit S, and Thm 4.6's identity."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
from revprobe import (
    ProbedModel,
    RaddConfig,
    RaddForMaskedLM,
    RevprobeError,
    letter_pairs,
    letter_tokenizer,
    one_layer_gpt2,
    storage_gradient_cosines,
)
from tiny import drawn, pairs_at, tapped

radd = partial(tiny.radd, scale=0.2)


def gradient_by_autograd(model: ProbedModel, query, begin: tuple[int, ...] = ()) -> torch.Tensor:
    """dL/dS with S an explicit (zero) tensor per head, added to the readout logits through the model's own routes."""
    (target,) = query.target_positions
    ids = torch.tensor([[*begin, *query.token_ids]])
    ids[0, len(begin) + target] = model.mask_token_id
    row = len(begin) + target - model.logit_shift
    every = torch.arange(ids.shape[1])[None]
    with torch.no_grad(), tapped(model, torch.tensor([[row]]), every, every.shape[1]) as tap:
        logits = model.module(ids).logits[0, row].double()
    weight = tap.layers()[0].weight[0, :, 0].double()  # head seq
    stored = torch.zeros(weight.shape[0], model.vocab_size, model.vocab_size, dtype=torch.float64, requires_grad=True)
    routed = torch.einsum("hj,hvj->v", weight, stored[:, :, ids[0]])
    loss = F.cross_entropy((logits + routed)[None], torch.tensor(query.target))
    return torch.autograd.grad(loss, stored)[0].flatten()


@pytest.mark.parametrize("heads", [1, 2])
def test_the_cosine_is_that_of_autograd_through_an_explicit_s(heads):
    model = radd(n_heads=heads)
    pairs = letter_pairs(5, model=model)
    table = storage_gradient_cosines(model, pairs, batch_size=50)
    for pair in range(0, len(pairs), 61):
        forward, reverse = (gradient_by_autograd(model, q) for q in (pairs[pair].forward, pairs[pair].reverse))
        assert table.cosine[pair] == pytest.approx(float(F.cosine_similarity(forward, reverse, dim=0)), abs=1e-6)


@pytest.mark.parametrize("places", [((0, 2), (2, 0)), ((1, 3), (3, 1))], ids=["with a begin token", "without"])
def test_a_model_that_reads_one_row_earlier_is_asked_behind_its_begin_token_where_it_needs_one(places) -> None:
    module = drawn(lambda: RaddForMaskedLM(RaddConfig(position_encoding="rope", d_model=16, n_heads=2)), scale=0.3)
    wrapping = {"objective": "masked", "logit_shift": 1, "begin_token_id": 40}
    model = ProbedModel(module, letter_tokenizer(), **wrapping)
    pairs, begin = pairs_at(*((evidence, target) for target, evidence in places), length=4, vocab=30), ()
    if places[0][0] == 0:
        begin = (40,)
    table = storage_gradient_cosines(model, pairs, batch_size=3)
    for pair in range(len(pairs)):
        sides = [gradient_by_autograd(model, q, begin) for q in (pairs[pair].forward, pairs[pair].reverse)]
        assert table.cosine[pair] == pytest.approx(float(F.cosine_similarity(*sides, dim=0)), abs=1e-6)


def test_both_factors_are_positive_as_thm_4_6_says():
    table = storage_gradient_cosines(model := radd(), letter_pairs(6, model=model))
    assert (table.cosine_attention > 0).all() and (table.cosine_error > 0).all()
    np.testing.assert_allclose(table.cosine, table.cosine_error * table.cosine_attention)


def test_what_has_no_s_is_refused():
    two_layers, causal = radd(n_layers=2), ProbedModel(one_layer_gpt2(), letter_tokenizer(), objective="causal")
    with pytest.raises(RevprobeError, match="has 2 attention layers; S is defined for one"):
        storage_gradient_cosines(two_layers, letter_pairs(5, model=two_layers))
    with pytest.raises(RevprobeError, match="pairs of kind 'swapped' do not share an entry of S"):
        storage_gradient_cosines(causal, letter_pairs(5, model=causal))
