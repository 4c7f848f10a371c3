"""Queries as tensors: what the model is shown, which rows are read, which tokens are priced.

Shapes below: query, seq (longest of the batch, right-padded), token (most target tokens of the batch), column
(most evidence tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import RevprobeError
from ...models.contract.called import CalledModule
from ...models.probed import ProbedModel
from ..pairs.query import Query

# Tokens of one batch for a small model, and the parameters beyond which batches shrink.
_TOKENS, _SMALL = 8192, 50_000_000
Item = TypeVar("Item")


@dataclass(frozen=True)
class QueryBatch:
    """Some queries, padded to one length, on the model's device.

    Shapes: `input_ids` (target hidden), `attention_mask` (None without padding): `query seq`; `rows` (readout rows),
    `targets` (token ids), `is_target`: `query token`; `columns` (evidence positions), `is_evidence`: `query column`.
    `ahead`: query rows and key columns of an attention call that stand before the query's own (an adapter's prompts).
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    rows: Tensor
    targets: Tensor
    is_target: Tensor
    columns: Tensor
    is_evidence: Tensor
    ahead: tuple[int, int] = (0, 0)

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


def make_batch(model: ProbedModel, queries: Sequence[Query]) -> QueryBatch:
    """Pad the queries and hide their targets the model's way.

    Raises: RevprobeError, when a readout row would be before the sequence.
    """
    device = model.device
    tokens, lengths = _padded([q.token_ids for q in queries], 0)
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
    padding = (
        None
        if (lengths == tokens.shape[1]).all()
        else (torch.arange(tokens.shape[1]) < lengths[:, None]).long().to(device)
    )
    is_evidence = torch.arange(columns.shape[1]) < widths[:, None]
    shown = model.hide(tokens.to(device), hidden.to(device))
    rows, targets, is_target, columns, is_evidence = (
        t.to(device) for t in (rows, targets, is_target, columns, is_evidence)
    )
    ahead = model.contract.placement.ahead
    return QueryBatch(shown, padding, rows, targets, is_target, columns, is_evidence, ahead)


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


def queries_per_batch(model: CalledModule, queries: Sequence[Query], batch_size: int | None = None) -> int:
    """What was asked for; by itself about 8,192 tokens for small models, fewer for large ones, at least two queries.

    Raises: RevprobeError, for a batch size below 1.
    """
    if batch_size is not None:
        if batch_size < 1:
            raise RevprobeError(f"batch_size {batch_size!r}: expected at least 1 query")
        return batch_size
    parameters = sum(p.numel() for p in model.module.parameters())
    tokens = max(512, int(_TOKENS * min(1.0, _SMALL / max(parameters, 1))))
    return max(2, tokens // max(len(q.token_ids) for q in queries))


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
