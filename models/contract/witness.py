"""Autograd as a witness: which embedded tokens reach some logits. What does not has a gradient of exactly zero."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .trial import Trial


class Reach(NamedTuple):
    """Whether logits of a row's own tokens have a gradient at other embedded tokens, beyond its rounding."""

    later: bool  # of the logits before some token, at that token or behind it
    padding: bool  # of the middle row, behind its tokens
    other_rows: bool  # of a row, in another
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
            reach = _reach(again[:, offset:], embedded[0], tokens)
        except Exception:  # no embedding seen, weights on disk, a module that will not run so (Reformer in eval mode)
            return None
    moved = trial.moved(again.detach(), run.logits)
    return Reach(*reach, repeated=not moved or trial.may_be_rounding(moved))


def _reach(logits: Tensor, embedded: Tensor, tokens: int) -> tuple[bool, bool, bool]:
    """Later tokens, padding and other rows, from four backward passes. The middle row has `tokens` tokens."""
    width = embedded.shape[1]
    lengths = [width, tokens, width]
    own = [_gradient([logits[row, : lengths[row]]], embedded) for row in (0, 1)]
    others = any(bool(at[[other for other in range(3) if other != row]].any()) for row, at in enumerate(own))
    later = False
    for wanted in ((1, tokens - 1, width // 2), (width - 1, 2, width // 4)):
        cuts = [min(max(cut, 1), length - 1) for cut, length in zip(wanted, lengths, strict=True)]
        at = _gradient([logits[row, :cut] for row, cut in enumerate(cuts)], embedded)
        later |= any(bool(at[row, cut : lengths[row]].any()) for row, cut in enumerate(cuts))
    return later, bool(own[1][1, tokens:].any()), others


def _gradient(logits: Sequence[Tensor], embedded: Tensor) -> Tensor:
    """Where some logits have a gradient beyond its own rounding. Shapes: `-> rows tokens (bool)`."""
    priced = torch.stack([part[part.isfinite()].double().square().sum() for part in logits]).sum()
    (gradient,) = torch.autograd.grad(priced, [embedded], retain_graph=True)
    size = gradient.detach().nan_to_num(0.0).abs().flatten(2).amax(-1)
    return size > torch.finfo(gradient.dtype).eps * size.max()
