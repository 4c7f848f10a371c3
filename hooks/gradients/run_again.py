"""Blocks that run again in the backward pass, so that of the first run only what goes into them is held.

Activations of a deep model outweigh everything else that a gradient needs. A block that runs again costs its forward
pass once more, and holds what lies inside it while its own gradient passes, and no longer. Its modules' inputs, which
the products are made of, are held all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError, checkpoint

from .order import fingerprint
from .spread_weights import spread_units


class RunsOtherwise(Exception):
    """A block did something else when it ran again with the same inputs: it has to be held instead."""


def that_can(module: nn.Module, blocks: Sequence[nn.Module], adopting: Collection[str] = ()) -> list[nn.Module]:
    """Of a module's blocks those that can run again; none where something else stands around their forward functions.

    A block with parameters of its own is itself run again for their gradient, one example at a time.
    Args:
        adopting: paths of modules that use parameters of children without calling them; see `adopted_parameters`.
    """
    if spread_units(module) or any(hasattr(m, "_orig_mod") for m in module.modules()):  # of torch.compile
        return []
    adopters = {id(module.get_submodule(path)) for path in adopting}
    plain = (b for b in blocks if id(b) not in adopters and not any(p is not None for p in b._parameters.values()))
    return [block for block in plain if not isinstance(block, torch.jit.ScriptModule)]


@contextmanager
def run_again(module: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks of a module run again in a backward pass through what is computed inside.

    No cache of keys and values is kept: it would hold them, and be longer the second time.
    Raises: RunsOtherwise, in the backward pass, when one of them fails or gives something else than before, or takes
        another way to it; what was read by then is to be thrown away.
    """
    patched: list[tuple[nn.Module, Any]] = []
    configs: dict[int, Any] = {id(held): held for m in module.modules() for held in [vars(m).get("config")]}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        for block in dict.fromkeys(blocks):
            patched.append((block, vars(block).get("forward")))
            vars(block)["forward"] = _Again(block.forward)  # a bridge's `setattr` reaches into what it wraps
        yield
    except CheckpointError as error:
        raise RunsOtherwise(str(error).splitlines()[0]) from error
    finally:
        for config in caching:
            config.use_cache = True
        for block, own in reversed(patched):
            if own is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = own


class _Again:
    """A block's forward function: what it computes inside is let go, and computed again for its gradient."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # Without an early stop the whole block runs again, so that what it gives can be held against the first time.
        run = _Held(partial(self.forward, **kwargs))
        return checkpoint(run, *args, use_reentrant=False, early_stop=False)


class _Held:
    """One call of a block; whenever it runs again its outputs are held against those of the first run."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.first: list[tuple[Tensor, Tensor]] | None = None

    def __call__(self, *args: Any) -> Any:
        try:
            output = self.forward(*args)
        except Exception as error:
            if self.first is None or _no_memory(error):
                raise
            raise RunsOtherwise(f"a block fails when it runs again: {error}") from error
        rows = [_rows(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if self.first is None:
            self.first = rows
        elif len(rows) != len(self.first) or not all(map(_same, self.first, rows)):
            raise RunsOtherwise("a block gives other values when it runs again with the same inputs")
        return output


def _no_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or a CPU: holding more is no way out of that."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@torch.no_grad()
def _rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """A number for each row of an output, and how large its parts are. Shapes: `... dim -> ..., ...`."""
    values = values.detach()
    return fingerprint(values), fingerprint(values.abs())


def _same(first: tuple[Tensor, Tensor], again: tuple[Tensor, Tensor]) -> bool:
    """Row for row equal, but for the order in which a device sums; or NaN both times, which is told elsewhere."""
    if first[0].shape != again[0].shape:
        return False
    close = (first[0] - again[0]).abs() <= 1e-4 * first[1]
    return bool((close | (first[0].isnan() & again[0].isnan())).all())
