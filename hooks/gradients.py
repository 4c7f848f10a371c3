"""Per-example gradient products: inner products of many parameter gradients without forming a gradient.

The gradient of a Linear weight for one example is sum_t g_t (x) a_t, with a_t the input and g_t the gradient of
the loss with respect to the output at token t. So the inner product of two examples' gradients is
sum_{t,s} (a_t . a_s) (g_t . g_s): one batched forward pass and one backward pass over activations give the
factors of every example, and the weights need no gradient. Embeddings match token ids in place of (a_t . a_s); a
parameter used several times (tied unembedding, shared layers) gets the cross terms between its uses; every other
module that holds parameters is replayed through a vmapped vector-Jacobian product.

    with record_gradients(module, parameters, batch) as recorder:
        loss = per_example_loss(module(...))        # shape: batch
        recorder.backward(loss)
    products = recorder.products(left, right)       # name -> tensor of len(left)

Exactness is checked against autograd's own graph: a parameter that the loss reaches by a path no rule has seen is
an error that names it.

Shapes below: batch, seq, out (rows of a weight), in (columns of a weight).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import RevprobeError
from .gradient_graph import Call, Output, check_complete, check_order, fed_without_gradient, require_total, sources
from .gradient_products import Use, merged, products, rounding
from .gradient_rules import (
    all_finite,
    carries_gradient,
    drop_silent_tokens,
    has_rule,
    linear_use,
    lookup,
    lookup_scale,
    replay,
)

_WIDER = "use a wider dtype, or check the weights for NaN"
Parts = Mapping[str, Mapping[str, Tensor]]
Adopted = Mapping[str, Mapping[str, nn.Parameter]]


@contextmanager
def record_gradients(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: int,
    *,
    parts: Parts | None = None,
    adopted: Adopted | None = None,
) -> Iterator[GradientRecorder]:
    """Record what is needed for the per-example gradients of `parameters` during one forward pass of `batch` examples.

    While open, the parameters require grad (so that the check against autograd's graph sees them) and modules
    have hooks; both are undone on leaving.
    Args:
        parts: for a fused parameter, the output features of each of its parts, {name: {"q": indices, ...}}; its
            products then come apart under "name[q]" and so on.
        adopted: parameters of modules that are not called, by the module that uses them; see `adopted_parameters`.
    Raises: RevprobeError, for no parameters.
    """
    if not parameters:
        raise RevprobeError("no parameter was selected, so there is no gradient; check parameters= and layers=")
    recorder = GradientRecorder(module, dict(parameters), batch, parts or {}, adopted or {})
    flags = [(p, p.requires_grad) for p in module.parameters()]
    selected = {id(p) for p in parameters.values()}
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in selected)
        recorder.attach()
        yield recorder
    finally:
        recorder.detach()
        for p, flag in flags:
            p.requires_grad_(flag)


class GradientRecorder:
    """The factors of per-example gradients of one batch, and their inner products."""

    def __init__(
        self, module: nn.Module, parameters: dict[str, nn.Parameter], batch: int, parts: Parts, adopted: Adopted
    ) -> None:
        self.module, self.parameters, self.batch, self.parts = module, parameters, batch, parts
        self._adopted = adopted
        self._names = {id(p): name for name, p in parameters.items()}
        self._calls: list[Call] = []
        self._handles: list[Any] = []
        self._uses: dict[str, list[Use]] = {}
        self._replaying = False  # modules run to be replayed are not recorded
        self._reading = False  # nor those that run in the backward pass

    @property
    def labels(self) -> list[str]:
        """What products come under: parameter names, "name[part]" for the parts of fused ones."""
        return [label for name in self.parameters for label in part_labels(name, self.parts)]

    def attach(self) -> None:
        for name, child in self.module.named_modules():
            if any(id(p) in self._names for p in self._answers_for(name, child).values()):
                # Before the hooks of others: what they do to the output comes after the module.
                self._handles.append(child.register_forward_hook(self._hook(name), with_kwargs=True, prepend=True))

    def _answers_for(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters a module holds, and those it uses of children that are not called."""
        own = {key: p for key, p in module._parameters.items() if p is not None}
        return own | dict(self._adopted.get(name, {}))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return None if self._replaying else self._record(name, module, args, kwargs, output)

        return record

    def _record(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        leaves, structure = tree_flatten(output)
        kept = [self._one_per_example(leaf, name, module) if carries_gradient(leaf) else leaf for leaf in leaves]
        if sum(map(carries_gradient, kept)) > 1:
            # One output may be made of another inside the module (a router's scores of its logits): as views, each
            # has the gradient of what comes after the module alone.
            kept = [leaf.view_as(leaf) if carries_gradient(leaf) else leaf for leaf in kept]
        if not self._reading:  # gradient checkpointing runs modules again in the backward pass
            scale = lookup_scale(module, next(iter((*args, *kwargs.values())), None), output)
            inputs, cut = sources(args, kwargs), fed_without_gradient(args, kwargs)
            args, kwargs = tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, (args, kwargs))
            outputs = [Output(leaf) for leaf in kept if carries_gradient(leaf)]
            own = self._answers_for(name, module)
            self._calls.append(Call(module, name, own, args, kwargs, outputs, scale, inputs, cut))
        return tree_unflatten(kept, structure)

    def _one_per_example(self, output: Tensor, name: str, module: nn.Module) -> Tensor:
        """The output with the batch first."""
        if output.is_leaf and output.requires_grad:
            output = output.view_as(output)  # the parameter itself: others may reach it too
        if output.shape[:1] == (1,) and self.batch > 1:
            # Broadcast over the batch later (GPT-2's positions): expanding here keeps the examples apart.
            output = output.expand(self.batch, *output.shape[1:])
        # A multiple of the batch is `(batch seq) dim`, as in OPT; `check_order` holds it to that order.
        if output.dim() == 0 or not output.shape[0] or output.shape[0] % self.batch:
            raise RevprobeError(
                f"module {name!r} ({type(module).__name__}) gives {tuple(output.shape)}, expected {self.batch} "
                "examples first; its gradients cannot be told apart"
            )
        return output

    def backward(self, loss: Tensor) -> None:
        """Take the gradients of `loss.sum()` with respect to the recorded outputs. Shapes: `loss`: `batch`.

        Raises: RevprobeError, when the loss is not one number per example, no selected parameter reaches it, a
            module that ran is cut off from it, a gradient is not finite, or a parameter reaches it by a path that
            was not recorded.
        """
        if loss.shape != (self.batch,):
            raise RevprobeError(
                f"loss of shape {tuple(loss.shape)}: expected one number for each of the {self.batch} examples"
            )
        if not self._calls or not loss.requires_grad:
            ran = (
                f"module {self._calls[0].name!r} ran, but is detached from it"
                if self._calls
                else "no module of them ran"
            )
            raise RevprobeError(
                f"the loss reaches none of the selected parameters: {ran}; select others or check the model"
            )
        check_complete(self._calls, self.parameters, loss)
        self._reading = True
        try:
            check_order(self._calls, self.batch, loss)
            self._uses = self._collect(loss)
        finally:
            self._reading = False
            self._calls.clear()

    def _collect(self, loss: Tensor) -> dict[str, list[Use]]:
        """The uses of every label, from one backward pass."""
        adopted = {key: p for own in self._adopted.values() for p in own.values() if (key := self._names.get(id(p)))}
        totals = torch.autograd.grad(loss.sum(), list(adopted.values()), retain_graph=True) if adopted else ()
        wanted = [output.edge for call in self._calls for output in call.outputs if output.edge is not None]
        gradients = iter(torch.autograd.grad(loss.sum(), wanted, allow_unused=True))
        owned = [[None if o.edge is None else next(gradients) for o in call.outputs] for call in self._calls]
        for call, own in zip(reversed(self._calls), reversed(owned), strict=True):
            # From the loss backwards: the first to be found is where it started, the others only inherit it.
            if any(g is not None and not all_finite(g) for g in own):
                raise RevprobeError(
                    f"the gradient at module {call.name!r} is not finite: the loss overflows there or in what follows "
                    f"it; {_WIDER}"
                )
        uses: dict[str, list[Use]] = {label: [] for label in self.labels}
        for call, own in zip(self._calls, owned, strict=True):
            if any(g is not None for g in own):
                for label, use in self._read(call, own):
                    uses[label].append(use)
        for name, total in zip(adopted, totals, strict=True):
            # Whether the module that answers for a child really is the one that uses it shows in the sum alone.
            require_total(name, merged(uses[name]), total)
        return uses

    @contextmanager
    def _replay_mode(self) -> Iterator[None]:
        """Run modules again without recording them."""
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False

    def _read(self, call: Call, gradients: Sequence[Tensor | None]) -> Iterator[tuple[str, Use]]:
        """The uses of a module's own parameters in one call, under their labels."""
        module = call.module
        if call.name in self._adopted or (call.scale is None and not has_rule(module)):
            with self._replay_mode():
                replayed = replay(call.module, call.own, call.args, call.kwargs, call.outputs, gradients, self.batch)
            yield from self._labelled(call, replayed)
            return
        assert gradients[0] is not None, "a module with a rule has one output"
        gradient = gradients[0].to(torch.promote_types(gradients[0].dtype, torch.float32))
        if gradient.shape[0] != self.batch:
            gradient = gradient.reshape(self.batch, -1, gradient.shape[-1])
        if call.scale is not None:
            assert isinstance(module, nn.Embedding), "only embeddings look rows up"
            yield from self._labelled(call, {"weight": lookup(module, call.given, gradient, call.scale)})
            return
        given = call.given
        inputs = given.expand(self.batch, *given.shape[1:]) if given.shape[0] == 1 else given
        inputs = inputs.to(gradient.dtype).reshape(self.batch, -1, inputs.shape[-1])
        gradient, inputs = drop_silent_tokens(gradient.reshape(self.batch, -1, gradient.shape[-1]), inputs)
        if not all_finite(inputs):
            raise RevprobeError(f"the input of module {call.name!r} is not finite, so its gradient is not; {_WIDER}")
        for key in ("weight", "bias"):
            # .get: TransformerLens' unembedding swaps a missing bias for a buffer, which leaves no such parameter.
            name = self._names.get(id(module._parameters.get(key)))
            for label, features in part_labels(name, self.parts).items() if name else ():
                part = gradient if features is None else gradient[..., features.to(gradient.device)]
                yield label, linear_use(module, key, part, inputs)

    def _labelled(self, call: Call, uses: Mapping[str, Use]) -> Iterator[tuple[str, Use]]:
        for key, use in uses.items():
            name = self._names.get(id(call.own[key]))
            if name is not None:
                yield part_label(name), use

    def products(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """Inner products of the gradients of examples left[n] and right[n], by label.

        Shapes: `pair, pair -> pair`, float32 or wider.
        """
        return {label: products(merged(uses), left, right) for label, uses in self._uses.items()}

    def rounding(self) -> dict[str, Tensor]:
        """The norm below which a gradient is rounding, by label; see `gradient_products.rounding`.

        Shapes: `-> batch`.
        """
        owners = {label: p for name, p in self.parameters.items() for label in part_labels(name, self.parts)}
        return {label: rounding(uses, self.batch, owners[label]) for label, uses in self._uses.items()}


def part_labels(name: str, parts: Parts) -> dict[str, Tensor | None]:
    """The labels of a parameter's parts with their output features; the bare name and None when it is not fused."""
    split = parts.get(name)
    return {name: None} if not split else {part_label(name, part): features for part, features in split.items()}


def part_label(name: str, part: str | None = None) -> str:
    """How a part of a fused parameter is called: "name[part]"."""
    return name if part is None else f"{name}[{part}]"
