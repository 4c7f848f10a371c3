"""What a forward pass with everything nonlinear held consists of: its parts, and its attention calls.

`hooks.linearize` fills these while the model runs; `probes.passes.decomposition` takes logits apart by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import RevprobeError


@dataclass(frozen=True)
class Part:
    """A constant of the linearized pass.

    `kind`: embed, position, bias, norm or mlp; `site`: the path of the module that ran, `function`: what it
    called; `values`: a leaf of autograd's graph whose first axis is (or begins with) the batch.
    """

    kind: str
    site: str
    function: str
    values: Tensor

    def shares(self, gradient: Tensor, batch: int) -> Tensor:
        """Its share of each example's logit. Shapes: `values, -> batch`, float32 or wider.

        Raises: RevprobeError, when its first axis does not tell the examples apart.
        """
        if self.values.shape[0] % batch:
            raise RevprobeError(
                f"{self.site or 'the model'} gives {tuple(self.values.shape)} for {batch} examples, so they cannot be "
                "told apart; use batch_size=1"
            )
        wide = torch.promote_types(self.values.dtype, torch.float32)
        return (gradient.to(wide) * self.values.detach().to(wide)).reshape(batch, -1).sum(1)


@dataclass(frozen=True)
class LinearizedAttention:
    """One attention call with its pattern held; `site`: its module's path, `first_head`: of its heads, in its layer.

    Shapes: `value`: `batch kv_heads seq dim`, carries the graph of how it was made from earlier parts; `output`:
    `batch heads seq dim`, a leaf; `weight`, `hidden`: `batch heads rows seq`, the pattern at the rows asked for and
    what the mask keeps from them.
    """

    site: str
    layer: int
    first_head: int
    value: Tensor
    output: Tensor
    weight: Tensor
    hidden: Tensor

    def by_head(self, values: Tensor) -> Tensor:
        """One copy of a key-value head for each head that reads it. Shapes: `batch kv_heads ... -> batch heads ...`."""
        return values.repeat_interleave(self.output.shape[1] // values.shape[1], dim=1)


@dataclass
class LinearizedPass:
    """The parts and attention calls of one held forward pass, in the order they were made.

    `eps`: rounding unit of the coarsest dtype that the residual stream passed through. `last`: the last layer's state,
    with its graph, where what follows it is not held.
    """

    parts: list[Part] = field(default_factory=list)
    attention: list[LinearizedAttention] = field(default_factory=list)
    eps: float = 0.0
    last: Tensor | None = None

    def note_last(self, state: Tensor) -> None:
        """Keep the last layer's state."""
        self.last = state


def push_forward(output: Tensor, inputs: list[Tensor], directions: list[Tensor]) -> Tensor:
    """How a tensor that is affine in `inputs` moves along `directions`: the transpose of the transpose.

    Backward is linear in what it is given, so differentiating it by that gives the forward map; forward-mode autograd
    would have to be on while the model ran. Shapes: `-> output`.
    """
    given = torch.zeros_like(output, requires_grad=True)
    gradients = torch.autograd.grad(output, inputs, given, create_graph=True)
    total = torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
    return torch.autograd.grad(total, given)[0].detach()
