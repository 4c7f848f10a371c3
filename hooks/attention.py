"""See attention scores without asking a model to output them.

`tap_attention(module, rows, columns)` watches a forward pass and keeps the scores and weights of the rows and columns
asked for. It looks in three places and takes the first that shows anything:

    hook points   `hook_attn_scores` of a TransformerLens bridge
    SDPA          every F.scaled_dot_product_attention call: scores are worked out from the call's own query, key,
                  scale and mask, rows x seq per head, never seq x seq; the call itself is left as it was
    softmax       the input of a softmax over [batch, heads, seq, seq], for attention written by hand (eager kernels,
                  older research code); seq x seq exists there anyway

Each call is attributed to the module that made it. Scores are pre-softmax and include what is added to them (ALiBi
arrives as an additive mask); a position that the mask forbids has score -inf and weight 0.
`tap_queries` keeps the query vectors of SDPA calls instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import RevprobeError

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
SCORE_POINT = ".hook_attn_scores"
# Masks written by hand hide with -1e4, -1e9 or a dtype's lowest number; a score this far below its row's best has no
# weight in any dtype.
FAR_BELOW = 9e3
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class AttentionRows:
    """One attention call, seen at the rows and columns asked for.

    Shapes: `score`, `weight`: `batch heads rows columns`, float32 or wider; `mass`: `batch heads rows`, the
    weights' sum over the row, 1 unless every key was masked.
    """

    site: str
    score: Tensor
    weight: Tensor
    mass: Tensor


@dataclass
class AttentionTap:
    """What a tap saw, by source, in the order of the calls."""

    hook_points: list[AttentionRows] = field(default_factory=list)
    sdpa: list[AttentionRows] = field(default_factory=list)
    softmax: list[AttentionRows] = field(default_factory=list)

    @property
    def calls(self) -> list[AttentionRows]:
        """The calls of the first source that showed any."""
        return self.hook_points or self.sdpa or self.softmax

    def layers(self) -> dict[int, AttentionRows]:
        """The calls by layer, as `by_layer` numbers them. Raises: RevprobeError, when no call was seen."""
        if not self.calls:
            raise RevprobeError(
                "no attention was seen: the model calls neither scaled_dot_product_attention nor a softmax over "
                "[batch, heads, seq, seq] (flash or flex kernels, nn.MultiheadAttention); load it with "
                "attn_implementation='sdpa', or 'eager' where its class has no sdpa"
            )
        return by_layer(self.calls)


@dataclass(frozen=True)
class QueryRows:
    """The queries of one attention call, as the scores see them: after RoPE, before the scale.

    Shapes: `query`: `batch heads rows dim`, float32 or wider.
    """

    site: str
    query: Tensor


Call = TypeVar("Call", AttentionRows, QueryRows)


def by_layer(calls: Sequence[Call]) -> dict[int, Call]:
    """Calls by layer: the number in the module's path, or the order of calls where paths do not differ."""
    numbers = [_LAYER.search(call.site) for call in calls]
    by_path = [int(number[1]) for number in numbers if number]
    distinct = len(by_path) == len(calls) == len(set(by_path))
    return dict(zip(by_path if distinct else range(len(calls)), calls, strict=True))


@contextmanager
def tap_attention(module: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[AttentionTap]:
    """Record scores and weights at `rows` x `columns` of every attention call of `module` while open.

    Shapes: `rows`: `batch rows`, `columns`: `batch columns` (long, within the sequence).
    Adds hooks to the module tree and removes exactly those, also when the forward pass raises.
    """
    tap = AttentionTap()

    def see_sdpa(site: str, call: Mapping[str, Any]) -> None:
        tap.sdpa.append(AttentionRows(site, *attention_rows(call, rows, columns, site=site)))

    @torch.no_grad()
    def see_scores(found: list[AttentionRows], site: str, scores: Tensor) -> None:
        found.append(AttentionRows(site, *_weigh(matrix_rows(scores, rows), columns)))

    def see_softmax(site: str, scores: Tensor) -> None:
        if is_score_matrix(scores, len(rows)) and scores.shape[-1] > max(int(rows.max()), int(columns.max())):
            see_scores(tap.softmax, site, scores)

    def watch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site = running[-1] if running else ""
        if func is F.scaled_dot_product_attention:
            see_sdpa(site, sdpa_call(args, kwargs))
        elif (scores := softmaxed(func, args, kwargs)) is not None:
            see_softmax(site, scores)
        return func(*args, **kwargs)

    hooks = _score_hooks(module, lambda *at: see_scores(tap.hook_points, *at))
    with running_module(module) as running, hooks, FunctionMode(watch):
        yield tap


@contextmanager
def tap_queries(module: nn.Module, rows: Tensor) -> Iterator[list[QueryRows]]:
    """Record the queries at `rows` of every SDPA call of `module` while open, in the order of the calls.

    Shapes: `rows`: `batch rows` (long). Adds hooks to the module tree and removes exactly those, also when the forward
    pass raises.
    Raises: RevprobeError, when a call's batch is not the batch that was asked about.
    """
    calls: list[QueryRows] = []

    def watch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.scaled_dot_product_attention:
            site = running[-1] if running else ""
            query = sdpa_call(args, kwargs)["query"].detach()
            calls.append(QueryRows(site, _query_rows(query, rows.to(query.device), site)))
        return func(*args, **kwargs)

    with running_module(module) as running, FunctionMode(watch):
        yield calls


@torch.no_grad()
def attention_rows(
    call: Mapping[str, Any], rows: Tensor, columns: Tensor, *, site: str = "attention"
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, weights and row mass of one SDPA call at the rows and columns asked for.

    Shapes: `call["query"]`: `batch heads seq dim`, `call["key"]`: `batch kv_heads seq dim`; returns
        `batch heads rows columns` twice and `batch heads rows`.
    Raises: RevprobeError, when the call's batch is not the batch that was asked about.
    """
    return _weigh(call_rows(call, rows, site=site), columns)


def call_rows(call: Mapping[str, Any], rows: Tensor, *, site: str = "attention") -> Tensor:
    """Whole rows of scores of one SDPA call, mask included, float32 or wider; gradients pass through.

    Shapes: `batch rows -> batch heads rows seq`. Raises: RevprobeError, as `attention_rows`.
    """
    query, key = call["query"], call["key"]
    query_rows = _query_rows(query, rows, site)
    wide = query_rows.dtype
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).to(wide)
    scale = call.get("scale")
    scores = query_rows @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return _hidden_as_infinite(scores + _mask_rows(call, rows, scores))


def _query_rows(query: Tensor, rows: Tensor, site: str) -> Tensor:
    """The queries of some rows. Shapes: `batch heads seq dim, batch rows -> batch heads rows dim`, float32 or wider."""
    if query.dim() != 4 or query.shape[0] != rows.shape[0]:
        raise RevprobeError(
            f"{site or 'attention'}: attention over query {tuple(query.shape)}, expected {rows.shape[0]} sequences x "
            "heads x seq x dim; the model reshapes its batch"
        )
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
    at_rows = query.transpose(1, 2)[batch, rows].transpose(1, 2)
    return at_rows.to(torch.promote_types(query.dtype, torch.float32))


def matrix_rows(scores: Tensor, rows: Tensor) -> Tensor:
    """The same from a whole score matrix. Shapes: `batch heads seq seq, batch rows -> batch heads rows seq`."""
    at_rows = scores.transpose(1, 2)[torch.arange(len(rows), device=rows.device)[:, None], rows].transpose(1, 2)
    at_rows = at_rows.to(torch.promote_types(scores.dtype, torch.float32))
    # Hand-written attention masks with the dtype's lowest number instead of -inf.
    return _hidden_as_infinite(at_rows.masked_fill(at_rows <= torch.finfo(scores.dtype).min / 2, float("-inf")))


def _hidden_as_infinite(at_rows: Tensor) -> Tensor:
    """Rows of scores with -inf wherever a mask hides, whatever number it hides with."""
    return at_rows.masked_fill(at_rows < at_rows.amax(-1, keepdim=True) - FAR_BELOW, float("-inf"))


def sdpa_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an F.scaled_dot_product_attention call by name."""
    return {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}


def softmaxed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a torch call takes the softmax of, over the last axis; None for any other call."""
    if func not in _SOFTMAX:
        return None
    scores: Tensor = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return scores if dim in (-1, scores.dim() - 1) else None


def is_score_matrix(scores: Tensor, batch: int) -> bool:
    """Whether a softmax is attention's: routers and output distributions are softmaxed too, but only scores are
    `batch heads seq seq` with the size of this very batch.
    """
    return scores.dim() == 4 and scores.shape[0] == batch and scores.shape[-1] == scores.shape[-2]


def _weigh(scores: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and weights at the columns, and the rows' mass. Shapes: `scores`: `batch heads rows seq`."""
    weights = scores.softmax(-1).nan_to_num(0.0)  # a fully masked row has no weights
    at = columns[:, None, None, :].expand(*scores.shape[:3], -1)
    return scores.gather(-1, at), weights.gather(-1, at), weights.sum(-1)


def _mask_rows(call: Mapping[str, Any], rows: Tensor, scores: Tensor) -> Tensor:
    """The call's mask at the given rows, additive, causality included. Shapes: `-> batch 1|heads rows seq`."""
    bias = torch.zeros((), dtype=scores.dtype, device=scores.device)
    if call.get("is_causal"):
        later = torch.arange(scores.shape[-1], device=rows.device) > rows[..., None]
        bias = bias + torch.zeros_like(later, dtype=scores.dtype).masked_fill(later, float("-inf"))[:, None]
    mask = call.get("attn_mask")
    if mask is None:
        return bias
    mask = mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask
    mask = mask.expand(rows.shape[0], -1, call["query"].shape[-2], -1)
    at_rows = mask.transpose(1, 2)[torch.arange(rows.shape[0], device=rows.device)[:, None], rows].transpose(1, 2)
    # An additive mask may hide with the dtype's lowest number instead of -inf (Falcon's ALiBi).
    hidden = ~at_rows if at_rows.dtype == torch.bool else at_rows <= torch.finfo(at_rows.dtype).min / 2
    added = torch.zeros_like(at_rows, dtype=scores.dtype) if at_rows.dtype == torch.bool else at_rows.to(scores.dtype)
    return bias + added.masked_fill(hidden, float("-inf"))


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
def _score_hooks(module: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show the scores that pass a TransformerLens bridge's `hook_attn_scores` points."""
    points = {name: child for name, child in module.named_modules() if name.endswith(SCORE_POINT)}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, __, output: see(name.removesuffix(SCORE_POINT), output)

    handles = [point.register_forward_hook(watch(name)) for name, point in points.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def running_module(module: nn.Module) -> Iterator[list[str]]:
    """The path of modules that are running now, innermost last."""
    running: list[str] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:  # a returned value would replace the module's output
        running.pop()

    for name, child in module.named_modules():
        handles += [child.register_forward_pre_hook(enter(name)), child.register_forward_hook(leave, always_call=True)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()
