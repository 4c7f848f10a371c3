"""One backward pass over recorded calls: factors are read as gradients come by, multiplied, and let go.

The gradient of every recorded output passes a hook on its node of autograd's graph. A closed rule turns it into the
factors of the module's parameters there and then; a parameter with this one use gets its products at once, so that
neither factors nor gradients pile up. What waits for the end is small or needed: modules that are replayed, and
parameters with several uses, whose cross terms need all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ...errors import RevprobeError
from .graph import Call, CannotSplit, adds_up
from .order import Mixed, Order, Rows
from .products import multiply
from .rules import all_finite, drop_silent_tokens, linear_use, lookup, replay
from .spread_weights import WholeWeights
from .uses import Use, merged
from .walk import Key, Spread, walk_back

_WIDER = "use a wider dtype, or check the weights for NaN"
Parts = Mapping[str, Mapping[str, Tensor]]
Adopted = Mapping[str, Mapping[str, nn.Parameter]]


class Products(NamedTuple):
    """What a backward pass gives, by label: a parameter's name, or "name[part]" for the parts of fused ones.

    Shapes: `inner`: `pair`, the inner products of the gradients of examples left[n] and right[n]; `floor`: `batch`,
    the norm below which an example's gradient is rounding. Float32 or wider.
    """

    inner: dict[str, Tensor]
    floor: dict[str, Tensor]


class Selection(NamedTuple):
    """The parameters whose gradients are wanted, how fused ones come apart, and who answers for uncalled ones.

    `weights`: the module's, since a spread one holds pieces of the selected parameters while it does not run.
    """

    parameters: Mapping[str, nn.Parameter]
    parts: Parts
    adopted: Adopted
    weights: WholeWeights

    @property
    def names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.parameters.items()}

    @property
    def owners(self) -> dict[str, str]:
        """Label -> name of the parameter it is, or is a part of."""
        return {label: name for name in self.parameters for label in part_labels(name, self.parts)}


class Recorded(NamedTuple):
    """A forward pass as it was recorded: its calls, its losses (`batch`), and what autograd says of the examples.

    `order`: which rows are whose; `spread`: outputs without the batch; `unread`: parameters that the calls do not
    cover, and why. More of them may turn up as calls are read.
    """

    calls: list[Call]
    loss: Tensor
    order: Order
    spread: Mapping[Key, Spread]
    unread: dict[str, str]


def read_backward(
    selection: Selection,
    recorded: Recorded,
    pairs: tuple[Tensor, Tensor],
    unrecorded: Callable[[], AbstractContextManager[Any]],
) -> Products:
    """Run the backward pass of `loss.sum()` and multiply the examples' gradients; those of `unread` are left out.

    Shapes: `pairs`: `pair, pair`.
    Args:
        recorded: its calls are emptied, and what they held goes when it has been read.
        unrecorded: makes a context in which modules run without being recorded.
    Raises: RevprobeError, for a gradient or an input that is not finite.
    """
    loss, unread = recorded.loss, recorded.unread
    reader = _Reader(selection, recorded, pairs)
    recorded.calls.clear()
    adopted = {name: p for name, p in selection.parameters.items() if name in _answered_for(selection) - set(unread)}
    totals = (
        torch.autograd.grad(loss.sum(), list(adopted.values()), retain_graph=True, allow_unused=True) if adopted else ()
    )
    walk_back(dict(reader.pending), get_gradient_edge(loss), torch.ones_like(loss), reader.arrive, recorded.spread)
    with unrecorded():
        reader.replay()
    for (name, p), total in zip(adopted.items(), totals, strict=True):
        # Whether the module that answers for a child really is the one that uses it shows in the sum alone.
        if name not in unread and not adds_up(
            merged(reader.waiting[name]), torch.zeros_like(p) if total is None else total
        ):
            unread[name] = (
                f"parameter {name!r} reaches the loss, but not through calls of its own module: its weight is used "
                "outside its module, so its gradient would be incomplete"
            )
    for label in (label for label, name in selection.owners.items() if name not in unread):
        if label not in reader.found.inner:
            reader.multiply(label, reader.waiting.get(label, []))
    return reader.found


def _answered_for(selection: Selection) -> set[str]:
    answered = {id(p) for own in selection.adopted.values() for p in own.values()}
    return {name for key, name in selection.names.items() if key in answered}


class _Reader:
    """The calls still to be read, the uses that wait for others, and the products found so far."""

    def __init__(self, selection: Selection, recorded: Recorded, pairs: tuple[Tensor, Tensor]) -> None:
        self.selection, self.names, self.owners = selection, selection.names, selection.owners
        self.batch, self.pairs = len(recorded.loss), pairs
        self.order, self.spread, self.unread = recorded.order, recorded.spread, recorded.unread
        calls: Sequence[Call] = recorded.calls
        self.pending = dict(enumerate(calls))
        self.gradients: dict[int, list[Tensor | None]] = {}  # of calls that are replayed at the end
        self.rows: dict[int, Rows | None] = {}  # theirs
        uses = Counter(id(p) for call in calls for p in call.own.values())
        # An adopted parameter's gradient is held against autograd's own at the end.
        alone = {n for key, n in self.names.items() if uses[key] == 1} - _answered_for(selection)
        self.waiting: dict[str, list[Use]] = {label: [] for label, name in self.owners.items() if name not in alone}
        self.found = Products({}, {})

    @torch.no_grad()
    def arrive(self, n: int, k: int, gradient: Tensor | None) -> None:
        """Take the gradient of output `k` of call `n`."""
        if gradient is None:
            return
        call = self.pending[n]
        if not all_finite(gradient):
            # From the loss backwards: the first to be found is where it started, the others only inherit it.
            raise RevprobeError(
                f"the gradient at module {call.name!r} is not finite: the loss overflows there or in what follows "
                f"it; {_WIDER}"
            )
        try:
            rows = self.order.rows((n, k), gradient)
            if (gradient.dim() < 2 and self.batch > 1) and (call.closed or rows is not None):
                raise Mixed  # one row for all examples
            if rows is not None and len(call.outputs) > 1:
                raise Mixed  # several outputs, and no common order
            if call.closed:
                del self.pending[n]
                for label, use in self._read(call, gradient, rows):
                    self._keep(label, use)
            else:
                self.gradients.setdefault(n, [None] * len(call.outputs))[k] = gradient
                self.rows[n] = rows
        except Mixed:
            given = tuple(call.outputs[k].shape)
            self._give_up(
                call,
                f"module {call.name!r} ({type(call.module).__name__}) gives {given} for {self.batch} examples, and "
                "some of it belongs to several; its gradients cannot be told apart",
            )
        except CannotSplit as error:
            self._give_up(call, str(error))

    def _give_up(self, call: Call, why: str) -> None:
        """Leave a call's parameters to others, whatever other uses they have."""
        names = {self.names[id(p)] for p in call.own.values() if id(p) in self.names}
        self.unread |= {name: why for name in names if name not in self.unread}

    def replay(self) -> None:
        """Read the calls that no closed rule covers."""
        for n, gradients in sorted(self.gradients.items()):
            call = self.pending.pop(n)
            if not self._wanted(call.own.values()):
                continue
            shapes = [self.spread[n, k].shape if (n, k) in self.spread else o.shape for k, o in enumerate(call.outputs)]
            try:
                call.require_unchanged()
                with self.selection.weights.gathered(call.module):
                    uses = replay(call, gradients, shapes, self.rows[n], self.batch)
                for label, use in self._labelled(call, uses):
                    self._keep(label, use)
            except CannotSplit as error:
                self._give_up(call, str(error))
        self.gradients.clear()

    def _wanted(self, parameters: Iterable[nn.Parameter | None]) -> bool:
        """Whether any of these is selected and can still be read here."""
        names = {self.names.get(id(p)) for p in parameters} - {None}
        return bool(names - set(self.unread))

    def _keep(self, label: str, use: Use) -> None:
        """Multiply at once what has no other use, so that its factors can go."""
        if self.owners[label] in self.unread:
            self.waiting.pop(label, None)
        elif label in self.waiting:
            self.waiting[label].append(use)
        else:
            self.multiply(label, [use])

    @torch.no_grad()
    def multiply(self, label: str, uses: list[Use]) -> None:
        """The products of a label; without a use its gradient is zero."""
        owner = self.selection.parameters[self.owners[label]]
        nothing = torch.zeros(len(self.pairs[0])), torch.zeros(self.batch)
        self.found.inner[label], self.found.floor[label] = multiply(uses, owner, *self.pairs) if uses else nothing

    def _read(self, call: Call, gradient: Tensor, rows: Rows | None) -> Iterator[tuple[str, Use]]:
        """The uses of a module's own parameters in one call, by closed rules, under their labels."""
        if not self._wanted(call.own.values()):
            return
        call.require_unchanged()
        module, given = call.module, call.given
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        leading = given.shape if call.scale is not None else given.shape[:-1]
        if leading.numel() * self.batch == gradient[..., 0].numel():
            given = given.expand(gradient.shape[:-1] if call.scale is not None else (*gradient.shape[:-1], -1))
        if rows is not None:
            gradient = rows.gradient(gradient)
            given = rows.of(given[..., None])[..., 0] if call.scale is not None else rows.of(given)
        elif gradient.shape[0] != self.batch or gradient.dim() == 1:
            gradient = gradient.reshape(self.batch, -1, gradient.shape[-1])
        if call.scale is not None:
            assert isinstance(module, nn.Embedding), "only embeddings look rows up"
            yield from self._labelled(call, {"weight": lookup(module, given, gradient, call.scale)})
            return
        inputs = given.to(gradient.dtype).reshape(self.batch, -1, given.shape[-1])
        gradient, inputs = drop_silent_tokens(gradient.reshape(self.batch, -1, gradient.shape[-1]), inputs)
        if not all_finite(inputs):
            raise RevprobeError(f"the input of module {call.name!r} is not finite, so its gradient is not; {_WIDER}")
        for key in ("weight", "bias"):
            # .get: TransformerLens' unembedding swaps a missing bias for a buffer, which leaves no such parameter.
            held = module._parameters.get(key)
            name = None if held is None else self.names.get(id(self.selection.weights.of(held)))
            for label, features in part_labels(name, self.selection.parts).items() if name else ():
                part = gradient if features is None else gradient[..., features.to(gradient.device)]
                yield label, linear_use(module, key, part, inputs)

    def _labelled(self, call: Call, uses: Mapping[str, Use]) -> Iterator[tuple[str, Use]]:
        for key, use in uses.items():
            name = self.names.get(id(call.own[key]))
            if name is not None:
                yield part_label(name), use


def part_labels(name: str, parts: Parts) -> dict[str, Tensor | None]:
    """The labels of a parameter's parts with their output features; the bare name and None when it is not fused."""
    split = parts.get(name)
    return {name: None} if not split else {part_label(name, part): features for part, features in split.items()}


def part_label(name: str, part: str | None = None) -> str:
    """How a part of a fused parameter is called: "name[part]"."""
    return name if part is None else f"{name}[{part}]"
