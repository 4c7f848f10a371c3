"""See and replace what flows through a model: the residual stream after each layer, and what is written into it.

    residual    what a layer hands on: the output of its block (of layer -1: what the first block is given)
    attention   what its attention writes: the output of the output projection, before a norm that some put behind it
    mlp         what its MLP (or its experts) writes, likewise
    head        what each head read: the input of the output projection, head by head

Where these lie in a model is found by looking at it once (`state_survey`). States are `batch seq width`, those of heads
`batch seq heads dim`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import RevprobeError

KINDS = ("residual", "attention", "mlp", "head")
EMBEDDED = -1  # the layer of the residual stream before the first block


@dataclass(frozen=True)
class StateSite:
    """Where one state lies: the first tensor that the module at `path` returns, or is given where `before` is set."""

    kind: str
    layer: int
    path: str
    heads: int = 1
    before: bool = False


@dataclass(frozen=True)
class States:
    """The states of a model, as one look at it found; `without`: (kind, layer) -> why there is no such site."""

    sites: Mapping[tuple[str, int], StateSite]
    without: Mapping[tuple[str, int], str]

    def of(self, kind: str) -> dict[int, StateSite]:
        """Layer -> its site of one kind, ascending."""
        return {layer: self.sites[one, layer] for one, layer in sorted(self.sites) if one == kind}

    def missing(self, kind: str) -> dict[int, str]:
        """Layer -> why it has no site of one kind, ascending."""
        return {layer: self.without[one, layer] for one, layer in sorted(self.without) if one == kind}


Change = Callable[[Tensor], Tensor | None]


@contextmanager
def record_states(
    module: nn.Module, sites: Sequence[StateSite], keep: Callable[[Tensor], Tensor] = lambda state: state
) -> Iterator[dict[StateSite, Tensor]]:
    """Keep the states of one forward pass; of several inside, those of the last.

    Args:
        keep: what is kept of a state, such as a few rows of it.
    Raises: RevprobeError, when a site was never reached (a model compiled before the tap skips hooks).
    """
    found: dict[StateSite, Tensor] = {}

    def note(site: StateSite) -> Change:
        def see(state: Tensor) -> Tensor:
            found[site] = keep(state)
            return state.clone()  # some models add to what a part returned, in its place (Falcon's parallel blocks)

        return see

    with change_states(module, {site: note(site) for site in sites}):
        yield found


@contextmanager
def change_states(module: nn.Module, changes: Mapping[StateSite, Change]) -> Iterator[None]:
    """Hand each state to its change while open; what that returns takes the state's place, None leaves it.

    A change must not write into what it is given. Adds hooks to the modules of the sites and removes exactly those.
    Raises: RevprobeError, when a site was never reached.
    """
    reached: set[StateSite] = set()
    handles = []
    try:
        for site, change in changes.items():
            hook = _before(site, change, reached) if site.before else _after(site, change, reached)
            child = module.get_submodule(site.path)
            if site.before:
                handles.append(child.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(child.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
    missed = [site for site in changes if site not in reached]
    if missed:
        raise RevprobeError(
            f"the {missed[0].kind} state of layer {missed[0].layer} was never reached ({len(missed)} of "
            f"{len(changes)}); run the model inside the block, and compile it only afterwards"
        )


def _after(site: StateSite, change: Change, reached: set[StateSite]) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        reached.add(site)
        if isinstance(output, Tensor):
            return change(output)
        changed = change(output[0])
        return None if changed is None else (changed, *output[1:])

    return hook


def _before(site: StateSite, change: Change, reached: set[StateSite]) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reached.add(site)
        given = given_state(args, kwargs)
        assert given is not None, "the look found a state there"
        changed = change(given.unflatten(-1, (site.heads, -1)) if site.kind == "head" else given)
        if changed is None:
            return None
        changed = changed.flatten(-2) if site.kind == "head" else changed
        swap = lambda one: changed if one is given else one  # noqa: E731
        return tuple(map(swap, args)), {name: swap(one) for name, one in kwargs.items()}

    return hook


def given_state(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first `batch seq width` of floats that a module is given."""
    given = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
    return next((one for one in given if one.dim() == 3 and one.is_floating_point()), None)


def returned_state(output: Any) -> Tensor | None:
    """The `batch seq width` that a module returns, alone or first in a tuple."""
    first = output[0] if isinstance(output, tuple) and type(output) is tuple and output else output
    return first if isinstance(first, Tensor) and first.dim() == 3 and first.is_floating_point() else None
