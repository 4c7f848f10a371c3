"""Which layers of a model have no softmax attention, told from the module tree and the attention that was seen."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_STACK = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<layer>\d+)(?:\.|$)")


def silent_layers(module: nn.Module, sites: Iterable[str]) -> list[int]:
    """The layers without attention, in the stacks of layers where the modules at `sites` made some.

    Qwen3.5 alternates softmax and linear attention: its linear layers make no call and are listed here. Empty where
    paths do not number the layers one to one (shared layers, attention outside any list).

    Args:
        sites: paths of the modules that were seen to attend, e.g. "model.layers.3.self_attn".
    """
    found = [_STACK.match(site) for site in sites]
    places = [(match["stack"] or "", int(match["layer"])) for match in found if match]
    stacks = {stack for stack, _ in places}
    if len(places) != len(found) or len(set(places)) != len(places) or len(stacks) != 1:
        return []
    layers = {int(name) for name, _ in module.get_submodule(stacks.pop()).named_children() if name.isdigit()}
    return sorted(layers - {layer for _, layer in places})
