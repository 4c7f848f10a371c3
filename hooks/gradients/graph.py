"""Autograd's own graph as a witness: which modules reach a loss, and by which edges it reaches their parameters.

A recorded call covers the edges into its own parameters between its inputs and its outputs. An edge that no call
covers is a use of a parameter that no rule has seen; a call whose outputs are not in the loss's graph was cut off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from ...errors import RevprobeError
from .spread_weights import WholeWeights
from .uses import FormedUse

Edge = tuple[Any, int]  # a node of the graph and the number of its input


class CannotSplit(Exception):
    """The gradient of a call's parameters cannot be told apart by example from what was recorded; the text says why."""


class Reach(NamedTuple):
    """What lies behind some tensors: all nodes, and the edges into each leaf tensor by the leaf's id."""

    nodes: set[Any]
    edges: dict[int, set[Edge]]


def reach(roots: Iterable[Any], stop: Iterable[Any] = ()) -> Reach:
    """Walk the graph from the nodes `roots` towards the leaves, not through the nodes of `stop`."""
    edges: dict[int, set[Edge]] = defaultdict(set)
    seen = set(stop)
    stack = [node for node in roots if node is not None and node not in seen]
    walked = set(stack)
    while stack:
        node = stack.pop()
        for place, (following, _) in enumerate(node.next_functions):
            if following is None:
                continue
            if hasattr(following, "variable"):
                edges[id(following.variable)].add((node, place))
            elif following not in seen and following not in walked:
                walked.add(following)
                stack.append(following)
    return Reach(walked, edges)


def sources(*values: Any) -> list[Any]:
    """The nodes of all tensors that carry gradient in nested arguments; leaves have none."""
    found = (leaf.grad_fn for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return [node for node in found if node is not None]


def versions(*values: Any) -> list[int]:
    """How often each tensor in nested arguments has been written into."""
    return [leaf._version for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def fed_without_gradient(*values: Any) -> bool:
    """Whether floating-point tensors went in and none of them carries gradient."""
    floating = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return bool(floating) and not any(leaf.requires_grad for leaf in floating)


class Output:
    """An output tensor of a recorded call: its place in autograd's graph, and its values while they are untouched.

    The place is taken when the module returns: an in-place operation on the tensor moves the tensor, not the place.
    Args:
        keep: whether the values will be asked for. Without, they are held only where an in-place operation would
            lose the place (in a view, as a Linear with a bias returns), and only until `forget`.
    """

    def __init__(self, tensor: Tensor, *, keep: bool = True) -> None:
        self.edge = get_gradient_edge(tensor) if tensor.requires_grad else None
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self._keep, self._version, self._is_view = keep, tensor._version, tensor._is_view()
        self._tensor = tensor if keep or self._is_view else None

    @property
    def overwritten(self) -> bool:
        """Whether something wrote into the tensor since."""
        return self._tensor is not None and self._tensor._version != self._version

    @property
    def lost(self) -> bool:
        """Whether the place no longer covers all uses: writing into a view takes its later uses past it."""
        return self._is_view and self.overwritten

    @property
    def values(self) -> Tensor | None:
        """None where something wrote into the tensor since, or the values were not kept."""
        return None if self._tensor is None or self.overwritten else self._tensor.detach()

    def forget(self) -> None:
        """Let go of values that nobody will ask for."""
        self._tensor = self._tensor if self._keep else None


@dataclass(frozen=True)
class Call:
    """One call of a module that owns parameters: what went in, and the output tensors whose gradients are wanted.

    `own`: the parameters it answers for, by their path from the module; `scale`: of the rows an embedding looked up
    (None: no lookup); `sources`: nodes of autograd's graph that lead into the call; `cut`: floating-point tensors went
    in, and none carries gradient; `closed`: a closed rule reads its gradient, without a replay; `versions`: of the
    tensors that went in, at that moment; `aliases`: other paths by which it uses its own parameters, and theirs.
    """

    module: nn.Module
    name: str
    own: Mapping[str, nn.Parameter]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Output]
    scale: float | None
    sources: list[Any]
    cut: bool
    closed: bool
    versions: list[int]
    aliases: dict[str, str] = field(default_factory=dict)

    def with_aliases(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of its own parameters under all paths by which it uses them."""
        return {**values, **{path: values[key] for path, key in self.aliases.items() if key in values}}

    @property
    def given(self) -> Any:
        """The first argument, by position or by name."""
        return next(iter((*self.args, *self.kwargs.values())))

    def require_unchanged(self) -> None:
        """Raises: CannotSplit, when something has written into a tensor that went in."""
        if versions(self.args, self.kwargs) != self.versions:
            raise CannotSplit(
                f"the input of module {self.name!r} was overwritten in place after the module ran, so its gradient is "
                "lost; make what follows work out of place (inplace=False)"
            )

    @property
    def is_table(self) -> bool:
        """Whether it ran without gradient and was given no states, so that nothing but itself is cut off."""
        states = (leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor))
        return not self.roots and not any(leaf.is_floating_point() for leaf in states)

    @property
    def roots(self) -> list[Any]:
        return [output.edge.node for output in self.outputs if output.edge is not None]


class Completeness(NamedTuple):
    """What autograd's graph says of the selected parameters, by name.

    `reached`: by the loss; `unread`: reached, but not by recorded calls alone, and why.
    """

    reached: list[str]
    unread: dict[str, str]


NOTHING_REACHED = Completeness([], {})


def completeness(
    calls: Sequence[Call], parameters: Mapping[str, nn.Parameter], loss: Tensor, frozen: Container[int] = ()
) -> Completeness:
    """Hold recorded calls against autograd's graph: is every edge into a parameter covered by a call that is reached?

    Args:
        frozen: ids of parameters that were frozen before; a frozen table that runs without gradient (positions of sines
            and cosines) is a constant of its model and reaches nothing.
    Raises: RevprobeError, for a parameter whose modules ran but are cut off from the loss: without gradient, or by
        something that detaches. What simply is not used (a pooler) has no gradient, and is no error.
    """
    reached = reach([loss.grad_fn])
    covered: dict[int, set[Edge]] = {id(p): set() for p in parameters.values()}
    own: dict[int, list[Call]] = {id(p): [] for p in parameters.values()}
    edges_of: dict[int, list[set[Edge]]] = {id(p): [] for p in parameters.values()}
    lost: dict[int, str] = {}
    for call in calls:
        keys = [id(p) for p in call.own.values() if id(p) in covered]
        if any(output.lost for output in call.outputs) and reached.nodes.intersection(call.roots):
            lost |= dict.fromkeys(keys, call.name)
        inside = reach(call.roots, call.sources).edges if reached.nodes.intersection(call.roots) else {}
        for key in keys:
            covered[key] |= inside.get(key, set())
            own[key].append(call)
            edges_of[key].append(inside.get(key, set()))
    found = Completeness([], {})
    for name, parameter in parameters.items():
        edges, seen = reached.edges.get(id(parameter), set()), own[id(parameter)]
        if edges:
            found.reached.append(name)
        elif id(parameter) in frozen and all(call.is_table for call in seen):
            pass
        elif seen and not any(reached.nodes.intersection(call.roots) for call in seen):  # else unused inside its module
            _require_unused(calls, seen[-1], name, reached.nodes)
        if edges - covered[id(parameter)] or id(parameter) in lost:
            overwritten = (call.name for call in seen for o in call.outputs if o.overwritten)
            module = lost.get(id(parameter), next(overwritten, None))
            counts = len(edges), len(edges & covered[id(parameter)])
            found.unread[name] = _past_its_calls(name, *counts) if module is None else _overwritten(module, name)
        elif both := _shared_with_a_child(seen, edges_of[id(parameter)]):
            found.unread[name] = f"module {both!r} uses {name!r} itself and calls a module inside it that holds it too"
    return found


def _shared_with_a_child(calls: Sequence[Call], edges: Sequence[set[Edge]]) -> str | None:
    """The module whose uses of a parameter are its own and those of a called child: a replay cannot tell them apart.

    `calls`, `edges`: those that answer for the parameter, and how it is reached from the outputs of each.
    """
    for call, uses in zip(calls, edges, strict=True):
        inside = f"{call.name}." if call.name else ""
        children = [
            e for other, e in zip(calls, edges, strict=True) if other is not call and other.name.startswith(inside)
        ]
        if uses & (theirs := set().union(*children)) and uses - theirs:
            return call.name
    return None


def _past_its_calls(name: str, edges: int, covered: int) -> str:
    return (
        f"parameter {name!r} reaches the loss {edges} times, but only {covered} calls of its own module were seen: its "
        "weight is used outside its module, so its gradient would be incomplete"
    )


def _overwritten(module: str, name: str) -> str:
    return (
        f"the output of module {module!r} is overwritten in place, so the gradient of {name!r} is lost; make what "
        "follows it work out of place (inplace=False)"
    )


def _require_unused(calls: Sequence[Call], call: Call, name: str, reached: set[Any]) -> None:
    """What is between a call and the loss: nothing, or a module that is reached and passes no gradient on.

    Raises: RevprobeError, in the second case.
    """
    why = None if call.roots else "it runs without gradient (torch.no_grad, reentrant checkpointing)"
    for later in calls[next(n for n, other in enumerate(calls) if other is call) :] if why is None else ():
        passes = not later.cut and reach(later.roots).nodes.intersection(later.sources)
        if reached.intersection(later.roots) and not passes:
            why = f"module {later.name!r} detaches its input, or is given one that is detached"
            break
    if why is not None:
        raise RevprobeError(
            f"module {call.name!r} ran, but its {name!r} does not reach the loss: {why}; leave the parameter out with "
            "parameters="
        )


def adopted_parameters(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    run: Callable[[], Tensor],
    weights: WholeWeights | None = None,
) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters that one run reaches although the module that holds them is not called: who answers for them.

    A parent that uses a child's weight without calling the child (TransformerLens' norms, quantized wrappers) is
    replayed with the child's parameters as its own.
    Args:
        weights: the module's, where they were asked for before.
    Returns: name of the nearest enclosing module that is called -> path from there -> parameter; empty for most models.
    """
    weights = weights or WholeWeights(module)
    called: set[str] = set()
    handles = [
        child.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, child in module.named_modules()
    ]
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        with torch.enable_grad():
            reached = reach([run().grad_fn]).edges
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in flags:
            p.requires_grad_(flag)
        weights.let_go()
    wanted = {id(p) for p in parameters.values()} & set(reached)
    modules = list(module.named_modules())
    held = lambda child: {key: weights.of(p) for key, p in child._parameters.items() if p is not None}  # noqa: E731
    answered = {id(p) for name, child in modules if name in called for p in held(child).values()}
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, child in modules:
        for key, parameter in held(child).items():
            if id(parameter) in wanted - answered:
                parent = name  # becomes the innermost module around it that is called; "" is the model itself
                while parent and parent not in called:
                    parent = parent.rpartition(".")[0]
                path = f"{name}.{key}".removeprefix(f"{parent}." if parent else "")
                found.setdefault(parent, {})[path] = parameter
    return found


def adds_up(uses: Sequence[Any], total: Tensor) -> bool:
    """Whether the examples' gradients of an adopted parameter add up to autograd's own for the batch.

    They do not where another module uses the parameter.
    """
    formed = [use for use in uses if isinstance(use, FormedUse)]
    found = sum((use.grads.double().sum(0) for use in formed), torch.zeros(total.numel(), dtype=torch.float64))
    tolerance = 1e-3 * total.double().norm() + torch.finfo(total.dtype).eps
    return len(formed) == len(uses) and bool((found.to(total.device) - total.double().flatten()).norm() <= tolerance)
