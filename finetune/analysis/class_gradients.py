"""The objective taken apart: the loss and the gradient of every class of its terms.

A class is what is priced, whether the target and the evidence are visible, how many tokens are hidden, and whether a
dial leaves the term out. Sequences of one state (see `masked_samples`) run together, and on their shared forward pass
one backward pass gives the gradient of each class among them. What is drawn comes in replicates, from which the error
of the draw is told.

Shapes below: class, parameter, replicate, row, seq.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import RevprobeError
from ...models.probed import ProbedModel
from ...progress import Progress, counted
from ..training.negatives import LOWER, OTHER, PLACEHOLDER, UPPER, dropped_terms
from ..training.objectives import logits_at_their_position
from .masked_samples import REPLICATES, Masked, Objective, Sample, State, samples
from .reverse_gradients import FlatParameters, by_role
from .term_rows import EVIDENCE, LEFT, PARTS, RIGHT, TARGET, RowTable

# A token's kind as the dials know it.
_KINDS = torch.tensor([{TARGET: LOWER, EVIDENCE: UPPER, LEFT: PLACEHOLDER, RIGHT: PLACEHOLDER}.get(p, OTHER) for p in
                       range(len(PARTS))])  # fmt: skip


class TermClass(NamedTuple):
    """One class: `priced` is one of PARTS; target and evidence are "visible", "hidden" or "partly"; masks are units."""

    priced: str
    target: str
    evidence: str
    masks: int
    dropped: bool


@dataclass
class ClassGradients:
    """Shapes: `loss`: class; `gradient`: class parameter; `noise`: class class, what the draw adds to the products of
    gradients; `role_noise`: role -> class; `deviation`: class replicate, of the products with one direction.

    `sequences`: how many were run; `enumerated`: whether every stratum was.
    """

    direction: Tensor
    classes: list[TermClass] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    noise: dict[tuple[int, int], float] = field(default_factory=dict)
    role_noise: dict[tuple[str, int], float] = field(default_factory=dict)
    deviations: dict[int, np.ndarray] = field(default_factory=dict)
    sequences: int = 0
    enumerated: bool = True

    def place(self, one: TermClass) -> int:
        """The class's place among all, made for it where it is new."""
        if one not in self.classes:
            self.classes.append(one)
            self.losses.append(0.0)
            self.gradients.append(torch.zeros_like(self.direction))
        return self.classes.index(one)

    def add(self, flat: FlatParameters, found: dict[TermClass, tuple[np.ndarray, Tensor]]) -> None:
        """One stratum: each class's loss and gradient by replicate. Shapes: `replicate, replicate parameter`."""
        places = [self.place(one) for one in found]
        gradients = torch.stack([gradient for _, gradient in found.values()])  # class replicate parameter
        mean, replicates = gradients.mean(1), gradients.shape[1]
        for at, (loss, _), one in zip(places, found.values(), mean, strict=True):
            self.losses[at] += float(loss.mean())
            self.gradients[at] += one
        if replicates == 1:
            return
        apart = gradients - mean[:, None]
        along = (apart.double() @ self.direction.double()).cpu().numpy()
        for row, at in enumerate(places):
            self.deviations[at] = self.deviations.get(at, 0.0) + along[row]
        for role, span in flat.spans.items():
            part = apart[..., span].double().flatten(1)
            for at, value in zip(places, part.square().sum(1).tolist(), strict=True):
                self.role_noise[role, at] = self.role_noise.get((role, at), 0.0) + value / _error_divisor(replicates)
        products = (apart.flatten(1).double() @ apart.flatten(1).double().T / _error_divisor(replicates)).tolist()
        for left, row in zip(places, products, strict=True):
            for right, value in zip(places, row, strict=True):
                self.noise[left, right] = self.noise.get((left, right), 0.0) + value

    @property
    def gradient(self) -> Tensor:
        """Shapes: `-> class parameter`."""
        return torch.stack(self.gradients)

    def weighted_sum(self, factors: np.ndarray) -> Tensor:
        """The classes' gradients, each times its factor, summed in float64 one after the other.

        Shapes: `class -> parameter`.
        """
        total = torch.zeros_like(self.direction, dtype=torch.float64)
        for factor, gradient in zip(factors.tolist(), self.gradients, strict=True):
            total.add_(gradient, alpha=factor)
        return total

    @property
    def deviation(self) -> np.ndarray:
        """Shapes: `-> class replicate`; zero where everything was enumerated."""
        nothing = np.zeros(REPLICATES)
        return np.stack([self.deviations.get(at, nothing) for at in range(len(self.classes))])

    def gram(self, flat: FlatParameters) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Products of the classes' gradients less what the draw adds to them, and their squared norms by role.

        Shapes: `-> class class, role -> class`.
        """
        gradient = self.gradient
        products = sum((part for _, part in by_role(flat, gradient, gradient)), torch.zeros(()))
        whole = products.cpu().numpy()
        for (left, right), value in self.noise.items():
            whole[left, right] -= value
        squares = {}
        for role, span in flat.spans.items():
            own = gradient[:, span].double().square().sum(1).cpu().numpy()
            squares[role] = own - np.array([self.role_noise.get((role, at), 0.0) for at in range(len(own))])
        return whole, squares


def _error_divisor(replicates: int) -> int:
    return replicates * (replicates - 1)


def class_gradients(
    model: ProbedModel,
    tables: Sequence[RowTable],
    objective: Objective,
    flat: FlatParameters,
    direction: Tensor,
    *,
    draws: int,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> ClassGradients:
    """Take the objective apart; the caller keeps the module untouched.

    Args:
        direction: what the error of the draw is told along. Shapes: `parameter`.
        draws: how many masked sequences in all, where not every set is enumerated.
    """
    found = ClassGradients(direction)
    for sample in counted(list(samples(tables, objective, draws, seed)), progress):
        found.enumerated &= sample.enumerated
        found.sequences += sample.sequences
        found.add(flat, _of_sample(model, sample, objective.dial, flat))
    return found


def _of_sample(
    model: ProbedModel, sample: Sample, dial: str, flat: FlatParameters
) -> dict[TermClass, tuple[np.ndarray, Tensor]]:
    """Each class's loss and gradient by replicate."""
    losses: dict[TermClass, np.ndarray] = {}
    gradients: dict[TermClass, Tensor] = {}
    for replicate, some in sample.batches():
        terms = priced_terms(model, some)
        weights = list(class_weights(sample.state, some, dial))
        for place, (one, weight) in enumerate(weights):
            if one not in losses:
                losses[one] = np.zeros(sample.replicates)
                gradients[one] = torch.zeros(sample.replicates, flat.size).to(flat.parameters[0])
            loss = (terms * weight.to(terms)).sum()
            losses[one][replicate] += loss.item()
            gradients[one][replicate] += flat.gradient(loss, keep_graph=place + 1 < len(weights))
    return {one: (losses[one], gradients[one]) for one in losses}


def priced_terms(model: ProbedModel, some: Masked) -> Tensor:
    """The cross-entropy of every hidden token, 0 elsewhere. Shapes: `-> row seq`."""
    token_ids, hidden = some.token_ids.to(model.device), some.hidden.to(model.device)
    logits = logits_at_their_position(model.logits(model.hide(token_ids, hidden)), model.logit_shift)
    log_probabilities = logits.double().log_softmax(-1)
    if log_probabilities.isnan().any():
        raise RevprobeError(model.explain_non_finite())
    return -log_probabilities.gather(-1, token_ids[..., None])[..., 0].masked_fill(~hidden, 0.0)


def class_weights(state: State, some: Masked, dial: str) -> Iterator[tuple[TermClass, Tensor]]:
    """The classes among the hidden tokens, and each token's weight in each of them. Shapes: `-> row seq`."""
    share = dropped_share(dial, _KINDS[some.part], some.hidden)
    for place, name in enumerate(PARTS):
        here = (some.hidden & (some.part == place)) * some.weight[:, None]
        for dropped, of_term in ((False, 1 - share), (True, share)):
            if bool((weights := here * of_term).any()):
                yield TermClass(name, *state, dropped), weights


def dropped_share(dial: str, kinds: Tensor, hidden: Tensor) -> Tensor:
    """How often a dial leaves out each term: always or never, but for the matched dials, which pick at random.

    Shapes: `row seq, row seq (bool) -> row seq`, float64.
    """
    side = dial.removesuffix("-matched")
    share = dropped_terms(side, kinds, hidden).double()
    if side == dial:
        return share
    counts = [dropped_terms(one, kinds, hidden).sum(1) for one in ("drop-left", "drop-right")]
    return share * (torch.minimum(*counts) / share.sum(1).clamp(min=1))[:, None]
