"""Queries as tensors: what the model is shown, which rows are read, which tokens are priced; and how many at a time.

Everything that runs queries together makes its batch here and reads it by `logits_at_rows` (or `likelihood.readout`),
and so is held against queries alone (`alone`), whatever is done with the numbers; that keeps this file a long one.

Shapes below: query, seq (longest of the batch, right-padded), token (most target tokens of the batch), column
(most evidence tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby, islice, zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...errors import RevprobeError
from ...hooks.attention import AttentionTap, tap_attention
from ...hooks.attention_sites import Attention
from ...models.contract.called import CalledModule
from ...models.probed import ProbedModel
from ..pairs.query import Query
from .alone import Alone, Size, is_due, places_to_hold

# Tokens of one batch for a small model, the parameters beyond which batches shrink, and how far they do. A CPU's time
# for a large model grows with the tokens whatever the batch, and its memory is what other programs have left.
_TOKENS, _SMALL, _FEWEST, _FEWEST_ON_CPU = 8192, 50_000_000, 512, 128
# Distinct queries of one pair with its control; beyond how many times the room they do not fit, so that blocks run
# again; and how many times the tokens there is room for then, since of a layer only its modules' inputs are held.
ONE_PAIR, _OVER, _RUN_AGAIN = 3, 1.5, 2.5
Item = TypeVar("Item")


@dataclass(frozen=True)
class QueryBatch:
    """Some queries, padded to one length, on the model's device.

    Shapes: `input_ids` (target hidden), `attention_mask` (None without padding): `query seq`; `rows` (readout rows),
    `targets` (token ids), `is_target`: `query token`; `columns` (evidence positions), `is_evidence`: `query column`.
    `ahead`: query rows and key columns of an attention call that stand before the query's own (an adapter's prompts).
    `draws`: so many rows are one query, each with other random tokens; the axis `query` is `(query draw)` then.
    `alone`: what some of its queries gave by themselves, where that is to be held against the batch.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    rows: Tensor
    targets: Tensor
    is_target: Tensor
    columns: Tensor
    is_evidence: Tensor
    ahead: tuple[int, int] = (0, 0)
    draws: int = 1
    alone: Alone | None = None

    def row(self, number: int) -> QueryBatch:
        """One of its rows."""
        rows = slice(number, number + 1)
        one: dict[str, Any] = {key: held[rows] for key, held in vars(self).items() if isinstance(held, Tensor)}
        return replace(self, **one, draws=1, alone=None)

    @property
    def size(self) -> tuple[int, int]:
        """Query rows and key columns of an attention call over this batch, an adapter's virtual tokens included."""
        return self.input_ids.shape[1] + self.ahead[0], self.input_ids.shape[1] + self.ahead[1]

    @property
    def attention_rows(self) -> Tensor:
        """The readout rows among those of an attention call. Shapes: `query token`."""
        return self.rows + self.ahead[0]

    @property
    def attention_columns(self) -> Tensor:
        """The evidence's columns among those of an attention call. Shapes: `query column`."""
        return self.columns + self.ahead[1]


def make_batch(
    model: ProbedModel,
    queries: Sequence[Query],
    *,
    in_draws: bool = False,
    attention: Attention | None = None,
    changed: bool = False,
) -> QueryBatch:
    """Pad the queries and hide their targets the model's way; of a batch larger than any before, run some alone.

    What the batch gives is held against that where it is read. Inside `untouched`, and before any hook of the pass is
    in place: of a hook's own work the runs alone are no part.

    Args:
        in_draws: the caller takes as many rows for a query as the model has draws of random tokens.
        attention: what `tapped` will read of it, whose weights are then held as well.
        changed: the model will be changed while it runs, and by rights gives other numbers; so the batch is run once as
            it is, and that is held.
    Raises: RevprobeError, when a readout row would be before the sequence, and for a model of random tokens where one
        sight of a query would be taken for all; with `changed` also as `logits_at_rows`.
    """
    if not in_draws:
        model.require_mask_token("this analysis")
    batch, size = _batch_of(model, queries), Size.of(queries, attention=attention is not None)
    if not is_due(model, size):
        return batch
    held = replace(batch, alone=_run_alone(model, queries, size, attention))
    if not changed:
        return held
    with torch.no_grad():
        logits_at_rows(model, held)
    return batch


@torch.no_grad()
def _run_alone(model: ProbedModel, queries: Sequence[Query], size: Size, attention: Attention | None) -> Alone:
    """What the queries of a batch that are held against it give by themselves."""
    found = Alone(model, size)
    for place in places_to_hold(queries):
        own = _batch_of(model, [queries[place]])
        with nullcontext() if attention is None else tapped(model, own, attention) as tap:
            logits = logits_at_rows(model, own)[0]
        found.log_probabilities[place * own.draws] = logits.double().log_softmax(-1)
        if tap is not None:
            found.taps[place * own.draws] = tap
    return found


def logits_at_rows(model: ProbedModel, batch: QueryBatch) -> Tensor:
    """Run the batch: its logits at the readout rows. Shapes: `-> (query draw) token vocab`.

    Raises: RevprobeError, for NaN logits, and as `Alone.hold` where a query by itself has other numbers.
    """
    logits = model.logits(batch.input_ids, batch.attention_mask)
    logits = logits[torch.arange(len(batch.rows), device=logits.device)[:, None], batch.rows]
    if logits.isnan().any():
        raise RevprobeError(model.explain_non_finite())
    if batch.alone is not None:
        batch.alone.hold(logits)
    return logits


@contextmanager
def tapped(model: ProbedModel, batch: QueryBatch, attention: Attention) -> Iterator[AttentionTap]:
    """The attention of the readout rows on the evidence while the batch runs inside; its weights are held at the end.

    Raises: as `Alone.hold`.
    """
    at = batch.attention_rows, batch.attention_columns
    with tap_attention(model.module, *at, attention, batch.size) as tap:
        yield tap
    if batch.alone is not None:
        batch.alone.hold_weights(tap)


def _batch_of(model: ProbedModel, queries: Sequence[Query]) -> QueryBatch:
    """The queries as tensors.

    Raises: RevprobeError, when a readout row would be before the sequence.
    """
    device = model.device
    tokens, lengths = _padded([_on_canvas(model, q) for q in queries], 0)
    positions, counts = _padded([q.target_positions for q in queries], -1)
    columns, widths = _padded([q.evidence_positions for q in queries], 0)
    is_target = torch.arange(positions.shape[1]) < counts[:, None]
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden.scatter_(1, torch.where(is_target, positions, positions[:, :1]), True)
    rows = torch.where(is_target, positions - model.logit_shift, 0)
    if (rows < 0).any():
        raise RevprobeError(
            f"a target at position 0 has no readout row in {model.name} (logit_shift 1); put a begin token before the "
            "query"
        )
    targets = tokens.gather(1, positions.clamp(min=0))
    padding = _marked(queries, lengths, tokens.shape[1])
    is_evidence = torch.arange(columns.shape[1]) < widths[:, None]
    shown = model.hide(tokens.to(device), hidden.to(device))
    rows, targets, is_target, columns, is_evidence = (
        t.to(device) for t in (rows, targets, is_target, columns, is_evidence)
    )
    padding = None if padding is None else padding.to(device)
    ahead = model.contract.placement.ahead
    batch = QueryBatch(shown, padding, rows, targets, is_target, columns, is_evidence, ahead)
    return batch if model.draws == 1 else _in_draws(model, batch)


def _on_canvas(model: CalledModule, query: Query) -> Sequence[int]:
    """The tokens of a query, with hidden ones behind them up to the end of the canvas of a model that has one."""
    if model.canvas_length is None:
        return query.token_ids
    free = query.canvas_start + model.canvas_length - len(query.token_ids)
    return [*query.token_ids, *[model.mask_token_id or 0] * free]


def _marked(queries: Sequence[Query], lengths: Tensor, length: int) -> Tensor | None:
    """The attention mask: 0 for padding and 1 for tokens, or 2 on a canvas that starts elsewhere than at 1."""
    starts = torch.tensor([query.canvas_start for query in queries])[:, None]
    place = torch.arange(length)
    if (lengths == length).all() and (starts == 1).all():
        return None
    there = (place < lengths[:, None]).long()
    return there if (starts == 1).all() else there * (1 + (place >= starts).long())


def _in_draws(model: ProbedModel, batch: QueryBatch) -> QueryBatch:
    """Each row once for each draw: the ids of hidden places say which. Shapes: `query ... -> (query draw) ...`."""
    held = {key: one for key, one in vars(batch).items() if isinstance(one, Tensor)}
    rows: dict[str, Any] = {key: one.repeat_interleave(model.draws, 0) for key, one in held.items()}
    ids: Tensor = rows["input_ids"]
    draw = torch.arange(model.draws, device=ids.device).repeat(len(batch.input_ids))[:, None]
    rows["input_ids"] = ids + draw * torch.eq(ids, model.mask_token_id or 0)
    return replace(batch, **rows, draws=model.draws)


def prepare_queries(model: ProbedModel, queries: Sequence[Query]) -> list[Query]:
    """Check the queries against the model, and put a begin token before all of them where one target needs it.

    Raises: RevprobeError, for a token outside the vocabulary, a query longer than the model takes, or a target at
        position 0 of a shift-1 model that has no begin token.
    """
    highest = max(max(q.token_ids) for q in queries)
    lowest = min(min(q.token_ids) for q in queries)
    if not 0 <= lowest <= highest < model.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise RevprobeError(
            f"token id {wrong} is outside the vocabulary of {model.name} (0 to {model.vocab_size - 1}); these pairs "
            "were made for another model"
        )
    if model.objective == "masked" and any(model.mask_token_id in q.target for q in queries):
        raise RevprobeError(
            f"a target is the mask token {model.mask_token_id} itself, which is never predicted; give the clean "
            "sequence"
        )
    if model.canvas_length is not None:
        return [_behind_its_prompt(model, query, model.canvas_length) for query in queries]
    if elsewhere := next((q.canvas_start for q in queries if q.canvas_start != 1), None):
        raise RevprobeError(
            f"a query has canvas_start={elsewhere}, and {model.name} has no canvas behind a prompt; leave it out"
        )
    if model.logit_shift and any(q.target_positions[0] == 0 for q in queries):
        begin = model.begin_token_id
        if begin is None:
            raise RevprobeError(
                f"a target stands at position 0, which {model.name} (logit_shift 1) cannot predict without a begin "
                "token; pass begin_token_id="
            )
        queries = [
            Query([begin, *q.token_ids], [p + 1 for p in q.target_positions], [p + 1 for p in q.evidence_positions])
            for q in queries
        ]
    longest = max(len(q.token_ids) for q in queries)
    if model.max_length is not None and longest > model.max_length:
        raise RevprobeError(
            f"a query of {longest} tokens is longer than {model.name} takes ({model.max_length}); shorten it or load "
            "a model with a longer context"
        )
    return list(queries)


def _behind_its_prompt(model: ProbedModel, query: Query, canvas: int) -> Query:
    """The query with a prompt: a begin token where it says no other.

    Raises: RevprobeError, when there is none, or more stands behind the prompt than the canvas holds.
    """
    if model.wants_begin(query.token_ids, query.canvas_start):
        if (begin := model.begin_token_id) is None:
            raise RevprobeError(
                f"{model.name} writes behind a prompt, and names no begin token to be one; pass begin_token_id="
            )
        target, evidence = ([p + 1 for p in one] for one in (query.target_positions, query.evidence_positions))
        query = Query([begin, *query.token_ids], target, evidence)
    if query.target_positions[0] < query.canvas_start:
        raise RevprobeError(
            f"a target is the begin token, which is the prompt of {model.name} and is not predicted; ask for another"
        )
    if (behind := len(query.token_ids) - query.canvas_start) > canvas:
        raise RevprobeError(
            f"a query of {len(query.token_ids)} tokens has {behind} behind its prompt of {query.canvas_start}, more "
            f"than the canvas of {model.name} holds ({canvas}); shorten it, or let more of it be prompt (canvas_start=)"
        )
    return query


class GradientBatch(NamedTuple):
    """How many distinct queries share a backward pass, and whether blocks run again in it instead of being held."""

    queries: int
    again: bool


def gradient_batch(model: CalledModule, queries: Sequence[Query], batch_size: int | None = None) -> GradientBatch:
    """`queries_per_batch` where what a model computes is held for a backward pass.

    Where one pair with its control does not fit, blocks run again: a forward pass more, for about half of the memory,
    or a fifth where attention or an adapter holds much. A larger `batch_size` is taken to fit.

    Raises: RevprobeError, as `queries_per_batch`.
    """
    size, longest, room = queries_per_batch(model, queries, batch_size), _longest(model, queries), _room(model)
    if ONE_PAIR * longest <= _OVER * room or (batch_size is not None and batch_size > ONE_PAIR):
        return GradientBatch(size, again=False)
    return GradientBatch(size if batch_size is not None else max(2, int(_RUN_AGAIN * room) // longest), again=True)


def queries_per_batch(model: CalledModule, queries: Sequence[Query], batch_size: int | None = None) -> int:
    """What was asked for; by itself about 8,192 tokens for small models, fewer for large ones, at least two queries.

    The fewest are 512 tokens, on a CPU 128.

    Raises: RevprobeError, for a batch size below 1.
    """
    if batch_size is not None:
        if batch_size < 1:
            raise RevprobeError(f"batch_size {batch_size!r}: expected at least 1 query")
        return batch_size
    return max(2, _room(model) // _longest(model, queries))


def _longest(model: CalledModule, queries: Sequence[Query]) -> int:
    """Tokens of the longest query, in all its draws."""
    return max(len(_on_canvas(model, query)) for query in queries) * model.draws


def _room(model: CalledModule) -> int:
    """Tokens of one batch."""
    parameters = sum(p.numel() for p in model.module.parameters())
    fewest = _FEWEST_ON_CPU if model.device.type == "cpu" else _FEWEST
    return max(fewest, int(_TOKENS * min(1.0, _SMALL / max(parameters, 1))))


def require_tokens_alone(model: ProbedModel, what: str) -> None:
    """Raises: RevprobeError, for a model with virtual tokens (prompt or prefix adapters), which belong to no query."""
    if any(model.contract.placement.ahead):
        raise RevprobeError(
            f"{model.name} attends to virtual tokens beside the query's, so {what} would be counted short; use an "
            "adapter inside the model, such as LoRA, or the three probes, which read it right"
        )


def in_batches(
    model: ProbedModel, items: Iterable[Item], size: int, length: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """The items `size` at a time; of equal lengths, shortest first, where the model's padding would reach real tokens.

    Args:
        length: how many tokens the query of an item has.
    """
    apart = bool(model.contract.equal_lengths)
    groups = (group for _, group in groupby(sorted(items, key=length), length)) if apart else iter([items])
    for group in groups:
        rest = iter(group)
        while some := list(islice(rest, size)):
            yield some


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Ragged rows as one tensor, with their lengths."""
    table = torch.tensor(list(zip_longest(*rows, fillvalue=fill)), dtype=torch.long).T.contiguous()
    return table, torch.tensor([len(row) for row in rows])
