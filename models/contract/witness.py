"""Autograd as a witness: which embedded tokens reach some logits. What does not has a gradient of exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .called import CalledModule
from .trial import Trial

Asked = TypeVar("Asked")


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
    run = trial.padded or trial.plain
    found = with_gradient(
        trial.called, run.ids, run.mask, lambda out, embedded: (out, _reach(out[:, offset:], embedded, trial.tokens))
    )
    if found is None:
        return None
    again, reach = found
    moved = trial.moved(again.detach(), run.logits)
    return Reach(*reach, repeated=not moved or trial.may_be_rounding(moved))


def with_gradient(
    called: CalledModule, ids: Tensor, mask: Tensor | None, asked: Callable[[Tensor, Tensor], Asked]
) -> Asked | None:
    """What is asked of a run's logits and its embedded tokens, which carry gradient; None where that cannot be had."""
    embedded: list[Tensor] = []
    words = ids < called.vocab_size  # ids beyond stand for random tokens (`canvas.noise`), which are embedded instead

    def cut(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if embedded or not args or args[0].shape != ids.shape:
            return None
        if not torch.equal(args[0][words], ids[words]):
            return None
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    with ExitStack() as stack, torch.enable_grad():
        for part in called.module.modules():
            if isinstance(part, nn.Embedding):
                stack.callback(part.register_forward_hook(cut).remove)
        try:
            return asked(called.run(ids, mask), embedded[0])
        except Exception:  # no embedding seen, weights on disk, a module that will not run so (Reformer in eval mode)
            return None


def _reach(logits: Tensor, embedded: Tensor, tokens: int) -> tuple[bool, bool, bool]:
    """Later tokens, padding and other rows, from four backward passes. The middle row has `tokens` tokens."""
    width = embedded.shape[1]
    lengths = [width, tokens, width]
    own = [reaching([logits[row, : lengths[row]]], embedded) for row in (0, 1)]
    others = any(bool(at[[other for other in range(3) if other != row]].any()) for row, at in enumerate(own))
    later = False
    for wanted in ((1, tokens - 1, width // 2), (width - 1, 2, width // 4)):
        cuts = [min(max(cut, 1), length - 1) for cut, length in zip(wanted, lengths, strict=True)]
        at = reaching([logits[row, :cut] for row, cut in enumerate(cuts)], embedded)
        later |= any(bool(at[row, cut : lengths[row]].any()) for row, cut in enumerate(cuts))
    return later, bool(own[1][1, tokens:].any()), others


def reaching(logits: Sequence[Tensor], embedded: Tensor) -> Tensor:
    """Where some logits have a gradient beyond its own rounding. Shapes: `-> rows tokens (bool)`."""
    priced = torch.stack([part[part.isfinite()].double().square().sum() for part in logits]).sum()
    (gradient,) = torch.autograd.grad(priced, [embedded], retain_graph=True)
    size = gradient.detach().nan_to_num(0.0).abs().flatten(2).amax(-1)
    return size > torch.finfo(gradient.dtype).eps * size.max()
