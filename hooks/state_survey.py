"""One look at a model: where its states lie, layer by layer (`hooks.states`).

A layer's block, the module that its layer number names, is taken for what hands the residual stream on; then it is put
to the test: with the state of one sequence put in at that layer, another sequence must get the first one's logits.
Where it does not, later layers read more than the block hands on (inputs of their own, a second stream), and the layer
has no such site. What is written into the stream is found by the roles of parameters, and put to two tests: a part that
tells sequences apart while all that is learned in it is silent hands on the stream itself (BLOOM's MLP adds it), and
beside a part that is held no other of the block's MLP may count (shared experts are not all of them). The heads' input
of the output projection is found by comparing it with what the attention calls return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_calls import FunctionMode, Layout, its_path, running_modules
from .attention_sites import Attention, AttentionSite
from .layer_numbers import LayerNumbers
from .states import EMBEDDED, States, StateSite, change_states, given_state, record_states, returned_state
from .untouched import untouched

NO_BLOCK = "the layer is no single module that runs once, whose output the next one reads"
NO_STATE = "its block returns no tensor of (batch, tokens, width)"
MORE = "later layers read more than the state that its block hands on"
NO_OUTPUT = "no single output projection of its attention is known by name"
NO_MLP = "no single MLP is known by name, nor is there one other part that it could be"
NO_HEADS = "what its output projection is given is not what its heads read, side by side"
ROWS = 16  # sequences of a trial
_PRODUCTS = frozenset(["matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention"])
# By how much a trial may miss, as a share of what the two sequences differ by.
_FINE, _COARSE = 1e-3, 0.1


@dataclass
class _Seen:
    """What one run showed: the modules' outputs and inputs, how often each ran, and the products of attention."""

    ran: dict[str, int] = field(default_factory=dict)
    returned: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    adds: set[str] = field(default_factory=set)  # modules whose output holds the stream itself
    mixed: dict[str, list[Tensor]] = field(default_factory=dict)


def survey_states(
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    shown: tuple[Tensor, Tensor],
    attention: Attention,
    numbers: LayerNumbers,
    roles: Mapping[str, str],
) -> States:
    """Find the states of `module` in one run of two sequences, and try those of the residual stream.

    Args:
        run: the logits of token ids.
        shown: two sequences of one length without padding, `1 seq` each.
        roles: the path of a module with parameters -> its role ("o", "mlp", "norm", ...).
    """
    blocks = numbers.blocks(module, [site.path for site in attention.sites])
    paths = [path for some in blocks.values() for path in some]
    seen = _look(module, run, shown[0], paths, attention)
    seen.adds = _adding(module, run, torch.cat(shown), paths, roles)
    mlps: dict[int, list[StateSite]] = {}
    attending: list[str | None] = []
    sites: dict[tuple[str, int], StateSite] = {}
    without: dict[tuple[str, int], str] = {}

    def keep(kind: str, layer: int, found: StateSite | str) -> None:
        if isinstance(found, str):
            without[kind, layer] = found
        else:
            sites[kind, layer] = found

    by_path = bool(blocks) and set(attention.heads) <= set(blocks)
    for layer, paths in blocks.items() if by_path else []:
        if len(paths) > 1 or seen.ran.get(paths[0]) != 1:
            for kind in ("residual", "attention", "mlp", "head"):
                keep(kind, layer, NO_BLOCK)
            continue
        own = [site for site in attention.sites if site.layer == layer]
        block = _Block(layer, paths[0], own, seen, {at: role for at, role in roles.items() if _inside(at, paths[0])})
        keep("residual", layer, block.residual())
        keep("attention", layer, block.written_by_attention())
        mlps[layer] = block.written_by_mlp()
        attending.append(block.part_that_attends())
        keep("head", layer, block.heads(attention.heads.get(layer, 0)))
    if not by_path:
        without |= {
            (kind, layer): NO_BLOCK for layer in attention.heads for kind in ("residual", "attention", "mlp", "head")
        }
    parts = [
        at for at, role in roles.items() if role == "mlp" and not any(_inside(at, one) for one in attending if one)
    ]
    for layer, whole in _whole(module, run, shown[0], mlps, {layer: blocks[layer][0] for layer in mlps}, parts).items():
        keep("mlp", layer, whole or NO_MLP)
    first = next((blocks[layer][0] for layer in sorted(blocks) if ("residual", layer) in sites), None)
    if first is not None and first in seen.given:
        sites["residual", EMBEDDED] = StateSite("residual", EMBEDDED, first, before=True)
    for layer in _failing(module, run, shown, [site for site in sites.values() if site.kind == "residual"]):
        del sites["residual", layer]
        without["residual", layer] = MORE
    return States(sites, without)


def _look(
    module: nn.Module, run: Callable[[Tensor], Any], ids: Tensor, blocks: Sequence[str], attention: Attention
) -> _Seen:
    seen, attending = _Seen(), set(attention.calls)
    handles = []

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.ran[path] = seen.ran.get(path, 0) + 1
            for table, state in ((seen.given, given_state(args, kwargs)), (seen.returned, returned_state(output))):
                if state is not None:
                    table[path] = state.clone()  # what comes after may write into it

        return hook

    def make(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if running and getattr(func, "__name__", "") in _PRODUCTS | {F.scaled_dot_product_attention.__name__}:
            seen.mixed.setdefault(running[-1], []).append(result)
        return result

    try:
        for path, child in module.named_modules():
            if any(path == block or _inside(path, block) for block in blocks):
                handles.append(child.register_forward_hook(note(path), with_kwargs=True))
        with (
            untouched(module),
            torch.no_grad(),
            running_modules(module, its_path, attending) as running,
            FunctionMode(make),
        ):
            run(ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@dataclass
class _Block:
    """The block of one layer: `roles` of the modules inside it, by path."""

    layer: int
    path: str
    attention: Sequence[AttentionSite]
    seen: _Seen
    roles: Mapping[str, str]

    def residual(self) -> StateSite | str:
        return StateSite("residual", self.layer, self.path) if self.path in self.seen.returned else NO_STATE

    def _width(self) -> int | None:
        state = self.seen.returned.get(self.path)
        return None if state is None else state.shape[-1]

    def _writes(self, path: str) -> bool:
        """Whether a module runs once and returns something as wide as the stream, and not the stream itself."""
        state = self.seen.returned.get(path)
        alone = state is not None and self.seen.ran[path] == 1 and path not in self.seen.adds
        return alone and state is not None and state.shape[-1] == self._width()

    def _projection(self) -> str | None:
        found = [path for path, role in self.roles.items() if role == "o" and self._writes(path)]
        return found[0] if len(found) == 1 else None

    def part_that_attends(self) -> str | None:
        """The part of the block, its own child, in which it attends."""
        return next((_child(site.path, self.path) for site in self.attention if _inside(site.path, self.path)), None)

    def written_by_attention(self) -> StateSite | str:
        part = self._projection()
        if part is None and (whole := self.part_that_attends()) and "mlp" not in self._all_of(whole):
            part = whole if self._writes(whole) else None
        return StateSite("attention", self.layer, part) if part else NO_OUTPUT

    def written_by_mlp(self) -> list[StateSite]:
        """Where the MLP may write, the likeliest first."""
        named = [path for path in self.seen.returned if self._writes(path) and self._all_of(path) == {"mlp"}]
        outermost = [path for path in named if not any(_inside(path, other) for other in named)]
        children = {_child(path, self.path) for path in self.roles} - {self.part_that_attends()}
        children = {one for one in children if self._writes(one) and self._all_of(one) - {"norm"}}
        return [StateSite("mlp", self.layer, *some) for some in (outermost, children) if len(some) == 1]

    def _all_of(self, path: str) -> set[str]:
        return {role for at, role in self.roles.items() if at == path or _inside(at, path)}

    def heads(self, count: int) -> StateSite | str:
        projection = self._projection()
        given = None if projection is None else self.seen.given.get(projection)
        if projection is None or given is None:
            return NO_OUTPUT
        if not count or given.shape[-1] % count or any(site.repeats or site.extra[0] for site in self.attention):
            return NO_HEADS
        read = self._read_by_heads(given.unflatten(-1, (count, -1)).transpose(1, 2))
        return StateSite("head", self.layer, projection, count, before=True) if read else NO_HEADS

    def _read_by_heads(self, given: Tensor) -> bool:
        """Whether these are the results of the layer's attention calls. Shapes: `batch heads seq dim`."""
        for site in self.attention:
            own = given[:, site.first_head : site.first_head + site.heads]
            slack = 1e-2 * float(own.abs().max())
            results = [form for one in self.seen.mixed.get(site.path, []) for form in _forms(one, site, len(given))]
            if not any(one.shape == own.shape and torch.allclose(one, own, rtol=1e-2, atol=slack) for one in results):
                return False
        return bool(self.attention)


def _forms(result: Tensor, site: AttentionSite, batch: int) -> Iterator[Tensor]:
    """A result of an attention call as `batch heads seq dim`: laid out as its scores, or with the heads folded in."""
    for layout in (site.layout, Layout("(b h0) q k", (("h0", site.heads),))):
        if result.dim() > 2 and (flat := layout.flat(result, batch)) is not None:
            yield flat


def _adding(
    module: nn.Module, run: Callable[[Tensor], Any], ids: Tensor, blocks: Sequence[str], roles: Mapping[str, str]
) -> set[str]:
    """The modules in the blocks whose output tells two sequences apart while all that is learned there but norms is
    silent: what does that is the stream, which they add. Shapes: `ids`: `2 seq`.
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
            if any(_inside(path, block) for block in blocks):
                if path in learned:
                    handles.append(child.register_forward_hook(_scaled(0.0)))
                else:
                    handles.append(child.register_forward_hook(note(path)))
        with untouched(module), torch.no_grad():
            run(ids)
    finally:
        for handle in handles:
            handle.remove()
    return adding


def _whole(
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
                if _inside(path, blocks[layer]) and path != site.path and not _inside(path, site.path)
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
    """The modules that hold the parameters at some paths, and no other module with parameters."""
    names = {name for name, child in module.named_modules() if next(child.parameters(), None) is not None}
    held = {path if path in names else path.rpartition(".")[0] for path in paths} & names
    return {path for path in held if not any(_inside(name, path) for name in names)}


def _scaled(by: float) -> Callable[..., Any]:
    """A hook that multiplies what a module returns."""

    def scaled(one: Any) -> Any:
        return one * by if isinstance(one, Tensor) and one.is_floating_point() else one

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return tuple(map(scaled, output)) if isinstance(output, tuple) else scaled(output)

    return hook


def _failing(
    module: nn.Module, run: Callable[[Tensor], Tensor], shown: tuple[Tensor, Tensor], sites: Sequence[StateSite]
) -> list[int]:
    """The layers of the sites at which the second sequence's state does not bring its logits to the first."""
    failing = []
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
            failing += [site.layer for site, by in zip(some, missed.tolist(), strict=True) if not by <= slack * apart]
    return failing


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Distances of logits; a token that both leave out (-inf, the mask of some models) is none."""
    return (one - other).abs().masked_fill(one == other, 0.0)


def _is_fine(module: nn.Module) -> bool:
    return all(p.dtype.itemsize >= 4 for p in module.parameters() if p.is_floating_point())


def _put_in(state: Tensor, row: int) -> Callable[[Tensor], Tensor]:
    def change(given: Tensor) -> Tensor:
        return torch.cat([given[:row], state.to(given), given[row + 1 :]])

    return change


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _child(path: str, outer: str) -> str:
    """The part of `outer`, one step below it, that holds `path`."""
    return f"{outer}.{path[len(outer) + 1 :].split('.')[0]}"
