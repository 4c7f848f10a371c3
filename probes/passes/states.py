"""The states of readout rows, and what a model's own tail makes of them: what stands behind the logit lens.

The tail is all that follows the last layer: final norm, prediction head, soft-caps, unembedding. None of it is named.
The states to be read are put in the place of the last layer's output in a further run, one at each of its tokens,
and the model goes on from there; what the run was shown does not matter. That reads as many states in one run as it
has tokens, where a run for each layer would read one for each query, and holds as long as the tail treats every token
by itself: so among the states of every run of the tail are the last layer's own, away from where they came from, and
they must give the model's own logits.

Shapes below: query, token (target tokens), layer, width, vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import RevprobeError
from ...hooks.states import StateSite, change_states, record_states
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel
from ...models.structure import states_of
from ..pairs.query import Query
from .batches import QueryBatch, in_batches, logits_at_rows, make_batch

# The last layer's own states may miss the model's logits by this share of the largest, or by some rounding units.
_SLACK, _UNITS = 1e-5, 4.0
_AT_ONCE = 64  # states whose log-probabilities are worked out together, in float64


def rows_of_states(
    model: ProbedModel, queries: Sequence[Query], sites: Sequence[StateSite]
) -> tuple[QueryBatch, Tensor, list[Tensor]]:
    """Run queries once, as one batch: their logits at the readout rows, and the states there, site by site.

    Shapes: `-> batch, query token vocab, site: query token width`.
    Raises: RevprobeError, for NaN logits, and as `passes.alone` does where a query alone has other numbers.
    """
    batch = make_batch(model, queries)
    at = torch.arange(len(batch.rows), device=batch.rows.device)[:, None], batch.rows
    keep = lambda state: state[tuple(index.to(state.device) for index in at)].clone()  # noqa: E731
    with record_states(model.module, sites, keep) as found:
        logits = logits_at_rows(model, batch)
    return batch, logits, [found[site] for site in sites]


@dataclass
class Tail:
    """What follows a model's last layer; `gap`: by how much its own states missed its logits so far, as a share."""

    model: ProbedModel
    last: StateSite
    gap: float = 0.0

    @classmethod
    def of(cls, model: ProbedModel) -> Tail:
        """Raises: RevprobeError, when the last layer's output is not the state that the logits are made from."""
        states = states_of(model)
        residual, missing = states.of("residual"), states.missing("residual")
        last = max([*residual, *missing], default=None)
        if last is None or last not in residual:
            why = "" if last is None else f" (layer {last}: {missing[last]})"
            raise RevprobeError(
                f"{model.name}: the last layer has no single state that the logits are made from{why}, so nothing can "
                "be read through its own norm and unembedding; probe_reverse_probability reads what it says at the end"
            )
        return cls(model, residual[last])

    def log_probabilities(self, batch: QueryBatch, own: Tensor, states: Sequence[Tensor]) -> Iterator[Read]:
        """Read the states of a batch, the last of them the last layer's, and hold that against the logits `own`.

        Shapes: `own`: `query token vocab`; each of `states`: `query token width`.
        Raises: RevprobeError, when the last layer's states do not give the model's logits.
        """
        stacked = torch.stack([state.to(states[-1]) for state in states], dim=2)  # query token layer width
        shape = stacked.shape[:3]
        queue = stacked.flatten(0, 2)
        rows, length = batch.input_ids.shape
        is_last = torch.arange(len(queue)) % shape[2] == shape[2] - 1
        home = batch.rows.cpu().flatten().repeat_interleave(shape[2])
        # Were each of the last layer's states read where it came from, a tail that tells tokens apart would pass.
        ahead = int((((torch.arange(len(queue)) % length) == home) | ~is_last).all())
        queue = torch.cat([queue[:ahead], queue])
        misses: list[Tensor] = []
        for start in range(0, len(queue), rows * length):
            some = queue[start : start + rows * length]
            logits = self._run(some, length)
            skipped = ahead if start == 0 else 0
            for at in range(skipped, len(some), _AT_ONCE):
                part = logits[at : at + _AT_ONCE]
                places = torch.arange(start + at - ahead, start + at - ahead + len(part))
                query, token, layer = torch.unravel_index(places, tuple(shape))
                read = Read(query, token, layer, part, part.double().log_softmax(-1))
                theirs = own[query.to(own.device), token.to(own.device)][is_last[places].to(own.device)]
                misses.append(_missed(part[is_last[places].to(part.device)], theirs))
                yield read
        self._hold(torch.cat(misses), own, states[-1])

    def _run(self, states: Tensor, length: int) -> Tensor:
        """The logits of states, in a run that holds one at each token. Shapes: `state width -> state vocab`."""
        rows = -(-len(states) // length)
        spare = states[:1].expand(rows * length - len(states), -1)
        packed = torch.cat([states, spare]).view(rows, length, -1)
        # A masked model predicts where it sees its mask, and some copy what they see elsewhere.
        shown = self.model.mask_token_id if self.model.objective == "masked" else 0
        assert shown is not None, "a masked ProbedModel has a mask token"
        ids = torch.full((rows, length), shown, device=self.model.device)
        with change_states(self.model.module, {self.last: lambda given: packed.to(given)}):
            return self.model.logits(ids)[:, :length].flatten(0, 1)[: len(states)]

    def _hold(self, missed: Tensor, own: Tensor, state: Tensor) -> None:
        finite = own[own.isfinite()].double().abs()
        self.gap = max(self.gap, float(missed.max()) / max(float(finite.max()), torch.finfo(torch.float32).tiny))
        eps = max(torch.finfo(dtype).eps for dtype in (state.dtype, own.dtype))
        if not self.gap <= max(_SLACK, _UNITS * eps):
            raise RevprobeError(
                f"{self.model.name}: its last layer's states, read at other tokens, miss its own logits by "
                f"{self.gap:.2g} of the largest, so what follows the last layer does not treat every token by itself "
                "and no layer can be read through it; probe_reverse_probability reads what it says at the end"
            )


@dataclass(frozen=True)
class Read:
    """Some states as the tail reads them: whose they are, and what it makes of them.

    Shapes: `query`, `token`, `layer` (places in what was given): `state`; `logits`, `log_probabilities` (float64):
    `state vocab`.
    """

    query: Tensor
    token: Tensor
    layer: Tensor
    logits: Tensor
    log_probabilities: Tensor


def _missed(found: Tensor, wanted: Tensor) -> Tensor:
    """The largest difference of each row; a token that both leave out (-inf) is none. Shapes: `-> row`, float64."""
    apart = (found.double() - wanted.double()).abs().masked_fill(found == wanted, 0.0)
    return apart.amax(-1).cpu() if len(apart) else apart.new_zeros(0).cpu()


@torch.no_grad()
def states_of_queries(
    model: ProbedModel, queries: Sequence[Query], sites: Sequence[StateSite], size: int, report: Callable[[int], None]
) -> np.ndarray:
    """The states of many queries at their readout rows, the mean over target tokens.

    Of a causal model it is the state of the first readout row: each later one has read tokens of the target.

    Args:
        size: queries of a batch; `report` is told how many have been run.
    Shapes: `-> site query width`, float32. Raises: RevprobeError, for NaN logits.
    """
    found, done = np.zeros((len(sites), len(queries), 0), dtype=np.float32), 0
    length = lambda q: len(queries[q].token_ids)  # noqa: E731
    with untouched(model.module):
        for numbers in in_batches(model, range(len(queries)), size, length):
            batch, _, states = rows_of_states(model, [queries[q] for q in numbers], sites)
            for place, state in enumerate(states):
                asked = batch.is_target.to(state.device)[..., None]
                if model.objective == "causal":
                    asked = asked & (batch.rows == batch.rows[:, :1]).to(state.device)[..., None]
                mean = state.float().masked_fill(~asked, 0.0).sum(1) / asked.sum(1)
                if not found.shape[2]:
                    found = np.full((len(sites), len(queries), mean.shape[1]), np.nan, dtype=np.float32)
                found[place, numbers] = mean.cpu().numpy()
            done += len(numbers)
            report(done)
    return found
