"""A forward pass in which everything nonlinear is held, so that the logits are a sum over what was written into them.

Inside `hold_nonlinear(module, tokens, rows)` every operation that is not known to be linear hands on its value as a
constant of its own, a part; sums keep their summands apart, norms hold their scale, attention holds its pattern. The
logits do not change, and are affine in the parts: a logit is the sum over parts of (d logit / d part) . part, since
what stands between a part and the logit is linear. Autograd knows those derivatives, so no module is named anywhere:
what is found is how the model was run. An operation missing from the list of linear ones costs detail (its whole
output becomes one part); one that should not be on it breaks the sum, which callers must hold against the logit.

A part is one of: an embedding's rows (`embed` for tokens, `position` for the others), a constant that is added
(`bias`), the mean that a norm subtracts (`norm`), an attention call's output by head, and whatever else is nonlinear
(`mlp`: activations, and products of two computed tensors). Where the last layer's state is named, nothing behind it is
held: what follows runs as it is, norms too, so that autograd's derivative by that state is the model's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import RevprobeError
from .attention_calls import (
    FunctionMode,
    at_rows,
    call_rows,
    canonical,
    is_attention_call,
    its_path,
    matrix_rows,
    running_modules,
    sdpa_call,
    softmaxed,
    weights_of,
)
from .attention_sites import Attention, AttentionSite
from .gradients.spread_weights import require_whole
from .linearized_pass import LinearizedAttention, LinearizedPass, Part
from .states import StateSite, change_states
from .token_tables import TokenLookups, embedding_call, lookup

# Linear in the one tensor that varies; shapes, casts, sums and selections. "__get__" is an attribute (.mT, .shape).
# fmt: off
_LINEAR = frozenset([
    "__get__", "__getitem__", "__setitem__", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten",
    "transpose", "permute", "t", "contiguous", "squeeze", "unsqueeze", "expand", "expand_as", "narrow", "select",
    "chunk", "split", "tensor_split", "unbind", "movedim", "swapaxes", "cat", "stack", "concat", "repeat",
    "concatenate", "repeat_interleave", "roll", "to", "float", "double", "half", "bfloat16", "type", "type_as",
    "clone", "detach",
    "sum", "neg", "masked_fill", "where", "gather", "index_select", "index_add", "index_add_", "dropout",
    "requires_grad_", "size", "dim", "numel", "stride", "is_contiguous",
])
_SUMS = frozenset([
    "add", "sub", "rsub", "add_", "sub_", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__",
])
_PRODUCTS = frozenset([
    "mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "div", "div_", "divide", "true_divide", "__truediv__",
])
# fmt: on
_MATRIX_PRODUCTS = frozenset(["matmul", "__matmul__", "bmm", "mm"])
# How far a pattern may be from the softmax it comes from (bfloat16 has three digits).
_PATTERN_SLACK = 1e-2


@contextmanager
def hold_nonlinear(
    module: nn.Module,
    tokens: TokenLookups,
    rows: Tensor,
    attention: Attention,
    last: StateSite | None = None,
    *,
    apart: bool = True,
) -> Iterator[LinearizedPass]:
    """Hold everything nonlinear of a forward pass while open; patterns are kept at `rows` (`batch rows`).

    `tokens` says which lookups of the run are by token. Rows that are looked up once for the whole batch, as positions
    are, become a part for each example, or, not `apart`, do so only where they are added. `attention` is what a look at
    the module found: those calls alone are taken for attention. Where `last` is given, the last layer's state, what
    follows it is not held: logits are then affine in the parts up to that state alone.

    Parameters do not ask for gradient inside (their flags are restored); logits computed here carry the graph from
    the parts. Adds hooks to the module tree and removes exactly those.

    Raises: RevprobeError, for weights spread over processes.
    """
    require_whole(module, "an attribution of logits")
    held = LinearizedPass()
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        with (
            torch.enable_grad(),
            running_modules(module, its_path) as running,
            change_states(module, {} if last is None else {last: held.note_last}),
            FunctionMode(_Holding(held, rows, running, tokens.again(), attention, apart).make),
        ):
            yield held
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


class _Holding:
    """Runs linear functions as they are, and cuts the graph behind every other."""

    def __init__(
        self,
        held: LinearizedPass,
        rows: Tensor,
        running: list[str],
        tokens: TokenLookups,
        attention: Attention,
        apart: bool,
    ) -> None:
        self.held, self.rows, self.running, self.tokens, self.attention = held, rows, running, tokens, attention
        self.apart, self.shared = apart, list[Tensor]()  # looked up once for the whole batch
        self.calls: Counter[str] = Counter()  # of each module: SDPA calls and softmaxes
        self.patterns: list[tuple[AttentionSite, Tensor, Tensor]] = []  # softmaxes whose values have not come yet

    def make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.held.last is not None:  # behind the last layer nothing is held
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        site = self._next_site() if is_attention_call(func) else None
        if (looked := lookup(func, args, kwargs)) is not None:
            by_token = self.tokens.by_token(func, looked[0], self.running)
            if by_token and (name == "embedding" or not _varying((args, kwargs))):
                return self._part("embed", func(*args, **kwargs))
        if name == "embedding":
            return self._embedding(func, args, kwargs)
        if not _varying((args, kwargs)):
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and site is not None:
            return self._sdpa(site, sdpa_call(args, kwargs))
        if name in _RULES:
            return _RULES[name](self, func, args, kwargs)
        if name in _LINEAR:
            return self._seen(func(*args, **kwargs))
        if site is not None and (softmax := softmaxed(func, args, kwargs)) is not None:
            self._keep_pattern(site, softmax[0].detach())
        return self._cut(func, args, kwargs)

    def _next_site(self) -> AttentionSite | None:
        turn, self.calls[self._site] = self.calls[self._site], self.calls[self._site] + 1
        site = self.attention.at(self._site, turn)
        if site is not None and any(site.extra):
            raise RevprobeError(
                f"{site.path} attends to {site.extra[1]} keys beside the query's tokens, so its output is no sum over "
                "tokens"
            )
        return site

    # ---- making parts ----

    def _part(self, kind: str, values: Tensor, function: str = "") -> Tensor:
        """A new part. The clone lets the model write into what it is given."""
        leaf = values.detach().requires_grad_()
        self.held.parts.append(Part(kind, self._site, function or kind, leaf))
        return self._seen(leaf.clone())

    @property
    def _site(self) -> str:
        return self.running[-1] if self.running else ""

    def _seen(self, result: Any) -> Any:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self.held.eps = max(self.held.eps, torch.finfo(leaf.dtype).eps)
        return result

    def _cut(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Not known to be linear: every output that varies becomes a part."""
        name = getattr(func, "__name__", "a function")
        kind = "norm" if name == "mean" else "mlp"
        part = lambda leaf: self._part(kind, leaf, name) if _varying(leaf) else leaf  # noqa: E731
        return tree_map(part, func(*args, **kwargs))

    def _embedding(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        ids, weight, given = embedding_call(args, kwargs)
        if ids.dim() == 1 or (ids.dim() == 2 and ids.shape[0] == 1):
            # Positions come as one row for the whole batch; a part must tell its examples apart.
            if not self.apart:
                self.shared.append(func(ids, weight, **given))
                return self.shared[-1]
            ids = ids.expand(len(self.rows), -1)
        return self._part("position", func(ids, weight, **given))

    # ---- functions with a rule of their own ----

    def _sum(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """a + b: a summand that does not vary is a part of its own."""
        if len(args) < 2:
            return self._cut(func, args, kwargs)
        shape = torch.broadcast_shapes(*(getattr(a, "shape", ()) for a in args[:2]))
        varying = next(a for a in args[:2] if _varying(a))
        sides = [a if _varying(a) else self._constant(a, shape, varying) for a in args[:2]]
        return self._seen(func(*sides, *args[2:], **kwargs))

    def _constant(self, constant: Any, shape: Sequence[int], like: Tensor) -> Tensor:
        values = constant if isinstance(constant, Tensor) else torch.tensor(constant, dtype=like.dtype)
        kind = "position" if any(_same_storage(values, rows) for rows in self.shared) else "bias"
        values = values.to(like.device) if values.is_floating_point() else values.to(like)
        return self._part(kind, values.expand(shape).clone())

    def _product(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """a * b, a / b: linear if one varies; one number per position is a scale, and is held; else a part."""
        if len(args) < 2:
            return self._cut(func, args, kwargs)
        first, second, *rest = args
        if _varying(first) and _varying(second):
            if _is_scale(second, first):
                second = second.detach()
            elif _is_scale(first, second) and "div" not in func.__name__:
                first = first.detach()
            else:
                return self._cut(func, args, kwargs)
        elif _varying(second) and "div" in func.__name__:
            return self._cut(func, args, kwargs)
        return self._seen(func(first, second, *rest, **kwargs))

    def _matrix_product(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """a @ b: linear if one varies; a pattern times its values is attention written by hand."""
        if len(args) != 2 or not (_varying(args[0]) and _varying(args[1])):
            return self._seen(func(*args, **kwargs))
        pattern = self._pattern(args[0].detach())
        if pattern is not None:
            return self._pattern_times_value(pattern, *args)
        return self._cut(func, args, kwargs)

    def _linear(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
        if not _varying(given["input"]) or _varying(given["weight"]):
            return self._cut(func, args, kwargs)
        return self._with_bias(func(given["input"], given["weight"]), given.get("bias"))

    def _addmm(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """bias + x @ weight, as transformers' Conv1D writes it."""
        if kwargs or len(args) != 3 or _varying(args[0]) or _varying(args[2]):
            return self._cut(func, args, kwargs)
        return self._with_bias(args[1] @ args[2], args[0])

    def _with_bias(self, result: Tensor, bias: Tensor | None) -> Tensor:
        return self._seen(result if bias is None else result + self._part("bias", bias.expand(result.shape).clone()))

    def _layer_norm(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """(x - mean) / deviation * weight + bias with mean and bias as parts and the deviation held."""
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        states = given["input"]
        if len(given["normalized_shape"]) != 1:
            return self._cut(func, args, kwargs)
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        variance = wide.detach().var(-1, keepdim=True, correction=0)
        scale = (variance + given.get("eps", 1e-5)).rsqrt()
        normed = ((wide - self._part("norm", wide.mean(-1, keepdim=True))) * scale).to(states.dtype)
        weight = given.get("weight")
        return self._with_bias(normed if weight is None else normed * weight, given.get("bias"))

    def _rms_norm(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | dict(kwargs)
        states = given["input"]
        if len(given["normalized_shape"]) != 1:
            return self._cut(func, args, kwargs)
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        eps = torch.finfo(states.dtype).eps if given.get("eps") is None else given["eps"]
        scale = (wide.detach().square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = (wide * scale).to(states.dtype)
        weight = given.get("weight")
        return self._seen(normed if weight is None else normed * weight)

    # ---- attention ----

    def _sdpa(self, site: AttentionSite, call: dict[str, Any]) -> Tensor:
        # A learned bias arrives in the mask: like query and key it moves the pattern alone, which is held.
        scored = ("query", "key", "attn_mask")
        call |= {name: call[name].detach() for name in scored if call.get(name) is not None}
        mixed = F.scaled_dot_product_attention(**(call | {"value": call["value"].detach()}))
        own, by_head = canonical(call, site.layout, len(self.rows)), site.layout.flat(mixed, len(self.rows))
        assert own is not None and by_head is not None, "the layout that was found"
        score = call_rows(own, self.rows)
        return site.layout.back(self._attention(site, own["value"], by_head, weights_of(score), score.isneginf()))

    def _keep_pattern(self, site: AttentionSite, scores: Tensor) -> None:
        """The weights of a softmax, and what the mask hides: a weight of 0 may as well have underflowed."""
        flat = site.layout.flat(scores, len(self.rows))
        if flat is not None and flat.shape[2] > int(self.rows.max()):
            hidden = matrix_rows(flat, self.rows).isneginf()
            self.patterns.append((site, flat.float().softmax(-1), hidden))

    def _pattern(self, weights: Tensor) -> tuple[AttentionSite, Tensor] | None:
        """The site and the hidden cells of the softmax that these weights come from."""
        if not _is_square(weights, len(self.rows)):
            return None
        weights = weights.reshape(len(self.rows), -1, *weights.shape[-2:]).float()
        for place, (site, known, hidden) in enumerate(self.patterns):
            if known.shape == weights.shape and torch.allclose(known, weights, rtol=0, atol=_PATTERN_SLACK):
                del self.patterns[place]
                return site, hidden
        return None

    def _pattern_times_value(self, found: tuple[AttentionSite, Tensor], pattern: Tensor, value: Tensor) -> Tensor:
        batch = len(self.rows)
        mixed = pattern.detach() @ value.detach()
        weight = at_rows(pattern.detach().reshape(batch, -1, *pattern.shape[-2:]), self.rows)
        value, by_head = (t.reshape(batch, -1, *t.shape[-2:]) for t in (value, mixed))
        site, hidden = found
        return self._attention(site, value, by_head, weight, hidden).reshape(mixed.shape)

    def _attention(self, site: AttentionSite, value: Tensor, mixed: Tensor, weight: Tensor, hidden: Tensor) -> Tensor:
        output = mixed.detach().requires_grad_()
        call = LinearizedAttention(site.path, site.layer, site.first_head, value, output, weight, hidden)
        self.held.attention.append(call)
        return self._seen(output.clone())


_RULES: dict[str, Any] = {
    **dict.fromkeys(_SUMS, _Holding._sum),
    **dict.fromkeys(_PRODUCTS, _Holding._product),
    **dict.fromkeys(_MATRIX_PRODUCTS, _Holding._matrix_product),
    "linear": _Holding._linear,
    "addmm": _Holding._addmm,
    "layer_norm": _Holding._layer_norm,
    "rms_norm": _Holding._rms_norm,
}


def _varying(values: Any) -> bool:
    """Whether a tensor that depends on a part is among the (nested) arguments."""
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(values))


def _same_storage(one: Tensor, other: Tensor) -> bool:
    """Whether one is a view of the other, or both of a third."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _is_scale(factor: Tensor, states: Tensor) -> bool:
    """One number per position beside many: what a norm multiplies or divides by."""
    return factor.dim() > 0 and factor.shape[-1] == 1 and states.shape[-1] > 1


def _is_square(values: Tensor, batch: int) -> bool:
    """Whether these are squares of positions for each example and head, which may be folded into one axis."""
    return values.dim() in (3, 4) and values.shape[-1] == values.shape[-2] and not values.shape[0] % batch
