"""Queries unmasked by the model's own decoder, with a look at every step: the runs behind `trace_denoising`.

Nothing is run that decoding would not run: a watch taps the attention of the readout rows of what is still masked while
the model runs, and prices the target in the logits that the decoder reads.

Shapes below: query (distinct queries), step, token (target tokens), asked (tokens that are priced at a target position:
the query's own first, then those of the facts that are its controls), head (the heads of all layers that are read,
layer after layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ...errors import RevprobeError
from ...hooks.attention import AttentionTap, tap_attention
from ...hooks.attention_sites import Attention
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel
from ...progress import Progress
from ..decoding.masked import Blanks, Step, Unmasking, schedule_of, unmask
from ..pairs.query import Query
from ..passes.alone import in_equal_lengths_if_need_be
from ..passes.batches import in_batches, make_batch, queries_per_batch

# What a target position is at a step: written before it, may be written in it, waits for its turn, or stands in a block
# that the model has not begun.
WRITTEN, OPEN, WAITING, NOT_BEGUN = range(4)


@dataclass
class Trace:
    """What was seen of each query at each step; NaN (-1) where there was nothing to see.

    Shapes: `steps` (how many a query takes): `query`; `state`, `written` (the token revealed there and then), `rank`
    (of the query's own target, 1-based, ties against it): `query step token`; `log_probability` (nats, of the whole
    vocabulary): `query step token asked`; `score` (pre-softmax, mean over still-masked rows and evidence tokens),
    `weight` (summed over evidence tokens, mean over still-masked rows): `query step head`.
    `unread`: layer -> why it has no attention in some batch, of those that should have been read.
    """

    steps: np.ndarray
    state: np.ndarray
    written: np.ndarray
    rank: np.ndarray
    log_probability: np.ndarray
    score: np.ndarray
    weight: np.ndarray
    unread: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, steps: Sequence[int], tokens: int, asked: int, heads: int) -> Trace:
        shape = len(steps), max(steps), tokens
        return cls(
            steps=np.array(steps),
            state=np.zeros(shape, dtype=np.int8),
            written=np.full(shape, -1, dtype=np.int32),
            rank=np.full(shape, np.nan, dtype=np.float32),
            log_probability=np.full((*shape, asked), np.nan),
            score=np.full((*shape[:2], heads), np.nan, dtype=np.float32),
            weight=np.full((*shape[:2], heads), np.nan, dtype=np.float32),
        )


def trace_steps(
    model: ProbedModel,
    queries: Sequence[Query],
    asked: Sequence[Sequence[tuple[int, ...]]],
    how: Unmasking,
    attention: Attention,
    batch_size: int | None = None,
    progress: Progress | bool | None = None,
) -> Trace:
    """Let the model write every query's target, as `decode` would, and keep what was seen.

    Args:
        asked: for each query the targets priced at its positions, its own first, all of its length.
        attention: the sites that are read.
    Raises: RevprobeError, for fewer steps than blocks, NaN logits, or numbers that depend on the batch.
    """
    steps = [len(schedule_of(model, how, query.target_positions)) for query in queries]  # refused before it runs
    size = queries_per_batch(model, queries, batch_size)
    by_size = sorted(range(len(queries)), key=lambda i: (len(queries[i].token_ids), steps[i]))
    heads, widest = sum(attention.heads.values()), max(len(query.target) for query in queries)

    def run() -> Trace:
        trace, done = Trace.empty(steps, widest, max(map(len, asked)), heads), 0
        with untouched(model.module), torch.no_grad():
            for some in in_batches(model, by_size, size, lambda i: len(queries[i].token_ids)):
                watch = _Look(model, trace, some, [queries[i] for i in some], [asked[i] for i in some], attention)
                unmask(model, [_blanks(model, queries[i]) for i in some], how, some, watch)
                done += len(some)
                if callable(progress):
                    progress(done, len(queries))
        return trace

    return in_equal_lengths_if_need_be(model, run)


def _blanks(model: ProbedModel, query: Query) -> Blanks:
    """The query with its target masked, the rest shown."""
    assert model.mask_token_id is not None, "a masked model names its mask token when wrapped"
    tokens = list(query.token_ids)
    for place in query.target_positions:
        tokens[place] = model.mask_token_id
    return Blanks(tuple(tokens), query.target_positions)


class _Look:
    """A `Watch` over the queries of one batch, at `numbers` of the trace."""

    def __init__(
        self,
        model: ProbedModel,
        trace: Trace,
        numbers: Sequence[int],
        queries: Sequence[Query],
        asked: Sequence[Sequence[tuple[int, ...]]],
        attention: Attention,
    ) -> None:
        self.model, self.trace, self.numbers, self.queries = model, trace, np.array(numbers), queries
        self.attention, self.step, self.tap = attention, 0, AttentionTap(attention)
        self.alone = make_batch(model, queries, attention=attention).alone
        widest, most = max(len(query.target) for query in queries), max(map(len, asked))
        tokens = np.zeros((len(queries), most, widest), dtype=np.int64)
        for row, targets in enumerate(asked):
            for place, target in enumerate(targets):
                tokens[row, place, : len(target)] = target
        self.asked = torch.as_tensor(tokens, device=model.device)
        self.watched = self.asked.new_zeros(0)  # the target positions whose rows are tapped: `row token`
        evidence = [query.evidence_positions for query in queries]
        wide = max(map(len, evidence))
        columns = [[*places, *[places[0]] * (wide - len(places))] for places in evidence]
        self.columns = torch.tensor(columns, device=model.device)
        counts = torch.tensor([len(places) for places in evidence], device=model.device)
        self.is_evidence = torch.arange(wide, device=model.device) < counts[:, None]

    @contextmanager
    def running(self, step: Step) -> Iterator[None]:
        """The attention of the readout rows of what is still masked, while the model runs."""
        ahead, length = self.model.contract.placement.ahead, step.ids.shape[1]
        most = int(step.hidden.sum(1).max())
        self.watched = (~step.hidden).byte().argsort(dim=1, stable=True)[:, :most]  # those still masked come first
        rows = step.columns.gather(1, self.watched) - self.model.logit_shift
        at = rows + ahead[0], self.columns + ahead[1]
        size = length + ahead[0], length + ahead[1]
        with tap_attention(self.model.module, *at, self.attention, size) as self.tap:
            yield

    def seen(self, step: Step, logits: Tensor, revealed: Tensor) -> None:
        """Keep the step."""
        if not self.step:
            self._hold(step, logits)
        read = step.hidden if self.model.block_size is None else step.hidden & self._begun(step)
        waiting = torch.where(read, WAITING, NOT_BEGUN)
        state = torch.where(step.is_open, OPEN, torch.where(step.hidden, waiting, WRITTEN))
        at = self.numbers, self.step
        width = state.shape[1]
        self.trace.state[*at, :width] = state.cpu().numpy()
        self.trace.written[*at, :width] = revealed.cpu().numpy()
        self._price(step, logits, read)
        self._keep_attention(read)
        self.step += 1

    def _begun(self, step: Step) -> Tensor:
        """Which positions are read off a block that the model has come to. Shapes: `-> row token`."""
        block = (step.columns - self.model.logit_shift) // (self.model.block_size or 1)
        return block <= block.masked_fill(~step.is_open, -1).amax(1, keepdim=True)

    def _price(self, step: Step, logits: Tensor, read: Tensor) -> None:
        """Log-probabilities of the targets asked for, over the whole vocabulary as all probes have them."""
        row, at = read.nonzero(as_tuple=True)
        rows = logits[row, step.columns[row, at] - self.model.logit_shift].double()
        chosen = rows.gather(-1, self.asked[row, :, at])
        values = (chosen - rows.logsumexp(-1, keepdim=True)).cpu().numpy()
        place = self.numbers[row.cpu().numpy()], self.step, at.cpu().numpy()
        self.trace.log_probability[*place, : values.shape[1]] = values
        self.trace.rank[place] = (rows >= chosen[:, :1]).sum(-1).cpu().numpy()

    def _keep_attention(self, read: Tensor) -> None:
        """Scores averaged over still-masked rows and evidence tokens, weights summed over evidence tokens."""
        self.trace.unread |= self.tap.missing()
        layers, read = self.tap.layers(self.model.name), read.gather(1, self.watched)
        cell = (read[:, :, None] & self.is_evidence[:, None, :])[:, None]

        def of_heads(part: str) -> Tensor:  # `row head watched evidence`, layer after layer
            missing = torch.full((len(cell), 1, *cell.shape[2:]), torch.nan, device=cell.device)
            every = [
                getattr(layers[layer], part) if layer in layers else missing.expand(-1, heads, -1, -1)
                for layer, heads in self.attention.heads.items()
            ]
            return torch.cat(every, 1)

        score, weight = (of_heads(part).masked_fill(~cell, 0.0).sum((2, 3)) for part in ("score", "weight"))
        at, rows = (self.numbers, self.step), read.sum(1)[:, None]
        self.trace.score[at] = (score / cell.sum((2, 3))).cpu().numpy()
        self.trace.weight[at] = (weight / rows).cpu().numpy()  # 0 / 0 where all is written

    def _hold(self, step: Step, logits: Tensor) -> None:
        """The first, all-masked step beside queries alone, where that is due (`passes.alone`)."""
        if self.alone is not None:
            every = torch.arange(len(self.queries), device=logits.device)[:, None]
            self.alone.hold(logits[every, step.columns - self.model.logit_shift])
            self.alone.hold_weights(self.tap)


def read_layers(attention: Attention, layers: Sequence[int]) -> Attention:
    """The attention of some layers alone: the calls of others are made and not looked at."""
    sites = tuple(site for site in attention.sites if site.layer in layers)
    if not sites:
        raise RevprobeError(
            f"none of the layers {list(layers)} has attention that can be read; ask for one of {list(attention.heads)}"
        )
    return replace(attention, sites=sites)
