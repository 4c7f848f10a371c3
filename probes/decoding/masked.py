"""How a masked model writes: all answer positions start as masks, and each step reveals those it is surest of.

The answer is cut into blocks that are finished from left to right (semi-autoregressive); inside a block the model's
own confidence decides the order. With one block and as many steps as tokens this is LLaDA's low-confidence
remasking, or Dream's sampler with `alg="entropy"`; with blocks of one token it is left-to-right decoding.

Two things differ from the published samplers, on purpose: the mask token is never revealed (theirs leave such a
position masked for good), and of equally sure positions the leftmost comes first (theirs leave it to the sort).

The positions to be written need not stand at the end, nor together: a text may go on behind them. Whoever wants to know
what happens at each step hands in a `Watch`; it sees the model's own run, so that watching costs no run of its own and
changes no token.

Shapes below: row (text), seq (right-padded), token (positions to be written), open (positions that may be revealed in
this step), vocab.

Source: Nie et al. 2025 (arXiv 2502.09992), App. B.4; Ye et al. 2025 (arXiv 2508.15487).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import RevprobeError, did_you_mean
from ...models.probed import ProbedModel
from ..pairs.query import Query
from ..passes.alone import in_equal_lengths_if_need_be
from ..passes.batches import in_batches, make_batch


@dataclass(frozen=True)
class Prompt:
    """Tokens that stand before the answer, and those a tokenizer puts after it ([SEP])."""

    before: tuple[int, ...]
    after: tuple[int, ...] = ()

    def blanks(self, length: int, mask: int) -> Blanks:
        """The prompt with an answer of so many tokens still to be written."""
        start = len(self.before)
        return Blanks((*self.before, *[mask] * length, *self.after), tuple(range(start, start + length)))


@dataclass(frozen=True)
class Blanks:
    """A text with the mask token at the positions that are to be written, ascending."""

    token_ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One step of a batch, before anything is revealed in it.

    Shapes: `ids`, `attention` (None without padding): `row seq`; `columns` (where a token stands), `hidden` (not
    written yet), `is_open` (may be revealed now): `row token`.
    """

    ids: Tensor
    attention: Tensor | None
    columns: Tensor
    hidden: Tensor
    is_open: Tensor


class Watch(Protocol):
    """What looks on while a batch is unmasked."""

    def running(self, step: Step) -> AbstractContextManager[Any]:
        """Open while the model runs."""

    def seen(self, step: Step, logits: Tensor, revealed: Tensor) -> None:
        """After the step. Shapes: `row seq vocab, row token`: the token revealed, -1 where none was."""


def _confidence(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of the token that would be revealed (LLaDA's low-confidence remasking)."""
    return log_probabilities.gather(-1, tokens[:, None])[:, 0]


def _negative_entropy(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Minus the entropy of the position, in nats (Dream's `entropy`)."""
    return -torch.special.entr(log_probabilities.exp()).sum(-1)


def _margin(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Probability of the best token minus that of the second (Dream's `topk_margin`)."""
    best = log_probabilities.exp().topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


# How sure the model is of a position. Shapes: `open vocab, open -> open`; larger is surer.
ALGORITHMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "confidence": _confidence,
    "entropy": _negative_entropy,
    "margin": _margin,
}


@dataclass(frozen=True)
class Unmasking:
    """How to unmask; `unmasking(model, ...)` fills in the defaults and checks.

    Args:
        algorithm: which positions come first, a key of ALGORITHMS.
        steps: forward passes for the whole answer; one a token when None.
        block_length: tokens a block; the whole answer when None. A model that is read in blocks writes in its own,
            counted from the first token of the prompt, or in equal parts of them.
        temperature: 0 reveals the likeliest token; above, tokens are drawn at that temperature.
        seed: of the draws; each prompt draws from a generator of its own, whatever batch it is in.
    """

    algorithm: str = "confidence"
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """The settings, for a reading's meta."""
        return asdict(self)

    def schedule(self, length: int, starts: Sequence[int] | None = None) -> list[tuple[int, int, int]]:
        """What each step does to an answer of `length` tokens: (first, one past the last) of its block, how many.

        Steps are spread evenly over blocks and tokens evenly over a block's steps, the earlier ones taking the
        remainder, as LLaDA does; unlike there, neither has to divide the other. A step without a token is left out.

        >>> Unmasking(steps=4, block_length=3).schedule(6)
        [(0, 3, 2), (0, 3, 1), (3, 6, 2), (3, 6, 1)]

        Args:
            starts: where blocks begin in the answer, of a model that counts them from elsewhere (`block_starts`).
        Raises: RevprobeError, for fewer steps than blocks.
        """
        size = self.block_length or length
        starts = range(0, length, size) if starts is None else starts
        steps = length if self.steps is None else min(self.steps, length)
        if steps < len(starts):
            raise RevprobeError(
                f"{self.steps} steps for {len(starts)} blocks of {size} tokens: every block takes at least one step; "
                "raise steps or block_length"
            )
        blocks = list(pairwise([*starts, length]))
        # One token a step must stay that in a last, shorter block too: shares follow the blocks' sizes there.
        shares = [end - start for start, end in blocks] if steps == length else _even(steps, len(blocks))
        return [
            (start, end, count)
            for (start, end), share in zip(blocks, shares, strict=True)
            for count in _even(end - start, share)
            if count
        ]


def unmasking(
    model: ProbedModel,
    *,
    algorithm: str | None = None,
    steps: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Unmasking:
    """The settings for a masked model: the published samplers' order, "entropy" for models converted from causal ones
    (logit shift 1, as Dream) and "confidence" for others (as LLaDA), unless one is named.

    Raises: RevprobeError, for an unknown algorithm, or a setting that is out of range.
    """
    algorithm = algorithm or ("entropy" if model.logit_shift else "confidence")
    if algorithm not in ALGORITHMS:
        raise RevprobeError(f"unknown decoding algorithm {algorithm!r}{did_you_mean(algorithm, ALGORITHMS)}")
    for name, value in (("steps", steps), ("block_length", block_length)):
        if value is not None and value < 1:
            raise RevprobeError(f"{name} {value!r}: expected at least 1, or None for the default")
    if model.block_size is not None:
        block_length = block_length or model.block_size
        if model.block_size % block_length:
            raise RevprobeError(
                f"block_length {block_length} for {model.name}, which is read in blocks of {model.block_size} tokens: "
                "expected a number that divides them, or None"
            )
    if not 0 <= temperature < float("inf"):
        raise RevprobeError(f"temperature {temperature!r}: expected 0 (the likeliest token) or a positive number")
    return Unmasking(algorithm, steps, block_length, float(temperature), seed)


def block_starts(model: ProbedModel, how: Unmasking, places: Sequence[int]) -> list[int] | None:
    """Which of the positions to be written begin a block; None for a model without blocks.

    Blocks are counted from the text's first token, so that an answer's first one may be shorter. With shift 1 a
    block's first token is read off the finished block before, and stands when the others are begun.
    """
    size, length = model.block_size, how.block_length
    if size is None:
        return None
    assert length is not None, "set by `unmasking`"
    block = [(at // length, bool(model.logit_shift) and at % size == 0) for at in places]
    return [k for k in range(len(places)) if k == 0 or block[k] != block[k - 1]]


def schedule_of(model: ProbedModel, how: Unmasking, places: Sequence[int]) -> list[tuple[int, int, int]]:
    """`Unmasking.schedule` of the positions of a text. Raises: RevprobeError, for fewer steps than blocks."""
    return how.schedule(len(places), block_starts(model, how, places))


def unmask(
    model: ProbedModel, texts: Sequence[Blanks], how: Unmasking, labels: Sequence[int], watch: Watch | None = None
) -> list[list[int]]:
    """What is written into the blanks of one batch; `labels` seed the draws of each text.

    Raises: RevprobeError, when the logits are NaN.
    """
    canvas = _Canvas(model, texts)
    draws = _Draws(how, labels, model.device)
    schedules = [schedule_of(model, how, text.places) for text in texts]
    for step in range(max(len(schedule) for schedule in schedules)):
        now = [schedule[step] if step < len(schedule) else (0, 0, 0) for schedule in schedules]
        first, last, count = torch.tensor(now, device=model.device).unbind(1)
        canvas.reveal(first, last, count, how, draws, watch)
    return canvas.answers()


def hidden_log_probabilities(model: ProbedModel, texts: Sequence[Blanks]) -> Tensor:
    """What the first step sees of a batch of texts with as many blanks each: log-probabilities at every blank, the mask
    token left out. Shapes: `-> row token vocab`, float64.

    Raises: RevprobeError, when the logits are NaN.
    """
    return in_equal_lengths_if_need_be(model, lambda: _first_step(model, texts))


def _first_step(model: ProbedModel, texts: Sequence[Blanks]) -> Tensor:
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    for numbers in in_batches(model, range(len(texts)), len(texts), lambda n: len(texts[n].token_ids)):
        some = [texts[n] for n in numbers]
        queries = [Query.unchecked(text.token_ids, text.places, text.places[:1]) for text in some]
        make_batch(model, queries, changed=True)
        canvas = _Canvas(model, some)
        row, at = canvas.hidden.nonzero(as_tuple=True)
        read = canvas._read(canvas.run(), row, at)
        for n, values in zip(numbers, read.view(len(some), -1, read.shape[-1]), strict=True):
            found[n] = values
    return torch.stack(found)


class _Canvas:
    """Texts and what has been revealed. Shapes: `ids, attention: row seq`; `columns, hidden: row token`."""

    def __init__(self, model: ProbedModel, texts: Sequence[Blanks]) -> None:
        self.model = model
        # To the right, so that a learned position embedding sees a padded row exactly as it sees the row alone.
        width = max(len(text.token_ids) for text in texts)
        rows = [[*text.token_ids, *[0] * (width - len(text.token_ids))] for text in texts]
        self.ids = torch.tensor(rows, device=model.device)
        sizes = torch.tensor([len(text.token_ids) for text in texts], device=model.device)[:, None]
        is_token = torch.arange(width, device=model.device) < sizes
        self.attention = None if bool(is_token.all()) else is_token.long()
        self.lengths = [len(text.places) for text in texts]
        most = max(self.lengths)
        places = [[*text.places, *[text.places[0]] * (most - len(text.places))] for text in texts]
        self.columns = torch.tensor(places, device=model.device)
        lengths = torch.tensor(self.lengths, device=model.device)[:, None]
        self.hidden = torch.arange(most, device=model.device) < lengths

    def reveal(
        self, first: Tensor, last: Tensor, count: Tensor, how: Unmasking, draws: _Draws, watch: Watch | None = None
    ) -> None:
        """Run the model and fill the `count` surest positions of each row's block. Shapes: `row, row, row ->`."""
        token = torch.arange(self.hidden.shape[1], device=self.ids.device)
        is_open = self.hidden & (token >= first[:, None]) & (token < last[:, None])
        row, at = is_open.nonzero(as_tuple=True)
        step = Step(self.ids, self.attention, self.columns, self.hidden.clone(), is_open)
        with nullcontext() if watch is None else watch.running(step):
            logits = self.run()
        log_probabilities = self._read(logits, row, at)
        tokens = draws.tokens(log_probabilities, row)
        sure = torch.full(is_open.shape, -torch.inf, dtype=torch.float64, device=self.ids.device)
        sure[row, at] = ALGORITHMS[how.algorithm](log_probabilities, tokens)
        rank = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = (is_open & (rank < count[:, None]))[row, at]
        row, at, tokens = row[chosen], at[chosen], tokens[chosen]
        if watch is not None:  # before the canvas changes under the step
            revealed = torch.full_like(self.columns, -1)
            revealed[row, at] = tokens
            watch.seen(step, logits, revealed)
        self.ids[row, self.columns[row, at]] = tokens
        self.hidden[row, at] = False

    def answers(self) -> list[list[int]]:
        """The tokens at the positions that were to be written, all of them revealed by now."""
        assert not self.hidden.any(), "the schedule must reveal every position"
        rows = self.ids.gather(1, self.columns).tolist()
        return [row[:length] for row, length in zip(rows, self.lengths, strict=True)]

    def run(self) -> Tensor:
        """The model on what stands there now. Shapes: `-> row seq vocab`."""
        return self.model.logits(self.ids, self.attention)

    def _read(self, logits: Tensor, row: Tensor, at: Tensor) -> Tensor:
        """Log-probabilities at the positions' readout rows, mask token left out. Shapes: `open, open -> open vocab`."""
        # In float64, as LLaDA's sampler: ties that rounding makes would be broken by position.
        logits = logits[row, self.columns[row, at] - self.model.logit_shift].double()
        log_probabilities = self.model.without_mask(logits).log_softmax(-1)
        if log_probabilities.isnan().any():
            raise RevprobeError(self.model.explain_non_finite())
        return log_probabilities


class _Draws:
    """Which token each position would get: the likeliest, or the largest after Gumbel noise of the row's own generator.

    Adding temperature x Gumbel noise to log-probabilities and taking the largest draws from the softmax at that
    temperature; in float64, since low precision there loses quality (arXiv 2409.02908).
    """

    def __init__(self, how: Unmasking, labels: Sequence[int], device: torch.device) -> None:
        self.temperature, self.device = how.temperature, device
        seeds = [np.random.SeedSequence([how.seed, label]).generate_state(1, np.uint64)[0] for label in labels]
        # On the CPU, so that a seed means the same draws on every device.
        self.generators = [torch.Generator().manual_seed(int(seed) >> 1) for seed in seeds]

    def tokens(self, log_probabilities: Tensor, row: Tensor) -> Tensor:
        """Shapes: `open vocab, open -> open`; positions of one row stand together."""
        if not self.temperature:
            return log_probabilities.argmax(-1)
        counts = torch.bincount(row.cpu(), minlength=len(self.generators)).tolist()
        uniform = torch.cat(
            [
                torch.rand(count, log_probabilities.shape[1], dtype=torch.float64, generator=generator)
                for count, generator in zip(counts, self.generators, strict=True)
            ]
        ).to(self.device)
        return (log_probabilities - self.temperature * torch.log(-torch.log(uniform))).argmax(-1)


def _even(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole shares that differ by one at most, the larger first."""
    return [total // parts + (part < total % parts) for part in range(parts)]
