"""Each probe held against the slow computations of `parity_references`, on questions made up for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from parity_references import Asked, attention_weights, eager_copy, gradient_of, log_probability, products, same_model
from tiny_architectures import MASK
from torch import nn

import revprobe as rp

TOLERANCE = 1e-4
Questions = list[list[Asked]]
PROBES = ("probability", "attention", "gradient")
RIGHT, REFUSED, LEFT_OUT, WRONG = "right", "refused", "left out", "WRONG"


class Outcome(NamedTuple):
    """What one probe said of one model: how, the largest error where it is right, and the reason where it is not."""

    kind: str
    error: float = float("nan")
    reason: str = ""

    def __str__(self) -> str:
        if self.kind == RIGHT:
            return f"right ({self.error:.0e})" + (f"; {self.reason}" if self.reason else "")
        size = "" if np.isnan(self.error) else f" ({self.error:.1g})"
        return f"{self.kind}{size}: {self.reason}"


def questions(objective: str, even: bool = False) -> tuple[Questions, rp.ReversalPairs]:
    """Five facts asked both ways, 6 to 11 tokens long: (forward, reverse) of each as the model and as a probe sees it.

    `even`: all of 9 tokens. Masked: the same target from the same evidence, in the opposite order. Causal: the roles
    are swapped.
    """
    generator = torch.Generator().manual_seed(7)
    asked, given = [], []
    for fact in range(5):
        ids = (20 + torch.randperm(90, generator=generator)).tolist()
        one, other, near, *rest = ids
        sides, probed = [], []
        for side in (0, 1):
            length = 9 if even else (6, 9, 11, 7, 8, 10)[(fact + 2 * side) % 6]
            tokens = rest[side * 12 : side * 12 + length]
            if objective == "masked":
                evidence, target, beside = ((1, length - 2, 2), (length - 2, 1, 3))[side]
                tokens[evidence], tokens[target], tokens[beside] = one, other, near
                seen, row = [MASK if i == target else t for i, t in enumerate(tokens)], target
            else:
                evidence, target, beside = 1, length - 1 - fact % 2, 2
                tokens[evidence], tokens[target] = (one, other) if side == 0 else (other, one)
                tokens[beside] = near
                seen, row = tokens, target - 1
            sides.append(Asked(seen, tokens[target], row, (evidence, beside)))
            probed.append(rp.Query(tokens, [target], [evidence]))
        asked.append(sides)
        given.append(probed)
    kind = "same_target" if objective == "masked" else "swapped"
    made = (rp.ReversalPair(*sides, kind=kind, fact=str(fact)) for fact, sides in enumerate(given))
    return asked, rp.ReversalPairs.from_pairs(made)


def beside(pairs: rp.ReversalPairs, asked: Questions) -> rp.ReversalPairs:
    """The same questions with their evidence in the other column."""
    columns = {tuple(query.token_ids): one.columns[1] for pair, ones in zip(pairs, asked, strict=True)
               for query, one in zip((pair.forward, pair.reverse), ones, strict=True)}  # fmt: skip
    moved = [rp.Query(q.token_ids, q.target_positions, [columns[tuple(q.token_ids)]]) for q in pairs.queries]
    return rp.ReversalPairs(tuple(moved), pairs.forward, pairs.reverse, pairs.facts, pairs.kind)


# --- one probe against its reference --------------------------------------------------------------------------------


def check_probability(
    model: rp.ProbedModel, pairs: rp.ReversalPairs, asked: Questions, reference: nn.Module
) -> Outcome:
    """Probabilities relative to those of each query alone."""
    frame = rp.probe_reverse_probability(model, pairs).frame.set_index(["direction", "pair"])
    errors = []
    with torch.no_grad():
        for pair, sides in enumerate(asked):
            for side, one in zip(("forward", "reverse"), sides, strict=True):
                right = log_probability(reference, one).item()
                errors.append(abs(np.expm1(float(frame.loc[(side, pair), "log_probability"]) - right)))
    return judged(max(errors))


def check_gradient(model: rp.ProbedModel, pairs: rp.ReversalPairs, asked: Questions, reference: nn.Module) -> Outcome:
    """Norms relative to autograd's, and cosines."""
    reading = rp.probe_gradient_cosine(model, pairs)
    frame = reading.frame.assign(
        first=reading.frame.norm_forward**2, second=reading.frame.norm_reverse**2
    ).groupby("pair")[["inner", "first", "second"]].sum()  # fmt: skip
    errors = [0.0]
    for pair, sides in enumerate(asked):
        right = products(*(gradient_of(reference, one) for one in sides))
        got, size = frame.loc[pair], (right.first * right.second) ** 0.5
        if not size:
            return Outcome(LEFT_OUT, reason="no gradient reaches any parameter")
        errors.append(abs(float(got["inner"]) - right.inner) / size)
        errors.append(abs((float(got["first"]) / right.first) ** 0.5 - 1))
        errors.append(abs((float(got["second"]) / right.second) ** 0.5 - 1))
    alone = reading.meta.get("one_by_one", {})
    return judged(float(np.max(errors)), f"{len(alone)} parameters one by one" if alone else "")


def check_attention(model: rp.ProbedModel, pairs: rp.ReversalPairs, asked: Questions, reference: nn.Module) -> Outcome:
    """Weights, and differences of the scores of two columns, layer by layer and head by head."""
    reading = rp.probe_attention_correlation(model, pairs)
    one, two = reading.frame, rp.probe_attention_correlation(model, beside(pairs, asked)).frame
    layers = sorted(one.loc[one["weight_forward"].notna(), "layer"].unique())
    if not layers:
        return Outcome(REFUSED, reason=next(iter(reading.undefined), "no layer is read"))
    eager, errors = eager_copy(reference), [0.0]
    if not same_model(reference, eager, asked[0][0]):
        return Outcome(LEFT_OUT, reason="its eager attention computes another model, so it is no reference")
    keys = ["pair", "layer", "head"]
    one, two = (frame.set_index(keys).sort_index() for frame in (one, two))
    for pair, sides in enumerate(asked):
        for side, query in zip(("forward", "reverse"), sides, strict=True):
            right = attention_weights(eager, query)
            if not right:
                return Outcome(LEFT_OUT, reason=f"its eager attention gives nothing to compare {len(layers)} layers to")
            # Layer by layer, head by head: a layer may attend more than once, so only the order of all is compared.
            read = [f.loc[(pair, layers), [f"weight_{side}", f"score_{side}"]].to_numpy() for f in (one, two)]
            errors.append(_apart(read, torch.cat(right).double().numpy()))
    left = len({*range(max(layers) + 1)} - {*layers}) + len(reading.meta.get("left_out", {}))
    notes = [f"{len(layers)} layers"] + ([f"{left} not read, named"] if left else [])
    return judged(float(np.max(errors)), ", ".join(notes))


def _apart(read: list[np.ndarray], weights: np.ndarray) -> float:
    """How far weights are apart, and differences of scores from those of log-weights. Shapes: `heads 2`, `heads 2`."""
    if len(read[0]) != len(weights):
        return float("inf")
    got = np.stack([table[:, 0] for table in read], axis=1)
    scores = read[0][:, 1] - read[1][:, 1]
    seen = (weights > 1e-30).all(1)
    logs = np.log(weights[seen, 0]) - np.log(weights[seen, 1])
    apart = np.abs(scores[seen] - logs) / np.maximum(1.0, np.abs(logs))
    return float(max(np.abs(got - weights).max(), apart.max(initial=0.0)))


def judged(error: float, note: str = "") -> Outcome:
    return Outcome(RIGHT, error, note) if error <= TOLERANCE else Outcome(WRONG, error, note or "differs")


CHECKS: dict[str, Callable[..., Outcome]] = dict(
    zip(PROBES, (check_probability, check_attention, check_gradient), strict=True)
)
