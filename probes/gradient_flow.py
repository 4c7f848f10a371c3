"""The paper's two-route toy: gradient terms in the original parameters (C.1), and gradient flow to its end (C.2, C.3).

A masked position attends to itself and to one evidence token u with weight a = sigmoid(s), and its logits are what it
retrieves: z = a W_U W_V e_u, or z = a c with c = S[:, u] as a parameter of its own. The forward query sees u at D_f
tokens to its right, the reverse query at D_r to its left. delta = p - 1_v throughout.

Shapes below: vocab, d_model, dim (of the query), plane (dim / 2). RoPE's planes are entries k and k + dim / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from scipy.special import expit, log_softmax, softmax
from torch import nn

from ..errors import RevprobeError
from ..models.probed import ProbedModel, as_probed
from ..models.roles import parameter_roles
from ..models.rotary import OTHER, TURNS, layer_positions
from .theory import BASE, rope_frequencies

HORIZON = 1e8  # the margin grows like log t, so the end of a flow is far away
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def rope_rotation(dim: int, distance: float, base: float = BASE, *, angles: ArrayLike | None = None) -> np.ndarray:
    """R_D, which turns plane k (entries k and k + dim / 2) by D theta_k. Shapes: `-> dim dim`, float64.

    Raises: RevprobeError, for an odd dim.
    """
    theta = distance * (rope_frequencies(dim, base) if angles is None else np.asarray(angles, dtype=np.float64))
    cos, sin = np.diag(np.cos(theta)), np.diag(np.sin(theta))
    return np.block([[cos, -sin], [sin, cos]])


def rope_transfer_condition(query: ArrayLike, distance: float, base: float = BASE) -> float:
    """q^T R_D q / |q|^2 at D = D_f + D_r: positive is enough for the reverse probability to follow (Prop. C.2).

    Not necessary: a negative one leaves the outcome open. Shapes: `query`: `dim`.
    """
    q = _vector("query", query)
    return float(q @ rope_rotation(len(q), distance, base) @ q / (q @ q))


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
    Raises: RevprobeError, for an odd or unequal dimension, a zero query, or an integration that does not finish.
    Source: paper App. C.3.
    """
    q, k = _vector("query", query), _vector("key", key)
    forward, reverse = (rope_rotation(len(q), turn, base) for turn in (distance_forward, -distance_reverse))
    routes = _Routes(forward, reverse, (0.0, 0.0), learn_query=False, learn_key=True)
    return _flow(routes, q, k, vocabulary, horizon, points)


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

    Arguments, columns and errors as in `simulate_rope_transfer`.
    Source: paper App. C.3.
    """
    q, k = _vector("query", query), _vector("key", key)
    content, bias = np.eye(len(q)), (-slope * distance_forward, -slope * distance_reverse)
    routes = _Routes(content, content, bias, learn_query=learn_routing, learn_key=learn_routing)
    return _flow(routes, q, k, vocabulary, horizon, points)


def _flow(
    routes: _Routes, query: np.ndarray, key: np.ndarray, vocabulary: int, horizon: float, points: int
) -> pd.DataFrame:
    if len(query) != len(key):
        raise RevprobeError(f"query of {len(query)} entries and key of {len(key)}: expected one dimension for both")
    if vocabulary < 2 or points < 2 or not horizon > 1e-3:
        raise RevprobeError(
            f"vocabulary={vocabulary!r}, points={points!r}, horizon={horizon!r}: expected at least 2 tokens, 2 points "
            "and a horizon above 0.001"
        )
    start = np.concatenate([np.zeros(vocabulary), query, key])
    times = np.concatenate([[0.0], np.geomspace(1e-3, horizon, points - 1)])
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


@dataclass(frozen=True)
class TwoRouteToy:
    """The matrices of a one-layer, one-head model as Prop. C.1 uses them: no norm, residual or MLP.

    Shapes: `embedding`: `token d_model`; `query`, `key`: `dim d_model`; `value`: `d_model d_model` (a model's W_O W_V);
    `unembedding`: `vocab d_model`; `angles`: `plane`, zeros for ALiBi. `slope`: of ALiBi, 0 otherwise.
    """

    embedding: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    unembedding: np.ndarray
    angles: np.ndarray
    slope: float = 0.0

    @classmethod
    def from_model(cls, model: ProbedModel | nn.Module, *, slope: float | None = None) -> TwoRouteToy:
        """Take the matrices out of a one-layer, one-head model that has each as a Linear layer of its own.

        Its norms, biases, residual stream and MLP are left out, as in the proposition.
        Args:
            slope: of the ALiBi bias, which no parameter holds: needed where RoPE does not turn the queries, 0 for none.
        Raises: RevprobeError, for more layers or heads, fused projections, interleaved planes, or positions that
            enter by neither rotation nor bias.
        """
        model = as_probed(model)
        positions = layer_positions(model)
        if len(positions) != 1 or (found := next(iter(positions.values()))).heads != 1:
            raise RevprobeError(
                f"{model.name}: Prop. C.1 is about one attention layer of one head; take a model of that"
            )
        if found.kind == OTHER:
            raise RevprobeError(f"{model.name}: {found.reason}; Prop. C.1 needs RoPE, ALiBi or no position at all")
        if found.rotary is not None and (found.rotary.interleaved or found.rotary.start):
            raise RevprobeError(f"{model.name}: planes of neighbouring or later entries; expected k and k + dim / 2")
        if found.kind != TURNS and slope is None:
            raise RevprobeError(f"{model.name} has no rotation: pass slope= of its ALiBi bias, 0 where it has none")
        angles = found.rotary.frequencies if found.kind == TURNS and found.rotary else np.zeros(found.head_dim // 2)
        matrix = _matrices(model)
        value = matrix["o"] @ matrix["v"]
        return cls(matrix["embed"], matrix["q"], matrix["k"], value, matrix["unembed"], angles, slope or 0.0)

    def gradient_terms(
        self, *, target: int, evidence: int, mask: int, distance_forward: float, distance_reverse: float
    ) -> pd.DataFrame:
        """Inner products of the forward and the reverse gradient, matrix by matrix, in closed form.

        Args:
            target, evidence, mask: token ids of v, u and the mask.
        Returns: one row per part: parameter ("W_U", "W_V", "W_Q", "W_K", "E"), part (of E: "mask" for the mask's
            column, "key", "value" and "cross" for the evidence's; else ""), inner.
        Raises: RevprobeError, for a token outside the tables, or a mask that is also target or evidence.
        Source: paper App. C.2, Prop. C.1.
        """
        self._check_tokens(target, evidence, mask)
        e_u, e_m = self.embedding[evidence], self.embedding[mask]
        clean = np.arange(len(self.unembedding)) != mask  # the mask can be read but is never predicted
        sides = [self._side(e_u, e_m, target, clean, turn) for turn in (distance_forward, -distance_reverse)]
        f, r = sides
        unembedded = [self.unembedding.T @ side.delta for side in sides]
        gains, routes, root = f.gain * r.gain, f.route * r.route, len(self.query)
        value_paths = [self.value.T @ one for one in unembedded]
        key_paths = [self.key.T @ side.turned_query for side in sides]
        query_paths = [self.query.T @ side.turned_key for side in sides]
        rows = {
            ("W_U", ""): routes * (f.delta @ r.delta) * np.square(self.value @ e_u).sum(),
            ("W_V", ""): routes * (unembedded[0] @ unembedded[1]) * (e_u @ e_u),
            ("W_Q", ""): gains * (f.turned_key @ r.turned_key) * (e_m @ e_m) / root,
            ("W_K", ""): gains * (f.turned_query @ r.turned_query) * (e_u @ e_u) / root,
            ("E", "mask"): gains * (query_paths[0] @ query_paths[1]) / root,
            ("E", "key"): gains * (key_paths[0] @ key_paths[1]) / root,
            ("E", "value"): routes * (value_paths[0] @ value_paths[1]),
            ("E", "cross"): (
                f.gain * r.route * (key_paths[0] @ value_paths[1]) + f.route * r.gain * (value_paths[0] @ key_paths[1])
            )
            / np.sqrt(root),
        }
        return pd.DataFrame(
            [(*name, float(inner)) for name, inner in rows.items()], columns=["parameter", "part", "inner"]
        )

    def _side(self, e_u: np.ndarray, e_m: np.ndarray, target: int, clean: np.ndarray, turn: float) -> _Side:
        """One prompt, with the evidence `turn` tokens to the right of the mask (negative: to the left)."""
        query, key = self.query @ e_m, self.key @ e_u
        rotation = rope_rotation(len(query), turn, angles=self.angles)
        route = float(expit(query @ rotation @ key / np.sqrt(len(query)) - self.slope * abs(turn)))
        retrieved = self.unembedding @ (self.value @ e_u)
        delta = softmax(np.where(clean, route * retrieved, -np.inf))
        delta[target] = 0.0
        delta[target] = -delta.sum()  # p - 1 would lose its digits as p nears 1
        gain = route * (1.0 - route) * float(delta @ retrieved)
        return _Side(route, delta, gain, rotation @ key, rotation.T @ query)

    def _check_tokens(self, target: int, evidence: int, mask: int) -> None:
        limits = {"target": len(self.unembedding), "evidence": len(self.embedding), "mask": len(self.embedding)}
        for name, token in (("target", target), ("evidence", evidence), ("mask", mask)):
            if not 0 <= token < limits[name]:
                raise RevprobeError(f"{name} token {token!r}: expected 0 to {limits[name] - 1}")
        if mask in (evidence, target):
            raise RevprobeError(f"mask token {mask!r} is also target or evidence; expected three different tokens")


@dataclass(frozen=True)
class _Side:
    """One prompt of the toy: a, delta, g = a (1 - a) delta^T W_U W_V e_u, R k and R^T q."""

    route: float
    delta: np.ndarray
    gain: float
    turned_key: np.ndarray
    turned_query: np.ndarray


def _matrices(model: ProbedModel) -> dict[str, np.ndarray]:
    """The weight of each role, float64. Raises: RevprobeError, when a role is missing or has several."""
    found: dict[str, list[np.ndarray]] = {}
    weights = dict(model.module.named_parameters())
    for name, place in parameter_roles(model.module).items():
        if weights[name].dim() == 2:
            found.setdefault(place.role, []).append(weights[name].detach().double().cpu().numpy())
    for role in ("embed", "q", "k", "v", "o", "unembed"):
        if len(found.get(role, [])) != 1:
            raise RevprobeError(
                f"{model.name} has {len(found.get(role, []))} matrices of the role {role!r}: Prop. C.1 needs exactly "
                "one (not fused, not tied)"
            )
    return {role: matrices[0] for role, matrices in found.items() if len(matrices) == 1}


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or len(vector) < 2 or len(vector) % 2 or not np.isfinite(vector).all():
        raise RevprobeError(f"{name} of shape {vector.shape}: expected an even number of finite entries")
    if name == "query" and not vector.any():
        raise RevprobeError("query is zero: no route depends on it; give one that is not")
    return vector
