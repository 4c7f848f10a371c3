"""The log-probability of many continuations of prompts by a causal model; what begins alike is run once a batch.

Answers that part late (a description and its inflected forms) share most of their tokens. So continuations are read
token by token: each different beginning is one row, whose keys and values are those of its parent and one more, as in
beam search. Prompts of one length go together, so that nothing is padded. A model that keeps no plain cache, or whose
angles depend on the length of the sequence, reads a prompt and a continuation as a whole.

Shapes below: candidate (continuations of a prompt), row (different beginnings), vocab.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...errors import RevprobeError
from ...models.probed import ProbedModel
from ...models.rotary import grows_with_length
from ..pairs.query import Query
from ..passes.batches import in_batches, queries_per_batch
from .causal import generator_of

Tokens = tuple[int, ...]
Continuations = Sequence[Sequence[Tokens]]  # of each prompt
# Stands behind a continuation for any of the tokens that end it.
_END = -1
# Tokens of a batch that make room for one row, which holds keys and values: those of so many tokens take what one takes
# that is run (logits in float64, activations). And no less than a few.
_HELD, _FEWEST = 4, 8


def continuation_scores(
    model: ProbedModel,
    prompts: Sequence[Sequence[int]],
    rows: Continuations,
    batch_size: int | None = None,
    *,
    ends: Collection[int] = (),
) -> Iterator[tuple[int, Tensor]]:
    """The place of each prompt, in any order, with the log-probabilities of its continuations, in nats.

    Args:
        rows: the continuations of each prompt.
        batch_size: most beginnings that are run at once; by the size of the model when None.
        ends: behind every continuation one of these stands, whichever: their probabilities are summed. None when empty.

    Shapes: `-> candidate`, float64 on the CPU.
    Raises: RevprobeError, when the logits are NaN.
    """
    last = sorted(ends)
    rows = [[(*row, *[_END][: len(last)]) for row in own] for own in rows]
    found = [torch.full((len(own),), torch.nan, dtype=torch.float64) for own in rows]
    left = [len(own) for own in rows]
    yield from ((place, found[place]) for place, own in enumerate(rows) if not own)
    generator = None if grows_with_length(model.module) else generator_of(model.module)
    for together in _batches(model, prompts, rows, batch_size):
        scores = None if generator is None else _by_token(model, generator, prompts, rows, together, last)
        if scores is None:  # nor does it for the others
            generator = None
            asked = ((prompts[piece.place], [rows[piece.place][n] for n in piece.candidates]) for piece in together)
            scores = [_as_wholes(model, prompt, some, batch_size, last) for prompt, some in asked]
        for piece, own in zip(together, scores, strict=True):
            found[piece.place][piece.candidates] = own
            left[piece.place] -= len(piece.candidates)
            if not left[piece.place]:
                yield piece.place, found[piece.place]


@dataclass(frozen=True)
class _Piece:
    """Some continuations of a prompt, and the most rows that they need at once."""

    place: int
    candidates: list[int]
    width: int


def _batches(
    model: ProbedModel, prompts: Sequence[Sequence[int]], rows: Continuations, batch_size: int | None
) -> Iterator[list[_Piece]]:
    """Prompts of one length as long as they and their rows have room; one that needs more in pieces."""
    length = lambda place: len(prompts[place])  # noqa: E731
    for tokens, same in groupby(sorted((place for place, own in enumerate(rows) if own), key=length), length):
        places = list(same)
        most = queries_per_batch(model, [Query.unchecked(range(tokens), (), ())], batch_size)
        longest = tokens + max(len(row) for place in places for row in rows[place])
        of_a_row = max(_FEWEST, longest // _HELD)
        room = queries_per_batch(model, [Query.unchecked(range(of_a_row), (), ())], batch_size)
        batch: list[_Piece] = []
        for piece in (piece for place in places for piece in _pieces(place, rows[place], room)):
            if batch and (len(batch) == most or sum(one.width for one in batch) + piece.width > room):
                yield batch
                batch = []
            batch.append(piece)
        yield batch


def _pieces(place: int, rows: Sequence[Tokens], room: int) -> Iterator[_Piece]:
    """All continuations, or so many at a time as have room whatever they share, what begins alike together."""
    width = _width(rows)
    ordered = sorted(range(len(rows)), key=rows.__getitem__)
    size = len(rows) if width <= room else room
    for start in range(0, len(rows), size):
        candidates = ordered[start : start + size]
        yield _Piece(place, candidates, width if size == len(rows) else _width([rows[n] for n in candidates]))


def _width(rows: Sequence[Tokens]) -> int:
    return max([1, *(len(step.children) for step in _steps(rows, [0] * len(rows)))])


@dataclass(frozen=True)
class _Step:
    """One token of all continuations that reach so far.

    Attributes:
        candidates: these continuations.
        parents: the rows that they stand in.
        tokens: what each goes on with.
        children: the next rows, as (parent, token): beginnings that are not the whole of every continuation.
    """

    candidates: list[int]
    parents: list[int]
    tokens: list[int]
    children: list[tuple[int, int]]


def _steps(rows: Sequence[Tokens], roots: Sequence[int]) -> Iterator[_Step]:
    """Continuations token by token; `roots`: the row of each one's prompt."""
    at = list(roots)
    for depth in range(max(map(len, rows), default=0)):
        candidates = [n for n, row in enumerate(rows) if len(row) > depth]
        parents, tokens = [at[n] for n in candidates], [rows[n][depth] for n in candidates]
        children: dict[tuple[int, int], int] = {}
        for n, child in zip(candidates, zip(parents, tokens, strict=True), strict=True):
            if len(rows[n]) > depth + 1:
                at[n] = children.setdefault(child, len(children))
        yield _Step(candidates, parents, tokens, list(children))


def _by_token(
    model: ProbedModel,
    generator: Any,
    prompts: Sequence[Sequence[int]],
    rows: Continuations,
    together: Sequence[_Piece],
    ends: list[int],
) -> list[Tensor] | None:
    """Scores of each piece, a token of all of them at a time; None where no plain cache is kept."""

    def indices(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=model.device)

    ran = generator(input_ids=indices([list(prompts[piece.place]) for piece in together]), use_cache=True)
    cache: Any = getattr(ran, "past_key_values", None)
    if not _is_plain(cache, len(prompts[together[0].place])):
        return None
    continuations = [rows[piece.place][n] for piece in together for n in piece.candidates]
    roots = [root for root, piece in enumerate(together) for _ in piece.candidates]
    scores = torch.zeros(len(continuations), dtype=torch.float64, device=model.device)
    for step in _steps(continuations, roots):
        log_probabilities, tokens = _log_probabilities(model, ran.logits[:, -1]), indices(step.tokens)
        own = log_probabilities[indices(step.parents), tokens.clamp(min=0)]
        if _END in step.tokens:
            own = own.where(tokens != _END, log_probabilities[:, ends].logsumexp(-1)[indices(step.parents)])
        scores[indices(step.candidates)] += own
        if step.children:
            parents, shown = zip(*step.children, strict=True)
            cache.reorder_cache(indices(parents))  # each layer's on its own device
            ran = generator(input_ids=indices(shown)[:, None], past_key_values=cache, use_cache=True)
    return list(scores.cpu().split([len(piece.candidates) for piece in together]))


def _is_plain(cache: Any, length: int) -> bool:
    """Whether it holds keys and values of so many tokens in every layer, and nothing else."""
    if type(cache) is not DynamicCache or not cache.layers:
        return False
    return all(type(layer) is DynamicLayer and layer.get_seq_length() == length for layer in cache.layers)


def _as_wholes(
    model: ProbedModel, prompt: Sequence[int], rows: Sequence[Tokens], batch_size: int | None, ends: list[int]
) -> Tensor:
    """Scores of the continuations, each run with its prompt. Shapes: `-> candidate`, float64 on the CPU."""
    longest = len(prompt) + max(map(len, rows))
    size = queries_per_batch(model, [Query.unchecked(range(longest), (), ())], batch_size)
    found = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    for some in in_batches(model, range(len(rows)), size, lambda place: len(rows[place])):
        width = max(len(rows[place]) for place in some)
        padded = [[*rows[place], *[0] * (width - len(rows[place]))] for place in some]
        ids = torch.tensor(padded, dtype=torch.long, device=model.device)
        lengths = torch.tensor([len(rows[place]) for place in some], device=model.device)[:, None]
        # Padding stands to the right, where a causal model does not see it.
        before = torch.tensor([list(prompt)], device=model.device).expand(len(some), -1)
        # An end is last, where any token may stand: what is read stands before it.
        shown = ids if not ends else ids.where(ids != _END, ends[0])
        logits = model.logits(torch.cat([before, shown], dim=1))[:, len(prompt) - 1 : -1]
        log_probabilities = _log_probabilities(model, logits)
        own = log_probabilities.gather(2, shown[..., None])[..., 0]
        if ends:
            own = own.where(ids != _END, log_probabilities[..., ends].logsumexp(-1))
        is_token = torch.arange(width, device=model.device) < lengths
        found[some] = own.masked_fill(~is_token, 0.0).sum(1).cpu()
    return found


def _log_probabilities(model: ProbedModel, logits: Tensor) -> Tensor:
    found = logits.double().log_softmax(-1)
    if found.isnan().any():
        raise RevprobeError(model.explain_non_finite())
    return found
