"""A backward pass that comes by every recorded output and shows its gradient, without holding any.

Positions have no batch (`1 seq dim`, `seq dim`): autograd sums their gradient over the examples where they were added.
Just before that sum the examples are still apart, and there it is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .graph import Call, reach

Key = tuple[int, int]  # a recorded call and one of its outputs, by number
See = Callable[[int, int, Tensor | None], None]
_SPREADS = frozenset(["AddBackward0", "ExpandBackward0"])
# They only place values elsewhere: their nodes hold no tensors, and can be asked again.
_VIEWS = frozenset(
    f"{name}Backward{number}"
    for name in (
        "Slice",
        "Select",
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "Unsqueeze",
        "Squeeze",
        "Transpose",
        "Permute",
        "T",
        "Alias",
        "Clone",
        "ToCopy",
    )
    for number in (0, 1)
)


class Way(NamedTuple):
    """How an output without the batch comes to have one: through `views`, first to last, to a sum times `factor`."""

    views: tuple[Any, ...]
    node: Any
    factor: float


class Spread(NamedTuple):
    """An output without the batch that is added, or repeated, over it and used in no other way.

    The sum over the batch comes after that: the gradients of `ways` tell the examples apart. `shape`: of the output,
    with the batch first.
    """

    ways: list[Way]
    shape: torch.Size

    def gradient(self, way: Way, gradient: Tensor) -> Tensor:
        """What one way adds to each example's gradient of the output."""
        rows = [gradient.detach() * way.factor] if not way.views else []
        for row in gradient.detach() * way.factor if way.views else ():
            row = row.reshape(tuple(way.views[-1]._input_metadata[0].shape))
            for view in reversed(way.views):
                row = view(row)
            rows.append(row)
        return torch.stack(rows).reshape(self.shape)


def spread_over(calls: Sequence[Call], loss: Tensor) -> dict[Key, Spread]:
    """The recorded outputs used as positions are: `1 seq dim` or `seq dim`, cut maybe, and added to all examples."""
    batch, found = len(loss), {}
    single = [(n, k, o) for n, call in enumerate(calls) for k, o in enumerate(call.outputs) if o.edge is not None]
    single = [(n, k, o) for n, k, o in single if o.shape[:1] == (1,) or len(o.shape) < 3]
    if batch == 1 or not single:
        return {}
    users: dict[GradientEdge, list[tuple[Any, int]]] = defaultdict(list)
    for node in reach([loss.grad_fn]).nodes:
        for place, edge in enumerate(node.next_functions):
            users[GradientEdge(*edge)].append((node, place))
    for n, k, output in single:
        ways = _ways(output.edge, output.shape, (), users, batch)
        if ways:
            found[n, k] = Spread(ways, torch.Size((batch, *_lone(output.shape))))
    return found


def _lone(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[1:] if tuple(shape[:1]) == (1,) else shape)


def _ways(edge: Any, shape: Sequence[int], views: tuple[Any, ...], users: Mapping[Any, Any], batch: int) -> list[Way]:
    """The ways from an edge to the batch; empty where one of them is another than views and a sum."""
    found: list[Way] = []
    for node, place in users[edge]:
        name, given = node.name(), tuple(node._input_metadata[0].shape)
        if name in _SPREADS and given == (batch, *_lone(shape)):
            found.append(Way(views, node, float(node._saved_alpha) if name == "AddBackward0" and place else 1.0))
        elif name in _VIEWS and (further := _ways(GradientEdge(node, 0), given, (*views, node), users, batch)):
            found += further
        else:
            return []
    return found


def innermost(calls: Iterable[Call], root: GradientEdge) -> tuple[list[GradientEdge], set[Any]]:
    """The recorded outputs that have no other behind them, and all nodes that the root reaches.

    A backward pass to the innermost outputs comes by every other recorded output that is reached.
    """
    users: dict[Any, list[Any]] = defaultdict(list)
    reached, stack = {root.node}, [root.node]
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            users[following].append(node)
            if following not in reached:
                reached.add(following)
                stack.append(following)
    recorded = [output.edge for call in calls for output in call.outputs if output.edge is not None]
    recorded = [edge for edge in recorded if edge.node in reached]
    outer: set[Any] = set()
    stack = [user for node in {edge.node for edge in recorded} for user in users[node]]
    while stack:
        node = stack.pop()
        if node not in outer:
            outer.add(node)
            stack.extend(users[node])
    return list(dict.fromkeys(edge for edge in recorded if edge.node not in outer)), reached


def walk_back(
    calls: Mapping[int, Call],
    root: GradientEdge,
    seed: Tensor,
    see: See,
    spread: Mapping[Key, Spread],
    *,
    retain_graph: bool = False,
) -> None:
    """Run a backward pass and show the gradient of every recorded output, without holding any.

    Args:
        root, seed: where the pass starts, and the gradient it starts with.
        see: called with the key of a call, the number of one of its outputs, and its gradient (None: none came); of
            the outputs that lie innermost at the end, of the others as the pass goes by.
        spread: the outputs that are shown with the batch they are spread over, at the end.
    """
    ends, reached = innermost(calls.values(), root)
    at_end: dict[GradientEdge, list[Key]] = {edge: [] for edge in ends}
    passed: set[int] = set()
    handles = []
    sums: dict[Key, Tensor] = {}

    def passing(n: int, k: int, place: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def show(gradients: tuple[Tensor | None, ...]) -> None:
            passed.add(n)
            see(n, k, gradients[place])

        return show

    for n, call in calls.items():
        for k, output in enumerate(call.outputs):
            if (n, k) in spread:
                handles += [
                    way.node.register_prehook(_adding(spread[n, k], way, sums, (n, k))) for way in spread[n, k].ways
                ]
            elif output.edge in at_end:
                at_end[output.edge].append((n, k))
            elif output.edge is not None:
                handles.append(output.edge.node.register_prehook(passing(n, k, output.edge.output_nr)))
    awaited = {n for n, call in calls.items() if reached.intersection(call.roots)}
    try:
        gradients: Sequence[Tensor | None] = ()
        if ends:
            gradients = torch.autograd.grad([root], ends, [seed], allow_unused=True, retain_graph=retain_graph)
    finally:
        for handle in handles:
            handle.remove()
    for places, gradient in zip(at_end.values(), gradients, strict=True):
        for n, k in places:
            passed.add(n)
            see(n, k, gradient)
    for n, k in spread:
        if n in calls:
            passed.add(n)
            see(n, k, sums.get((n, k)))
    assert awaited <= passed, "the backward pass did not come by every recorded output"


def _adding(spread: Spread, way: Way, sums: dict[Key, Tensor], key: Key) -> Callable[[tuple[Tensor | None, ...]], None]:
    """A hook that adds what comes by one way to an output's sum."""

    def add(gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None:
            term = spread.gradient(way, gradients[0])
            sums[key] = sums[key] + term if key in sums else term

    return add
