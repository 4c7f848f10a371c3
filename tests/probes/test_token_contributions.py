"""The logit by token: against attention and matrices written out, and against the storage probe's sums."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import revprobe as rp
import tiny
from revprobe.probes.storage import probe_stored_evidence
from tiny import AttentionOnly, drawn, tapped

PAIR = rp.ReversalPair(rp.Query([7, 8, 20, 1, 30, 31], [0, 1], [4, 5]), rp.Query([1, 30, 31, 7, 8, 20], [3, 4], [1, 2]))


def radd(encoding: str = "rope", **sizes: object) -> rp.ProbedModel:
    return tiny.radd(encoding, n_heads=2, scale=0.2, dtype=torch.float64, **sizes)


def causal() -> rp.ProbedModel:
    return tiny.llama("eager", scale=0.2, dtype=torch.float64)


def shown(model: rp.ProbedModel, query: rp.Query) -> list[int]:
    hide = query.target_positions if model.objective == "masked" else ()
    return [model.mask_token_id if place in hide else token for place, token in enumerate(query.token_ids)]


def test_in_the_papers_model_a_contribution_is_attention_times_s() -> None:
    """z_i[v] = sum_j a_ij S[v, x_j], every term by loops over heads, rows and positions; two target rows."""
    module = drawn(lambda: AttentionOnly(heads=2, dim=8), scale=0.2, dtype=torch.float64)
    model = rp.ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)
    table = rp.token_contributions(model, PAIR).set_index(["direction", "row", "position", "head"]).sort_index()
    for side in ("forward", "reverse"):
        query = getattr(PAIR, side)
        ids = shown(model, query)
        states = module.embed.weight[ids].detach().numpy()
        for row, target in zip(query.target_positions, query.target, strict=True):
            logit = module(torch.tensor([ids]))[0, row, target].item()
            assert table.loc[side, row]["contribution"].sum() == pytest.approx(logit, abs=1e-12)
            for head in range(2):
                q, k, v = (p.weight.detach().numpy()[8 * head : 8 * head + 8] for p in (module.q, module.k, module.v))
                raw = [math.exp(float((q @ states[row]) @ (k @ state)) / math.sqrt(8)) for state in states]
                for position, token in enumerate(ids):
                    found = table.loc[side, row, position, head]
                    s = float(module.unembed.weight.detach().numpy()[target] @ (v @ states[position]))
                    assert (found["token"], found["target"]) == (token, target)
                    assert found["weight"] == pytest.approx(raw[position] / sum(raw), abs=1e-12)
                    assert found["stored"] == pytest.approx(s, abs=1e-12)
                    assert found["contribution"] == pytest.approx(raw[position] / sum(raw) * s, abs=1e-12)


@torch.no_grad()
def test_s_of_every_position_in_one_layer_radd_by_hand() -> None:
    """With norms, W_O and a residual stream: gain W_O W_V (gamma E[x_j] / deviation), and the model's own pattern."""
    model, query = radd(), rp.Query([3, 0, 40, 5], [1], [2])
    m, block, ids = model.module, model.module.blocks[0], torch.tensor([[3, 53, 40, 5]])
    ids[0, 1] = model.mask_token_id
    ends: list[Tensor] = []
    handle = m.final_norm.register_forward_pre_hook(lambda _, args: ends.append(args[0][0, 1]))
    m(ids)
    handle.remove()
    gain = (ends[0].var(correction=0) + m.final_norm.eps).rsqrt() * m.final_norm.weight * m.lm_head.weight[0]
    out = block.attention.o_proj.weight.unflatten(1, (2, -1))  # d_model head dim
    table = rp.token_contributions(model, query)
    assert set(table["direction"]) == {"query"}
    assert set(table["row"]) == {1}
    with tapped(m, torch.tensor([[1]]), torch.arange(4)[None], 4) as tap:
        m(ids)
    weight = tap.layers()[0].weight[0, :, 0]
    for found in table.itertuples():
        token = m.embed_tokens.weight[found.token]
        scale = (token.var(correction=0) + block.attention_norm.eps).rsqrt() * block.attention_norm.weight
        value = (block.attention.v_proj.weight @ (token * scale)).unflatten(0, (2, -1))[found.head]
        assert found.stored == pytest.approx(float(gain @ out[:, found.head] @ value), abs=1e-10)
        assert found.weight == pytest.approx(float(weight[found.head, found.position]), abs=1e-7)


@pytest.mark.parametrize("build", [radd, lambda: radd("absolute", n_layers=2), causal])
def test_the_sum_over_positions_is_the_probes_evidence_and_others(build) -> None:
    """Mean over target rows, sum over positions: by direction, layer and head, what the probe's frame has."""
    model, pair = build(), PAIR
    if model.objective == "causal":  # the evidence stands before the target in both
        first, second = rp.Query([9, 30, 31, 7, 8], [3, 4], [1, 2]), rp.Query([30, 31, 9, 2, 7, 8], [4, 5], [0, 1])
        pair = rp.ReversalPair(first, second)
    table = rp.token_contributions(model, pair)
    frame = probe_stored_evidence(model, [pair], control=False).frame
    heads = frame[frame["part"].isin(["evidence", "others"])]
    for side in ("forward", "reverse"):
        query, own = getattr(pair, side), table[table["direction"] == side]
        rows = len(query.target_positions)
        found = own.groupby(["layer", "head"])["contribution"].sum() / rows
        expected = heads.groupby(["layer", "head"])[f"contribution_{side}"].sum()
        assert np.allclose(found, expected, atol=1e-5)
        assert found.index.tolist() == expected.index.tolist()
        there = own["position"].isin(query.evidence_positions)
        at_evidence = heads[heads["part"] == "evidence"].groupby(["layer", "head"])
        assert np.allclose(
            own[there].groupby(["layer", "head"])["contribution"].sum() / rows,
            at_evidence[f"contribution_{side}"].sum(),
            atol=1e-5,
        )
        stored = heads[(heads["part"] == "evidence") & (heads["source"] == "token")].set_index(["layer", "head"])
        assert np.allclose(own[there].groupby(["layer", "head"])["stored"].mean(), stored[f"stored_{side}"], atol=1e-5)
        assert np.allclose(own.groupby(["row", "layer", "head"])["weight"].sum(), 1, atol=1e-6)
        if model.objective == "causal":
            assert (own["position"] <= own["row"]).all(), "what the mask hides is left out"
            assert (own["target"].to_numpy() == np.take(query.token_ids, own["row"] + 1)).all()


def test_it_takes_one_question_and_leaves_no_trace() -> None:
    model = radd()
    module = model.module.train()
    flags, random = [p.requires_grad for p in module.parameters()], torch.get_rng_state()
    with pytest.raises(rp.RevprobeError, match="expected a ReversalPair or a Query, got a ReversalPairs; pass pairs"):
        rp.token_contributions(model, rp.ReversalPairs.from_pairs([PAIR]))
    first, second = (rp.token_contributions(model, PAIR) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert module.training
    assert flags == [p.requires_grad for p in module.parameters()]
    assert torch.equal(random, torch.get_rng_state())
