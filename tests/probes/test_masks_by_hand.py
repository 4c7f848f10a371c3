"""Attention that hides with a finite number of its own (-1e4, -1e9): what the mask hides is hidden for every probe."""

import math

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import revprobe as rp

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}


def llama(hide: float) -> rp.ProbedModel:
    """A causal Llama whose attention writes `hide` over the later positions, and over those more than three back."""

    def attend(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **_):
        scores = query @ key.mT * scaling
        everything = torch.ones(scores.shape[-2:], dtype=torch.bool)
        unseen = everything.triu(1) | everything.tril(-4)
        return (scores.masked_fill(unseen, hide).softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(f"by_hand_{hide}", attend)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attn_implementation=f"by_hand_{hide}")
    return rp.ProbedModel(LlamaForCausalLM(config).eval(), objective="causal")


def pairs() -> rp.ReversalPairs:
    """Evidence at position 0: three before the target forward, in reverse so far back that no row sees it."""
    made = []
    for n in range(9):
        target, evidence = 10 + n, 20 + n
        forward = rp.Query([evidence, 7, 6, target, 8, 9], [3], [0])
        reverse = rp.Query([evidence, 6, 7, 4, 8, 9, target], [6], [0])
        made.append(rp.ReversalPair(forward=forward, reverse=reverse, fact=f"{n}"))
    return rp.ReversalPairs.from_pairs(made)


@pytest.fixture(scope="module", params=[-1e4, -1e9, torch.finfo(torch.float32).min, -math.inf], ids=str)
def model(request) -> rp.ProbedModel:
    return llama(request.param)


def test_hidden_evidence_has_no_score_no_storage_and_no_route(model):
    hidden = "evidence hidden by the attention mask"
    for reading in (
        rp.probe_attention_correlation(model, pairs(), control=False),
        rp.probe_stored_evidence(model, pairs(), control=False),
        rp.probe_route_edit(model, pairs(), scope="all", control=False),
    ):
        assert math.isnan(reading.value) and reading.n == 0 and hidden in reading.undefined, reading


def test_a_control_is_never_drawn_where_the_row_cannot_see(model):
    """Two positions are left before the readout row; cutting one that is hidden would change nothing."""
    frame = rp.probe_route_edit(model, pairs(), scope="all").frame
    forward = frame[frame["direction"] == "forward"]
    assert len(forward) == 9 and (forward["reason_control"] == "").all()
    assert (forward["change_control"].abs() > 1e-9).all() and (forward["edited_control"] == 1).all()


def test_the_numbers_are_those_of_an_infinite_mask(model):
    expected = rp.probe_route_edit(llama(-math.inf), pairs(), scope="all").frame
    found = rp.probe_route_edit(model, pairs(), scope="all").frame
    for column in ("change", "change_control"):
        torch.testing.assert_close(
            torch.tensor(found[column].to_numpy()), torch.tensor(expected[column].to_numpy()), equal_nan=True
        )
