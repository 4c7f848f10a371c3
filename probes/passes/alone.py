"""One query of a batch beside the same query run by itself: what the short trial of a model cannot show.

Some models change with length (rotary factors for long contexts, attention in blocks, chunks) or with the size of a
batch (experts of a limited capacity). So the first batch of a pass that is larger or longer than any before is held
against its shortest query alone: log-probabilities, and the weights of its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import RevprobeError
from ...hooks.attention import AttentionTap, tap_attention
from ...hooks.attention_sites import Attention
from ...models.contract.trial import LENGTH
from ...models.probed import ProbedModel
from ..pairs.query import Query
from .batches import make_batch
from .likelihood import readout

# In float32 a sound model's log-probabilities and weights move by 1e-5 with the batch; nats, and share of a weight.
_APART, _LIKELY = 1e-3, -15.0


class Size(NamedTuple):
    """A batch as far as it matters here: whether rows are padded, how many there are, how long, what was watched."""

    padded: bool
    rows: int
    tokens: int
    attention: bool

    def covers(self, other: Size) -> bool:
        return all(own >= theirs for own, theirs in zip(self, other, strict=True))


class PaddingReaches(Exception):
    """Raised for a padded batch whose shortest query gives other numbers alone."""


Done = TypeVar("Done")
_held: WeakKeyDictionary[nn.Module, set[Size]] = WeakKeyDictionary()


def is_due(model: ProbedModel, size: Size) -> bool:
    """Whether a batch is larger than the trial's and than all that were held against a query alone."""
    coarse = (model.contract.narrowed or model.dtype).itemsize < 4  # rounding alone moves its numbers visibly
    beyond = size.rows > 3 or size.tokens > LENGTH
    known = _held.get(model.module, set())
    return beyond and size.rows > 1 and not coarse and not any(one.covers(size) for one in known)


def in_equal_lengths_if_need_be(model: ProbedModel, run: Callable[[], Done]) -> Done:
    """What `run` gives; where padding reached a query there, what it gives in batches of equal lengths.

    Args:
        run: a whole pass, from its beginning: what a first one has kept is lost.
    """
    try:
        return run()
    except PaddingReaches as error:
        model.contract = replace(model.contract, equal_lengths=str(error))
        return run()


def shortest_of(queries: Sequence[Query], *, attention: bool = False) -> tuple[int, Size]:
    """The row to run alone of a batch of queries, the last of the shortest, and the batch's size."""
    lengths = np.array([len(query.token_ids) for query in queries])
    size = Size(bool(np.ptp(lengths)), len(lengths), int(lengths.max()), attention)
    return len(lengths) - 1 - int(lengths[::-1].argmin()), size


def hold_batch(
    model: ProbedModel,
    queries: Sequence[Query],
    log_probabilities: Tensor | Callable[[], Tensor],
    tap: AttentionTap | None = None,
    attention: Attention | None = None,
) -> None:
    """Hold one query of a batch that has been run against its own run, where that is due.

    Args:
        log_probabilities: those of the batch, or what gives them. Shapes: `query token vocab`.
    Raises: as `hold_against_alone`.
    """
    row, size = shortest_of(queries, attention=tap is not None)
    if is_due(model, size):
        found = log_probabilities if isinstance(log_probabilities, Tensor) else log_probabilities()
        hold_against_alone(model, queries[row], row, size, found, tap, attention)


@torch.no_grad()
def hold_against_alone(
    model: ProbedModel,
    query: Query,
    row: int,
    size: Size,
    log_probabilities: Tensor,
    tap: AttentionTap | None,
    attention: Attention | None,
) -> None:
    """Run the query by itself and compare.

    Of a model of random tokens, the first draw of them. Shapes: `log_probabilities`: `query token vocab`, of the batch
    in which the query stands at `row`.
    Raises: PaddingReaches, for a padded batch with other numbers; RevprobeError, for one without padding.
    """
    batch = make_batch(model, [query], in_draws=True)
    if tap is None or attention is None:
        alone, own = readout(model, batch)[0], None
    else:
        at = batch.attention_rows, batch.attention_columns
        with tap_attention(model.module, *at, attention, batch.size) as own:
            alone = readout(model, batch)[0]
    there = log_probabilities.detach()[row, : len(alone)]
    likely = (alone > _LIKELY) | (there > _LIKELY)
    moved = float((alone - there)[likely].abs().max())
    require_as_alone(model, size, moved, 0.0 if own is None or tap is None else _turned(own, tap, row, model.name))


def require_as_alone(model: ProbedModel, size: Size, moved: float, turned: float = 0.0) -> None:
    """Note that a batch of this size is sound, or raise.

    Args:
        moved, turned: by how much a query's log-probabilities (nats) and weights differ from those of its own run.
    Raises: PaddingReaches, for a padded batch with other numbers; RevprobeError, for one without padding.
    """
    if max(moved, turned) <= _APART:
        _held.setdefault(model.module, set()).add(size)
        return
    what = f"log-probabilities by {moved:.2g} nats" if moved > _APART else f"attention weights by {turned:.2g}"
    found = f"among {size.rows} queries of up to {size.tokens} tokens one differs from itself alone in {what}"
    if size.padded:
        raise PaddingReaches(found)
    raise RevprobeError(
        f"{model.name}: {found}, so its numbers would depend on the batch; use batch_size=1, without the gradient probe"
    )


def _turned(own: AttentionTap, tap: AttentionTap, row: int, name: str) -> float:
    layers, worst = tap.layers(name), 0.0
    for layer, call in own.layers(name).items():
        if layer in layers:
            tokens, columns = call.weight.shape[2:]
            there = layers[layer].weight[row, :, :tokens, :columns]
            worst = max(worst, float((call.weight[0] - there).abs().max()))
    return worst
