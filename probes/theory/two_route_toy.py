"""Prop. C.1: how the gradients of a forward and a reverse query align, matrix by matrix of a one-layer model.

A masked position attends to itself and to one evidence token u with weight a = sigmoid(s), and its logits are what it
retrieves: z = a W_U W_V e_u. The forward query sees u at D_f tokens to its right, the reverse query at D_r to its left.
delta = p - 1_v throughout.

Shapes below: vocab, token, d_model, dim (of the query).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit, softmax
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError
from ...models.probed import ProbedModel, as_probed
from ...models.rotary import OTHER, TURNS, Rotary, seen_positions
from ...models.structure import parameter_roles, score_biases
from .checks import both_distances, number


@dataclass(frozen=True)
class TwoRouteToy:
    """The matrices of a one-layer, one-head model as Prop. C.1 uses them: no norm, residual or MLP.

    The score is q^T R k / sqrt(dim) - slope * distance.
    Shapes: `embedding`: `token d_model`; `query`, `key`: `dim d_model`; `value`: `d_model d_model` (a model's W_O W_V);
    `unembedding`: `vocab d_model`. `rotary`: how the model turns query and key, None for ALiBi. `slope`: of ALiBi, 0
    otherwise.
    """

    embedding: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    unembedding: np.ndarray
    rotary: Rotary | None = None
    slope: float = 0.0

    @classmethod
    @checked
    def from_model(cls, model: ProbedModel | nn.Module, *, slope: float | None = None) -> TwoRouteToy:
        """Take the matrices out of a one-layer, one-head model that has each as a Linear layer of its own.

        Its norms, biases, residual stream, MLP and any scale of the scores but 1/sqrt(dim) are left out, as in the
        proposition. The rotation is the model's own: scaled, partial or of interleaved planes.
        Args:
            slope: of the ALiBi bias, which no parameter holds: needed where RoPE does not turn the queries, 0 for none.
        Raises: RevprobeError, for more layers or heads, fused projections, positions that enter by neither rotation
            nor ALiBi, or a slope for a model that rotates.
        """
        model = as_probed(model)
        positions = seen_positions(model)
        if len(positions) != 1 or (found := next(iter(positions.values()))).heads != 1:
            raise RevprobeError(
                f"{model.name}: Prop. C.1 is about one attention layer of one head; take a model of that"
            )
        if found.kind == OTHER:
            raise RevprobeError(f"{model.name}: {found.reason}; Prop. C.1 needs RoPE, ALiBi or no position at all")
        if biases := score_biases(model.module):
            raise RevprobeError(
                f"{model.name} adds a learned bias to its scores ({biases[0]}), for which Prop. C.1 has no term; take "
                "a model with RoPE, ALiBi or no position"
            )
        steep = None if slope is None else number("slope", slope, 0.0)
        if found.kind == TURNS and steep:
            raise RevprobeError(
                f"slope={slope!r}: {model.name} turns its queries and has no ALiBi bias; leave slope out"
            )
        if found.kind != TURNS and steep is None:
            raise RevprobeError(f"{model.name} has no rotation: pass slope= of its ALiBi bias, 0 where it has none")
        matrix = _matrices(model)
        value = matrix["o"] @ matrix["v"]
        rotary = found.rotary if found.kind == TURNS else None
        return cls(matrix["embed"], matrix["q"], matrix["k"], value, matrix["unembed"], rotary, steep or 0.0)

    @checked
    def gradient_terms(
        self, *, target: int, evidence: int, mask: int, distance_forward: float, distance_reverse: float
    ) -> pd.DataFrame:
        """Inner products of the forward and the reverse gradient, matrix by matrix, in closed form.

        Args:
            target, evidence, mask: token ids of v, u and the mask.
            distance_forward, distance_reverse: tokens from the mask to the evidence, to its right and to its left.
        Returns: one row per part: parameter ("W_U", "W_V", "W_Q", "W_K", "E"), part (of E: "mask" for the mask's
            column, "key", "value" and "cross" for the evidence's; else ""), inner.
        Raises: RevprobeError, for a token outside the tables, a mask that is also target or evidence, or a distance
            that is negative or not finite.
        Source: paper App. C.2, Prop. C.1.
        """
        self._check_tokens(target, evidence, mask)
        ahead, behind = both_distances(distance_forward, distance_reverse)
        e_u, e_m = self.embedding[evidence], self.embedding[mask]
        clean = np.arange(len(self.unembedding)) != mask  # the mask can be read but is never predicted
        sides = [self._side(e_u, e_m, target, clean, turn) for turn in (ahead, -behind)]
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
        rotation = np.eye(len(query)) if self.rotary is None else self.rotary.rotation(turn)
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
