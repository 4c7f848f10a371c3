"""Edit single attention scores of a model: what a user calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..errors import RevprobeError
from ..hooks.attention_edits import EditLog, edit_scores
from ..hooks.attention_sites import Attention
from ..models.probed import ProbedModel, as_probed
from ..models.structure import attention_of
from .passes.selection import chosen_of

Positions = Tensor | Sequence[Sequence[int]]
Bias = float | Tensor | Callable[[int, Tensor], Tensor]


@checked
@contextmanager
def edit_attention(
    model: ProbedModel | nn.Module,
    rows: Positions,
    columns: Positions,
    bias: Bias = float("-inf"),
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
) -> Iterator[EditLog]:
    """Add `bias` to the attention scores of `rows` at `columns` in every run inside the block.

    The default, -inf, cuts the route from the columns to the rows; 0 changes nothing. Masks, causality, grouped
    keys, autocast, gradients and gradient checkpointing are as without the edit. Attention is found by one run of a
    few tokens when the block opens, on any model the probes take. The edit belongs to the model: runs in other
    threads see it too. A row that would lose its last visible key keeps its scores, as does one
    whose bias is NaN or +inf; the log that the block receives says which.

        with rp.edit_attention(model, rows=[[9]], columns=[[0]], layers=[0]):
            logits = model.logits(ids)

    Shapes: `rows`: `batch rows`, `columns`: `batch columns`, for the batch that is run inside.
    Args:
        bias: a number or tensor broadcastable to `batch heads rows columns` (with `heads=`, still all heads), or a
            function that makes it from the layer and the rows' scores before softmax, `batch heads rows seq`, -inf
            where masked: `lambda layer, scores: 2.0 - scores[..., [0]]` sets the score of column 0 to 2. A layer that
            computes its heads in several calls asks at each of them, with -inf for the heads of the others.
        layers, heads: which to edit; all when None.
    Raises: RevprobeError, for a layer or head the model lacks, a position named twice or outside the sequence that
        is run, or a block in which the edited attention never ran.
    """
    model = as_probed(model)
    at_rows, at_columns = _positions(rows, "rows"), _positions(columns, "columns")
    if len(at_rows) != len(at_columns):
        raise RevprobeError(
            f"rows for {len(at_rows)} sequences and columns for {len(at_columns)}: expected one list of each per "
            "sequence of the batch"
        )
    attention, ahead = attention_of(model), model.contract.placement.ahead
    chosen = choose_layers(model, attention, layers)
    keep, last = choose_heads(model, attention, heads), int(at_columns.max())

    def change(layer: int, whole: Tensor) -> Tensor:
        scores = whole[..., ahead[1] :]  # an adapter's virtual tokens stand before the query's
        if last >= scores.shape[-1]:
            raise RevprobeError(
                f"columns name position {last}, but layer {layer} attends over {scores.shape[-1]} tokens; expected 0 "
                f"to {scores.shape[-1] - 1}"
            )
        added = bias(layer, scores) if callable(bias) else bias
        added = torch.as_tensor(added, dtype=scores.dtype, device=scores.device)
        index = at_columns.to(scores.device)[:, None, None].expand(*scores.shape[:3], -1)
        kept = torch.tensor([head in keep for head in range(scores.shape[1])], device=scores.device)
        added = torch.where(kept[:, None, None], added, 0.0).expand_as(index)
        return torch.zeros_like(whole).scatter(-1, index + ahead[1], added)

    with edit_scores(model.module, attention, at_rows, change, layers=chosen, ahead=ahead[0]) as log:
        yield log


def choose_layers(model: ProbedModel, attention: Attention, layers: Iterable[int] | None) -> list[int]:
    """The layers asked for, all of them when None. Raises: RevprobeError, for one without attention to edit."""
    there, without = list(attention.heads), list(attention.without)
    return chosen_of("layer", layers, there, model=model, purpose="edit", without_attention=without)


def choose_heads(model: ProbedModel, attention: Attention, heads: Iterable[int] | None) -> list[int]:
    """The heads asked for, all of them when None. Raises: RevprobeError, for one that no layer has."""
    return chosen_of("head", heads, range(max(attention.heads.values())), model=model, purpose="edit")


def _positions(positions: Positions, what: str) -> Tensor:
    try:
        table = torch.as_tensor(positions, dtype=torch.long)
    except (TypeError, ValueError) as error:
        raise RevprobeError(
            f"{what} {positions!r}: expected one equally long list of positions per sequence"
        ) from error
    if table.dim() != 2 or not table.numel():
        raise RevprobeError(f"{what} of shape {tuple(table.shape)}: expected `batch {what}`, one list per sequence")
    ordered = table.sort(1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any() or (table < 0).any():
        raise RevprobeError(f"{what} {table.tolist()} name a position twice or below 0; each counts once, from 0")
    return table
