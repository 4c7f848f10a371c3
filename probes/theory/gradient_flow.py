"""Props. C.2 and C.3: gradient flow on the forward loss alone, to its end, and what becomes of the reverse probability.

A masked position attends to itself and to one evidence token u with weight a = sigmoid(s), and its logits are what it
retrieves: z = a c with the column c = S[:, u] as a parameter of its own. The forward query sees u at D_f tokens to its
right, the reverse query at D_r to its left. delta = p - 1_v throughout.

Shapes below: dim (of the query), plane (dim / 2). RoPE's planes are entries k and k + dim / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from scipy.special import expit, log_softmax, softmax

from ...arguments import checked
from ...errors import RevprobeError
from .checks import both_distances, number, plane_frequencies, whole_number, within
from .score_correlation import BASE, rope_frequencies

HORIZON = 1e8  # the margin grows like log t, so the end of a flow is far away
FIRST = 1e-3  # where the evenly spaced log times begin
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def rope_rotation(dim: int, distance: float, base: float = BASE, *, angles: ArrayLike | None = None) -> np.ndarray:
    """R_D, which turns plane k (entries k and k + dim / 2) by D theta_k. Shapes: `-> dim dim`, float64.

    Args:
        distance: tokens, negative for a turn back.
        angles: theta_k of each plane, where they are not base^(-2k/dim).
    Raises: RevprobeError, for an odd dim, a distance that is not finite, or another number of angles.
    """
    own = rope_frequencies(dim, base)
    theta = number("distance", distance, -np.inf) * (own if angles is None else plane_frequencies(angles, len(own)))
    cos, sin = np.diag(np.cos(theta)), np.diag(np.sin(theta))
    return np.block([[cos, -sin], [sin, cos]])


@checked
def rope_transfer_condition(query: ArrayLike, distance: float, base: float = BASE) -> float:
    """q^T R_D q / |q|^2 at D = D_f + D_r: positive is enough for the reverse probability to follow (Prop. C.2).

    Not necessary: a negative one leaves the outcome open. Shapes: `query`: `dim`.
    Raises: RevprobeError, for an odd dimension, a zero query, or a distance that is negative or not finite.
    Source: paper App. C.3.
    """
    q = _vector("query", query)
    return float(q @ rope_rotation(len(q), number("distance", distance, 0.0), base) @ q / (q @ q))


@dataclass(frozen=True)
class _Routes:
    """Two routes whose scores are linear in each of query and key: score = q^T (map k) / sqrt(dim) + bias."""

    forward: np.ndarray
    reverse: np.ndarray
    bias: tuple[float, float]
    learn_query: bool
    learn_key: bool

    def scores(self, query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shapes: `... dim, ... dim -> ..., ...`."""
        root = np.sqrt(query.shape[-1])
        forward = ((query @ self.forward) * key).sum(-1) / root + self.bias[0]
        return forward, ((query @ self.reverse) * key).sum(-1) / root + self.bias[1]


@checked
def simulate_rope_transfer(
    query: ArrayLike,
    key: ArrayLike,
    *,
    distance_forward: float,
    distance_reverse: float,
    base: float = BASE,
    vocabulary: int = 10,
    horizon: float = HORIZON,
    points: int = 200,
) -> pd.DataFrame:
    """Prop. C.2: gradient flow on the forward loss over the column S[:, u] and the evidence's key; the query is fixed.

    Shapes: `query`, `key`: `dim`; the key is where the flow starts, the column starts at zero.
    Args:
        vocabulary: tokens that can be predicted; the target is one of them.
        horizon: time at which the flow stops; both parameters have rate 1.
        points: times that are returned, from 0 and then evenly in log time.
    Returns: one row per time: time, p_forward, p_reverse (probability of the target), route_forward, route_reverse
        (weight of the evidence), score_forward, score_reverse, margin (S[v, u] minus every other entry, which are
        equal), loss_forward (nats).
    Raises: RevprobeError, for an odd or unequal dimension, a zero query, a distance that is negative, a number that is
        not finite, or an integration that does not finish.
    Source: paper App. C.3.
    """
    q, k = _vector("query", query), _vector("key", key)
    ahead, behind = both_distances(distance_forward, distance_reverse)
    forward, reverse = (rope_rotation(len(q), turn, base) for turn in (ahead, -behind))
    routes = _Routes(forward, reverse, (0.0, 0.0), learn_query=False, learn_key=True)
    return _flow(routes, q, k, vocabulary, horizon, points)


@checked
def simulate_alibi_transfer(
    query: ArrayLike,
    key: ArrayLike,
    *,
    distance_forward: float,
    distance_reverse: float,
    slope: float = 0.5,
    learn_routing: bool = True,
    vocabulary: int = 10,
    horizon: float = HORIZON,
    points: int = 200,
) -> pd.DataFrame:
    """Prop. C.3: the same flow with ALiBi scores q^T k / sqrt(dim) - slope * distance; query and key learn or rest.

    Args:
        slope: of the bias, at least 0.
        learn_routing: query and key follow the gradient; else the column alone does.
    The other arguments, the columns and the errors are those of `simulate_rope_transfer`.
    Source: paper App. C.3.
    """
    q, k = _vector("query", query), _vector("key", key)
    ahead, behind = both_distances(distance_forward, distance_reverse)
    steep = number("slope", slope, 0.0)
    content, bias = np.eye(len(q)), (-steep * ahead, -steep * behind)
    routes = _Routes(content, content, bias, learn_query=learn_routing, learn_key=learn_routing)
    return _flow(routes, q, k, vocabulary, horizon, points)


def _flow(
    routes: _Routes, query: np.ndarray, key: np.ndarray, vocabulary: int, horizon: float, points: int
) -> pd.DataFrame:
    if len(query) != len(key):
        raise RevprobeError(f"query of {len(query)} entries and key of {len(key)}: expected one dimension for both")
    vocabulary = whole_number("vocabulary", vocabulary, 2, "a whole number of at least 2 tokens")
    points = whole_number("points", points, 2, "a whole number of at least 2 times")
    if not number("horizon", horizon, 0.0) > FIRST:
        raise RevprobeError(f"horizon={horizon!r}: expected a time above {FIRST:g}, the first that is returned after 0")
    start = np.concatenate([np.zeros(vocabulary), query, key])
    times = np.concatenate([[0.0], np.geomspace(FIRST, horizon, points - 1)])
    times[-1] = horizon  # geomspace may end a rounding error beyond it
    # Stiff: the column slows down like 1 / t while the routes may still move.
    solved = solve_ivp(_velocity, (0.0, horizon), start, "LSODA", times, args=(routes, vocabulary), **TOLERANCE)
    if not solved.success:
        raise RevprobeError(f"the flow stopped at t = {solved.t[-1]:.3g} ({solved.message}); choose a shorter horizon")
    column, queries, keys = np.split(solved.y.T, [vocabulary, vocabulary + len(query)], axis=1)
    scores = routes.scores(queries, keys)
    columns: dict[str, Any] = {"time": solved.t}
    for side, score in zip(("forward", "reverse"), scores, strict=True):
        route = expit(score)
        columns |= {f"p_{side}": softmax(route[:, None] * column, axis=1)[:, 0], f"route_{side}": route}
        columns[f"score_{side}"] = score
    loss = -log_softmax(expit(scores[0])[:, None] * column, axis=1)[:, 0]
    return pd.DataFrame(columns | {"margin": column[:, 0] - column[:, 1:].max(1), "loss_forward": loss})


def _velocity(_: float, state: np.ndarray, routes: _Routes, vocabulary: int) -> np.ndarray:
    """Minus the gradient of the forward loss; the target is token 0."""
    column, query, key = np.split(state, [vocabulary, vocabulary + (len(state) - vocabulary) // 2])
    route = expit(routes.scores(query, key)[0])
    delta = softmax(route * column)
    delta[0] = -delta[1:].sum()  # p - 1 would lose its digits as p nears 1
    through_score = route * expit(-routes.scores(query, key)[0]) * (delta @ column) / np.sqrt(len(query))
    moves_query = -through_score * (routes.forward @ key) if routes.learn_query else np.zeros_like(query)
    moves_key = -through_score * (routes.forward.T @ query) if routes.learn_key else np.zeros_like(key)
    return np.concatenate([-route * delta, moves_query, moves_key])


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    vector = within(name, values, -np.inf, np.inf)
    if vector.ndim != 1 or len(vector) < 2 or len(vector) % 2:
        raise RevprobeError(f"{name} of shape {vector.shape}: expected an even number of entries")
    if name == "query" and not vector.any():
        raise RevprobeError("query is zero: no route depends on it; give one that is not")
    return vector
