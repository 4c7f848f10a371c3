"""What one use of a parameter adds to its gradient, held as factors.

An outer product summed over tokens (Linear, Conv1D), rows looked up by token id (Embedding), or a small gradient held
whole (biases, norms).

Shapes below: batch, seq, out (rows of a weight), in (columns of a weight).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OuterUse:
    """A gradient sum_t rows_t (x) columns_t. Shapes: `rows`: `batch seq out`, `columns`: `batch seq in`."""

    rows: Tensor
    columns: Tensor

    @property
    def device(self) -> torch.device:
        return self.rows.device


@dataclass(frozen=True)
class LookupUse:
    """An embedding's gradient: row ids_t gets grads_t.

    Shapes: `ids`: `batch seq` (-1 where none), `grads`: `batch seq dim`; `rows`: tokens in the table.
    """

    ids: Tensor
    grads: Tensor
    rows: int

    @property
    def device(self) -> torch.device:
        return self.grads.device


@dataclass(frozen=True)
class FormedUse:
    """A gradient held whole, for small parameters.

    Shapes: `grads`: `batch numel`; `terms`: `batch`, the sum of its terms' squared norms.
    """

    grads: Tensor
    terms: Tensor

    @property
    def device(self) -> torch.device:
        return self.grads.device


Use = OuterUse | LookupUse | FormedUse


def merged(uses: list[Use]) -> list[Use]:
    """Uses of one kind joined along their tokens, so that their cross terms come by themselves."""
    outer = [use for use in uses if isinstance(use, OuterUse)]
    lookups = [use for use in uses if isinstance(use, LookupUse)]
    formed = [use for use in uses if isinstance(use, FormedUse)]
    merged: list[Use] = []
    if outer:
        merged.append(OuterUse(torch.cat([u.rows for u in outer], 1), torch.cat([u.columns for u in outer], 1)))
    if lookups:
        merged.append(
            LookupUse(torch.cat([u.ids for u in lookups], 1), torch.cat([u.grads for u in lookups], 1), lookups[0].rows)
        )
    if formed:
        merged.append(
            FormedUse(torch.stack([u.grads for u in formed]).sum(0), torch.stack([u.terms for u in formed]).sum(0))
        )
    return merged
