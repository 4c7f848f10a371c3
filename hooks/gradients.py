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

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

from ..errors import RevprobeError
from .gradient_products import FormedUse, LookupUse, OuterUse, Use, merged, products, rounding


@dataclass(frozen=True)
class _Call:
    """One call of a module that owns parameters: what went in, and the output tensor whose gradient is wanted."""

    module: nn.Module
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@contextmanager
def record_gradients(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], batch: int
) -> Iterator[GradientRecorder]:
    """Record what is needed for the per-example gradients of `parameters` during one forward pass of `batch` examples.

    While open, the parameters require grad (so that the check against autograd's graph sees them) and modules
    have hooks; both are undone on leaving.
    Raises: RevprobeError, for no parameters.
    """
    if not parameters:
        raise RevprobeError("no parameter was selected, so there is no gradient; check parameters= and layers=")
    recorder = GradientRecorder(module, dict(parameters), batch)
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

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter], batch: int) -> None:
        self.module, self.parameters, self.batch = module, parameters, batch
        self._calls: list[_Call] = []
        self._handles: list[Any] = []
        self._uses: dict[str, list[Use]] = {}
        self._replaying = False

    def attach(self) -> None:
        selected = {id(p) for p in self.parameters.values()}
        for name, child in self.module.named_modules():
            if any(id(p) in selected for p in child._parameters.values() if p is not None):
                self._handles.append(child.register_forward_hook(self._hook(name), with_kwargs=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            return None if self._replaying else self._record(name, module, args, kwargs, output)

        return record

    def _record(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor:
        if not isinstance(output, Tensor):
            raise RevprobeError(
                f"module {name!r} ({type(module).__name__}) returns a {type(output).__name__}, not a tensor; its "
                "parameters' gradients cannot be recorded"
            )
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        if output.shape[0] == 1 != self.batch:
            # Broadcast over the batch later (GPT-2's positions): expanding here keeps the examples apart.
            output = output.expand(self.batch, *output.shape[1:])
        if output.shape[0] != self.batch:
            raise RevprobeError(
                f"module {name!r} ({type(module).__name__}) gives {tuple(output.shape)}, expected {self.batch} "
                "examples first; its gradients cannot be told apart"
            )
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        self._calls.append(_Call(module, name, detached, kwargs, output))
        return output

    def backward(self, loss: Tensor) -> None:
        """Take the gradients of `loss.sum()` with respect to the recorded outputs. Shapes: `loss`: `batch`.

        Raises: RevprobeError, when the loss is not one number per example, no selected parameter reaches it, a
            gradient is not finite, or a parameter reaches it by a path that was not recorded.
        """
        if loss.shape != (self.batch,):
            raise RevprobeError(
                f"loss of shape {tuple(loss.shape)}: expected one number for each of the {self.batch} examples"
            )
        if not self._calls or not loss.requires_grad:
            raise RevprobeError(
                "the loss reaches none of the selected parameters; select others or check that the model is not "
                "detached"
            )
        self._check_complete(loss)
        outputs = [call.output for call in self._calls]
        gradients = torch.autograd.grad(loss.sum(), outputs, allow_unused=True)
        self._uses = {name: [] for name in self.parameters}
        names = {id(p): name for name, p in self.parameters.items()}
        for call, gradient in zip(self._calls, gradients, strict=True):
            if gradient is None:
                continue
            if not torch.isfinite(gradient).all():
                raise RevprobeError(
                    f"the gradient at module {call.name!r} is not finite; the loss overflows there, use a wider dtype"
                )
            for key, use in self._read(call, gradient).items():
                parameter = call.module._parameters[key]
                if id(parameter) in names:
                    self._uses[names[id(parameter)]].append(use)
        self._calls.clear()

    def _check_complete(self, loss: Tensor) -> None:
        """Hold the recorded calls against autograd's graph: every edge into a parameter comes from a recorded call."""
        reached = _parameter_edges(loss)
        recorded: Counter[int] = Counter()
        replayed: set[int] = set()
        for call in self._calls:
            for parameter in call.module._parameters.values():
                recorded[id(parameter)] += 1
                if not _has_rule(call.module):
                    replayed.add(id(parameter))
        for name, parameter in self.parameters.items():
            edges = reached[id(parameter)]
            if edges > recorded[id(parameter)] and not (id(parameter) in replayed and recorded[id(parameter)]):
                raise RevprobeError(
                    f"parameter {name!r} reaches the loss {edges} times, but only {recorded[id(parameter)]} calls of "
                    "its own module were seen: "
                    f"its weight is used outside its module; its gradient would be incomplete"
                )

    def _read(self, call: _Call, gradient: Tensor) -> dict[str, Use]:
        """The uses of a module's own parameters in one call."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        gradient, module = gradient.to(wide), call.module
        if not _has_rule(module):
            return _replay(call, gradient, self)
        if isinstance(module, nn.Embedding):
            return {"weight": _lookup(module, call.args[0] if call.args else call.kwargs["input"], gradient)}
        given = call.args[0] if call.args else call.kwargs["x" if isinstance(module, Conv1D) else "input"]
        inputs = given.detach().to(wide)
        inputs = inputs.expand(self.batch, *inputs.shape[1:]).reshape(self.batch, -1, inputs.shape[-1])
        gradient = gradient.reshape(self.batch, -1, gradient.shape[-1])
        gradient, inputs = _drop_silent_tokens(gradient, inputs)
        outer = OuterUse(inputs, gradient) if isinstance(module, Conv1D) else OuterUse(gradient, inputs)
        return {"weight": outer, "bias": FormedUse(gradient.sum(1), gradient.pow(2).sum((1, 2)))}

    def products(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """Inner products of the gradients of examples left[n] and right[n], for every parameter.

        Shapes: `pair, pair -> pair`, float32 or wider.
        """
        return {name: products(merged(uses), left, right) for name, uses in self._uses.items()}

    def rounding(self) -> dict[str, Tensor]:
        """The norm below which a gradient is rounding, for every parameter; see `gradient_products.rounding`.

        Shapes: `-> batch`.
        """
        named = zip(self._uses.items(), self.parameters.values(), strict=True)
        return {name: rounding(uses, self.batch, p.dtype, p.device) for (name, uses), p in named}


def _has_rule(module: nn.Module) -> bool:
    """Whether a closed rule covers the module; subclasses with a forward of their own are replayed instead."""
    plain = (type(module).forward is kind.forward for kind in (nn.Linear, nn.Embedding, Conv1D))
    return any(plain) and not (
        isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq)
    )


def _parameter_edges(loss: Tensor) -> Counter[int]:
    """How many edges of autograd's graph lead into each leaf tensor, by id."""
    edges: Counter[int] = Counter()
    assert loss.grad_fn is not None, "the loss has a graph"
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            if hasattr(following, "variable"):
                edges[id(following.variable)] += 1
            elif following not in seen:
                seen.add(following)
                stack.append(following)
    return edges


def _lookup(module: nn.Embedding, ids: Tensor, gradient: Tensor) -> LookupUse:
    ids = ids.expand(gradient.shape[:-1]).reshape(gradient.shape[0], -1)
    if module.padding_idx is not None:
        ids = ids.masked_fill(ids == module.padding_idx, -1)
    return LookupUse(ids, gradient.reshape(gradient.shape[0], -1, gradient.shape[-1]), module.num_embeddings)


def _drop_silent_tokens(gradient: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the tokens that carry gradient: the unembedding's readout rows, not the whole sequence."""
    loud = (gradient != 0).any(-1)
    keep = max(int(loud.sum(1).max()), 1)
    if keep == loud.shape[1]:
        return gradient, inputs
    order = loud.int().argsort(dim=1, descending=True, stable=True)[:, :keep, None]
    return gradient.gather(1, order.expand(-1, -1, gradient.shape[-1])), inputs.gather(
        1, order.expand(-1, -1, inputs.shape[-1])
    )


def _replay(call: _Call, gradient: Tensor, recorder: GradientRecorder) -> dict[str, Use]:
    """Per-example gradients of a module's own parameters, by a vector-Jacobian product vmapped over the batch."""
    own = {key: p for key, p in call.module._parameters.items() if p is not None}
    batched = [isinstance(a, Tensor) and a.dim() > 0 and a.shape[0] == gradient.shape[0] for a in call.args]
    varying = [a for a, b in zip(call.args, batched, strict=True) if b]

    def one_example(values: list[Tensor], cotangent: Tensor) -> dict[str, Tensor]:
        remaining = iter(values)
        args = [next(remaining)[None] if b else a for a, b in zip(call.args, batched, strict=True)]

        def forward(weights: dict[str, Tensor]) -> Tensor:
            return functional_call(call.module, weights, tuple(args), call.kwargs)[0]

        return vjp(forward, own)[1](cotangent)[0]

    recorder._replaying = True
    try:
        grads = vmap(one_example)(varying, gradient.to(call.output.dtype))
    finally:
        recorder._replaying = False
    return {
        key: FormedUse(g.flatten(1).to(gradient.dtype), g.flatten(1).pow(2).sum(1).to(gradient.dtype))
        for key, g in grads.items()
    }
