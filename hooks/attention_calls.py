"""The attention calls of a running model: how they are seen, and what their scores are, whatever their layout.

A call is one F.scaled_dot_product_attention, or one softmax (or log-softmax) of scores written by hand. `Layout` says
where a call keeps examples, heads, rows and keys; everything else here speaks of `batch heads rows keys`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import EinopsError, rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Noted = TypeVar("Noted")
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
LOG_SOFTMAX = (F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax)
_MIXING = frozenset(["matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm", "mm", "tensordot"])
_DIFFERENCE = (torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__)
# Masks written by hand hide with -1e4, -1e9 or a dtype's lowest number; a score this far below its row's best has no
# weight in any dtype.
FAR_BELOW = 9e3
# Sinks and registers that a softmax may have beside the query's own tokens; a vocabulary is longer.
MOST_EXTRA = 4


class FunctionMode(TorchFunctionMode):
    """Every torch call inside goes through `make(func, args, kwargs)`, which makes it, as it is or another."""

    def __init__(self, make: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.make = make

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.make(func, args, kwargs or {})


@contextmanager
def running_modules(
    module: nn.Module, note: Callable[[str, Any], Noted], paths: Iterable[str] | None = None
) -> Iterator[list[Noted]]:
    """The modules that are running now, innermost last: what `note(path, arguments)` said when each was entered.

    Adds hooks to the modules at `paths` (all of them when None) and removes exactly those, also on exceptions.
    """
    running: list[Noted] = []
    handles = []

    def enter(path: str) -> Callable[..., None]:
        return lambda _, args, kwargs: running.append(note(path, (args, kwargs)))

    def leave(*_: Any) -> None:  # a returned value would replace the module's output
        running.pop()

    watched = module.named_modules() if paths is None else ((path, module.get_submodule(path)) for path in paths)
    try:
        for path, child in watched:
            handles.append(child.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(child.register_forward_hook(leave, always_call=True))
        yield running
    finally:
        for handle in handles:
            handle.remove()


def its_path(path: str, _: Any) -> str:
    """What is noted of a module of which nothing but its path is asked."""
    return path


# --- what a torch call is --------------------------------------------------------------------------------------------


def is_attention_call(func: Any) -> bool:
    """Whether a torch call may be attention's: an SDPA call, or any softmax."""
    return func is F.scaled_dot_product_attention or func in _SOFTMAX or func in LOG_SOFTMAX


def is_product(func: Any) -> bool:
    """Whether a torch call may be the one in which weights meet values."""
    return getattr(func, "__name__", "") in _MIXING


def sdpa_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an F.scaled_dot_product_attention call by name."""
    return {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}


def softmaxed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, int] | None:
    """What a torch call takes the softmax (or log-softmax) of, and the axis it is taken over; None for others."""
    if func not in _SOFTMAX and func not in LOG_SOFTMAX:
        return None
    scores: Tensor = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return None if dim is None else (scores, int(dim) % max(scores.dim(), 1))


class Uncentred:
    """Remembers what a softmax's input was before each row's largest score was taken off it, as gpt-oss does.

    The weights are the same; the scores would all be off by their row's largest.
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None

    def note(self, func: Any, args: tuple[Any, ...], result: Any) -> Any:
        """See one call and its result, and hand the result on."""
        if func in _DIFFERENCE and len(args) == 2 and all(isinstance(one, Tensor) for one in args):
            scores, taken = args
            if scores.dim() > 2 and taken.shape == (*scores.shape[:-1], 1):
                self.last = result, scores
        return result

    def scores(self, given: Tensor) -> Tensor:
        """What `given` was made from, where it is the last such difference; else itself."""
        found, self.last = self.last, None
        return found[1] if found is not None and found[0] is given else given


# --- layouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where a call's tensors keep examples (b), heads (h0, h1, ...), rows (q) and keys or dimensions (k).

    `pattern` is in einops' words: "b h0 q k", "(b h0) q k", "q k b h0"; `sizes` those of the head axes.
    """

    pattern: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def plain(self) -> bool:
        return self.pattern == "b h0 q k"

    @property
    def _flat(self) -> str:
        return f"b ({' '.join(name for name, _ in self.sizes)}) q k"

    def flat(self, values: Tensor, batch: int) -> Tensor | None:
        """Shapes: `as the call keeps it -> batch heads q k`; None for another number of axes or examples."""
        if self.plain:
            return values if values.dim() == 4 and values.shape[0] == batch else None
        try:
            return rearrange(values, f"{self.pattern} -> {self._flat}", b=batch)
        except EinopsError:
            return None

    def back(self, values: Tensor) -> Tensor:
        """Shapes: `batch heads q k -> as the call keeps it`."""
        return values if self.plain else rearrange(values, f"{self._flat} -> {self.pattern}", **dict(self.sizes))


def layouts(shape: Sequence[int], last: int, batch: int, rows: int, *, row_axis: int | None = None) -> list[Layout]:
    """The layouts that a tensor may have by its shape, likelier ones first.

    Args:
        last: the axis of keys (of a score matrix) or of dimensions (of queries).
        rows: the least number of rows; at most MOST_EXTRA more.
        row_axis: the axis of rows, where it is known.
    """
    axes = [axis for axis in range(len(shape)) if axis != last]
    fitting = [axis for axis in reversed(axes) if 0 <= shape[axis] - rows <= MOST_EXTRA and row_axis in (None, axis)]
    found = []
    for row in sorted(fitting, key=lambda axis: shape[axis] != rows):
        others = [axis for axis in axes if axis != row]
        for folded in (False, True):
            for example in others:
                if folded and (shape[example] % batch or shape[example] == batch):
                    continue
                if not folded and shape[example] != batch:
                    continue
                heads = {axis: f"h{n}" for n, axis in enumerate(other for other in others if other != example)}
                inside = f"h{len(heads)}"
                names = {row: "q", last: "k"} | heads
                sizes = {heads[axis]: shape[axis] for axis in heads} | (
                    {inside: shape[example] // batch} if folded else {}
                )
                for at_batch in (f"(b {inside})", f"({inside} b)") if folded else ("b",):
                    whole = names | {example: at_batch}
                    pattern = " ".join(whole[axis] for axis in range(len(shape)))
                    found.append(Layout(pattern, tuple(sizes.items())))
    return found


def canonical(call: Mapping[str, Any], layout: Layout, batch: int) -> dict[str, Any] | None:
    """An SDPA call with its tensors as `batch heads rows keys`; None where they are not the layout's."""
    if layout.plain:
        return dict(call) if call["query"].dim() == 4 and len(call["query"]) == batch else None
    moved = {name: layout.flat(call[name], batch) for name in ("query", "key", "value")}
    if any(values is None for values in moved.values()):
        return None
    mask = call.get("attn_mask")
    if mask is not None:
        mask = layout.flat(mask.expand(*call["query"].shape[:-1], call["key"].shape[-2]), batch)
    return dict(call, **moved, attn_mask=mask)


# --- scores ----------------------------------------------------------------------------------------------------------


def call_rows(call: Mapping[str, Any], rows: Tensor) -> Tensor:
    """Whole rows of scores of one (canonical) SDPA call, mask included, float32 or wider; gradients pass through.

    Shapes: `batch rows -> batch heads rows keys`.
    """
    query, key = call["query"], call["key"]
    query_rows = at_rows(query, rows).to(torch.promote_types(query.dtype, torch.float32))
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key = key.repeat_interleave(shared, dim=1)
    scale = call.get("scale")
    scores = query_rows @ key.to(query_rows.dtype).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if call.get("attn_mask") is None and not call.get("is_causal"):
        return scores  # nothing is hidden, and every step of a trace comes by here for every layer
    return hidden_as_infinite(scores + _mask_rows(call, rows, scores))


def matrix_rows(scores: Tensor, rows: Tensor) -> Tensor:
    """The same from a whole score matrix. Shapes: `batch heads rows keys, batch rows -> batch heads rows keys`."""
    found = at_rows(scores, rows).to(torch.promote_types(scores.dtype, torch.float32))
    # Hand-written attention masks with the dtype's lowest number instead of -inf.
    return hidden_as_infinite(found.masked_fill(found <= torch.finfo(scores.dtype).min / 2, float("-inf")))


def at_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Shapes: `batch heads seq any, batch rows -> batch heads rows any`."""
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
    return values.transpose(1, 2)[batch, rows].transpose(1, 2)


def hidden_as_infinite(scores: Tensor) -> Tensor:
    """Rows of scores with -inf wherever a mask hides, whatever number it hides with."""
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) - FAR_BELOW, float("-inf"))


def weights_of(scores: Tensor) -> Tensor:
    """Softmax over keys; a fully masked row has no weights."""
    return scores.softmax(-1).nan_to_num(0.0)


def reproduces(scores: Tensor, values: Tensor, output: Tensor) -> bool:
    """Whether rows of scores give an SDPA call's output on its values, up to rounding; a row of NaN is not asked.

    Shapes: `batch heads rows keys, batch heads|shared keys dim, batch heads rows dim`.
    """
    weights = weights_of(scores)
    values = values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1).to(weights.dtype)
    slack = 64 * max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps) * float(values.abs().max())
    return not bool(((weights @ values - output).abs() > slack).any())


def _mask_rows(call: Mapping[str, Any], rows: Tensor, scores: Tensor) -> Tensor:
    """The call's mask at the given rows, additive, causality included. Shapes: `-> batch 1|heads rows keys`."""
    bias = torch.zeros((), dtype=scores.dtype, device=scores.device)
    if call.get("is_causal"):
        later = torch.arange(scores.shape[-1], device=rows.device) > rows[..., None]
        bias = bias + torch.zeros_like(later, dtype=scores.dtype).masked_fill(later, float("-inf"))[:, None]
    mask = call.get("attn_mask")
    if mask is None:
        return bias
    mask = mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask
    found = at_rows(mask.expand(rows.shape[0], -1, call["query"].shape[-2], -1), rows)
    # An additive mask may hide with the dtype's lowest number instead of -inf (Falcon's ALiBi).
    hidden = ~found if found.dtype == torch.bool else found <= torch.finfo(found.dtype).min / 2
    added = torch.zeros_like(found, dtype=scores.dtype) if found.dtype == torch.bool else found.to(scores.dtype)
    return bias + added.masked_fill(hidden, float("-inf"))
