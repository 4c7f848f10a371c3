"""Autograd's own graph as a witness: which modules reach a loss, and by which edges it reaches their parameters.

A recorded call covers the edges into its own parameters between its inputs and its outputs. An edge that no call
covers is a use of a parameter that no rule has seen; a call whose outputs are not in the loss's graph was cut off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from ...errors import RevprobeError
from .products import FormedUse

Edge = tuple[Any, int]  # a node of the graph and the number of its input
See = Callable[[int, int, Tensor | None], None]


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


def innermost(calls: Iterable[Call], loss: Tensor) -> tuple[list[GradientEdge], set[Any]]:
    """The recorded outputs that have no other behind them, and all nodes that the loss reaches.

    A backward pass to the innermost outputs comes by every other recorded output that is reached.
    """
    users: dict[Any, list[Any]] = defaultdict(list)
    reached, stack = {loss.grad_fn}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions:  # type: ignore[union-attr]  # no None is put on the stack
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
    tensors that went in, at that moment.
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

    @property
    def given(self) -> Any:
        """The first argument, by position or by name."""
        return next(iter((*self.args, *self.kwargs.values())))

    def require_unchanged(self) -> None:
        """Raises: RevprobeError, when something has written into a tensor that went in."""
        if versions(self.args, self.kwargs) != self.versions:
            raise RevprobeError(
                f"the input of module {self.name!r} was overwritten in place after the module ran, so its gradient is "
                "lost; make what follows work out of place (inplace=False)"
            )

    @property
    def roots(self) -> list[Any]:
        return [output.edge.node for output in self.outputs if output.edge is not None]


def check_complete(calls: Sequence[Call], parameters: Mapping[str, nn.Parameter], loss: Tensor) -> None:
    """Hold recorded calls against autograd's graph: every edge into a parameter is covered by a call that is reached.

    Raises: RevprobeError, for a parameter whose modules ran but do not reach the loss, or with an edge not covered.
    """
    reached = reach([loss.grad_fn])
    covered: dict[int, set[Edge]] = {id(p): set() for p in parameters.values()}
    own: dict[int, list[Call]] = {id(p): [] for p in parameters.values()}
    for call in calls:
        keys = [id(p) for p in call.own.values() if id(p) in covered]
        if any(output.lost for output in call.outputs) and reached.nodes.intersection(call.roots):
            raise RevprobeError(_overwritten(call.name, next(n for n, p in parameters.items() if id(p) in keys)))
        inside = reach(call.roots, call.sources).edges if reached.nodes.intersection(call.roots) else {}
        for key in keys:
            covered[key] |= inside.get(key, set())
            own[key].append(call)
    for name, parameter in parameters.items():
        edges, seen = reached.edges.get(id(parameter), set()), own[id(parameter)]
        if seen and not edges:
            raise RevprobeError(
                f"module {seen[0].name!r} ran, but its {name!r} does not reach the loss: "
                f"{_cut_after(calls, seen[-1], reached.nodes)}; leave the parameter out with parameters="
            )
        if edges - covered[id(parameter)]:
            overwritten = next((call.name for call in seen for o in call.outputs if o.overwritten), None)
            if overwritten is not None:
                raise RevprobeError(_overwritten(overwritten, name))
            raise RevprobeError(
                f"parameter {name!r} reaches the loss {len(edges)} times, but only "
                f"{len(edges & covered[id(parameter)])} calls of its own module were seen: its weight is used outside "
                "its module, so its gradient would be incomplete"
            )


def _overwritten(module: str, name: str) -> str:
    return (
        f"the output of module {module!r} is overwritten in place, so the gradient of {name!r} is lost; make what "
        "follows it work out of place (inplace=False)"
    )


def _cut_after(calls: Sequence[Call], call: Call, reached: set[Any]) -> str:
    """What is between a call and the loss: the next module that is reached, but passes no gradient on."""
    if not call.roots:
        return "it runs without gradient (torch.no_grad, reentrant checkpointing)"
    for later in calls[next(n for n, other in enumerate(calls) if other is call) :]:
        passes = not later.cut and reach(later.roots).nodes.intersection(later.sources)
        if reached.intersection(later.roots) and not passes:
            return f"module {later.name!r} detaches its input, or is given one that is detached"
    return "a later module detaches its input, or the output is unused"


def adopted_parameters(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], run: Callable[[], Tensor]
) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters that one run reaches although the module that holds them is not called: who answers for them.

    A parent that uses a child's weight without calling the child (TransformerLens' norms, quantized wrappers) is
    replayed with the child's parameters as its own.
    Returns: name of the nearest enclosing module that is called -> path from there -> parameter; empty for most models.
    """
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
    wanted = {id(p) for p in parameters.values()} & set(reached)
    modules = list(module.named_modules())
    answered = {id(p) for name, child in modules if name in called for p in child._parameters.values()}
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, child in modules:
        for key, parameter in child._parameters.items():
            if parameter is not None and id(parameter) in wanted - answered:
                parent = name  # becomes the innermost module around it that is called; "" is the model itself
                while parent and parent not in called:
                    parent = parent.rpartition(".")[0]
                path = f"{name}.{key}".removeprefix(f"{parent}." if parent else "")
                found.setdefault(parent, {})[path] = parameter
    return found


def walk_back(calls: Mapping[int, Call], loss: Tensor, see: See, *, retain_graph: bool = False) -> None:
    """Run a backward pass and show the gradient of every recorded output, without holding any.

    Args:
        see: called with the key of a call, the number of one of its outputs, and its gradient (None: none came); of
            the outputs that lie innermost at the end, of the others as the pass goes by.
    """
    ends, reached = innermost(calls.values(), loss)
    at_end: dict[GradientEdge, list[tuple[int, int]]] = {edge: [] for edge in ends}
    passed: set[int] = set()
    handles = []

    def passing(n: int, k: int, place: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def show(gradients: tuple[Tensor | None, ...]) -> None:
            passed.add(n)
            see(n, k, gradients[place])

        return show

    for n, call in calls.items():
        for k, output in enumerate(call.outputs):
            if output.edge in at_end:
                at_end[output.edge].append((n, k))
            elif output.edge is not None:
                handles.append(output.edge.node.register_prehook(passing(n, k, output.edge.output_nr)))
    awaited = {n for n, call in calls.items() if reached.intersection(call.roots)}
    try:
        gradients = torch.autograd.grad(loss, ends, allow_unused=True, retain_graph=retain_graph) if ends else ()
    finally:
        for handle in handles:
            handle.remove()
    for places, gradient in zip(at_end.values(), gradients, strict=True):
        for n, k in places:
            passed.add(n)
            see(n, k, gradient)
    assert awaited <= passed, "the backward pass did not come by every recorded output"


def check_order(calls: Sequence[Call], batch: int, loss: Tensor) -> None:
    """Outputs whose first axis could be something else: the first example's loss reaches its rows and no others.

    So may be `(batch seq) dim`, positions without a batch axis where there are as many as examples, and
    `seq batch dim` where both are equal.
    Raises: RevprobeError, for an output that mixes examples.
    """
    found = [(n, o) for n, call in enumerate(calls) for o in call.outputs if o.edge is not None]
    doubtful = {n: calls[n] for n, output in found if _is_doubtful(output.shape, batch)}
    if not doubtful or batch == 1:
        return

    mixed: dict[int, torch.Size] = {}

    def see(n: int, k: int, gradient: Tensor | None) -> None:
        shape = calls[n].outputs[k].shape
        if gradient is not None and _is_doubtful(shape, batch) and gradient[shape[0] // batch :].any():
            mixed[n] = shape

    walk_back(doubtful, loss[0], see, retain_graph=True)
    if mixed:
        first = min(mixed)
        raise RevprobeError(
            f"module {calls[first].name!r} ({type(calls[first].module).__name__}) gives {tuple(mixed[first])} for "
            f"{batch} examples, not one example after the other; its gradients cannot be told apart"
        )


def _is_doubtful(shape: torch.Size, batch: int) -> bool:
    return shape[0] != batch or len(shape) <= 2 or bool({1, batch} & set(shape[1:-1]))


def require_total(name: str, uses: Sequence[Any], total: Tensor) -> None:
    """The examples' gradients of an adopted parameter add up to autograd's own for the batch.

    Raises: RevprobeError, when they do not: another module uses the parameter.
    """
    formed = [use for use in uses if isinstance(use, FormedUse)]
    found = sum((use.grads.double().sum(0) for use in formed), torch.zeros(total.numel(), dtype=torch.float64))
    tolerance = 1e-3 * total.double().norm() + torch.finfo(total.dtype).eps
    if len(formed) < len(uses) or (found.to(total.device) - total.double().flatten()).norm() > tolerance:
        raise RevprobeError(
            f"parameter {name!r} reaches the loss, but not through calls of its own module: its weight is used outside "
            "its module, so its gradient would be incomplete"
        )
