"""Queries of a batch beside the same queries run by themselves: what the short trial of a model cannot show.

Some models change with length (rotary factors for long contexts, attention in blocks, chunks) or with the size of a
batch (experts of a limited capacity). So of the first batch that is larger or longer than any before, the shortest
query and the last one are run alone (`make_batch` does it, before the batch, when no hook is in place yet), and what
the batch gives is held against that: log-probabilities wherever it is run, and the weights of attention that is tapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, nn

from ...errors import RevprobeError
from ...hooks.attention import AttentionTap
from ...models.contract.trial import LENGTH
from ...models.probed import ProbedModel
from ..pairs.query import Query

# In float32 a sound model's log-probabilities and weights move by 1e-5 with the batch; nats, and share of a weight.
_APART, _LIKELY = 1e-3, -15.0


class Size(NamedTuple):
    """A batch as far as it matters here: whether rows are padded, how many there are, how long, what was watched."""

    padded: bool
    rows: int
    tokens: int
    attention: bool

    @classmethod
    def of(cls, queries: Sequence[Query], *, attention: bool = False) -> Size:
        """Of a batch of these queries."""
        lengths = {len(query.token_ids) for query in queries}
        return cls(len(lengths) > 1, len(queries), max(lengths), attention)

    def covers(self, other: Size) -> bool:
        return all(own >= theirs for own, theirs in zip(self, other, strict=True))


class PaddingReaches(RevprobeError):
    """Raised for a padded batch of which a query gives other numbers alone."""


Done = TypeVar("Done")
_held: WeakKeyDictionary[nn.Module, set[Size]] = WeakKeyDictionary()


def is_due(model: ProbedModel, size: Size) -> bool:
    """Whether a batch is larger than the trial's and than all that were held against queries alone."""
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


def places_to_hold(queries: Sequence[Query]) -> list[int]:
    """Which queries of a batch are run alone: the last of the shortest, which has the most padding, and the last one.

    Experts of a limited capacity seat a batch's tokens in order, so it is the last that find no seat.
    """
    lengths = np.array([len(query.token_ids) for query in queries])
    return sorted({len(lengths) - 1 - int(lengths[::-1].argmin()), len(lengths) - 1})


@dataclass(frozen=True)
class Alone:
    """What some queries of a batch gave by themselves, and whether the batch gives the same.

    Of a model of random tokens, the first draw of them. Shapes: `log_probabilities`: row of the batch -> `token vocab`;
    `taps`: row -> its attention, where that is watched.
    """

    model: ProbedModel
    size: Size
    log_probabilities: dict[int, Tensor] = field(default_factory=dict)
    taps: dict[int, AttentionTap] = field(default_factory=dict)

    def hold(self, logits: Tensor) -> None:
        """Hold the batch's logits against it, or its log-probabilities, at the readout rows.

        Shapes: `logits`: `row token vocab`.
        Raises: PaddingReaches, for a padded batch with other numbers; RevprobeError, for one without padding, or NaN.
        """
        for row, alone in self.log_probabilities.items():
            there = logits.detach()[row, : len(alone)].double().log_softmax(-1)
            if alone.isnan().any() or there.isnan().any():
                raise RevprobeError(self.model.explain_non_finite())
            likely = (alone > _LIKELY) | (there > _LIKELY)
            self._require("log-probabilities by {:.2g} nats", float((alone - there)[likely].abs().max()))
        if not self.taps:
            self._note()

    def hold_weights(self, tap: AttentionTap) -> None:
        """Hold the attention weights of a batch whose logits have been held. Raises: as `hold`."""
        for row, own in self.taps.items():
            self._require("attention weights by {:.2g}", _turned(own, tap, row, self.model.name))
        self._note()

    def _note(self) -> None:
        """Batches of this size, and smaller ones, are sound."""
        _held.setdefault(self.model.module, set()).add(self.size)

    def _require(self, how: str, moved: float) -> None:
        if moved <= _APART:
            return
        size, what = self.size, how.format(moved)
        found = f"among {size.rows} queries of up to {size.tokens} tokens one differs from itself alone in {what}"
        if size.padded:
            raise PaddingReaches(found)
        raise RevprobeError(
            f"{self.model.name}: {found}, so its numbers would depend on the batch; use batch_size=1, without the "
            "gradient probe"
        )


def _turned(own: AttentionTap, tap: AttentionTap, row: int, name: str) -> float:
    """By how much weights of a row of the batch differ from those of its own run."""
    layers, worst = tap.layers(name), 0.0
    for layer, call in own.layers(name).items():
        if layer in layers:
            tokens, columns = call.weight.shape[2:]
            there = layers[layer].weight[row, :, :tokens, :columns]
            worst = max(worst, float((call.weight[0] - there).abs().max()))
    return worst
