"""See attention scores without asking a model to output them.

`tap_attention(module, rows, columns, attention, size)` watches a forward pass and keeps the scores and weights of the
rows and columns asked for, at the calls that one look at the model found readable (`hooks.attention_survey`):

    SDPA       F.scaled_dot_product_attention: scores are worked out from the call's own query, key, scale and mask,
               rows x keys per head, never keys x keys; the call itself is left as it was
    softmax    the input of a softmax, for attention written by hand (eager kernels, older research code); the whole
               matrix exists there anyway

Scores are pre-softmax and include what is added to them (ALiBi arrives as an additive mask, a cap has been put on); a
position that the mask forbids has score -inf and weight 0. A sink takes its part of the weight.
`tap_queries` keeps the query vectors of SDPA calls instead, and the key vectors if asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_calls import Uncentred, at_rows, call_rows, canonical, matrix_rows, sdpa_call, softmaxed, weights_of
from .attention_look import CHANGED, OUTPUT
from .attention_met import Awaited, Meetings, gives_output
from .attention_sites import Attention, AttentionSite, watched_calls


@dataclass(frozen=True)
class AttentionRows:
    """The attention of one layer, or of one call, seen at the rows and columns asked for.

    Shapes: `score`, `weight`: `batch heads rows columns`, float32 or wider; `mass`: `batch heads rows`, the
    sum of the weights on the query's own tokens, 1 unless every key was masked or a sink took its part.
    """

    site: str
    score: Tensor
    weight: Tensor
    mass: Tensor


@dataclass
class AttentionTap:
    """What a tap saw, in the order of the calls.

    `left_out`: path -> why what a look found readable was not read in this run (a model that attends in blocks only
    when its input is long, or changes its weights there).
    """

    attention: Attention
    calls: list[tuple[AttentionSite, AttentionRows]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def layers(self, name: str = "the model") -> dict[int, AttentionRows]:
        """Layer -> all its heads; a layer that was not read in whole is missing, and `left_out` says why.

        Of several runs inside the tap, the last. Raises: RevprobeError, when no attention of the model `name` was read.
        """
        self.attention.require(name)
        found = {(site.layer, site.first_head): rows for site, rows in self.calls if not site.repeats}
        layers = {}
        for layer, heads in self.attention.heads.items():
            parts = [rows for (at, _), rows in sorted(found.items(), key=lambda item: item[0]) if at == layer]
            if sum(part.score.shape[1] for part in parts) == heads:
                layers[layer] = _joined(parts)
        if not layers:
            Attention((), {}, self.left_out).require(name)
        return layers

    def drop(self, site: AttentionSite, reason: str) -> None:
        """Take back what earlier runs inside the tap saw of a site."""
        self.calls = [(other, rows) for other, rows in self.calls if other != site]
        self.left_out[site.path] = reason

    def missing(self) -> dict[int, str]:
        """Layer -> why it was not read in this run, of those that a look found readable."""
        return {site.layer: self.left_out[site.path] for site in self.attention.sites if site.path in self.left_out}


def _joined(parts: list[AttentionRows]) -> AttentionRows:
    if len(parts) == 1:
        return parts[0]
    whole = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("score", "weight", "mass"))
    return AttentionRows(parts[0].site, *whole)


@dataclass(frozen=True)
class QueryRows:
    """The queries of one layer, and the keys if asked, as the scores see them: after RoPE, before the scale.

    Shapes: `query`: `batch heads rows dim`, `key`: `batch heads columns dim`, float32 or wider; `hidden`: `batch heads
    rows columns`, what the mask keeps from the rows, with keys alone. A key that several query heads share stands under
    each of them.
    """

    site: str
    query: Tensor
    key: Tensor | None = None
    hidden: Tensor | None = None


@contextmanager
def tap_attention(
    module: nn.Module, rows: Tensor, columns: Tensor, attention: Attention, size: tuple[int, int]
) -> Iterator[AttentionTap]:
    """Record scores and weights at `rows` x `columns` of every readable attention call of `module` while open.

    Shapes: `rows`: `batch rows`, `columns`: `batch columns` (long, within the sequence).
    Args:
        attention: what a look at the module found.
        size: query rows and key columns of a call over this batch; a call of another size is left out.
    Adds hooks to the attending modules and removes exactly those, also when the forward pass raises.
    """
    tap, meetings = AttentionTap(attention), Meetings()

    @torch.no_grad()
    def see(
        site: AttentionSite, func: Any, args: Any, kwargs: Any, uncentred: Uncentred
    ) -> Callable[[Tensor], None] | None:
        if site.repeats:
            return None
        found = _score_rows(site, func, args, kwargs, uncentred, rows, size)
        if isinstance(found, str):
            tap.drop(site, found)
            return None
        seen = AttentionRows(site.path, *_weigh(found, columns, site.shift[1], size[1]))
        keep, at = partial(tap.calls.append, (site, seen)), rows.to(found.device) + site.shift[0]
        if func is not F.scaled_dot_product_attention:
            return lambda result: meetings.waiting.append(Awaited.of(site, func, result, at, size, keep))
        keep()
        # Torch's own function does the same to other numbers of one form; the form may change with the length.
        known, call = attention.reproduced, (site.path, site.turn)
        return None if size[1] <= known.get(call, 0) else partial(_hold, tap, site, (args, kwargs), found, at, size[1])

    with watched_calls(module, attention, see, meetings.mixed):
        yield tap
    for one in meetings.waiting:
        tap.drop(one.site, CHANGED)


@torch.no_grad()
def _hold(
    tap: AttentionTap,
    site: AttentionSite,
    call: tuple[Any, dict[str, Any]],
    scores: Tensor,
    at: Tensor,
    keys: int,
    output: Tensor,
) -> None:
    """Hold an SDPA call's output against the weights that were read of it."""
    if gives_output(site, call, scores, output, at):
        tap.attention.reproduced[site.path, site.turn] = keys
    else:
        tap.drop(site, OUTPUT)


def _score_rows(
    site: AttentionSite, func: Any, args: Any, kwargs: Any, uncentred: Uncentred, rows: Tensor, size: tuple[int, int]
) -> Tensor | str:
    """Rows of scores of a call over all its keys, or why it is not read."""
    batch = len(rows)
    there: Tensor | None
    if func is F.scaled_dot_product_attention:
        given = sdpa_call(args, kwargs)
        call = canonical(given, site.layout, batch)
        there, shape = (None if call is None else call["query"]), tuple(given["query"].shape)
        keys = given["key"].shape[-2]
    else:
        call, softmax = None, softmaxed(func, args, kwargs)
        assert softmax is not None, "a site is an SDPA call or a softmax"
        scores = uncentred.scores(softmax[0])
        there, shape, keys = site.layout.flat(scores, batch), tuple(scores.shape), scores.shape[softmax[1]]
    if there is None or there.shape[2] != size[0] + site.extra[0] or keys != size[1] + site.extra[1]:
        return (
            f"attention over a tensor {shape} with {keys} keys for {batch} sequences of {size[0]} tokens: blocks, "
            "pooling or padding"
        )
    at = rows.to(there.device) + site.shift[0]
    return matrix_rows(there, at) if call is None else call_rows(call, at)


@contextmanager
def tap_queries(
    module: nn.Module, rows: Tensor, attention: Attention, columns: Tensor | None = None
) -> Iterator[dict[int, QueryRows]]:
    """Record the queries at `rows`, and the keys at `columns`, of every SDPA layer of `module` while open, by layer.

    Shapes: `rows`: `batch rows`, `columns`: `batch columns` (long); no keys, and not what is hidden, when None. Adds
    hooks to the module tree and removes exactly those, also when the forward pass raises.
    """
    layers: dict[int, QueryRows] = {}
    parts: dict[int, dict[int, tuple[Tensor, Tensor | None, Tensor | None]]] = {}

    @torch.no_grad()
    def see(site: AttentionSite, func: Any, args: Any, kwargs: Any, _: Uncentred) -> None:
        if site.repeats or func is not F.scaled_dot_product_attention:
            return
        call = canonical(sdpa_call(args, kwargs), site.layout, len(rows))
        if call is None:
            return
        query, key, hidden = call["query"].detach(), None, None
        if columns is not None:
            shared = query.shape[1] // call["key"].shape[1]
            key = _wide_at(call["key"].detach(), columns, site.shift[1]).repeat_interleave(shared, dim=1)
            scores = call_rows(call, rows.to(query.device) + site.shift[0])
            hidden = _at_columns(scores, columns, site.shift[1]).isneginf()
        parts.setdefault(site.layer, {})[site.first_head] = _wide_at(query, rows, site.shift[0]), key, hidden
        queries, keys, masks = zip(*(part for _, part in sorted(parts[site.layer].items())), strict=True)
        beside = [None if key is None else torch.cat(some, 1) for some in (keys, masks)]
        layers[site.layer] = QueryRows(site.path, torch.cat(queries, 1), *beside)

    with watched_calls(module, attention, see):
        yield layers


def _wide_at(vectors: Tensor, positions: Tensor, first: int) -> Tensor:
    """Queries or keys at some positions. Shapes: `batch heads seq dim, batch at -> batch heads at dim`."""
    at = at_rows(vectors, positions.to(vectors.device) + first)
    return at.to(torch.promote_types(at.dtype, torch.float32))


def _weigh(scores: Tensor, columns: Tensor, first: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and weights at the columns, and the mass on the query's own keys, which start at `first`."""
    weights = weights_of(scores)
    at = partial(_at_columns, columns=columns, first=first)
    return at(scores), at(weights), weights[..., first : first + keys].sum(-1)


def _at_columns(values: Tensor, columns: Tensor, first: int) -> Tensor:
    """Shapes: `batch heads rows keys, batch columns -> batch heads rows columns`."""
    return values.gather(-1, (columns.to(values.device) + first)[:, None, None, :].expand(*values.shape[:3], -1))
