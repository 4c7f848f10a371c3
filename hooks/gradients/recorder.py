"""Per-example gradient products: inner products of many parameter gradients without forming a gradient.

The gradient of a Linear weight for one example is sum_t g_t (x) a_t, with a_t the input and g_t the gradient of
the loss with respect to the output at token t. So the inner product of two examples' gradients is
sum_{t,s} (a_t . a_s) (g_t . g_s): one batched forward pass and one backward pass over activations give the
factors of every example, and the weights need no gradient. Embeddings match token ids in place of (a_t . a_s); a
parameter used several times (tied unembedding, shared layers) gets the cross terms between its uses; every other
module that holds parameters is replayed through a vmapped vector-Jacobian product. What none of this tells apart is
read one example at a time.

    with record_gradients(module, parameters, batch) as recorder:
        loss = per_example_loss(module(...))                    # shape: batch
        found = recorder.backward(loss, left, right)
    found.inner, found.floor                                    # label -> tensor

Exactness is checked against autograd: a parameter that the loss reaches by a path no rule has seen, or whose
module's rows cannot be given to their examples, is among `recorder.unread`, with the reason.

Shapes below: batch, seq, out (rows of a weight), in (columns of a weight).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...errors import RevprobeError
from .backward import Adopted, Parts, Products, Recorded, Selection, read_backward
from .graph import NOTHING_REACHED, Call, Output, completeness, fed_without_gradient, sources, versions
from .one_by_one import LossOf, read_one_by_one
from .order import find_order
from .rules import carries_gradient, has_rule, lookup_scale
from .spread_weights import WholeWeights
from .walk import spread_over


@contextmanager
def record_gradients(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: int,
    *,
    parts: Parts | None = None,
    adopted: Adopted | None = None,
    loss_of: LossOf | None = None,
    unread: dict[str, str] | None = None,
    weights: WholeWeights | None = None,
) -> Iterator[GradientRecorder]:
    """Record what is needed for the per-example gradients of `parameters` during one forward pass of `batch` examples.

    While open, the parameters require grad (so that the check against autograd's graph sees them) and modules
    have hooks; both are undone on leaving.
    Args:
        parts: for a fused parameter, the output features of each of its parts, {name: {"q": indices, ...}}; its
            products then come apart under "name[q]" and so on.
        adopted: parameters of modules that are not called, by the module that uses them; see `adopted_parameters`.
        loss_of: the loss of one example run by itself, for the parameters that the batch does not tell apart; without
            it they are an error.
        unread: parameters known to be such ones, and why; those found are added.
        weights: the module's, where they were asked for before; `parameters` are whole ones.
    Raises: RevprobeError, for no parameters.
    """
    if not parameters:
        raise RevprobeError("no parameter was selected, so there is no gradient; check parameters= and layers=")
    weights = weights or WholeWeights(module)
    selection = Selection(dict(parameters), parts or {}, adopted or {}, weights)
    recorder = GradientRecorder(module, selection, batch, loss_of, {} if unread is None else unread)
    flags = [(p, p.requires_grad) for p in module.parameters()]
    recorder.frozen = {id(weights.of(p)) for p, flag in flags if not flag}
    selected = {id(p) for p in parameters.values()}
    try:
        for p, _ in flags:
            p.requires_grad_(id(weights.of(p)) in selected and p.is_floating_point())
        recorder.attach()
        yield recorder
    finally:
        recorder.detach()
        for p, flag in flags:
            p.requires_grad_(flag)
        weights.let_go()


class GradientRecorder:
    """The factors of per-example gradients of one batch, and their inner products.

    `unread`: the parameters that are read one example at a time, and why; `reached`: those that the loss reaches.
    """

    def __init__(
        self, module: nn.Module, selection: Selection, batch: int, loss_of: LossOf | None, unread: dict[str, str]
    ) -> None:
        self.module, self.batch, self.unread = module, batch, unread
        self.reached: list[str] = []
        self._selection, self._loss_of = selection, loss_of
        self._names = {key: name for key, name in selection.names.items() if name not in unread}
        self._calls: list[Call] = []
        self._returned: list[Output] = []  # by the whole model
        self._handles: list[Any] = []
        self.frozen: set[int] = set()  # parameters that were so before, by id
        self._replaying = False  # modules run to be replayed are not recorded
        self._reading = False  # nor those that run in the backward pass

    def attach(self) -> None:
        for name, child in self.module.named_modules():
            if any(id(p) in self._names for p in self._answers_for(name, child).values()):
                # Before the hooks of others: what they do to the output comes after the module.
                self._handles.append(child.register_forward_hook(self._hook(name), with_kwargs=True, prepend=True))
        self._handles.append(self.module.register_forward_hook(self._keep_returned))

    def _keep_returned(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._replaying and not self._reading:
            leaves = [leaf for leaf in tree_flatten(output)[0] if carries_gradient(leaf) and leaf.requires_grad]
            self._returned += [Output(leaf, keep=False) for leaf in leaves]

    def _answers_for(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters a module holds, and those it uses of children that are not called."""
        own = {key: self._selection.weights.of(p) for key, p in module._parameters.items() if p is not None}
        return own | dict(self._selection.adopted.get(name, {}))

    def _aliases(self, name: str, module: nn.Module, own: dict[str, nn.Parameter]) -> dict[str, str]:
        """Other paths to a module's own parameters, where it uses them itself: in children that were not called.

        A child that was called is recorded by itself (BERT's decoder and its head's bias; MobileBERT's head adds the
        decoder's bias without calling the decoder).
        """
        if next(module.children(), None) is None:
            return {}
        keys, called = {id(p): key for key, p in own.items()}, {call.name for call in self._calls}
        whole = self._selection.weights.of
        paths = ((path, keys.get(id(whole(p)))) for path, p in module.named_parameters(remove_duplicate=False))
        holder = lambda path: f"{name}.{path}".lstrip(".").rpartition(".")[0]  # noqa: E731
        return {path: key for path, key in paths if key and path not in own and holder(path) not in called}

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
        # The parameter itself may come out of a module: others may reach it too.
        kept = [leaf.view_as(leaf) if carries_gradient(leaf) and leaf.is_leaf else leaf for leaf in leaves]
        if sum(map(carries_gradient, kept)) > 1:
            # One output may be made of another inside the module (a router's scores of its logits): as views, each
            # has the gradient of what comes after the module alone.
            kept = [leaf.view_as(leaf) if carries_gradient(leaf) else leaf for leaf in kept]
        if not self._reading:  # gradient checkpointing runs modules again in the backward pass
            scale = lookup_scale(module, next(iter((*args, *kwargs.values())), None), output)
            inputs, cut = sources(args, kwargs), fed_without_gradient(args, kwargs)
            args, kwargs = tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, (args, kwargs))
            closed = name not in self._selection.adopted and (scale is not None or has_rule(module))
            outputs = [Output(leaf, keep=not closed) for leaf in kept if carries_gradient(leaf)]
            own, given = self._answers_for(name, module), versions(args, kwargs)
            aliases = self._aliases(name, module, own)
            about = (args, kwargs, outputs, scale, inputs, cut, closed, given, aliases)
            self._calls.append(Call(module, name, own, *about))
        return tree_unflatten(kept, structure)

    def backward(self, loss: Tensor, left: Tensor, right: Tensor) -> Products:
        """Take the gradients of `loss.sum()`, and the inner products of those of examples left[n] and right[n].

        Shapes: `loss`: `batch`; `left`, `right`: `pair`.
        Raises: RevprobeError, when the loss is not one number per example, no selected parameter reaches it, a
            module that ran is cut off from it, a gradient is not finite, or (without `loss_of`) a parameter's
            gradient cannot be told apart by example.
        """
        if loss.shape != (self.batch,):
            raise RevprobeError(
                f"loss of shape {tuple(loss.shape)}: expected one number for each of the {self.batch} examples"
            )
        try:
            found = self._from_the_batch(loss, (left, right))
        finally:
            self._reading = False
            self._calls.clear()
            self._returned.clear()
        if names := [name for name in self._selection.parameters if name in self.unread]:
            if self._loss_of is None:
                raise RevprobeError(self.unread[names[0]])
            with self._unrecorded():
                alone = read_one_by_one(self.module, self._selection, names, self._loss_of, (left, right), self.batch)
            found = Products(found.inner | alone.inner, found.floor | alone.floor)
        return Products(*({label: side[label] for label in self._selection.owners} for side in found))

    def _from_the_batch(self, loss: Tensor, pairs: tuple[Tensor, Tensor]) -> Products:
        """All but the unread ones."""
        parameters = self._selection.parameters
        known = {name: p for name, p in parameters.items() if name not in self.unread}
        complete = completeness(self._calls, known, loss, self.frozen) if loss.grad_fn is not None else NOTHING_REACHED
        self.reached = [name for name in parameters if name in complete.reached or name in self.unread]
        if loss.grad_fn is None or not self.reached:
            ran = (
                f"module {self._calls[0].name!r} ran, but is detached from it"
                if self._calls
                else "no module of them ran"
            )
            raise RevprobeError(
                f"the loss reaches none of the selected parameters: {ran}; select others or check the model"
            )
        self.unread |= complete.unread
        self._reading = True
        spread = spread_over(self._calls, loss)
        order = find_order(self.module, self._calls, loss, spread, self._returned)
        for output in (output for call in self._calls for output in call.outputs):
            output.forget()
        recorded = Recorded(self._calls, loss, order, spread, self.unread)
        return read_backward(self._selection, recorded, pairs, self._unrecorded)

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Run modules again without recording them."""
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False
