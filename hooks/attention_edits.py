"""Move single attention scores while a model runs.

`edit_scores(module, attention, rows, change)` adds to the scores of some rows whatever `change(layer, scores)` returns:
-inf cuts a route, a number shifts it. Where the module attends is what a look at it found (`attention_survey`):

    SDPA       the call gets an additive mask that holds its own mask, causality included, and the edit
    softmax    the input of a hand-written softmax is edited

The edit is entered from the hooks of the attending modules themselves, not around the whole step: gradient
checkpointing runs a layer again inside `backward`, where a mode of the caller is switched off, and a recomputation
without the edit gives wrong gradients (or, non-reentrant, an error).

Shapes below: batch, heads, rows (those asked for), seq.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RevprobeError
from .attention_calls import (
    FunctionMode,
    Uncentred,
    call_rows,
    canonical,
    is_attention_call,
    matrix_rows,
    sdpa_call,
    softmaxed,
)
from .attention_sites import Attention, AttentionSite

# What to add to the scores of a layer, `batch heads rows seq -> ` anything broadcastable to it; None to add nothing.
# Scores are float32 or wider, -inf where masked. NaN or +inf marks a row in which the edit has no meaning. A layer that
# computes its heads in several calls asks once for each; the heads of the others are -inf then, and nothing is added.
Change = Callable[[int, Tensor], Tensor | None]


@dataclass
class EditLog:
    """What became of an edit in the last run, by layer: `batch heads rows`, True where the row was left as it was.

    `meaningless`: the change was NaN or +inf there; `emptied`: it would have left the row no key to see.
    """

    meaningless: dict[int, Tensor] = field(default_factory=dict)
    emptied: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def edit_scores(
    module: nn.Module, attention: Attention, rows: Tensor, change: Change, *, layers: Collection[int], ahead: int = 0
) -> Iterator[EditLog]:
    """Add `change` to the scores of `rows` in some layers while open, in every forward pass and recomputation.

    A row that the edit would leave without a visible key stays as it was, and so does one where the change is NaN or
    +inf; the log says which. Adds hooks to the attending modules and removes exactly those, also on exceptions.

    Shapes: `rows`: `batch rows`, rows of the call's query (of the one token there is when it decodes), each named
        once except where the change is 0.
    Args:
        ahead: virtual tokens before the query's own in every call.
    Raises: RevprobeError, when a site's attention was never reached (a model compiled before the edit skips hooks), or
        a call is about other tokens than those the model is given (attention in blocks).
    """
    run = _Edit(attention, layers, rows, change, ahead)
    places = [_PathEdit(path, run) for path in attention.calls]
    handles = [module.register_forward_pre_hook(run.begin(places), with_kwargs=True)]
    try:
        for path, place in zip(attention.calls, places, strict=True):
            child = module.get_submodule(path)
            handles.append(child.register_forward_pre_hook(place.enter))
            handles.append(child.register_forward_hook(place.leave, always_call=True))
        yield run.log
        missed = sorted(set(layers) - run.reached)
        if missed:
            raise RevprobeError(
                f"the attention of layer {missed[0]} was never reached while it was edited ({len(missed)} of "
                f"{len(layers)} layers); run the model inside the block, and compile it only afterwards"
            )
    finally:
        for handle in handles:
            handle.remove()


class _Edit:
    """One edit of a whole model. `running` holds the attending modules that run now, innermost last."""

    def __init__(self, attention: Attention, layers: Collection[int], rows: Tensor, change: Change, ahead: int) -> None:
        self.attention, self.layers, self.change, self.ahead = attention, layers, change, ahead
        self.rows, self.last = rows + ahead, int(rows.max())
        self.log, self.running, self.reached = EditLog(), list[str](), set[int]()
        self.length: int | None = None  # of the token ids that the model was given, where it was given some
        self.shared = {
            path for path in attention.calls if len({site.layer for site in attention.sites if site.path == path}) > 1
        }

    def begin(self, places: Sequence[_PathEdit]) -> Callable[..., None]:
        """A pre-hook of the whole model: a forward pass begins, also after one that an exception cut off."""

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
            ids = next((one for one in given if one.dim() == 2 and not one.is_floating_point()), None)
            self.length = None if ids is None else ids.shape[1]
            self.running.clear()
            for place in places:
                place.calls = 0

        return note


class _PathEdit:
    """The edit of the calls of the module at one path."""

    def __init__(self, path: str, run: _Edit) -> None:
        self.path, self.run, self.calls = path, run, 0
        sites = [site for site in run.attention.sites if site.path == path]
        self.edits = any(site.layer in run.layers for site in sites)
        self.modes: list[FunctionMode] = []
        self.uncentred = Uncentred()

    def enter(self, *_: Any) -> None:
        self.run.running.append(self.path)
        if self.edits:
            self.modes.append(FunctionMode(self.make))
            self.modes[-1].__enter__()

    def leave(self, *_: Any) -> None:  # a returned value would replace the module's output
        if self.edits:
            self.modes.pop().__exit__(None, None, None)
        self.run.running.pop()

    def make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Send the SDPA calls or softmaxes of this module through the edit."""
        # A call made now may be an attending module's inside this one.
        if self.run.running[-1] != self.path or not is_attention_call(func):
            return self.uncentred.note(func, args, func(*args, **kwargs))
        site = self._next_site()
        if site is None or site.layer not in self.run.layers:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return func(**self.sdpa(site, sdpa_call(args, kwargs)))
        softmax = softmaxed(func, args, kwargs)
        assert softmax is not None, "a site is an SDPA call or a softmax"
        edited = self.matrix(site, softmax[0])
        return func(edited, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})

    def sdpa(self, site: AttentionSite, call: dict[str, Any]) -> dict[str, Any]:
        """The call with the edit in its mask."""
        query = call["query"]
        # When a single token decodes, grouped queries come packed: `batch kv_heads group dim`.
        packed = site.layout.plain and query.dim() == 4 and query.shape[1] != site.heads
        unpacked = dict(call, query=query.reshape(len(query), site.heads, 1, -1)) if packed else call
        whole = canonical(unpacked, site.layout, len(self.run.rows))
        if whole is None:
            raise self._misfit(site, len(query))
        self._require_rows(site, whole["query"].shape[2])
        rows = self.run.rows.to(query.device) + site.shift[0]
        added = self._added(site, call_rows(whole, rows))
        if added is None:
            return call
        mask = _spread(_call_mask(whole, site.heads), added, rows)
        mask = mask.reshape(*query.shape[:3], -1) if packed else site.layout.back(mask)
        return dict(call, attn_mask=mask, is_causal=False)

    def matrix(self, site: AttentionSite, given: Tensor) -> Tensor:
        """A whole score matrix with the edit in it."""
        batch = len(self.run.rows)
        scores, flat = (site.layout.flat(one, batch) for one in (self.uncentred.scores(given), given))
        if scores is None or flat is None:
            raise self._misfit(site, len(given))
        self._require_rows(site, scores.shape[2])
        rows = self.run.rows.to(given.device) + site.shift[0]
        added = self._added(site, matrix_rows(scores, rows))
        return given if added is None else site.layout.back(_spread(flat, added, rows))

    def _misfit(self, site: AttentionSite, batch: int) -> RevprobeError:
        return RevprobeError(
            f"{site.path}: scores of {batch} sequences, but the edit's rows are given for {len(self.run.rows)}; run "
            "the batch that the edit was made for, in sequences of one length where padding would reach tokens"
        )

    def _require_rows(self, site: AttentionSite, length: int) -> None:
        """Hold the edit's rows against the call's; on an accelerator a row too many would end the process."""
        tokens = length - site.extra[0] - self.run.ahead
        if self.run.length is not None and tokens != self.run.length:
            raise RevprobeError(
                f"{site.path} attends from {tokens} tokens at a time, but the model was given {self.run.length}: "
                "blocks, pooling or padding, whose rows are not the input's; edit shorter sequences"
            )
        if self.run.last >= tokens:
            raise RevprobeError(
                f"rows name position {self.run.last}, but {site.path} attends from {tokens} tokens; expected 0 to "
                f"{tokens - 1}"
            )

    def _next_site(self) -> AttentionSite | None:
        """The site of this call: a module shared between layers takes its turns, one after the other."""
        if self.path in self.run.shared and torch._C._current_graph_task_id() != -1:
            layers = {site.layer for site in self.run.attention.sites if site.path == self.path}
            raise RevprobeError(
                f"{self.path!r} attends for {len(layers)} layers, and gradient checkpointing runs them "
                "again in another order; edit it without gradient checkpointing"
            )
        site = self.run.attention.at(self.path, self.calls)
        self.calls += 1
        if site is not None:
            self.run.reached.add(site.layer)
        return site

    def _added(self, site: AttentionSite, scores: Tensor) -> Tensor | None:
        """What is added to the rows, with what has no meaning or would empty a row taken out."""
        first, heads = site.shift[1], slice(site.first_head, site.first_head + site.heads)
        own = scores[..., first : scores.shape[-1] - site.extra[1] + first]
        whole = own
        if site.heads != self.run.attention.heads[site.layer]:
            whole = own.new_full((len(own), self.run.attention.heads[site.layer], *own.shape[2:]), float("-inf"))
            whole[:, heads] = own
        change = self.run.change(site.layer, whole)
        if change is None:
            return None
        added = torch.zeros_like(scores)
        added[..., first : first + own.shape[-1]] = change.to(scores).expand_as(whole)[:, heads]
        meaningless = (~(added < float("inf"))).any(-1)
        added = added.masked_fill(meaningless[..., None], 0.0)
        emptied = scores.isfinite().any(-1) & (scores + added).isneginf().all(-1)
        for log, flags in ((self.run.log.meaningless, meaningless), (self.run.log.emptied, emptied)):
            if site.layer not in log or log[site.layer].shape != whole.shape[:3]:
                log[site.layer] = torch.zeros(whole.shape[:3], dtype=torch.bool, device=flags.device)
            log[site.layer][:, heads] = flags
        return added.masked_fill(emptied[..., None], 0.0)


def _call_mask(call: dict[str, Any], heads: int) -> Tensor:
    """The call's own mask, additive, causality included: a mask beside is_causal=True is not allowed.

    Shapes: `-> batch heads rows_of_the_call seq`, in the query's dtype (kernels take no other on every device).
    """
    query, key, mask = call["query"], call["key"], call.get("attn_mask")
    size = (query.shape[0], heads, query.shape[-2], key.shape[-2])
    full = torch.zeros(size, dtype=query.dtype, device=query.device)
    if call.get("is_causal"):
        seen = torch.ones(size[-2:], dtype=torch.bool, device=query.device).tril()
        full = full.masked_fill(~seen, float("-inf"))
    if mask is None:
        return full
    return full.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else full + mask.to(query.dtype)


def _spread(matrix: Tensor, added: Tensor, rows: Tensor) -> Tensor:
    """Add to some rows of a score matrix, out of place. Shapes: `batch heads seq seq, batch heads rows seq`."""
    index = rows[:, None, :, None].expand_as(added)
    return matrix.scatter_add(2, index, added.to(matrix.dtype))
