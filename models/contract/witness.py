"""Autograd as a witness: which embedded tokens reach some logits. What does not has a gradient of exactly zero."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .trial import Trial


class Reach(NamedTuple):
    """Whether logits of a row's own tokens have a gradient at other embedded tokens."""

    last: bool  # of the logits before the middle row's last token, at that token
    padding: bool  # of the middle row, behind its tokens
    other_rows: bool  # of any row, in another
    repeated: bool  # the same input gave the same logits as before; with gradient experts may be summed otherwise


def reached(trial: Trial, offset: int) -> Reach | None:
    """Run the padded batch (the plain one without) once more, with gradient; None where that cannot be asked.

    Args:
        offset: logits rows before that of the first token.
    """
    run, tokens = trial.padded or trial.plain, trial.tokens
    embedded: list[Tensor] = []

    def cut(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if embedded or not args or args[0].shape != run.ids.shape or not torch.equal(args[0], run.ids):
            return None
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    with ExitStack() as stack, torch.enable_grad():
        for part in trial.called.module.modules():
            if isinstance(part, nn.Embedding):
                stack.callback(part.register_forward_hook(cut).remove)
        try:
            again = trial.called.run(run.ids, run.mask)
            own = [again[row, offset : offset + (tokens if row == 1 else run.ids.shape[1])] for row in range(3)]
            at = [_gradient(logits, embedded[0]) for logits in (*own, own[1][:-1])]
        except (RuntimeError, ValueError, IndexError):  # no embedding was seen, weights on disk, a kernel without one
            return None
    others = any(bool(at[row][[other for other in range(3) if other != row]].any()) for row in range(3))
    moved = trial.moved(again.detach(), run.logits)
    return Reach(
        last=bool(at[3][1, tokens - 1].any()),
        padding=bool(at[1][1, tokens:].any()),
        other_rows=others,
        repeated=not moved or trial.may_be_rounding(moved),
    )


def _gradient(logits: Tensor, embedded: Tensor) -> Tensor:
    """Where some logits have a gradient. Shapes: `-> rows tokens (bool)`."""
    priced = logits[logits.isfinite()].double().square().sum()
    (gradient,) = torch.autograd.grad(priced, [embedded], retain_graph=True)
    return gradient.flatten(2).any(-1)
