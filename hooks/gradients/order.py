"""Whose rows are whose: the example of every row of every recorded output, asked of autograd before it is trusted.

A second backward pass weighs example i's loss by a power of two of its own. Between the loss and a gradient all is
linear and a power of two rounds nothing, so that a row of example i comes out as its plain gradient times that very
power, bit for bit; a row that two examples reach does not. That tells sequence first, rows sorted inside and put back,
two examples swapped, tokens gathered by an expert: each row goes to the example that autograd says.

Where autograd's graph has no operation that could order rows by their content, what held for one batch holds for
the next one of the same graph and shapes, and is not asked again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .graph import Call
from .walk import Key, Spread, walk_back

_LEVELS = 32  # powers of two told apart in one pass, 2**0 to 2**31
# Operations that may put the rows of a batch in an order that depends on what is in them.
_ORDERING = ("Index", "Gather", "Scatter", "Sort", "Roll", "Flip", "Take", "Masked", "Topk", "Put", "RepeatInterleave")
# Module -> graphs in which every output was seen to hold one example after the other.
_TRUSTED: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


class Mixed(Exception):
    """A row of an output is reached by the losses of several examples."""


class Rows(NamedTuple):
    """Which rows of an output, its leading axes flattened, are each example's. Shapes: `batch row` (bool: `valid`)."""

    index: Tensor
    valid: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Shapes: `... dim -> batch row dim`; where not valid, any row."""
        return values.reshape(-1, values.shape[-1])[self.index.to(values.device)]

    def gradient(self, values: Tensor) -> Tensor:
        """As `of`, zero where not valid."""
        return self.of(values) * self.valid[..., None].to(values.device)


class Order:
    """What one batch's gradients are held against.

    Args:
        seen: by output, the fingerprints of its rows in each weighted pass; None where the graph is trusted.
        codes: the examples' weights in each of these passes. Shapes: `pass batch`.
        trust: called when every output was seen to hold one example after the other.
    """

    def __init__(
        self,
        batch: int,
        seen: Mapping[Key, list[Tensor]] | None = None,
        codes: Tensor | None = None,
        trust: Callable[[], None] = lambda: None,
    ) -> None:
        self.batch, self._seen, self._trust = batch, seen, trust
        self._codes = torch.ones(0, batch) if codes is None else codes
        self._plain = True  # until an output is found otherwise

    def rows(self, key: Key, gradient: Tensor) -> Rows | None:
        """The rows of each example; None where they stand one example after the other.

        Raises: Mixed, where some row belongs to several.
        """
        if self._seen is None:
            return None
        plain, weighted = fingerprint(gradient), self._seen.get(key, [])
        silent = plain.abs() <= _smallest(gradient.dtype)
        codes = self._codes.to(plain)
        if not weighted:  # no gradient came in the weighted passes
            weighted = [torch.zeros_like(plain)] * len(codes)
        if gradient.dim() and gradient.shape[0] and gradient.shape[0] % self.batch == 0:
            by_row = codes.repeat_interleave(gradient.shape[0] // self.batch, dim=1)
            by_row = by_row.reshape(len(codes), -1, *[1] * (plain.dim() - 1))
            if all(bool(((w == code * plain) | silent).all()) for w, code in zip(weighted, by_row, strict=True)):
                # An example without gradient here has shown nothing yet.
                self._plain &= not bool(silent.reshape(self.batch, -1).all(1).any())
                return None
        self._plain = False
        return _rows(_examples(plain, weighted, codes, silent), self.batch)

    def finish(self) -> None:
        """All outputs have been asked for."""
        if self._plain and self._seen is not None:
            self._trust()


def find_order(
    module: nn.Module, calls: Sequence[Call], loss: Tensor, spread: Mapping[Key, Spread], outputs: Iterable[Any]
) -> Order:
    """Ask autograd for the order of examples in every recorded output, unless this graph has answered before.

    Args:
        spread: see `walk.spread_over`.
        outputs: nodes of what the model returned; what lies between them and the loss is the probe's own.
    """
    batch, trusted = len(loss), _TRUSTED.setdefault(module, set())
    signature = None if batch == 1 else _signature(calls, batch, list(outputs))
    if batch == 1 or signature in trusted:
        return Order(batch)
    narrow = any(output.dtype == torch.float16 for call in calls for output in call.outputs)
    codes = _codes(batch, narrow).to(loss)
    seen: dict[Key, list[Tensor]] = defaultdict(list)

    def see(n: int, k: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            seen[n, k].append(fingerprint(gradient))

    for code in codes:
        walk_back(dict(enumerate(calls)), (loss * code).sum(), see, spread, retain_graph=True)
    return Order(batch, seen, codes, lambda: None if signature is None else trusted.add(signature))


def _codes(batch: int, narrow: bool) -> Tensor:
    """A weight for each example and pass, different from every other example's in some pass.

    Float16 has no room for powers: there each pass tells one bit, by the sign. Shapes: `-> pass batch`.
    """
    levels = 2 if narrow else min(batch, _LEVELS)
    digits, left = [], torch.arange(batch)
    while not digits or left.any():
        digits.append(left % levels)
        left = left // levels
    table = torch.stack(digits).double()
    return 1 - 2 * table if narrow else 2**table


def fingerprint(gradient: Tensor) -> Tensor:
    """One number per row, linear in the row and other than zero where it is. Shapes: `... dim -> ...`; `n -> n`."""
    if gradient.dim() < 2:
        return gradient
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    weights = torch.rand(wide.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    return (wide * weights.to(wide)).sum(-1)


def _smallest(dtype: torch.dtype) -> float:
    """Below it, a gradient's parts have lost digits to underflow, and powers of two no longer pass through exactly."""
    info = torch.finfo(dtype)
    return 0.0 if dtype == torch.float16 else info.tiny / info.eps**2


def _examples(plain: Tensor, weighted: Sequence[Tensor], codes: Tensor, silent: Tensor) -> Tensor:
    """The example of each row, -1 where it has no gradient. Shapes: `... -> row`.

    Raises: Mixed.
    """
    plain, silent = plain.reshape(-1), silent.reshape(-1)
    match = torch.ones(len(plain), codes.shape[1], dtype=torch.bool, device=plain.device)
    for w, code in zip(weighted, codes, strict=True):
        match &= w.reshape(-1, 1) == plain[:, None] * code
    if not bool((match.sum(1).eq(1) | silent).all()):
        raise Mixed
    return match.int().argmax(1).masked_fill(silent, -1)


def _rows(examples: Tensor, batch: int) -> Rows:
    """Shapes: `row -> batch row`, as many as the example with the most has."""
    found = torch.arange(len(examples), device=examples.device)[examples >= 0]
    examples = examples[examples >= 0]
    counts = examples.bincount(minlength=batch)
    order = examples.argsort(stable=True)
    place = torch.arange(len(found), device=found.device) - (counts.cumsum(0) - counts)[examples[order]]
    index = found.new_zeros(batch, max(int(counts.max()), 1))
    valid = torch.zeros_like(index, dtype=torch.bool)
    index[examples[order], place], valid[examples[order], place] = found[order], True
    return Rows(index, valid)


def _signature(calls: Sequence[Call], batch: int, outputs: Sequence[Any]) -> int | None:
    """A number that stands for the graph and for how its shapes relate to the batch; None where content may order rows.

    The way from the model's outputs to the loss is left out of the search for such operations: it picks readout rows.
    """
    related = lambda size: "batch" if size == batch else size if size == 1 else size % batch == 0  # noqa: E731
    shapes = [(call.name, *map(related, output.shape)) for call in calls for output in call.outputs]
    found: list[Any] = []
    if not outputs:
        return None
    seen, stack = set(outputs), list(outputs)
    while stack:
        node = stack.pop()
        name = node.name()
        following = [(f, place) for f, place in node.next_functions if f is not None]
        looks_up = name.startswith("Embedding") and not all(hasattr(f, "variable") for f, _ in following)
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        if name.startswith(_ORDERING) or looks_up or own:
            return None
        places = [place for _, place in following]
        found.append((name, *places, *(getattr(node, key, None) for key in ("_saved_index", "_saved_start"))))
        for f, _ in following:
            if f not in seen:
                seen.add(f)
                stack.append(f)
    return hash((tuple(shapes), tuple(map(str, found))))
