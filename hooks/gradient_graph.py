"""Autograd's own graph as a witness: which modules reach a loss, and by which edges it reaches their parameters.

A recorded call covers the edges into its own parameters between its inputs and its outputs. An edge that no call
covers is a use of a parameter that no rule has seen; a call whose outputs are not in the loss's graph was cut off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

Edge = tuple[Any, int]  # a node of the graph and the number of its input


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


def fed_without_gradient(*values: Any) -> bool:
    """Whether floating-point tensors went in and none of them carries gradient."""
    floating = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return bool(floating) and not any(leaf.requires_grad for leaf in floating)
