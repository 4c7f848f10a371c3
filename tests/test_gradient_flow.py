"""Props. C.1 to C.3: closed forms against autograd, the flow against plain descent, and where the flow must end."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from revprobe import ProbedModel, RaddConfig, RaddForMaskedLM, RevprobeError, one_layer_gpt2
from revprobe.probes.gradient_flow import (
    TwoRouteToy,
    rope_rotation,
    rope_transfer_condition,
    simulate_alibi_transfer,
    simulate_rope_transfer,
)

TOKENS = {"target": 3, "evidence": 30, "mask": 53}


def radd(encoding: str = "rope", **sizes) -> ProbedModel:
    """A one-layer model far from its initial weights, so that no term is lost in rounding."""
    torch.manual_seed(0)
    module = RaddForMaskedLM(RaddConfig(position_encoding=encoding, **{"d_model": 16} | sizes))
    for parameter in module.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    return ProbedModel(module, objective="masked")


# --- slow references ------------------------------------------------------------------------------------------------


def toy_loss(weights: dict[str, torch.Tensor], encoding: str, turn: float, slope: float) -> torch.Tensor:
    """The toy's loss in torch, straight from its definition, with complex numbers for the rotation."""
    query, key = weights["W_Q"] @ weights["E"][TOKENS["mask"]], weights["W_K"] @ weights["E"][TOKENS["evidence"]]
    half = len(query) // 2
    if encoding == "rope":
        angle = turn * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        as_complex = torch.complex(key[:half], key[half:]) * torch.polar(torch.ones_like(angle), angle)
        key = torch.cat([as_complex.real, as_complex.imag])
    score = query @ key / math.sqrt(len(query)) - slope * abs(turn)
    logits = score.sigmoid() * (weights["W_U"] @ weights["W_V"] @ weights["E"][TOKENS["evidence"]])
    clean = torch.arange(len(logits)) != TOKENS["mask"]
    return logits[clean].logsumexp(0) - logits[TOKENS["target"]]


def toy_weights(model: ProbedModel) -> dict[str, torch.Tensor]:
    found = {name: p.detach().double() for name, p in model.module.named_parameters()}
    attention = {letter: found[f"blocks.0.attention.{letter}_proj.weight"] for letter in "qkvo"}
    weights = {"W_U": found["lm_head.weight"], "W_V": attention["o"] @ attention["v"]}
    weights |= {"W_Q": attention["q"], "W_K": attention["k"], "E": found["embed_tokens.weight"]}
    return {name: weight.clone().requires_grad_() for name, weight in weights.items()}


@pytest.mark.parametrize(("encoding", "slope"), [("rope", 0.0), ("alibi", 0.25)])
@pytest.mark.parametrize(("forward", "reverse"), [(3, 3), (2, 11)])
def test_the_terms_of_prop_c1_are_autograds_inner_products(encoding, slope, forward, reverse) -> None:
    """Each matrix of a real model, and the two columns of E; wrong signs of the rotation move W_Q, W_K and E."""
    model = radd(encoding)
    weights = toy_weights(model)
    sides = [
        dict(
            zip(
                weights,
                torch.autograd.grad(toy_loss(weights, encoding, turn, slope), list(weights.values())),
                strict=True,
            )
        )
        for turn in (forward, -reverse)
    ]
    toy = TwoRouteToy.from_model(model, slope=slope)
    terms = toy.gradient_terms(**TOKENS, distance_forward=forward, distance_reverse=reverse)
    by_parameter = terms.groupby("parameter")["inner"].sum()
    for name in weights:
        slow = float((sides[0][name] * sides[1][name]).sum())
        assert by_parameter[name] == pytest.approx(slow, rel=1e-9), f"{name} of {encoding}"
    column = terms.query("part == 'mask'")["inner"].item()
    slow = float(sides[0]["E"][TOKENS["mask"]] @ sides[1]["E"][TOKENS["mask"]])
    assert column == pytest.approx(slow, rel=1e-9), "the mask's column is the query path alone"
    assert terms["inner"].abs().min() > 1e-8, "a term that vanishes would pass any sign"


def test_a_finite_difference_sees_the_same_gain() -> None:
    """One entry of W_Q moved by hand: the autograd reference itself is right."""
    weights = toy_weights(radd())
    (gradient,) = torch.autograd.grad(toy_loss(weights, "rope", 4, 0.0), [weights["W_Q"]])
    losses = []
    for step in (1e-6, -1e-6):
        moved = {name: weight.detach().clone() for name, weight in weights.items()}
        moved["W_Q"][2, 5] += step
        losses.append(float(toy_loss(moved, "rope", 4, 0.0)))
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(float(gradient[2, 5]), rel=1e-5)


def test_alibi_routes_align_exactly_and_storage_always() -> None:
    """W_U's term is positive by algebra; ALiBi's W_Q and W_K terms have the sign of the product of gains."""
    toy = TwoRouteToy.from_model(radd("alibi"), slope=0.25)
    terms = toy.gradient_terms(**TOKENS, distance_forward=2, distance_reverse=9).set_index(["parameter", "part"])[
        "inner"
    ]
    assert terms["W_U", ""] > 0 and terms["W_V", ""] > 0
    query, key = toy.query @ toy.embedding[TOKENS["mask"]], toy.key @ toy.embedding[TOKENS["evidence"]]
    e_u, e_m = toy.embedding[TOKENS["evidence"]], toy.embedding[TOKENS["mask"]]
    expected = (key @ key) * (e_m @ e_m) / ((query @ query) * (e_u @ e_u))
    assert terms["W_Q", ""] / terms["W_K", ""] == pytest.approx(expected), "R is the identity for ALiBi"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: radd(n_layers=2), "one attention layer of one head"),
        (lambda: radd(n_heads=2), "one attention layer of one head"),
        (lambda: radd("absolute"), "needs RoPE, ALiBi or no position"),
        (lambda: ProbedModel(one_layer_gpt2(), objective="causal"), "needs RoPE, ALiBi or no position"),
    ],
)
def test_models_outside_the_proposition_are_refused(model, words: str) -> None:
    with pytest.raises(RevprobeError, match=words):
        TwoRouteToy.from_model(model())


def test_an_alibi_model_must_name_its_slope() -> None:
    """No parameter holds it, and a slope of 0 taken for granted would be a wrong number."""
    with pytest.raises(RevprobeError, match="pass slope="):
        TwoRouteToy.from_model(radd("alibi"))


def test_tokens_outside_the_tables_are_refused() -> None:
    toy = TwoRouteToy.from_model(radd())
    with pytest.raises(RevprobeError, match="target token 99: expected 0 to 55"):
        toy.gradient_terms(target=99, evidence=1, mask=53, distance_forward=1, distance_reverse=1)
    with pytest.raises(RevprobeError, match="mask token 53 is also target or evidence"):
        toy.gradient_terms(target=1, evidence=53, mask=53, distance_forward=1, distance_reverse=1)


# --- gradient flow ---------------------------------------------------------------------------------------------------


def descend(
    query: np.ndarray, key: np.ndarray, turns: tuple[float, float], slope: float, learn: tuple[bool, bool], time: float
):
    """Plain gradient descent with small steps on the forward loss, by autograd: p_forward and p_reverse at `time`."""
    parts = [torch.zeros(10, dtype=torch.float64), torch.tensor(query), torch.tensor(key)]
    column, q, k = (part.clone().requires_grad_() for part in parts)
    rotations = [torch.tensor(rope_rotation(len(query), 0.0 if slope else turn)) for turn in turns]
    steps = 2000

    def log_p(side: int) -> torch.Tensor:
        score = q @ rotations[side] @ k / math.sqrt(len(query)) - slope * abs(turns[side])
        return (score.sigmoid() * column).log_softmax(0)[0]

    for _ in range(steps):
        gradients = torch.autograd.grad(-log_p(0), [column, q, k])
        with torch.no_grad():
            for part, gradient, moves in zip((column, q, k), gradients, (True, *learn), strict=True):
                part -= time / steps * gradient * moves
    return log_p(0).exp().item(), log_p(1).exp().item()


@pytest.mark.parametrize("encoding", ["rope", "alibi", "alibi, routes at rest"])
def test_the_flow_is_where_small_descent_steps_lead(encoding: str) -> None:
    """At t = 20, halfway up, where a wrong gradient or rate would show; Euler's own error is 1/2000 of the way."""
    rng = np.random.default_rng(4)
    query, key = rng.normal(size=(2, 6))
    distances = {"distance_forward": 2, "distance_reverse": 5}
    if encoding == "rope":
        flow = simulate_rope_transfer(query, key, **distances, horizon=20.0, points=5)
        slow = descend(query, key, (2, -5), 0.0, (False, True), 20.0)
    else:
        learn = encoding == "alibi"
        flow = simulate_alibi_transfer(query, key, **distances, slope=0.1, learn_routing=learn, horizon=20.0, points=5)
        slow = descend(query, key, (2, -5), 0.1, (learn, learn), 20.0)
    end = flow.iloc[-1]
    assert end["time"] == 20.0 and 0.2 < end["p_forward"] < 0.999, "neither at the start nor at the end"
    assert (end["p_forward"], end["p_reverse"]) == pytest.approx(slow, abs=2e-3)
    assert end["loss_forward"] == pytest.approx(-math.log(end["p_forward"]), rel=1e-9)


def assert_storage_rises(flow: pd.DataFrame) -> None:
    """What holds for every flow from a uniform column: chance at the start, margin and forward score never fall."""
    assert flow["p_forward"].iloc[0] == pytest.approx(0.1) and flow["p_reverse"].iloc[0] == pytest.approx(0.1)
    assert (flow["margin"].diff().dropna() >= -1e-8).all(), "S[v, u] falls behind"
    assert (flow["score_forward"].diff().dropna() >= -1e-7).all(), "the forward route closes"
    assert (flow["loss_forward"].diff().dropna() <= 1e-9).all(), "a gradient flow never climbs"


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), forward=st.integers(1, 20), reverse=st.integers(1, 20))
def test_rope_carries_the_reverse_probability_to_one_under_the_condition(seed, forward, reverse) -> None:
    query, key = np.random.default_rng(seed).normal(size=(2, 16))
    assume(rope_transfer_condition(query, forward + reverse) > 0.1)
    flow = simulate_rope_transfer(query, key, distance_forward=forward, distance_reverse=reverse, points=60)
    assert_storage_rises(flow)
    assert flow["p_forward"].iloc[-1] > 0.9999, "the forward loss was not driven to its end"
    assert flow["p_reverse"].iloc[-1] > 0.99, f"reverse stays at {flow['p_reverse'].iloc[-1]}"
    assert flow["score_reverse"].iloc[-1] >= flow["score_reverse"].iloc[0], "the condition keeps the reverse route open"


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), forward=st.integers(1, 6), reverse=st.integers(1, 6), learn=st.booleans())
def test_alibi_carries_the_reverse_probability_to_one_always(seed, forward, reverse, learn) -> None:
    """No condition on query or distances; slopes and distances are kept where the route is not all but shut."""
    query, key = np.random.default_rng(seed).normal(size=(2, 16))
    distances = {"distance_forward": forward, "distance_reverse": reverse}
    flow = simulate_alibi_transfer(query, key, **distances, slope=0.1, learn_routing=learn, points=60)
    assert_storage_rises(flow)
    assert flow["p_forward"].iloc[-1] > 0.999 and flow["p_reverse"].iloc[-1] > 0.95, flow.iloc[-1].to_dict()
    constant = flow["score_forward"] - flow["score_reverse"]
    assert np.allclose(constant, 0.1 * (reverse - forward), atol=1e-9), "the two scores differ by constants"
    assert flow["score_forward"].iloc[-1] - flow["score_forward"].iloc[0] > (0.1 if learn else -1e-12)


def test_a_query_turned_against_itself_shuts_the_reverse_route() -> None:
    """q^T R q = -|q|^2: what opens the forward route closes the reverse one, and its probability falls back."""
    half_turn = {"distance_forward": math.pi / 2, "distance_reverse": math.pi / 2}
    query = np.array([3.0, 0.0])
    assert rope_transfer_condition(query, math.pi) == pytest.approx(-1.0)
    flow = simulate_rope_transfer(query, np.array([0.0, 1.0]), **half_turn)
    assert_storage_rises(flow)
    assert flow["p_forward"].iloc[-1] > 0.9999
    assert flow["p_reverse"].iloc[-1] < 0.15, "without the condition the reverse probability need not follow"
    assert np.allclose(flow["score_forward"], -flow["score_reverse"], atol=1e-6)


def test_the_condition_is_the_quadratic_form() -> None:
    query = np.random.default_rng(0).normal(size=8)
    turned = rope_rotation(8, 13) @ query
    assert rope_transfer_condition(query, 13) == pytest.approx(query @ turned / (query @ query))
    assert rope_transfer_condition(query, 0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: simulate_rope_transfer([1, 0], [1, 0, 0, 0], distance_forward=1, distance_reverse=1),
            "one dimension for",
        ),
        (lambda: simulate_rope_transfer([0, 0], [1, 0], distance_forward=1, distance_reverse=1), "query is zero"),
        (lambda: simulate_rope_transfer([1, 0, 1], [1, 0, 1], distance_forward=1, distance_reverse=1), r"shape \(3,\)"),
        (
            lambda: simulate_alibi_transfer([1, 0], [1, 0], distance_forward=1, distance_reverse=1, vocabulary=1),
            "vocabulary=1",
        ),
    ],
)
def test_flows_that_make_no_sense_are_refused(call, words: str) -> None:
    with pytest.raises(RevprobeError, match=words):
        call()
