"""One backward pass over recorded calls: factors are read as gradients come by, multiplied, and let go.

The gradient of every recorded output passes a hook on its node of autograd's graph. A closed rule turns it into the
factors of the module's parameters there and then; a parameter with this one use gets its products at once, so that
neither factors nor gradients pile up. What waits for the end is small or needed: modules that are replayed, and
parameters with several uses, whose cross terms need all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import RevprobeError
from .graph import Call, require_total, walk_back
from .products import Use, merged, multiply
from .rules import all_finite, drop_silent_tokens, linear_use, lookup, replay

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
    """The parameters whose gradients are wanted, how fused ones come apart, and who answers for uncalled ones."""

    parameters: Mapping[str, nn.Parameter]
    parts: Parts
    adopted: Adopted

    @property
    def names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.parameters.items()}

    @property
    def owners(self) -> dict[str, str]:
        """Label -> name of the parameter it is, or is a part of."""
        return {label: name for name in self.parameters for label in part_labels(name, self.parts)}


def read_backward(
    selection: Selection,
    calls: list[Call],
    loss: Tensor,
    pairs: tuple[Tensor, Tensor],
    unrecorded: Callable[[], AbstractContextManager[Any]],
) -> Products:
    """Run the backward pass of `loss.sum()` and multiply the examples' gradients.

    Shapes: `loss`: `batch`; `pairs`: `pair, pair`.
    Args:
        calls: what the forward pass recorded; the list is emptied, and what it held goes when it has been read.
        unrecorded: makes a context in which modules run without being recorded.
    Raises: RevprobeError, as `GradientRecorder.backward` does.
    """
    reader = _Reader(selection, calls, loss, pairs)
    calls.clear()
    adopted = {name: p for name, p in selection.parameters.items() if name in _answered_for(selection)}
    totals = torch.autograd.grad(loss.sum(), list(adopted.values()), retain_graph=True) if adopted else ()
    walk_back(dict(reader.pending), loss.sum(), reader.arrive)
    with unrecorded():
        reader.replay()
    for name, total in zip(adopted, totals, strict=True):
        # Whether the module that answers for a child really is the one that uses it shows in the sum alone.
        require_total(name, merged(reader.waiting[name]), total)
    for label in set(selection.owners) - set(reader.found.inner):
        reader.multiply(label, reader.waiting.get(label, []))
    return Products(*({label: found[label] for label in selection.owners} for found in reader.found))


def _answered_for(selection: Selection) -> set[str]:
    answered = {id(p) for own in selection.adopted.values() for p in own.values()}
    return {name for key, name in selection.names.items() if key in answered}


class _Reader:
    """The calls still to be read, the uses that wait for others, and the products found so far."""

    def __init__(self, selection: Selection, calls: Sequence[Call], loss: Tensor, pairs: tuple[Tensor, Tensor]) -> None:
        self.selection, self.names, self.owners = selection, selection.names, selection.owners
        self.batch, self.pairs = len(loss), pairs
        self.pending = dict(enumerate(calls))
        self.gradients: dict[int, list[Tensor | None]] = {}  # of calls that are replayed at the end
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
        if call.closed:
            del self.pending[n]
            for label, use in self._read(call, gradient):
                self._keep(label, use)
        else:
            self.gradients.setdefault(n, [None] * len(call.outputs))[k] = gradient

    def replay(self) -> None:
        """Read the calls that no closed rule covers."""
        for n, gradients in sorted(self.gradients.items()):
            call = self.pending.pop(n)
            call.require_unchanged()
            uses = replay(call.module, call.own, call.args, call.kwargs, call.outputs, gradients, self.batch)
            for label, use in self._labelled(call, uses):
                self._keep(label, use)
        self.gradients.clear()

    def _keep(self, label: str, use: Use) -> None:
        """Multiply at once what has no other use, so that its factors can go."""
        if label in self.waiting:
            self.waiting[label].append(use)
        else:
            self.multiply(label, [use])

    @torch.no_grad()
    def multiply(self, label: str, uses: list[Use]) -> None:
        """The products of a label; without a use its gradient is zero."""
        owner = self.selection.parameters[self.owners[label]]
        nothing = torch.zeros(len(self.pairs[0])), torch.zeros(self.batch)
        self.found.inner[label], self.found.floor[label] = multiply(uses, owner, *self.pairs) if uses else nothing

    def _read(self, call: Call, gradient: Tensor) -> Iterator[tuple[str, Use]]:
        """The uses of a module's own parameters in one call, by closed rules, under their labels."""
        call.require_unchanged()
        module, given = call.module, call.given
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if gradient.shape[0] != self.batch:
            gradient = gradient.reshape(self.batch, -1, gradient.shape[-1])
        if call.scale is not None:
            assert isinstance(module, nn.Embedding), "only embeddings look rows up"
            yield from self._labelled(call, {"weight": lookup(module, given, gradient, call.scale)})
            return
        inputs = given.expand(self.batch, *given.shape[1:]) if given.shape[0] == 1 else given
        inputs = inputs.to(gradient.dtype).reshape(self.batch, -1, inputs.shape[-1])
        gradient, inputs = drop_silent_tokens(gradient.reshape(self.batch, -1, gradient.shape[-1]), inputs)
        if not all_finite(inputs):
            raise RevprobeError(f"the input of module {call.name!r} is not finite, so its gradient is not; {_WIDER}")
        for key in ("weight", "bias"):
            # .get: TransformerLens' unembedding swaps a missing bias for a buffer, which leaves no such parameter.
            name = self.names.get(id(module._parameters.get(key)))
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
