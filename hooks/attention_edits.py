"""Move single attention scores while a model runs.

`edit_scores(module, sites, rows, change)` adds to the scores of some rows whatever `change(layer, scores)` returns:
-inf cuts a route, a number shifts it. `find_attention(module, run)` says where the module attends, from one traced
pass, with the same three sources as the tap (`hooks.attention`):

    hook points   the output of a TransformerLens bridge's `hook_attn_scores` is edited
    SDPA          the call gets an additive mask that holds its own mask, causality included, and the edit
    softmax       the input of a hand-written softmax is edited

The edit is entered from the hooks of the attending modules themselves, not around the whole step: gradient
checkpointing runs a layer again inside `backward`, where a mode of the caller is switched off, and a recomputation
without the edit gives wrong gradients (or, non-reentrant, an error).

Shapes below: batch, heads, rows (those asked for), seq.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RevprobeError
from .attention import (
    SCORE_POINT,
    FunctionMode,
    call_rows,
    is_score_matrix,
    matrix_rows,
    sdpa_call,
    softmaxed,
    tap_attention,
)
from .untouched import untouched

# What to add to the scores of a layer, `batch heads rows seq -> ` anything broadcastable to it; None to add nothing.
# Scores are float32 or wider, -inf where masked. NaN or +inf marks a row in which the edit has no meaning.
Change = Callable[[int, Tensor], Tensor | None]
Source = Literal["hook points", "sdpa", "softmax"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention call of a forward pass: the `turn`-th that the module at `path` makes."""

    layer: int
    path: str
    heads: int
    source: Source
    turn: int = 0


@dataclass
class EditLog:
    """What became of an edit in the last run, by layer: `batch heads rows`, True where the row was left as it was.

    `meaningless`: the change was NaN or +inf there; `emptied`: it would have left the row no key to see.
    """

    meaningless: dict[int, Tensor] = field(default_factory=dict)
    emptied: dict[int, Tensor] = field(default_factory=dict)


def find_attention(module: nn.Module, run: Callable[[], object]) -> list[AttentionSite]:
    """Where `module` attends, in the order of its calls; `run` makes one forward pass over a single sequence.

    Raises: RevprobeError, when no attention is seen.
    """
    first = torch.zeros(1, 1, dtype=torch.long)
    with untouched(module), torch.no_grad(), tap_attention(module, first, first) as tap:
        run()
    layers = tap.layers()
    source: Source = "hook points" if tap.hook_points else "sdpa" if tap.sdpa else "softmax"
    turns: Counter[str] = Counter()
    sites = []
    for layer, call in layers.items():
        sites.append(AttentionSite(layer, call.site, call.score.shape[1], source, turns[call.site]))
        turns[call.site] += 1
    return sites


@contextmanager
def edit_scores(
    module: nn.Module, sites: Sequence[AttentionSite], rows: Tensor, change: Change, *, layers: Collection[int]
) -> Iterator[EditLog]:
    """Add `change` to the scores of `rows` in some layers while open, in every forward pass and recomputation.

    A row that the edit would leave without a visible key stays as it was, and so does one where the change is NaN or
    +inf; the log says which. Adds hooks to the attending modules and removes exactly those, also on exceptions.

    Shapes: `rows`: `batch rows`, rows of the call's query (of the one token there is when it decodes), each named
        once except where the change is 0.
    Args:
        sites: all that `find_attention` found, also those of other layers: a shared module takes turns.
    Raises: RevprobeError, when a site's attention was never reached (a model compiled before the edit skips hooks).
    """
    log, reached, handles = EditLog(), set[int](), []
    running: list[str] = []
    try:
        for path in dict.fromkeys(site.path for site in sites if site.layer in layers):
            here = [site for site in sites if site.path == path]
            edit = _SiteEdit(here, layers, rows, change, log, running, reached)
            if here[0].source == "hook points":
                # First of all hooks, so that whoever watches this point sees what the model uses.
                point = module.get_submodule(path + SCORE_POINT)
                handles.append(point.register_forward_hook(edit.hook_point, prepend=True))
            else:
                place = module.get_submodule(path)
                handles.append(place.register_forward_pre_hook(edit.enter))
                handles.append(place.register_forward_hook(edit.leave, always_call=True))
        yield log
        missed = sorted(set(layers) - reached)
        if missed:
            raise RevprobeError(
                f"the attention of layer {missed[0]} was never reached while it was edited ({len(missed)} of "
                f"{len(layers)} layers); run the model inside the block, and compile it only afterwards"
            )
    finally:
        for handle in handles:
            handle.remove()


class _SiteEdit:
    """The edit of one module's calls. `running` holds the attending modules that run now, innermost last."""

    def __init__(
        self,
        sites: Sequence[AttentionSite],
        layers: Collection[int],
        rows: Tensor,
        change: Change,
        log: EditLog,
        running: list[str],
        reached: set[int],
    ) -> None:
        self.sites, self.layers, self.rows, self.change, self.log = sites, layers, rows, change, log
        self.running, self.reached = running, reached
        self.last = int(rows.max())
        self.calls = 0
        self.modes: list[FunctionMode] = []

    def enter(self, *_: Any) -> None:
        self.running.append(self.sites[0].path)
        self.modes.append(FunctionMode(self.make))
        self.modes[-1].__enter__()

    def leave(self, *_: Any) -> None:  # a returned value would replace the module's output
        self.modes.pop().__exit__(None, None, None)
        self.running.pop()

    @property
    def innermost(self) -> bool:
        """Whether a call made now is this module's own, not one of an attending module inside it."""
        return self.running[-1] == self.sites[0].path

    def hook_point(self, _: Any, __: Any, scores: Tensor) -> Tensor:
        return self.matrix(scores)

    def make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Send the SDPA calls or softmaxes of this module through the edit."""
        if not self.innermost:
            return func(*args, **kwargs)
        if self.sites[0].source == "sdpa":
            if func is F.scaled_dot_product_attention:
                return func(**self.sdpa(sdpa_call(args, kwargs)))
        elif (scores := softmaxed(func, args, kwargs)) is not None and is_score_matrix(scores, len(self.rows)):
            return func(self.matrix(scores), *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
        return func(*args, **kwargs)

    def sdpa(self, call: dict[str, Any]) -> dict[str, Any]:
        """The call with the edit in its mask."""
        site, query = self._next_site(), call["query"]
        if site.layer not in self.layers:
            return call
        self._require_fit(site, len(query), query.shape[-2] if query.shape[1] == site.heads else 1)
        # When a single token decodes, grouped queries come packed: `batch kv_heads group dim`.
        packed = query.shape[1] != site.heads
        whole = dict(call, query=query.reshape(len(query), site.heads, 1, -1)) if packed else call
        rows = self.rows.to(query.device)
        added = self._added(site, call_rows(whole, rows, site=site.path))
        if added is None:
            return call
        mask = _spread(_call_mask(whole, site.heads), added, rows)
        mask = mask.reshape(*query.shape[:3], -1) if packed else mask
        return dict(call, attn_mask=mask, is_causal=False)

    def matrix(self, scores: Tensor) -> Tensor:
        """A whole score matrix with the edit in it."""
        site = self._next_site()
        if site.layer not in self.layers:
            return scores
        self._require_fit(site, len(scores), scores.shape[-2])
        rows = self.rows.to(scores.device)
        added = self._added(site, matrix_rows(scores, rows))
        return scores if added is None else _spread(scores, added, rows)

    def _require_fit(self, site: AttentionSite, batch: int, length: int) -> None:
        """Hold the edit's rows against the call's; on an accelerator a row too many would end the process."""
        if batch != len(self.rows):
            raise RevprobeError(
                f"{site.path}: scores of {batch} sequences, but the edit's rows are given for {len(self.rows)}; run "
                "the batch that the edit was made for"
            )
        if self.last >= length:
            raise RevprobeError(
                f"rows name position {self.last}, but {site.path} attends from {length} tokens; expected 0 to "
                f"{length - 1}"
            )

    def _next_site(self) -> AttentionSite:
        """The site of this call: a module shared between layers takes its turns, one after the other."""
        if len(self.sites) > 1 and torch._C._current_graph_task_id() != -1:
            raise RevprobeError(
                f"{self.sites[0].path!r} attends for {len(self.sites)} layers, and gradient checkpointing runs them "
                "again in another order; edit it without gradient checkpointing"
            )
        site = self.sites[self.calls % len(self.sites)]
        self.calls += 1
        self.reached.add(site.layer)
        return site

    def _added(self, site: AttentionSite, scores: Tensor) -> Tensor | None:
        """What is added to the rows, with what has no meaning or would empty a row taken out."""
        added = self.change(site.layer, scores)
        if added is None:
            return None
        added = added.to(scores).expand_as(scores)
        meaningless = (~(added < float("inf"))).any(-1)
        added = added.masked_fill(meaningless[..., None], 0.0)
        emptied = scores.isfinite().any(-1) & (scores + added).isneginf().all(-1)
        self.log.meaningless[site.layer], self.log.emptied[site.layer] = meaningless, emptied
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
