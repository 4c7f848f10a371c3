"""Likelihoods of targets: the log-probability a query gives to some target tokens, and their rank.

A request is a query with the tokens it is priced for: its own target, or, for the control, the target of the fact
shuffled onto it. A single token is read off the query's own run, in which the whole target is hidden; several tokens in
chain mode are revealed left to right: the first is read off that run too, each later one takes a run.

Shapes below: query (of the pass), request, token (target tokens), vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ...errors import RevprobeError, did_you_mean
from ...models.probed import ProbedModel
from ..pairs.pairs import ReversalPairs
from ..pairs.query import Query
from ..statistics.estimators import NO_LIKE_TARGET, NO_PARTNER
from ..statistics.resampling import derangement
from .batches import QueryBatch, in_batches, logits_at_rows, make_batch
from .draws import mean_likelihood
from .prompts import null_partners

MODES = ("chain", "parallel")

Target = tuple[int, ...]
Request = tuple[int, Target]


def target_partners(pairs: ReversalPairs, logit_shift: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """For each direction and pair another fact's pair of its group, with another target of as many tokens; -1 for none.

    The query of a fact with the same target, the same evidence or the same prompt makes no null of it, nor does one at
    which the target is right by another fact (`null_partners`). One order of the facts for both directions, so that
    where all of them differ they have the same partner.
    Shapes: direction -> `pair` (indices).
    """
    found = {}
    for direction, index in (("forward", pairs.forward), ("reverse", pairs.reverse)):
        targets = [pairs.queries[q].target for q in index]
        traits = np.stack([pairs.groups(logit_shift), [len(target) for target in targets]], axis=1)
        alike = np.unique(traits, axis=0, return_inverse=True)[1].reshape(-1)
        found[direction] = null_partners(pairs, alike, [direction], seed=seed)
    return found


def no_partner(pairs: ReversalPairs, logit_shift: int, partner: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Why pairs have no partner of `target_partners`, "" where they have one. Shapes: `pair -> pair`."""
    alone = derangement(pairs.facts.astype(str), pairs.groups(logit_shift), seed=seed) < 0
    return np.select([partner >= 0, alone], ["", NO_PARTNER], NO_LIKE_TARGET).astype(object)


@dataclass
class Likelihoods:
    """The requests of one pass and their answers, (log-probability in nats, worst 1-based rank) each.

    `partner`: direction -> the pair at whose query a pair's target is priced for the control, -1 for none.
    `kept`: the draws of random tokens that answers are means over; one, of a model with a mask token.
    `begun`: what is known of requests whose first token alone is priced so far.
    """

    model: ProbedModel
    queries: Sequence[Query]
    mode: str
    requests: dict[int, list[Target]]
    partner: Mapping[str, np.ndarray] = field(default_factory=dict)
    kept: Sequence[int] = (0,)
    answers: dict[Request, tuple[float, int]] = field(default_factory=dict)
    begun: dict[Request, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: ProbedModel,
        queries: Sequence[Query],
        pairs: ReversalPairs,
        mode: str,
        *,
        control: bool = False,
        seed: int = 0,
    ) -> Likelihoods:
        """Every query's own target, and the targets that the control prices there.

        Raises: RevprobeError, for an unknown mode, or parallel likelihoods of a causal model.
        """
        if mode not in MODES:
            raise RevprobeError(f"unknown mode {mode!r}{did_you_mean(mode, MODES)}")
        if mode == "parallel" and model.objective == "causal":
            raise RevprobeError(
                f"mode 'parallel' for {model.name}: a causal model always prices a target token by token; use "
                "mode='chain'"
            )
        targets = [query.target for query in queries]
        requests: dict[int, dict[Target, None]] = {q: {target: None} for q, target in enumerate(targets)}
        partner = target_partners(pairs, model.logit_shift, seed=seed) if control else {}
        for direction, others in partner.items():
            index = getattr(pairs, direction)
            for pair in np.flatnonzero(others >= 0):
                requests[int(index[others[pair]])][targets[index[pair]]] = None
        asked = {q: list(targets) for q, targets in requests.items()}
        return cls(model, queries, mode, asked, partner, range(model.draws))

    def from_run(self, log_probabilities: Tensor, queries: np.ndarray) -> None:
        """Answer what these queries' own run can answer, and the first token of a chain of a masked model.

        Shapes: `(query draw) token vocab, query`.
        """
        now = [
            (row, (int(q), target), len(target) if self._in_one_run(int(q), target) else 1)
            for row, q in enumerate(queries)
            for target in self.requests[int(q)]
            if self.model.objective != "causal" or self._in_one_run(int(q), target)
        ]
        if not now:
            return
        log_probabilities = mean_likelihood(log_probabilities, self.model.draws, self.kept)
        width, device = log_probabilities.shape[1], log_probabilities.device
        tokens = torch.tensor([[*target, *([0] * (width - len(target)))] for _, (_, target), _ in now], device=device)
        present = torch.tensor([[k < count for k in range(width)] for *_, count in now], device=device)
        rows = log_probabilities[torch.tensor([row for row, *_ in now], device=device)]
        values, ranks = price(rows, tokens, present)
        for (_, request, count), *answer in zip(now, values.tolist(), ranks.tolist(), strict=True):
            known = self.answers if count == len(request[1]) else self.begun
            known[request] = (answer[0], answer[1])

    def _in_one_run(self, query: int, target: Target) -> bool:
        """A single token, parallel mode, or a causal model reading its own clean sequence."""
        own = self.model.objective == "causal" and target == self.queries[query].target
        return len(target) == 1 or self.mode == "parallel" or own

    def conditionals(self, q: int, target: Target) -> Iterator[Query]:
        """The queries whose probabilities multiply to P(target): one per token, or one run of a causal model."""
        query = self.queries[q]
        tokens = list(query.token_ids)
        for position, token in zip(query.target_positions, target, strict=True):
            tokens[position] = token
        if self.model.objective == "causal":
            yield Query.unchecked(tokens, query.target_positions, query.evidence_positions, query.canvas_start)
            return
        assert self.model.mask_token_id is not None, "a masked ProbedModel has a mask token"
        for k, position in enumerate(query.target_positions):
            # Later target tokens are masked in the clean sequence itself; the wrapper hides the one asked for.
            hidden = query.target_positions[k + 1 :]
            shown = [self.model.mask_token_id if i in hidden else token for i, token in enumerate(tokens)]
            yield Query.unchecked(shown, (position,), query.evidence_positions, query.canvas_start)

    def look_up(self, queries: np.ndarray, targets: Sequence[Target]) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability and rank of targets[n] at queries[n]; NaN where there is no query (-1) or no such request."""
        missing = (float("nan"), float("nan"))
        found = [self.answers.get((int(q), target), missing) for q, target in zip(queries, targets, strict=True)]
        value, rank = np.array(found, dtype=np.float64).T
        return value, rank


def run_chains(every: Sequence[Likelihoods], batch_size: int, part: int = 0, parts: int = 1) -> None:
    """Answer the rest, targets of several tokens, conditional by conditional; every `parts`-th request from `part`.

    Args:
        every: the likelihoods of one pass, over different draws; the model runs once for all of them.
    """
    one = every[0]
    requests = [(q, target) for q, targets in one.requests.items() for target in targets]
    rest = [request for request in requests if not one._in_one_run(*request)][part::parts]
    # Another process may have run the query: its chain begins here.
    steps = [
        (request, query) for request in rest for query in islice(one.conditionals(*request), request in one.begun, None)
    ]
    totals = [{request: likelihoods.begun.get(request, (0.0, 0)) for request in rest} for likelihoods in every]
    for some in in_batches(one.model, steps, batch_size, lambda step: len(step[1].token_ids)):
        batch = make_batch(one.model, [query for _, query in some], in_draws=True)
        found, first = readout(one.model, batch), slice(None, None, batch.draws)
        for likelihoods, total in zip(every, totals, strict=True):
            mean = mean_likelihood(found, batch.draws, likelihoods.kept)
            values, ranks = price(mean, batch.targets[first], batch.is_target[first])
            for (request, _), value, rank in zip(some, values.tolist(), ranks.tolist(), strict=True):
                total[request] = (total[request][0] + value, max(total[request][1], rank))
    for likelihoods, total in zip(every, totals, strict=True):
        likelihoods.answers.update(total)


def readout(model: ProbedModel, batch: QueryBatch) -> Tensor:
    """Log-probabilities at the readout rows. Shapes: `-> (query draw) token vocab`, float64.

    In float32 the gradient p - 1 of a confident answer is a difference of rounding errors.
    Raises: RevprobeError, for NaN logits, and as `Alone.hold` where a query by itself has other numbers.
    """
    log_probabilities = logits_at_rows(model, batch).double().log_softmax(-1)
    if log_probabilities.isnan().any():
        raise RevprobeError(model.explain_non_finite())
    return log_probabilities


def mean_nll(log_probabilities: Tensor, batch: QueryBatch) -> Tensor:
    """Mean negative log-likelihood over target tokens, all hidden at once, in nats.

    Shapes: `query token vocab -> query`.
    """
    chosen = log_probabilities.gather(-1, batch.targets[..., None])[..., 0]
    return -chosen.masked_fill(~batch.is_target, 0.0).sum(1) / batch.is_target.sum(1)


def price(log_probabilities: Tensor, tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Summed log-probability of the tokens (nats) and the worst of their 1-based ranks.

    Ties count against the target: its rank is the number of tokens at least as likely, so that a model that gives
    all tokens the same probability ranks none of them first.

    Shapes: `request token vocab, request token, request token (bool) -> request, request`.
    """
    chosen = log_probabilities.gather(-1, tokens[..., None])
    rank = (log_probabilities >= chosen).sum(-1)
    return chosen[..., 0].masked_fill(~present, 0.0).sum(1), rank.masked_fill(~present, 0).amax(1)
