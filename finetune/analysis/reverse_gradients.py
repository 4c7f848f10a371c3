"""The gradients that classes of training terms are held against: those of each fact's reverse loss, and of its parts.

    -log p(target) = -log p(target | candidates)  -  log p(candidates)
        loss               letters                       margin

The candidates are the targets of all facts; on letters, the 26 lowercase ones, so that what the margin loses goes to
the placeholder above all. The control asks for the same target under another fact's reverse query.

Shapes below: fact, query, token, vocab, parameter (all of them, flat, those of one role side by side).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...models.probed import ProbedModel
from ...models.structure import parameter_roles
from ...probes.pairs.pairs import ReversalPairs
from ...probes.pairs.query import Query
from ...probes.passes.alone import in_equal_lengths_if_need_be
from ...probes.passes.batches import QueryBatch, in_batches, make_batch, prepare_queries, queries_per_batch
from ...probes.passes.likelihood import mean_nll, readout
from ...probes.storage import control_partners
from ...progress import Progress, counted
from .one_step import with_target

LOSS, LETTERS, CONTROL = range(3)


class FlatParameters:
    """A module's parameters as one vector, role by role: those named, or all of them."""

    def __init__(self, module: nn.Module, names: Collection[str] | None = None) -> None:
        roles = {name: role.role for name, role in parameter_roles(module).items()}
        named = trained_parameters(module, names)
        self.names = sorted(named, key=lambda name: roles[name])
        self.parameters = [named[name] for name in self.names]
        ends = np.cumsum([p.numel() for p in self.parameters])
        self.size = int(ends[-1])
        self.spans: dict[str, slice] = {}
        for name, end, p in zip(self.names, ends, self.parameters, strict=True):
            first = self.spans.get(roles[name], slice(int(end) - p.numel(), 0)).start
            self.spans[roles[name]] = slice(first, int(end))

    def gradient(self, loss: Tensor, *, keep_graph: bool = False) -> Tensor:
        """Of a scalar. Shapes: `-> parameter`, in the parameters' own dtype."""
        found = torch.autograd.grad(loss, self.parameters, retain_graph=keep_graph, allow_unused=True)
        return self.flat([torch.zeros_like(p) if g is None else g for g, p in zip(found, self.parameters, strict=True)])

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor for each parameter, in the order of `names`. Shapes: `-> parameter`."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a flat vector, in their parameters' shapes. Shapes: `parameter ->`."""
        parts = vector.split([p.numel() for p in self.parameters])
        return {name: part.view_as(p) for name, part, p in zip(self.names, parts, self.parameters, strict=True)}

    def require_gradients(self) -> None:
        """Within `untouched`, which puts the flags back."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class ReverseGradients:
    """Shapes: `facts`: fact; `loss` (mean over its pairs, nats): `part fact`; `gradient`: `part fact parameter`, the
    parts being the loss, its letters and the control; NaN where a fact has no control; `queries` (how many each fact
    has, and how many of them have a control): `2 fact`.
    """

    facts: np.ndarray
    loss: np.ndarray
    gradient: Tensor
    queries: np.ndarray

    @property
    def mean(self) -> Tensor:
        """The gradient of the mean reverse loss over facts. Shapes: `-> parameter`."""
        return self.gradient[LOSS].mean(0)


def reverse_gradients(
    model: ProbedModel,
    pairs: ReversalPairs,
    flat: FlatParameters,
    *,
    control: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> ReverseGradients:
    """Every fact's, by one backward pass each; the caller keeps the module untouched."""
    queries = prepare_queries(model, pairs.queries)
    candidates = Candidates(model, [queries[index] for index in pairs.reverse])
    partner = control_partners(pairs, model.logit_shift, seed=seed) if control else np.full(len(pairs), -1)
    facts, fact = np.unique(pairs.facts.astype(str), return_inverse=True)
    size = queries_per_batch(model, queries, batch_size)
    loss = np.full((3, len(facts)), np.nan)
    gradient = torch.full((3, len(facts), flat.size), float("nan"), device=model.device, dtype=flat.parameters[0].dtype)
    for place in counted(range(len(facts)), progress):
        own = np.flatnonzero(fact == place)
        asked = [queries[pairs.reverse[pair]] for pair in own]
        loss[[LOSS, LETTERS], place], gradient[[LOSS, LETTERS], place] = _of_fact(model, asked, flat, size, candidates)
        with_partner = own[partner[own] >= 0]
        if len(with_partner):
            elsewhere = [
                with_target(queries[pairs.reverse[partner[pair]]], queries[pairs.reverse[pair]].target)
                for pair in with_partner
            ]
            found, gradient[CONTROL, place] = (part[0] for part in _of_fact(model, elsewhere, flat, size))
            loss[CONTROL, place] = found
    asked_about = [np.bincount(fact[there], minlength=len(facts)) for there in (partner >= -1, partner >= 0)]
    return ReverseGradients(facts, loss, gradient, np.stack(asked_about))


def _of_fact(
    model: ProbedModel,
    asked: list[Query],
    flat: FlatParameters,
    size: int,
    candidates: Candidates | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Mean loss over these queries, and its letters where candidates are given. Shapes: `-> part, part parameter`."""
    return in_equal_lengths_if_need_be(model, lambda: _in_batches(model, asked, flat, size, candidates))


def _in_batches(
    model: ProbedModel, asked: list[Query], flat: FlatParameters, size: int, candidates: Candidates | None
) -> tuple[np.ndarray, Tensor]:
    parts = 1 if candidates is None else 2
    loss = np.zeros(parts)
    gradient = torch.zeros(parts, flat.size, device=model.device, dtype=flat.parameters[0].dtype)
    for some in in_batches(model, asked, size, lambda query: len(query.token_ids)):
        batch = make_batch(model, some)
        log_probabilities = readout(model, batch)
        losses = [mean_nll(log_probabilities, batch).sum() / len(asked)]
        if candidates is not None:
            losses.append(mean_nll(candidates.only(log_probabilities, batch), batch).sum() / len(asked))
        for part, one in enumerate(losses):
            loss[part] += one.item()
            gradient[part] += flat.gradient(one, keep_graph=part + 1 < parts)
    return loss, gradient


class Candidates:
    """The tokens that some target has at each place of an answer, by the answers' length."""

    def __init__(self, model: ProbedModel, queries: Sequence[Query]) -> None:
        self.allowed: dict[int, Tensor] = {}
        for query in queries:
            width = len(query.target)
            empty = torch.zeros(width, model.vocab_size, dtype=torch.bool)
            self.allowed.setdefault(width, empty)[range(width), query.target] = True

    def only(self, log_probabilities: Tensor, batch: QueryBatch) -> Tensor:
        """Log-probabilities among the candidates alone. Shapes: `query token vocab -> query token vocab`."""
        masks = torch.ones(log_probabilities.shape, dtype=torch.bool)
        vocab = log_probabilities.shape[-1]  # of the logits; the embedding may have a row for the mask token beside
        for row, width in enumerate(batch.is_target.sum(1).tolist()):
            allowed = self.allowed[width][:, :vocab]
            masks[row, :width] = False
            masks[row, :width, : allowed.shape[1]] = allowed
        masks = masks.to(log_probabilities.device)
        among = log_probabilities.masked_fill(~masks, float("-inf")).logsumexp(-1, keepdim=True)
        return log_probabilities - among


def trained_parameters(module: nn.Module, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of these names (None: all) that have gradients, which weights in 4 bits do not."""
    wanted = None if names is None else set(names)
    return {
        name: p for name, p in module.named_parameters() if p.is_floating_point() and (wanted is None or name in wanted)
    }


def fits(
    module: nn.Module,
    facts: int,
    names: Collection[str] | None = None,
    *,
    classes: int = 200,
    limit: float = 8e9,
) -> bool:
    """Whether the gradients of so many classes, and of every fact's reverse loss, take no more than 8 GB."""
    size = sum(p.numel() * p.element_size() for p in trained_parameters(module, names).values())
    return size * (3 * facts + classes) <= limit


def by_role(flat: FlatParameters, left: Tensor, right: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The products of two lists of flat vectors, role by role. Shapes: `a parameter, b parameter -> a b`."""
    for role, span in flat.spans.items():
        yield role, left[..., span].double() @ right[..., span].double().transpose(-1, -2)
