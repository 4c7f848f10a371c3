"""Props. C.2 and C.3: the flow against plain descent, and where it must end."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from revprobe import RevprobeError, rope_transfer_condition, simulate_alibi_transfer, simulate_rope_transfer
from revprobe.probes.theory.gradient_flow import rope_rotation


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


def flow_of(simulate=simulate_rope_transfer, **changed) -> pd.DataFrame:
    return simulate([1, 0], [1, 0], **{"distance_forward": 1, "distance_reverse": 1} | changed)


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
        (lambda: flow_of(distance_forward=math.nan), "distance_forward nan: expected finite numbers of at least 0"),
        (lambda: flow_of(distance_reverse=-3), r"distance_reverse -3\.0"),
        (lambda: flow_of(distance_reverse=[1, 2]), r"distance_reverse=\[1, 2\]: expected a number"),
        (lambda: flow_of(horizon=math.inf), "horizon inf"),
        (lambda: flow_of(horizon=1e-4), "horizon=0.0001: expected a time above 0.001"),
        (lambda: flow_of(points=2.5), "points=2.5: expected a whole number"),
        (lambda: flow_of(simulate_alibi_transfer, slope=math.nan), "slope nan"),
        (lambda: flow_of(simulate_alibi_transfer, distance_forward=-1), r"distance_forward -1\.0"),
        (lambda: rope_rotation(8, 1, angles=[0.1, 0.2]), r"shape \(2,\): expected one for each of the 4 planes"),
        (lambda: rope_rotation(8, math.nan), "distance nan"),
        (lambda: rope_transfer_condition([1, 0], -1), r"distance -1\.0"),
    ],
)
def test_flows_that_make_no_sense_are_refused(call, words: str) -> None:
    with pytest.raises(RevprobeError, match=words):
        call()
