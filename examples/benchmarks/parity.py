"""The three probes against slow computations on every architecture of transformers; writes docs/tried.md.

    python examples/benchmarks/parity.py              # all that can be built tiny, about ten minutes of one core
    python examples/benchmarks/parity.py bert llama   # these model types only; the page is not written

A number is right if it differs by at most 1e-4 from what `parity_references` works out without the package. Whatever
else comes out is a refusal with its reason, or WRONG.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from parity_references import Asked, attention_weights, eager_copy, gradient_of, log_probability, products, same_model
from tiny_architectures import MASK, NotTiny, architectures, at_most, tiny_model
from torch import nn

import revprobe as rp

TOLERANCE = 1e-4
PROBES = ("probability", "attention", "gradient")
MOST_RUNS, MOST_TOKENS = 6, 36  # what wrapping may cost: forward passes, and token ids in one
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


@dataclass
class Tried:
    """One model: what each probe said, what `diagnose` said of them, and what wrapping cost."""

    name: str
    objective: str
    outcomes: dict[str, Outcome]
    said: dict[str, bool] = field(default_factory=dict)
    runs: int = 0
    tokens: int = 0
    notes: str = ""

    @property
    def wrong(self) -> list[str]:
        return [f"{probe}: {one}" for probe, one in self.outcomes.items() if one.kind == WRONG]

    @property
    def disagrees(self) -> list[str]:
        """Probes of which `diagnose` says another thing than was found."""
        kinds = {probe: one.kind for probe, one in self.outcomes.items() if probe in self.said}
        return [probe for probe, kind in kinds.items() if self.said[probe] != (kind == RIGHT)]


def queries(objective: str, mask: int = MASK) -> tuple[list[list[Asked]], list[list[rp.Query]], str]:
    """Five facts asked both ways, 6 to 11 tokens long: (forward, reverse) of each as the model and as a probe sees it.

    Masked: the same target from the same evidence, in the opposite order. Causal: the roles are swapped.
    """
    generator = torch.Generator().manual_seed(7)
    asked, given = [], []
    for fact in range(5):
        ids = (20 + torch.randperm(90, generator=generator)).tolist()
        one, other, near, *rest = ids
        sides, probed = [], []
        for side in (0, 1):
            length = (6, 9, 11, 7, 8, 10)[(fact + 2 * side) % 6]
            tokens = rest[side * 12 : side * 12 + length]
            if objective == "masked":
                evidence, target, beside = ((1, length - 2, 2), (length - 2, 1, 3))[side]
                tokens[evidence], tokens[target], tokens[beside] = one, other, near
                seen, row = [mask if i == target else t for i, t in enumerate(tokens)], target
            else:
                evidence, target, beside = 1, length - 1 - fact % 2, 2
                tokens[evidence], tokens[target] = (one, other) if side == 0 else (other, one)
                tokens[beside] = near
                seen, row = tokens, target - 1
            sides.append(Asked(seen, tokens[target], row, (evidence, beside)))
            probed.append(rp.Query(tokens, [target], [evidence]))
        asked.append(sides)
        given.append(probed)
    return asked, given, "same_target" if objective == "masked" else "swapped"


def pairs_of(given: list[list[rp.Query]], kind: str) -> rp.ReversalPairs:
    made = (rp.ReversalPair(*sides, kind=kind, fact=str(fact)) for fact, sides in enumerate(given))
    return rp.ReversalPairs.from_pairs(made)


def beside(pairs: rp.ReversalPairs, asked: list[list[Asked]]) -> rp.ReversalPairs:
    """The same questions with their evidence in the other column."""
    columns = {tuple(query.token_ids): one.columns[1] for pair, ones in zip(pairs, asked, strict=True)
               for query, one in zip((pair.forward, pair.reverse), ones, strict=True)}  # fmt: skip
    moved = [rp.Query(q.token_ids, q.target_positions, [columns[tuple(q.token_ids)]]) for q in pairs.queries]
    return rp.ReversalPairs(tuple(moved), pairs.forward, pairs.reverse, pairs.facts, pairs.kind)


# --- one probe against its reference --------------------------------------------------------------------------------


def check_probability(model: rp.ProbedModel, pairs: rp.ReversalPairs, asked: list[list[Asked]]) -> Outcome:
    """Probabilities relative to those of each query alone."""
    frame = rp.probe_reverse_probability(model, pairs).frame.set_index(["direction", "pair"])
    errors = []
    with torch.no_grad():
        for pair, sides in enumerate(asked):
            for side, one in zip(("forward", "reverse"), sides, strict=True):
                right = log_probability(model.module, one).item()
                errors.append(abs(np.expm1(float(frame.loc[(side, pair), "log_probability"]) - right)))
    return judged(max(errors))


def check_gradient(model: rp.ProbedModel, pairs: rp.ReversalPairs, asked: list[list[Asked]]) -> Outcome:
    """Norms relative to autograd's, and cosines."""
    reading = rp.probe_gradient_cosine(model, pairs)
    frame = reading.frame.assign(
        first=reading.frame.norm_forward**2, second=reading.frame.norm_reverse**2
    ).groupby("pair")[["inner", "first", "second"]].sum()  # fmt: skip
    errors = [0.0]
    for pair, sides in enumerate(asked):
        right = products(*(gradient_of(model.module, one) for one in sides))
        got, size = frame.loc[pair], (right.first * right.second) ** 0.5
        if not size:
            return Outcome(LEFT_OUT, reason="no gradient reaches any parameter")
        errors.append(abs(float(got["inner"]) - right.inner) / size)
        errors.append(abs((float(got["first"]) / right.first) ** 0.5 - 1))
        errors.append(abs((float(got["second"]) / right.second) ** 0.5 - 1))
    alone = reading.meta.get("one_by_one", {})
    return judged(float(np.max(errors)), f"{len(alone)} parameters one by one" if alone else "")


def check_attention(model: rp.ProbedModel, pairs: rp.ReversalPairs, asked: list[list[Asked]]) -> Outcome:
    """Weights, and differences of the scores of two columns, layer by layer and head by head."""
    reading = rp.probe_attention_correlation(model, pairs)
    one, two = reading.frame, rp.probe_attention_correlation(model, beside(pairs, asked)).frame
    layers = sorted(one.loc[one["weight_forward"].notna(), "layer"].unique())
    if not layers:
        return Outcome(REFUSED, reason=next(iter(reading.undefined), "no layer is read"))
    eager, errors, source = eager_copy(model.module), [0.0], ""
    if not same_model(model.module, eager, asked[0][0]):
        return Outcome(LEFT_OUT, reason="its eager attention computes another model, so it is no reference")
    keys = ["pair", "layer", "head"]
    one, two = one.set_index(keys), two.set_index(keys)
    for pair, sides in enumerate(asked):
        for side, query in zip(("forward", "reverse"), sides, strict=True):
            source, right = attention_weights(eager, query)
            if len(right) != len(layers):
                return Outcome(WRONG if right else LEFT_OUT, reason=f"reads layers {layers}; {source} {len(right)}")
            for layer, weights in zip(layers, right, strict=True):
                read = [f.loc[(pair, layer)][[f"weight_{side}", f"score_{side}"]].to_numpy() for f in (one, two)]
                errors.append(_apart(read, weights.double().numpy()))
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


# --- one model ------------------------------------------------------------------------------------------------------


def try_model(name: str, objective: str, module: nn.Module, wrap: Callable[[], rp.ProbedModel] | None = None) -> Tried:
    """Wrap a module, count what that costs, and hold each probe and `diagnose` against the references."""
    told = {"objective": objective} | ({"mask_token_id": MASK, "logit_shift": 0} if objective == "masked" else {})
    sizes: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        sizes.append(0 if ids is None else ids.numel())

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    tried = Tried(name, objective, {})
    try:
        model = wrap() if wrap is not None else rp.ProbedModel(module, **told)
    except Exception as error:
        tried.outcomes = dict.fromkeys(PROBES, raised(error))
        return tried
    finally:
        handle.remove()
        tried.runs, tried.tokens = len(sizes), max(sizes, default=0)
    tried.notes = "equal lengths only" if model.contract.equal_lengths else ""
    asked, given, kind = queries(objective)
    pairs = pairs_of(given, kind)
    for probe, check in CHECKS.items():
        try:
            tried.outcomes[probe] = check(model, pairs, asked)
        except Exception as error:
            tried.outcomes[probe] = raised(error)
    try:
        tried.said = dict(rp.diagnose(model).probes)
    except Exception as error:
        tried.notes += f" diagnose: {raised(error)}"
    return tried


def raised(error: Exception) -> Outcome:
    """A refusal by name is an answer; any other exception is a fault."""
    text = " ".join(str(error).split())
    if isinstance(error, rp.RevprobeError):
        return Outcome(REFUSED, reason=text)
    return Outcome(WRONG, reason=f"{type(error).__name__}: {text[:160]}")
