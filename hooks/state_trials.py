"""What may be a state, put to the test by runs: does it hold all that it should, and nothing from elsewhere?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .states import StateSite, change_states, record_states, returned_state
from .untouched import untouched

ROWS = 16  # sequences of a trial
# By how much a trial may miss, as a share of what the two sequences differ by.
_FINE, _COARSE = 1e-3, 0.1


def adding(
    module: nn.Module, run: Callable[[Tensor], Any], ids: Tensor, parts: Sequence[str], roles: Mapping[str, str]
) -> set[str]:
    """The modules in some parts whose output tells two sequences apart while all that is learned there but norms is
    silent: what does that is a stream that comes from elsewhere, which they add.

    Args:
        parts: the blocks, for the stream itself; parts of them, for what other parts made of it (a bottleneck's).
    Shapes: `ids`: `2 seq`.
    """
    adding: set[str] = set()
    learned = _innermost(module, [path for path, role in roles.items() if role != "norm"])
    handles = []

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if (state := returned_state(output)) is not None and len(state) == 2:
                one, other = state.nan_to_num()
                if float((one - other).abs().max()) > _FINE * float(state.nan_to_num().abs().max()):
                    adding.add(path)

        return hook

    try:
        for path, child in module.named_modules():
            asked = any(path == part or is_inside(path, part) for part in parts)
            if asked and not any(is_inside(path, one) for one in learned):
                handles.append(child.register_forward_hook(_scaled(0.0) if path in learned else note(path)))
        with untouched(module), torch.no_grad():
            run(ids)
    finally:
        for handle in handles:
            handle.remove()
    return adding


def first_that_is_whole(
    module: nn.Module,
    run: Callable[[Tensor], Any],
    ids: Tensor,
    tried: Mapping[int, Sequence[StateSite]],
    blocks: Mapping[int, str],
    parts: Sequence[str],
) -> dict[int, StateSite | None]:
    """Of what may be a layer's MLP the first beside which nothing of its MLP counts: with what it returns held, the
    block returns the same whatever becomes of the rest. None where there is none.

    Args:
        parts: the paths of the parameters of MLPs.
    """
    found: dict[int, StateSite | None] = dict.fromkeys(tried)
    learned = _innermost(module, parts)
    for rank in range(max(map(len, tried.values()), default=0)):
        sites = {layer: some[rank] for layer, some in tried.items() if found[layer] is None and rank < len(some)}
        outputs = [StateSite("residual", layer, blocks[layer]) for layer in sites]
        with untouched(module), torch.no_grad():
            with record_states(module, [*sites.values(), *outputs]) as own:
                run(ids)
            moved: dict[StateSite, bool] = {}

            def hold(
                site: StateSite, own: Any = own, moved: dict[StateSite, bool] = moved
            ) -> Callable[[Tensor], Tensor]:
                def change(state: Tensor) -> Tensor:
                    moved[site] = not float((state - own[site]).abs().max()) <= _FINE * float(own[site].abs().max())
                    held: Tensor = own[site].clone()
                    return held

                return change

            rest = [
                path
                for layer, site in sites.items()
                for path in learned
                if is_inside(path, blocks[layer]) and path != site.path and not is_inside(path, site.path)
            ]
            handles = [module.get_submodule(path).register_forward_hook(_scaled(2.0)) for path in rest]
            try:
                with change_states(module, {site: hold(site) for site in (*sites.values(), *outputs)}):
                    run(ids)
            finally:
                for handle in handles:
                    handle.remove()
        found |= {site.layer: sites[site.layer] for site in outputs if not moved[site]}
    return found


def _innermost(module: nn.Module, paths: Sequence[str]) -> set[str]:
    """The modules that hold the parameters at some paths, and no other module with parameters.

    An adapted layer counts as one module: the base layer and the adapter in it are no layers of the model.
    """
    learns = {name: child for name, child in module.named_modules() if next(child.parameters(), None) is not None}
    adapted = [name for name, child in learns.items() if hasattr(child, "adapter_layer_names")]  # peft's mark of them
    names = {name for name in learns if not any(is_inside(name, one) for one in adapted)}
    held = {path if path in names else path.rpartition(".")[0] for path in paths} & names
    return {path for path in held if not any(is_inside(name, path) for name in names)}


def _scaled(by: float) -> Callable[..., Any]:
    """A hook that multiplies what a module returns."""

    def scaled(one: Any) -> Any:
        return one * by if isinstance(one, Tensor) and one.is_floating_point() else one

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return tuple(map(scaled, output)) if isinstance(output, tuple) else scaled(output)

    return hook


def failing(
    module: nn.Module, run: Callable[[Tensor], Tensor], shown: tuple[Tensor, Tensor], sites: Sequence[StateSite]
) -> list[int]:
    """The layers of the sites at which the second sequence's state does not bring its logits to the first."""
    failed = []
    with untouched(module), torch.no_grad():
        own = run(shown[0])
        with record_states(module, sites) as states:
            wanted = run(shown[1])
        apart = float(_apart(wanted, own).max())
        slack = _FINE if torch.finfo(wanted.dtype).eps < 1e-4 and _is_fine(module) else _COARSE
        for start in range(0, len(sites), ROWS):
            some = sites[start : start + ROWS]
            changes = {site: _put_in(states[site], row) for row, site in enumerate(some)}
            with change_states(module, changes):
                found = run(shown[0].expand(len(some), -1))
            missed = _apart(found, wanted).flatten(1).amax(1)
            failed += [site.layer for site, by in zip(some, missed.tolist(), strict=True) if not by <= slack * apart]
    return failed


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Distances of logits; a token that both leave out (-inf, the mask of some models) is none."""
    return (one - other).abs().masked_fill(one == other, 0.0)


def _is_fine(module: nn.Module) -> bool:
    return all(p.dtype.itemsize >= 4 for p in module.parameters() if p.is_floating_point())


def _put_in(state: Tensor, row: int) -> Callable[[Tensor], Tensor]:
    def change(given: Tensor) -> Tensor:
        return torch.cat([given[:row], state.to(given), given[row + 1 :]])

    return change


def is_inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def child_of(path: str, outer: str) -> str:
    """The part of `outer`, one step below it, that holds `path`."""
    return f"{outer}.{path[len(outer) + 1 :].split('.')[0]}"
