"""One look at a model: where its states lie, layer by layer (`hooks.states`).

A layer's block, the module that its layer number names, is taken for what hands the residual stream on; then it is put
to the test: with the state of one sequence put in at that layer, another sequence must get the first one's logits.
Where it does not, later layers read more than the block hands on (inputs of their own, a second stream), and the layer
has no such site. What is written into the stream is found by the roles of parameters: by attention, in the part of the
block that calls it (a layer of a hybrid that calls none has no such site, whatever its projections are named), by the
MLP beside it. That is put to two tests: a part that tells sequences apart while all that is learned in it is silent
hands on a stream that it did not write (BLOOM's MLP adds it), and beside a part that is held no other of the block's
MLP may count (shared experts are not all of them). The heads' input of the output projection is found by comparing it
with what the attention calls return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_calls import FunctionMode, Layout, its_path, running_modules
from .attention_sites import Attention, AttentionSite
from .layer_numbers import LayerNumbers
from .state_trials import adding, child_of, failing, first_that_is_whole, is_inside
from .states import EMBEDDED, KINDS, States, StateSite, given_state, returned_state
from .untouched import untouched

NO_BLOCK = "the layer is no single module that runs once, whose output the next one reads"
NO_STATE = "its block returns no tensor of (batch, tokens, width)"
MORE = "later layers read more than the state that its block hands on"
NO_ATTENTION = "no softmax attention was seen in it: what mixes its tokens is something else"
NO_OUTPUT = "no single output projection of its attention is known by name"
NO_MLP = "no single MLP is known by name, nor is there one other part that it could be"
NO_HEADS = "what its output projection is given is not what its heads read, side by side"
_OF_ATTENTION = frozenset(["q", "k", "v", "qkv", "o"])
_PRODUCTS = frozenset(["matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention"])


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
    unread = [path.split(" (")[0] for path in attention.left_out]  # of some, one call of several
    seen = _look(module, run, shown[0], paths, attention)
    apart = partial(adding, module, run, torch.cat(shown), roles=roles)
    attending = [child_of(at, path) for at in (*attention.calls, *unread) for path in paths if is_inside(at, path)]
    seen.adds = apart(paths) | apart(attending)
    sites: dict[tuple[str, int], StateSite] = {}
    without: dict[tuple[str, int], str] = {}

    def keep(kind: str, layer: int, found: StateSite | str) -> None:
        if isinstance(found, str):
            without[kind, layer] = found
        else:
            sites[kind, layer] = found

    by_path = bool(blocks) and set(attention.heads) <= set(blocks)
    whole = [layer for layer, some in blocks.items() if by_path and len(some) == 1 and seen.ran.get(some[0]) == 1]
    for layer in set(blocks if by_path else attention.heads) - {*whole}:
        without |= {(kind, layer): NO_BLOCK for kind in KINDS}
    held: dict[int, _Block] = {}
    for layer in whole:
        path = blocks[layer][0]
        own = [site for site in attention.sites if site.layer == layer]
        inside = {at: role for at, role in roles.items() if is_inside(at, path)}
        block = held[layer] = _Block(layer, path, own, unread, seen, inside)
        keep("residual", layer, block.residual())
        keep("attention", layer, block.written_by_attention())
        keep("head", layer, block.heads(attention.heads.get(layer, 0)))
    for layer, mlp in _mlps(module, run, shown[0], held, apart).items():
        keep("mlp", layer, mlp or NO_MLP)
    # Of the first block, not of the first that has a state: a pooled encoder stands before its decoder (Funnel).
    first = blocks[min(blocks)][0] if by_path and min(blocks) in held else None
    if first is not None and first in seen.given:
        sites["residual", EMBEDDED] = StateSite("residual", EMBEDDED, first, before=True)
    for layer in failing(module, run, shown, [site for site in sites.values() if site.kind == "residual"]):
        del sites["residual", layer]
        without["residual", layer] = MORE
    return States(sites, without)


def _mlps(
    module: nn.Module,
    run: Callable[[Tensor], Any],
    ids: Tensor,
    blocks: Mapping[int, _Block],
    apart: Callable[[Sequence[str]], set[str]],
) -> dict[int, StateSite | None]:
    """Each block's MLP: what it writes, all of it and nothing else; None where there is no such place."""
    tried = {layer: block.written_by_mlp() for layer, block in blocks.items()}
    adds = apart([site.path for some in tried.values() for site in some])
    tried = {layer: [site for site in some if site.path not in adds] for layer, some in tried.items()}
    parts = [path for block in blocks.values() for path in block.parts_of_mlp()]
    return first_that_is_whole(module, run, ids, tried, {layer: block.path for layer, block in blocks.items()}, parts)


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
            if any(path == block or is_inside(path, block) for block in blocks):
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
    """The block of one layer: `roles` of the modules inside it, by path; `unread`: where attention is not read."""

    layer: int
    path: str
    attention: Sequence[AttentionSite]
    unread: Sequence[str]
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
        """Inside the part that attends, or beside it; a state-space part beside attention has one of its own."""
        part, named = self.part_that_attends(), [path for path, role in self.roles.items() if role == "o"]
        near = [path for path in named if part and is_inside(path, part)]
        near = near or [path for path in named if child_of(path, self.path) == path]
        found = [path for path in near if self._writes(path)]
        return found[0] if len(found) == 1 else None

    def _attends(self) -> list[str]:
        return [path for path in (*(site.path for site in self.attention), *self.unread) if self._holds(path)]

    def _holds(self, path: str) -> bool:
        return path == self.path or is_inside(path, self.path)

    def part_that_attends(self) -> str | None:
        """The part of the block, its own child, in which it attends."""
        return next((child_of(path, self.path) for path in self._attends() if path != self.path), None)

    def written_by_attention(self) -> StateSite | str:
        if not self._attends():
            return NO_ATTENTION
        part = self._projection()
        if part is None and (whole := self.part_that_attends()) and "mlp" not in self._all_of(whole):
            part = whole if self._writes(whole) else None
        return StateSite("attention", self.layer, part) if part else NO_OUTPUT

    def written_by_mlp(self) -> list[StateSite]:
        """Where the MLP may write, the likeliest first."""
        named = [path for path in self.seen.returned if self._writes(path) and self._all_of(path) == {"mlp"}]
        outermost = [path for path in named if not any(is_inside(path, other) for other in named)]
        children = {child_of(path, self.path) for path in self.roles} - {self.part_that_attends()}
        children = {one for one in children if self._writes(one) and self._all_of(one) - {"norm"}}
        children = {one for one in children if not self._all_of(one) & _OF_ATTENTION}  # Mamba's are called so too
        return [StateSite("mlp", self.layer, *some) for some in (outermost, children) if len(some) == 1]

    def parts_of_mlp(self) -> list[str]:
        """What is called an MLP's in the block; a gate of its attention is none."""
        attends = self.part_that_attends()
        return [at for at, role in self.roles.items() if role == "mlp" and not (attends and is_inside(at, attends))]

    def _all_of(self, path: str) -> set[str]:
        return {role for at, role in self.roles.items() if at == path or is_inside(at, path)}

    def heads(self, count: int) -> StateSite | str:
        if not self._attends():
            return NO_ATTENTION
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
