"""What the three probes should say of a model, worked out with nothing of the package: each query run by itself.

Probabilities are a log-softmax in float64, gradients `torch.autograd.grad` over all parameters, attention weights those
that the model returns from its eager attention (or its own softmax gives, where it returns none). A score is known from
weights up to a constant of its row, so differences of two columns are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Asked(NamedTuple):
    """One query: what the model sees, what is asked at which row, and two columns of evidence."""

    seen: list[int]
    target: int
    row: int
    columns: tuple[int, int]


class Gradients(NamedTuple):
    """Products over all parameters of two queries: of the two, and of each with itself."""

    inner: float
    first: float
    second: float


def log_probability(module: nn.Module, asked: Asked) -> Tensor:
    """Log-probability of the target in float64, nats; a prompt's rows stand before the tokens'."""
    logits = _run(module, asked)["logits"][0, -len(asked.seen) :]
    return logits[asked.row].double().log_softmax(-1)[asked.target]


def gradient_of(module: nn.Module, asked: Asked) -> list[Tensor | None]:
    """The gradient of the negative log-likelihood, of all parameters; None where it does not reach."""
    parameters = list(module.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(p.is_floating_point())
    try:
        return list(torch.autograd.grad(-log_probability(module, asked), parameters, allow_unused=True))
    finally:
        for p in frozen:
            p.requires_grad_(False)


def products(one: list[Tensor | None], other: list[Tensor | None]) -> Gradients:
    """Inner products of two queries' gradients."""

    def inner(a: list[Tensor | None], b: list[Tensor | None]) -> float:
        both = ((x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None)
        return sum(float((x.double() * y.double()).sum()) for x, y in both)

    return Gradients(inner(one, other), inner(one, one), inner(other, other))


def eager_copy(module: Any) -> nn.Module:
    """The same weights under the class's eager attention."""
    copied = copy.deepcopy(module)
    inner = copied.get_base_model() if hasattr(copied, "get_base_model") else copied
    if not hasattr(inner, "set_attn_implementation"):
        return copied
    inner.config = copy.deepcopy(inner.config)
    inner.set_attn_implementation("eager")
    if inner.config._attn_implementation == "eager" or inner is not copied:
        return copied
    # Classes that choose their attention when they are made (Falcon, where the option alone would drop the mask).
    made = type(module)._from_config(copy.deepcopy(module.config), attn_implementation="eager")
    made.load_state_dict(module.state_dict())
    return made.eval()


def same_model(one: nn.Module, other: nn.Module, asked: Asked) -> bool:
    """Whether two modules give the same logits, so that the attention of one is that of the other."""
    with torch.no_grad():
        first, second = (_run(module, asked)["logits"].double() for module in (one, other))
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3)


def attention_weights(eager: nn.Module, asked: Asked) -> list[Tensor]:
    """The attention of the readout row to the evidence columns, layer by layer.

    Shapes: each `heads columns`.
    """
    length = len(asked.seen)
    with torch.no_grad(), _Softmax(length) as softmax:
        try:
            out = _run(eager, asked, output_attentions=True)
        except (TypeError, ValueError, AttributeError):  # a class that does not know the option
            out = _run(eager, asked)
    found: list[Tensor] = []
    for name in ("attentions", "encoder_attentions", "decoder_attentions"):
        found += list(_tables(out.get(name), length))
    return [table[0, :, -length + asked.row, :][:, list(_from_end(asked, length))] for table in found or softmax.seen]


def _from_end(asked: Asked, length: int) -> Iterator[int]:
    """Columns counted from the end, since a prompt's stand before the tokens'."""
    return (column - length for column in asked.columns)


def _tables(given: Any, length: int) -> Iterator[Tensor]:
    """Attention from the tokens to themselves, and to what stands before them."""
    for table in given or ():
        sized = isinstance(table, Tensor) and table.dim() == 4 and table.shape[2] >= length <= table.shape[3]
        # Linear attention returns products here that are no shares of anything.
        if sized and bool((table >= 0).all()) and float(table.sum(-1).max()) < 1.001:
            yield table


class _Softmax(TorchFunctionMode):
    """Keeps what a softmax over `heads x tokens x tokens` gives."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.seen = length, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        softmax = func in (torch.softmax, nn.functional.softmax, Tensor.softmax)
        if softmax and out.dim() == 4 and out.shape[2] >= self.length <= out.shape[3]:
            self.seen.append(out)
        return out


def _run(module: nn.Module, asked: Asked, **options: Any) -> Any:
    out = module(input_ids=torch.tensor([asked.seen]), **options)
    return out if hasattr(out, "get") else {"logits": out[0] if isinstance(out, tuple) else out}
