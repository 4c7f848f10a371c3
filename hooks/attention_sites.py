"""Where a model attends: its readable calls, numbered by layer, and what is left out, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch.nn.functional as F
from torch import nn

from ..errors import RevprobeError
from .attention_calls import (
    FunctionMode,
    Layout,
    Uncentred,
    is_attention_call,
    is_product,
    its_path,
    running_modules,
    softmaxed,
)

Source = Literal["sdpa", "softmax"]
_SHOWN = 3


@dataclass(frozen=True)
class AttentionSite:
    """One attention call of a forward pass: the `turn`-th call that the module at `path` makes.

    A layer whose heads are computed in several calls has several sites; `first_head` is the number, in its layer, of
    the first of a call's `heads`. `repeats`: an earlier call of the layer has the same weights (differential attention
    in two SDPA calls, one for each half of the values).
    `extra`: rows and keys beside the query's own tokens (sinks, registers); `shift`: how many of them stand before.
    """

    layer: int
    path: str
    heads: int
    source: Source
    turn: int = 0
    first_head: int = 0
    repeats: bool = False
    layout: Layout = field(default=Layout("b h0 q k", (("h0", 1),)))
    extra: tuple[int, int] = (0, 0)
    shift: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Attention:
    """The attention of a model, as one look at it found (`hooks.attention_survey`).

    `sites`: in the order of their calls; `calls`: path -> SDPA calls and softmaxes of any kind in one forward pass;
    `left_out`: path -> why what is computed there is not read; `without`: layer -> why it has no site; `told`: whether
    the look could tell: scores that are constants still (zero-initialised queries) are taken for what they seem.
    `reproduced`: site -> the most keys at which a tap saw an SDPA call give what its weights give on its values.
    """

    sites: tuple[AttentionSite, ...]
    calls: Mapping[str, int]
    left_out: Mapping[str, str]
    without: Mapping[int, str] = field(default_factory=dict)
    told: bool = True
    reproduced: dict[tuple[str, int], int] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def heads(self) -> dict[int, int]:
        """Layer -> heads, ascending."""
        heads: dict[int, int] = {}
        for site in self.sites:
            heads[site.layer] = max(heads.get(site.layer, 0), site.first_head + site.heads)
        return dict(sorted(heads.items()))

    def at(self, path: str, turn: int) -> AttentionSite | None:
        """The site of a call, None where it is not read."""
        return self._by_call.get((path, turn % max(self.calls.get(path, 1), 1)))

    @cached_property
    def _by_call(self) -> dict[tuple[str, int], AttentionSite]:
        return {(site.path, site.turn): site for site in self.sites}

    def require(self, name: str = "the model") -> Attention:
        """Itself. Raises: RevprobeError, when nothing can be read, with what stands in the way."""
        if self.sites:
            return self
        if self.left_out:
            reasons: dict[str, list[str]] = {}
            for path, reason in self.left_out.items():
                reasons.setdefault(reason, []).append(path or name)
            shown = [f"{paths[0]}{' and others' if paths[1:] else ''}: {why}" for why, paths in reasons.items()]
            raise RevprobeError(
                f"no attention of {name} can be read: {'; '.join(shown[:_SHOWN])}; ask for what needs no attention "
                "(the gradient and probability probes)"
            )
        raise RevprobeError(
            f"no attention was seen: {name} calls neither scaled_dot_product_attention nor a softmax over its tokens "
            "that multiplies values (flash or flex kernels, nn.MultiheadAttention, a softmax written as exp / sum); if "
            "it is one of transformers' that has it, load it with attn_implementation='sdpa'"
        )


@contextmanager
def watched_calls(
    module: nn.Module,
    attention: Attention,
    see: Callable[[AttentionSite, Any, Any, Any, Uncentred], Callable[[Any], None] | None],
    mixed: Callable[[tuple[Any, ...]], None] | None = None,
) -> Iterator[None]:
    """Show every call of a site to `see(site, func, args, kwargs, uncentred)`; the call is made as it is.

    What `see` returns is called with the call's result; `mixed` is shown the arguments of every product of tensors.
    Adds hooks to the modules that make such calls and removes exactly those, also on exceptions.
    Raises: RevprobeError, when a module makes another number of calls than when it was looked at.
    """
    made: dict[str, int] = dict.fromkeys(attention.calls, 0)
    uncentred = Uncentred()

    def make(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answered = None
        if running and is_attention_call(func):
            path = running[-1]
            site = attention.at(path, made[path])
            made[path] += 1
            if site is not None:
                answered = see(site, func, args, kwargs, uncentred)
        elif mixed is not None and is_product(func):
            mixed(args)
        result = func(*args, **kwargs)
        if answered is not None:
            answered(result)
        return uncentred.note(func, args, result) if running else result

    with running_modules(module, its_path, attention.calls) as running, FunctionMode(make):
        yield
    uneven = next((path for path, count in made.items() if count % attention.calls[path]), None)
    if uneven is not None:
        raise RevprobeError(
            f"{uneven or 'the model'} made {made[uneven]} attention calls, not a multiple of the "
            f"{attention.calls[uneven]} it makes on a few tokens, so its layers cannot be told apart; use shorter "
            "queries"
        )


def attending_modules(module: nn.Module, run: Callable[[], object]) -> list[str]:
    """The paths of the modules that compute attention in one run, whatever can be read of it; weights may be missing.

    In the order of their first calls; softmaxes count where their input is `batch heads seq seq`.
    """
    found = dict[str, None]()

    def make(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        taken = softmaxed(func, args, kwargs)
        square = taken is not None and taken[0].dim() == 4 and taken[0].shape[-1] == taken[0].shape[-2]
        if func is F.scaled_dot_product_attention or square:
            found[running[-1] if running else ""] = None
        return func(*args, **kwargs)

    with running_modules(module, its_path) as running, FunctionMode(make):
        run()
    return list(found)
