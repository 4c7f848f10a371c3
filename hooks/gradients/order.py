"""Whose rows are whose: the example of every row of every recorded output, asked of autograd before it is trusted.

A second backward pass weighs example i's loss by a power of two of its own. Between the loss and a gradient all is
linear and a power of two rounds nothing, so that a row of example i comes out as its plain gradient times that very
power, bit for bit; a row that two examples reach does not. That tells sequence first, rows sorted inside and put back,
two examples swapped, tokens gathered by an expert: each row goes to the example that autograd says.

Where autograd's graph has no operation that could order rows by their content, all rows are asked at once, by weighing
what the model returns in place of the losses, which pass by most rows; what held then holds for the next batch of the
same graph and shapes, and is not asked again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .graph import Call, Output, reach
from .walk import Key, Spread, walk_back

_LEVELS = 32  # powers of two told apart in one pass, 2**0 to 2**31
# Operations that may put the rows of a batch in an order that depends on what is in them.
_ORDERING = (
    "Index",
    "Gather",
    "Scatter",
    "Sort",
    "Roll",
    "Flip",
    "Take",
    "MaskedSelect",
    "MaskedScatter",
    "Topk",
    "Put",
    "RepeatInterleave",
)
# Module -> graph -> whether every output was seen to hold one example after the other.
_KNOWN: WeakKeyDictionary[nn.Module, dict[int | None, bool]] = WeakKeyDictionary()


class Mixed(Exception):
    """A row of an output is reached by the losses of several examples."""


class Rows(NamedTuple):
    """Which rows of an output, its leading axes flattened, are each example's. Shapes: `batch row` (`valid`: bool)."""

    places: Tensor
    valid: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Shapes: `... dim -> batch row dim`; where not valid, any row."""
        return values.reshape(-1, values.shape[-1])[self.places.to(values.device)]

    def gradient(self, values: Tensor) -> Tensor:
        """As `of`, zero where not valid."""
        return self.of(values) * self.valid[..., None].to(values.device)


class Order:
    """What one batch's gradients are held against.

    Args:
        seen: by output, the fingerprints of its rows in each weighted pass; None where the graph is known.
        codes: the examples' weights in each of these passes. Shapes: `pass batch`.
    """

    def __init__(self, batch: int, seen: Mapping[Key, list[Tensor]] | None = None, codes: Tensor | None = None) -> None:
        self.batch, self._seen = batch, seen
        self._codes = torch.ones(0, batch) if codes is None else codes

    def rows(self, key: Key, gradient: Tensor) -> Rows | None:
        """The rows of each example; None where they stand one example after the other.

        Raises: Mixed, where some row belongs to several.
        """
        if self._seen is None:
            return None
        plain, codes = fingerprint(gradient), self._codes
        silent = plain.abs() <= _smallest(gradient.dtype)
        weighted = self._seen.get(key) or [torch.zeros_like(plain)] * len(codes)
        if gradient.dim() and _one_after_the_other(plain, weighted, codes, silent):
            return None
        return _rows(_examples(plain, weighted, codes.to(plain), silent), self.batch)


def find_order(
    module: nn.Module,
    calls: Sequence[Call],
    loss: Tensor,
    spread: Mapping[Key, Spread],
    returned: Sequence[Output],
) -> Order:
    """Ask autograd for the order of examples in every recorded output, unless this graph has answered before.

    Args:
        spread: see `walk.spread_over`.
        returned: what the model returned; what lies between it and the loss is the probe's own.
    """
    batch, known = len(loss), _KNOWN.setdefault(module, {})
    if batch == 1:
        return Order(1)
    signature = _signature(calls, batch, [output.edge.node for output in returned if output.edge is not None])
    narrow = any(output.dtype == torch.float16 for call in calls for output in call.outputs)
    codes = _codes(batch, narrow).to(loss)
    numbered = dict(enumerate(calls))
    if signature is not None and signature not in known:
        held = _held_by_all_rows(numbered, loss, spread, returned, codes)
        if held is not None:
            known[signature] = held
    if known.get(signature):
        return Order(batch)
    return Order(batch, _fingerprints(numbered, get_gradient_edge(loss), list(codes), spread), codes)


def _fingerprints(
    calls: Mapping[int, Call], root: GradientEdge, seeds: Sequence[Tensor], spread: Mapping[Key, Spread]
) -> dict[Key, list[Tensor]]:
    """Those of every recorded output, for each gradient that a backward pass may start with."""
    seen: dict[Key, list[Tensor]] = defaultdict(list)

    def see(n: int, k: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            seen[n, k].append(fingerprint(gradient))

    for seed in seeds:
        walk_back(calls, root, seed, see, spread, retain_graph=True)
    return seen


def _held_by_all_rows(
    calls: Mapping[int, Call], loss: Tensor, spread: Mapping[Key, Spread], returned: Sequence[Output], codes: Tensor
) -> bool | None:
    """Whether every output that the loss reaches holds one example after the other, in all its rows.

    Asked of a sum over all that the model returned. None where too many rows have no gradient to tell: the first row
    of a causal model's queries has none, an adapter at its first step has none at all.
    """
    batch, answered = len(loss), [o for o in returned if o.edge is not None and o.shape[:1] == loss.shape]
    if not answered or len(answered[0].shape) < 2:
        return None
    first = answered[0]
    across = _weights(first.shape[-1]).to(first.device, first.dtype)
    seeds = [
        (code.to(first.device, first.dtype).reshape(-1, *[1] * (len(first.shape) - 1)) * across).expand(first.shape)
        for code in (torch.ones_like(loss), *codes)
    ]
    assert first.edge is not None, "asked for above"
    seen = _fingerprints(calls, first.edge, seeds, spread)
    wanted = reach([loss.grad_fn]).nodes
    enough = True
    for n, k in ((n, k) for n, c in calls.items() for k, o in enumerate(c.outputs) if o.edge and o.edge.node in wanted):
        if (n, k) not in seen:
            enough = False
            continue
        plain, *weighted = seen[n, k]
        silent = plain.abs() <= _smallest(calls[n].outputs[k].dtype)
        if not _one_after_the_other(plain, weighted, codes, silent):
            return False
        enough &= bool((silent.reshape(batch, -1).double().mean(1) <= 0.5).all())
    return True if enough else None


def _one_after_the_other(plain: Tensor, weighted: Sequence[Tensor], codes: Tensor, silent: Tensor) -> bool:
    """Whether all rows that carry gradient stand in their example's block. Shapes: `(batch row) ...`."""
    batch = codes.shape[1]
    if not plain.dim() or not len(plain) or len(plain) % batch:
        return False
    by_row = codes.to(plain).repeat_interleave(len(plain) // batch, dim=1)
    by_row = by_row.reshape(len(codes), -1, *[1] * (plain.dim() - 1))
    return all(bool(((w == code * plain) | silent).all()) for w, code in zip(weighted, by_row, strict=True))


def _codes(batch: int, narrow: bool) -> Tensor:
    """A weight for each example and pass, different from every other example's in some pass.

    Float16 has no room for powers: there each pass tells one bit, by the sign. Shapes: `-> pass batch`.
    """
    levels = 2 if narrow else min(batch, _LEVELS)
    digits: list[Tensor] = []
    left = torch.arange(batch)
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
    return (wide * _weights(wide.shape[-1]).to(wide)).sum(-1)


def _weights(width: int) -> Tensor:
    """Such as no gradient is orthogonal to."""
    return torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5


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


def _permutes(node: Any, batch: int) -> bool:
    """Whether a product multiplies examples by a constant table as large as the batch, which may reorder them."""
    if not node.name().startswith(("Mm", "Bmm", "Addmm", "Baddbmm")) or all(
        f is not None for f, _ in node.next_functions
    ):
        return False
    sizes = (getattr(node, key, None) for key in dir(node) if key.startswith("_saved_") and key.endswith("_sizes"))
    return any(size is not None and tuple(size)[-2:] == (batch, batch) for size in sizes)


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
        if name.startswith(_ORDERING) or looks_up or own or _permutes(node, batch):
            return None
        places = [place for _, place in following]
        found.append((name, *places, *(getattr(node, key, None) for key in ("_saved_index", "_saved_start"))))
        for f, _ in following:
            if f not in seen:
                seen.add(f)
                stack.append(f)
    return hash((tuple(shapes), tuple(map(str, found))))
