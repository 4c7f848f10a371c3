"""Autograd as a witness: which embedded tokens reach some logits. What does not has a gradient of exactly zero."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .trial import Trial


class Reach(NamedTuple):
    """Whether the middle row's logits before its last token have a gradient at some embedded tokens."""

    last: bool
    padding: bool
    other_rows: bool
    repeated: bool  # the same input gave the same logits as before, to the bit


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
            logits = again[1, offset : offset + tokens - 1].double()
            priced = logits[logits.isfinite()].square().sum()
            (gradient,) = torch.autograd.grad(priced, embedded[:1])
        except (RuntimeError, ValueError):  # no embedding was seen, weights on disk, kernels without a gradient
            return None
    found = gradient.flatten(2).any(-1)
    return Reach(
        bool(found[1, tokens - 1]),
        bool(found[1, tokens:].any()),
        bool(found[[0, 2]].any()),
        torch.equal(again, run.logits),
    )
