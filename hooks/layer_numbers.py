"""Which layer a module or parameter belongs to, by its path: the one numbering that every frame uses.

A layer is a numbered module of the outermost list on its path ("model.layers.3.self_attn.q_proj" is of layer 3). Where
a model runs several such lists one after the other (encoder and decoder, local and global blocks), the numbers of
later ones go on from those before; lists that run side by side (XLM's attentions and ffns) share their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .untouched import untouched

_NUMBERED = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<number>\d+)(?:\.|$)")


@dataclass(frozen=True)
class LayerNumbers:
    """Path -> layer; `first`: the layer of each list's module 0, where it is not 0; `within`: paths that hold lists of
    modules but are in such a list themselves (a model inside nn.Sequential).
    """

    first: Mapping[str, int] = field(default_factory=dict)
    within: tuple[str, ...] = ()

    def __call__(self, path: str) -> int | None:
        """The layer of a path; None outside all lists."""
        outer = next((one for one in self.within if path.startswith(f"{one}.")), None)
        found = _NUMBERED.match(path if outer is None else path[len(outer) + 1 :])
        if found is None or path in self.within:
            return None
        stack = ".".join(part for part in (outer, found["stack"]) if part)
        return int(found["number"]) + self.first.get(stack, 0)

    def blocks(self, module: nn.Module, paths: Iterable[str]) -> dict[int, list[str]]:
        """Layer -> the paths of its modules, for all layers of the lists in which the modules at `paths` stand.

        One module, the layer's block, except where lists run side by side.
        """
        found: dict[int, list[str]] = {}
        for stack in dict.fromkeys(self._stack(path) for path in paths):
            for name in () if stack is None else module.get_submodule(stack)._modules:
                if name.isdigit():
                    layer = int(name) + self.first.get(stack or "", 0)
                    found.setdefault(layer, []).append(f"{stack}.{name}" if stack else name)
        return dict(sorted(found.items()))

    def _stack(self, path: str) -> str | None:
        outer = next((one for one in self.within if path.startswith(f"{one}.")), None)
        found = _NUMBERED.match(path if outer is None else path[len(outer) + 1 :])
        return None if found is None else ".".join(part for part in (outer, found["stack"]) if part)


def layer_numbers(module: nn.Module, run: Callable[[], Any]) -> LayerNumbers:
    """How the layers of a module are numbered; one forward pass (`run`) is made only where there are several lists."""
    stacks, within = _stacks(module)
    if len(stacks) < 2:
        return LayerNumbers({}, within)
    order = _entered(module, stacks, run)
    first: dict[str, int] = {}
    last, following = {stack: len(order) - 1 - order[::-1].index(stack) for stack in dict.fromkeys(order)}, 0
    group: list[str] = []
    for stack in dict.fromkeys(order):
        if group and order.index(stack) < max(last[one] for one in group):  # side by side
            first[stack] = first[group[0]]
        else:
            following += max((stacks[one] for one in group), default=0)
            first[stack], group = following, []
        group.append(stack)
    return LayerNumbers(first, within)


def outermost_blocks(module: nn.Module) -> list[nn.Module]:
    """The numbered modules of all outermost lists, each once: what a layer is, if it is called itself."""
    found: dict[nn.Module, None] = {}
    for stack in _stacks(module)[0]:
        numbered = module.get_submodule(stack)._modules.items()
        found |= {child: None for name, child in numbered if name.isdigit() and child is not None}
    return list(found)


def _entered(module: nn.Module, stacks: Mapping[str, int], run: Callable[[], Any]) -> list[str]:
    """The list of each numbered module that one forward pass enters, in order."""
    order: list[str] = []
    handles = []
    for stack in stacks:
        # A list of lists is not called itself.
        for child in module.get_submodule(stack).modules():
            handles.append(child.register_forward_pre_hook(lambda *_, stack=stack: order.append(stack)))
    try:
        with untouched(module), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return order


def _stacks(module: nn.Module) -> tuple[dict[str, int], tuple[str, ...]]:
    """The outermost lists of blocks, by path, with their sizes; and what stands in a list without being a block."""
    found: dict[str, int] = {}
    within: list[str] = []

    def search(path: str, parent: nn.Module) -> None:
        numbered = {name: child for name, child in parent._modules.items() if name.isdigit() and child is not None}
        blocks = [child for child in numbered.values() if next(child.children(), None) is not None]
        if blocks and _is_stack(parent, numbered, blocks):
            found[path] = len(numbered)
            return
        for name, child in parent._modules.items():
            if child is not None:
                where = f"{path}.{name}" if path else name
                if name in numbered and any(True for _ in _lists(child)):
                    within.append(where)
                search(where, child)

    search("", module)
    return found, tuple(within)


def _is_stack(parent: nn.Module, numbered: Mapping[str, nn.Module], blocks: list[nn.Module]) -> bool:
    """Blocks in any list; a model's parts in nn.Sequential, each of its own kind with lists inside, are no layers."""
    kinds = [type(block) for block in blocks]
    return (
        not isinstance(parent, nn.Sequential)
        or len(numbered) == 1
        or len(set(kinds)) < len(kinds)
        or not any(True for b in blocks for _ in _lists(b))
    )


def _lists(module: nn.Module) -> Iterator[nn.Module]:
    """The lists of blocks inside a module."""
    for child in module.modules():
        inside = [one for name, one in child._modules.items() if name.isdigit() and one is not None]
        if any(next(one.children(), None) is not None for one in inside):
            yield child
