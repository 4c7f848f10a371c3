"""Inner products of per-example gradients that are held as factors.

The inner product of two examples' gradients is the sum over all pairs of their uses (`uses.py`). Token sums go through
Gram matrices, or through the gradients themselves, some rows of the weight at a time; pair by pair, or all with all in
one matrix product, of which the pairs are taken. What is cheapest is counted, not tried; routes differ by rounding.

Shapes below: batch, pair, seq, out (rows of a weight), in (columns of a weight).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn

from .uses import FormedUse, LookupUse, OuterUse, Use, merged

# Rounding level of a sum, in units of eps times the root of its terms' squared norms (roundings add up like a random
# walk). A gradient whose norm is below it is rounding: key biases, for one, have zero gradient in theory.
NOISE_FLOOR = 32.0
# Largest intermediate tensor of the product routines, in elements.
_CHUNK = 2**24
# What writing and reading an element costs, in multiplications of a matrix product. Measured on a CPU: 30 to 60.
_MOVED = 32
# Multiplications below which there is nothing to gain: pairs are taken one by one there, and few products round alike
# in batches of other sizes.
_FEW = 2**26
# Longest sum left to one matrix product: of few rows it adds up one term after the other, and a million of them lose
# three digits in float32.
_TERMS = 2**14


@dataclass(frozen=True)
class Pairs:
    """The examples whose gradients are multiplied: left[n] with right[n], which are lefts[i[n]] with rights[j[n]].

    Shapes: `left`, `right`, `i`, `j`: `pair`; `lefts`, `rights`: the different ones of a side, in order.
    """

    left: Tensor
    right: Tensor
    lefts: Tensor
    rights: Tensor
    i: Tensor
    j: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Pairs:
        (lefts, i), (rights, j) = (torch.unique(side, return_inverse=True) for side in (left, right))
        return cls(left, right, lefts, rights, i, j)

    def __len__(self) -> int:
        return len(self.left)

    @property
    def met(self) -> int:
        """How many products there are where all meet all."""
        return len(self.lefts) * len(self.rights)

    def one_by_one(self, product: Callable[[Tensor, Tensor], Tensor], elements: int) -> Tensor:
        """`product` of slices of the pairs, so that no intermediate exceeds _CHUNK if one pair's does not.

        `elements`: of a pair's largest intermediate.

        Shapes: `pair, pair -> pair`; `-> pair`.
        """
        step = max(1, _CHUNK // max(elements, 1))
        slices = [slice(n, n + step) for n in range(0, max(len(self), 1), step)]
        return torch.cat([product(self.left[part], self.right[part]) for part in slices])

    def all_with_all(self, product: Callable[[Tensor, Tensor], Tensor], elements: int, each: int) -> Tensor:
        """`product` of blocks of both sides, of which the pairs are taken; `elements` a product, `each` an example.

        Shapes: `left, right -> left right`; `-> pair`.
        """
        side = max(1, min(isqrt(_CHUNK // max(elements, 1)), _CHUNK // max(each, 1)))
        rows = [torch.cat([product(a, b) for b in self.rights.split(side)], 1) for a in self.lefts.split(side)]
        return torch.cat(rows)[self.i, self.j]


def multiply(uses: list[Use], parameter: nn.Parameter, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of examples left[n] and right[n], and the norm below which an example's gradient is rounding.

    The floor is NOISE_FLOOR * eps * root of the squared norms of the gradient's terms. Factors are multiplied in their
    own type, also within the caller's autocast.
    Shapes: `pair, pair -> pair, batch`.
    """
    uses = merged(uses)
    left, right = left.to(uses[0].device), right.to(uses[0].device)
    with torch.autocast(uses[0].device.type, enabled=False):
        return _multiplied(uses, parameter, left, right)


def _multiplied(uses: list[Use], parameter: nn.Parameter, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    same = left == right
    others = Pairs.of(left[~same], right[~same])
    own, terms, crosses = zip(*(_products(use, others) for use in uses), strict=True)
    every = torch.arange(len(own[0]), device=left.device)
    itself = Pairs.of(every, every)
    different = [(a, b) for a in uses for b in uses if a is not b]
    squares = torch.stack([*own, *(_cross(a, b, itself) for a, b in different)]).sum(0)
    inner = squares[left]
    if len(others):
        inner[~same] = torch.stack([*crosses, *(_cross(a, b, others) for a, b in different)]).sum(0)
    floor = NOISE_FLOOR * torch.finfo(parameter.dtype).eps * torch.stack(terms).sum(0).sqrt()
    return inner, floor


def _products(use: Use, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """A use with itself: squared norms, squared norms of its terms, inner products. Shapes: `-> batch, batch, pair`."""
    if isinstance(use, FormedUse):
        return use.grads.pow(2).sum(1), use.terms, _cross(use, use, pairs)
    if isinstance(use, LookupUse):
        every = torch.arange(len(use.ids), device=use.device)
        terms = torch.linalg.vector_norm(use.grads, dim=-1).pow(2) * (use.ids >= 0)
        return _cross(use, use, Pairs.of(every, every)), terms.sum(1), _cross(use, use, pairs)
    if _forming_is_cheaper(use, pairs):
        tokens = [torch.linalg.vector_norm(factor, dim=-1).pow(2) for factor in (use.rows, use.columns)]
        squares, crosses = _by_forming(use, pairs)
        return squares, (tokens[0] * tokens[1]).sum(1), crosses
    # Slices instead of an index: nothing is copied.
    step = max(1, _CHUNK // max(1, use.rows.shape[1] ** 2))
    slices = [slice(n, n + step) for n in range(0, len(use.rows), step)]
    grams = ((use.rows[part] @ use.rows[part].mT, use.columns[part] @ use.columns[part].mT) for part in slices)
    found = [((r * c).sum((1, 2)), (r.diagonal(0, 1, 2) * c.diagonal(0, 1, 2)).sum(1)) for r, c in grams]
    squares, terms = (torch.cat(each) for each in zip(*found, strict=True))
    return squares, terms, _cross(use, use, pairs)


def _by_forming(use: OuterUse, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Squared norms and inner products through the gradients themselves, some rows of the weight at a time."""
    step = max(1, _CHUNK // max(1, len(use.rows) * use.columns.shape[-1]))
    squares, crosses = use.rows.new_zeros(len(use.rows)), use.rows.new_zeros(len(pairs))
    for n in range(0, use.rows.shape[-1], step):
        formed = (use.rows[..., n : n + step].mT @ use.columns).flatten(1)
        squares += formed.pow(2).sum(1)  # not torch's norm, which of a million terms in float32 loses three digits
        crosses += _whole(formed, formed, pairs)
    return squares, crosses


def _cross(a: Use, b: Use, pairs: Pairs) -> Tensor:
    """<a[left], b[right]>. Shapes: `-> pair`."""
    if isinstance(a, OuterUse) and isinstance(b, OuterUse):
        return _by_tokens(_outer_outer, a, b, pairs, a.rows.shape[-1] + a.columns.shape[-1])
    if isinstance(a, LookupUse) and isinstance(b, LookupUse):
        return _by_tokens(_lookup_lookup, a, b, pairs, a.grads.shape[-1])
    if isinstance(a, LookupUse) and isinstance(b, OuterUse):
        return _by_tokens(_lookup_outer, a, b, pairs, a.grads.shape[-1])
    if isinstance(a, OuterUse) and isinstance(b, LookupUse):
        return _cross(b, a, Pairs(pairs.right, pairs.left, pairs.rights, pairs.lefts, pairs.j, pairs.i))
    return _whole(_formed(a), _formed(b), pairs)


def _forming_is_cheaper(use: OuterUse, pairs: Pairs) -> bool:
    """Count multiplications: T^2 (out + in) a product by Gram matrices; else T out in an example, out in a product."""
    batch, seq, out = use.rows.shape
    width = out + use.columns.shape[-1]
    size = out * use.columns.shape[-1]
    grams = batch * seq**2 * width + min(_token_costs(seq, seq, width, pairs))
    return size * (batch * (seq + 2 * _MOVED) + min(_whole_costs(pairs))) < grams


def _token_costs(left: int, right: int, width: int, pairs: Pairs) -> tuple[int, int]:
    """Of products through tokens, so many a side, pair by pair and all with all; the former copies factors."""
    tokens = left * right
    return len(pairs) * width * (tokens + _MOVED * (left + right)), pairs.met * tokens * (width + _MOVED)


def _whole_costs(pairs: Pairs) -> tuple[int, int]:
    """Of an element of whole gradients, pair by pair (two copies, their product, its sum) and all with all."""
    return 4 * _MOVED * len(pairs), pairs.met


def _is_table_cheaper(alone: int, together: int) -> bool:
    return together < alone and alone > _FEW


def _by_tokens(product: Callable[..., Tensor], a: Use, b: Use, pairs: Pairs, width: int) -> Tensor:
    """Sums of `product` over the tokens of both sides. Shapes: `-> pair`."""
    (left, widest), (right, wide) = _held(a), _held(b)
    example = max(left, right) * max(widest, wide)
    if _is_table_cheaper(*_token_costs(left, right, width, pairs)):
        all_with_all = lambda i, j: product(a, b, i, j, together=True).sum((1, 3))  # noqa: E731
        return pairs.all_with_all(all_with_all, left * right, example)
    return pairs.one_by_one(lambda i, j: product(a, b, i, j, together=False).sum((1, 2)), max(left * right, example))


def _held(use: Use) -> tuple[int, int]:
    """Tokens of an example, and features of its widest factor."""
    factors = (use.rows, use.columns) if isinstance(use, OuterUse) else (use.grads,)
    return factors[0].shape[1], max(factor.shape[-1] for factor in factors)


def _outer_outer(a: OuterUse, b: OuterUse, i: Tensor, j: Tensor, *, together: bool) -> Tensor:
    return _dot(a.rows[i], b.rows[j], together) * _dot(a.columns[i], b.columns[j], together)


def _lookup_lookup(a: LookupUse, b: LookupUse, i: Tensor, j: Tensor, *, together: bool) -> Tensor:
    one, other = _facing(a.ids[i], b.ids[j], together)
    return ((one == other) & (one >= 0)) * _dot(a.grads[i], b.grads[j], together)


def _lookup_outer(a: LookupUse, b: OuterUse, i: Tensor, j: Tensor, *, together: bool) -> Tensor:
    """<row ids_t gets g_t, sum_s r_s (x) c_s> = sum_{t,s} r_s[ids_t] (g_t . c_s); no token's row is copied whole."""
    tokens = torch.arange(b.rows.shape[1], device=b.device)
    ids, examples = _facing(a.ids[i], j[:, None].expand(-1, len(tokens)), together)
    at_ids = b.rows[examples, tokens, ids.clamp(min=0)]
    return at_ids * (ids >= 0) * _dot(a.grads[i], b.columns[j], together)


def _dot(x: Tensor, y: Tensor, together: bool) -> Tensor:
    """Inner products of tokens. Shapes: `pair t d, pair s d -> pair t s`; together `l t d, r s d -> l t r s`."""
    return torch.tensordot(x, y, dims=([2], [2])) if together else x @ y.mT


def _facing(x: Tensor, y: Tensor, together: bool) -> tuple[Tensor, Tensor]:
    """Views that meet as `_dot`'s tokens do. Shapes: `pair t, pair s`; together `l t, r s`."""
    return (x[:, :, None, None], y[None, None]) if together else (x[:, :, None], y[:, None])


def _whole(a: Tensor, b: Tensor, pairs: Pairs) -> Tensor:
    """Inner products of gradients held whole. Shapes: `batch numel, batch numel -> pair`."""
    if not _is_table_cheaper(*(cost * a.shape[1] for cost in _whole_costs(pairs))):
        return pairs.one_by_one(lambda i, j: (a[i] * b[j]).sum(-1), a.shape[1])
    step = max(1, min(_TERMS, _CHUNK // max(len(a), 1)))
    wide = a.dtype if a.device.type == "mps" else torch.float64
    found = torch.zeros(len(pairs.lefts), len(pairs.rights), dtype=wide, device=a.device)
    for n in range(0, a.shape[1], step):
        found += a[pairs.lefts, n : n + step] @ b[pairs.rights, n : n + step].mT
    return found[pairs.i, pairs.j].to(a.dtype)


def _formed(use: Use) -> Tensor:
    """The per-example gradients themselves. Shapes: `-> batch numel`."""
    if isinstance(use, FormedUse):
        return use.grads
    if isinstance(use, OuterUse):
        return (use.rows.mT @ use.columns).flatten(1)
    table = use.grads.new_zeros(use.ids.shape[0], use.rows, use.grads.shape[-1])
    keep = (use.ids >= 0)[..., None]
    return table.scatter_add_(1, use.ids.clamp(min=0)[..., None].expand_as(use.grads), use.grads * keep).flatten(1)
