"""Per-example gradient products: inner products of many parameter gradients without forming a gradient.

The gradient of a Linear weight for one example is sum_t g_t (x) a_t, with a_t the input and g_t the gradient of
the loss with respect to the output at token t. So the inner product of two examples' gradients is
sum_{t,s} (a_t . a_s) (g_t . g_s): one batched forward pass and one backward pass over activations give the
factors of every example, and the weights need no gradient. Embeddings match token ids in place of (a_t . a_s); a
parameter used several times (tied unembedding, shared layers) gets the cross terms between its uses; every other
module that holds parameters is replayed through a vmapped vector-Jacobian product.

    with record_gradients(module, parameters, batch) as recorder:
        loss = per_example_loss(module(...))                    # shape: batch
        found = recorder.backward(loss, left, right)
    found.inner, found.floor                                    # label -> tensor

Exactness is checked against autograd's own graph: a parameter that the loss reaches by a path no rule has seen is
an error that names it.

Shapes below: batch, seq, out (rows of a weight), in (columns of a weight).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...errors import RevprobeError
from .backward import Adopted, Parts, Products, Selection, read_backward
from .graph import Call, Output, check_complete, check_order, fed_without_gradient, sources, versions
from .rules import carries_gradient, has_rule, lookup_scale


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
        self.module, self.parameters, self.batch = module, parameters, batch
        self._adopted = adopted
        self._selection = Selection(parameters, parts, adopted)
        self._names = self._selection.names
        self._calls: list[Call] = []
        self._handles: list[Any] = []
        self._replaying = False  # modules run to be replayed are not recorded
        self._reading = False  # nor those that run in the backward pass

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
            closed = name not in self._adopted and (scale is not None or has_rule(module))
            outputs = [Output(leaf, keep=not closed) for leaf in kept if carries_gradient(leaf)]
            own, given = self._answers_for(name, module), versions(args, kwargs)
            self._calls.append(Call(module, name, own, args, kwargs, outputs, scale, inputs, cut, closed, given))
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

    def backward(self, loss: Tensor, left: Tensor, right: Tensor) -> Products:
        """Take the gradients of `loss.sum()`, and the inner products of those of examples left[n] and right[n].

        Shapes: `loss`: `batch`; `left`, `right`: `pair`.
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
            for output in (output for call in self._calls for output in call.outputs):
                output.forget()
            return read_backward(self._selection, self._calls, loss, (left, right), self._unrecorded)
        finally:
            self._reading = False
            self._calls.clear()

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Run modules again without recording them."""
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False
