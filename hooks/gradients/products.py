"""Inner products of per-example gradients that are held as factors.

A `Use` is what one use of a parameter adds to its gradient: an outer product summed over tokens (Linear, Conv1D),
rows looked up by token id (Embedding), or a small gradient held whole (biases, norms). The inner product of two
examples' gradients is the sum over all pairs of uses; token sums go through Gram matrices, chunked so that no
intermediate grows large.

Shapes below: batch, pair, seq, out (rows of a weight), in (columns of a weight).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Rounding level of a sum, in units of eps times the root of its terms' squared norms (roundings add up like a random
# walk). A gradient whose norm is below it is rounding: key biases, for one, have zero gradient in theory.
NOISE_FLOOR = 32.0
# Largest intermediate tensor of the product routines, in elements.
_CHUNK = 2**24


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


def multiply(uses: list[Use], parameter: nn.Parameter, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of examples left[n] and right[n], and the norm below which an example's gradient is rounding.

    The floor is NOISE_FLOOR * eps * root of the squared norms of the gradient's terms.
    Shapes: `pair, pair -> pair, batch`.
    """
    uses = merged(uses)
    left, right = left.to(uses[0].device), right.to(uses[0].device)
    same = left == right
    others = (left[~same], right[~same])
    own, terms, crosses = zip(*(_products(use, *others, pairs=len(left)) for use in uses), strict=True)
    every = torch.arange(len(own[0]), device=left.device)
    different = [(a, b) for a in uses for b in uses if a is not b]
    squares = torch.stack([*own, *(_cross(a, b, every, every) for a, b in different)]).sum(0)
    inner = squares[left]
    if len(others[0]):
        inner[~same] = torch.stack([*crosses, *(_cross(a, b, *others) for a, b in different)]).sum(0)
    floor = NOISE_FLOOR * torch.finfo(parameter.dtype).eps * torch.stack(terms).sum(0).sqrt()
    return inner, floor


def _products(use: Use, left: Tensor, right: Tensor, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """A use with itself: squared norms, squared norms of its terms, inner products. Shapes: `-> batch, batch, pair`."""
    if isinstance(use, FormedUse):
        return use.grads.pow(2).sum(1), use.terms, _cross(use, use, left, right)
    if isinstance(use, LookupUse):
        every = torch.arange(len(use.ids), device=use.device)
        terms = torch.linalg.vector_norm(use.grads, dim=-1).pow(2) * (use.ids >= 0)
        return _cross(use, use, every, every), terms.sum(1), _cross(use, use, left, right)
    if _forming_is_cheaper(use, pairs):
        tokens = [torch.linalg.vector_norm(factor, dim=-1).pow(2) for factor in (use.rows, use.columns)]
        squares, crosses = _by_forming(use, left, right)
        return squares, (tokens[0] * tokens[1]).sum(1), crosses
    # Slices instead of an index: nothing is copied.
    step = max(1, _CHUNK // use.rows.shape[1] ** 2)
    slices = [slice(n, n + step) for n in range(0, len(use.rows), step)]
    grams = ((use.rows[part] @ use.rows[part].mT, use.columns[part] @ use.columns[part].mT) for part in slices)
    found = [((r * c).sum((1, 2)), (r.diagonal(0, 1, 2) * c.diagonal(0, 1, 2)).sum(1)) for r, c in grams]
    squares, terms = (torch.cat(each) for each in zip(*found, strict=True))
    return squares, terms, _cross(use, use, left, right)


def _by_forming(use: OuterUse, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms and inner products through the gradients themselves, some rows of the weight at a time."""
    most = max(len(use.rows), len(left)) * use.columns.shape[-1]
    step = max(1, _CHUNK // most)
    squares = use.rows.new_zeros(len(use.rows))
    crosses = use.rows.new_zeros(len(left))
    for n in range(0, use.rows.shape[-1], step):
        formed = (use.rows[..., n : n + step].mT @ use.columns).flatten(1)
        squares += torch.linalg.vector_norm(formed, dim=1).pow(2)
        crosses += (formed[left] * formed[right]).sum(-1)
    return squares, crosses


def _cross(a: Use, b: Use, left: Tensor, right: Tensor) -> Tensor:
    """<a[left], b[right]>. Shapes: `-> pair`."""
    if isinstance(a, FormedUse) and isinstance(b, FormedUse):
        return (a.grads[left] * b.grads[right]).sum(-1)
    if isinstance(a, OuterUse) and isinstance(b, OuterUse):
        # Through token Gram matrices.
        gram = lambda i, j: ((a.rows[i] @ b.rows[j].mT) * (a.columns[i] @ b.columns[j].mT)).sum((1, 2))  # noqa: E731
        wide = max(a.rows.shape[-1], a.columns.shape[-1], b.rows.shape[1])
        return _chunked(gram, left, right, a.rows.shape[1] * wide)
    if isinstance(a, LookupUse) and isinstance(b, LookupUse):
        return _chunked(lambda i, j: _lookup_lookup(a, b, i, j), left, right, a.ids.shape[1] * b.ids.shape[1])
    if isinstance(a, LookupUse) and isinstance(b, OuterUse):
        return _chunked(lambda i, j: _lookup_outer(a, b, i, j), left, right, a.ids.shape[1] * b.rows.shape[1])
    if isinstance(a, OuterUse) and isinstance(b, LookupUse):
        return _cross(b, a, right, left)
    return (_formed(a)[left] * _formed(b)[right]).sum(-1)


def _forming_is_cheaper(use: OuterUse, pairs: int) -> bool:
    """Count multiplications: T^2 (out + in) a pair by Gram matrices; else T out in an example, out in a pair."""
    batch, seq, out = use.rows.shape
    size = out * use.columns.shape[-1]
    return batch * seq * size + pairs * size < pairs * seq**2 * (out + use.columns.shape[-1])


def _lookup_lookup(a: LookupUse, b: LookupUse, i: Tensor, j: Tensor) -> Tensor:
    same = (a.ids[i][:, :, None] == b.ids[j][:, None, :]) & (a.ids[i] >= 0)[:, :, None]
    return (same * (a.grads[i] @ b.grads[j].mT)).sum((1, 2))


def _lookup_outer(a: LookupUse, b: OuterUse, i: Tensor, j: Tensor) -> Tensor:
    """<row ids_t gets g_t, sum_s r_s (x) c_s> = sum_{t,s} r_s[ids_t] (g_t . c_s)."""
    ids = a.ids[i]
    at_ids = b.rows[j].mT.gather(1, ids.clamp(min=0)[:, :, None].expand(-1, -1, b.rows.shape[1]))
    return (at_ids * (ids >= 0)[:, :, None] * (a.grads[i] @ b.columns[j].mT)).sum((1, 2))


def _formed(use: Use) -> Tensor:
    """The per-example gradients themselves. Shapes: `-> batch numel`."""
    if isinstance(use, FormedUse):
        return use.grads
    if isinstance(use, OuterUse):
        return (use.rows.mT @ use.columns).flatten(1)
    table = use.grads.new_zeros(use.ids.shape[0], use.rows, use.grads.shape[-1])
    keep = (use.ids >= 0)[..., None]
    return table.scatter_add_(1, use.ids.clamp(min=0)[..., None].expand_as(use.grads), use.grads * keep).flatten(1)


def _chunked(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, elements: int) -> Tensor:
    """`product` over slices of the pairs, so that no intermediate exceeds _CHUNK elements."""
    step = max(1, _CHUNK // max(elements, 1))
    return torch.cat([product(left[n : n + step], right[n : n + step]) for n in range(0, max(len(left), 1), step)])
