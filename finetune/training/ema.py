"""The exponential moving average of the weights, which RADD samples from and its readings are reported on.

torch's `AveragedModel` does the averaging; this file adds the decay warm-up of score-based diffusion code and the
saving beside a checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ...errors import RevprobeError, first_line
from ...hooks.untouched import set_eval_mode

Tensors = list[Tensor] | tuple[Tensor, ...]


def warmed_decay(decay: float, updates: int) -> float:
    """The decay of update number `updates`: min(decay, (1 + n) / (10 + n)).

    Without the warm-up a decay of 0.9999 would still hold a third of the random initial weights after 10,000 steps.

    >>> warmed_decay(0.9999, 90)
    0.91

    Source: score_sde (Song et al. 2021) and RADD, `ema.py`.
    """
    return min(decay, (1 + updates) / (10 + updates))


class MovingAverage(AveragedModel):
    """An average of a model's weights: average = d * average + (1 - d) * weights after each optimizer step.

    `.module` is the averaged model (in eval mode), `.n_averaged` the number of updates, which equals the training
    step. The first update copies the weights, as torch's AveragedModel does.

    Raises: RevprobeError, for a decay outside (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise RevprobeError(f"ema decay {decay!r}: expected a number between 0 and 1, such as 0.999")
        super().__init__(model, multi_avg_fn=self._blend)
        self.decay = decay
        set_eval_mode(self.module)

    @torch.no_grad()
    def _blend(self, averaged: Tensors, current: Tensors, n_averaged: Tensor | int) -> None:
        d = warmed_decay(self.decay, int(n_averaged) + 1)
        torch._foreach_lerp_(averaged, current, 1 - d)

    def save(self, folder: Path, tokenizer: Any = None) -> None:
        """Write the averaged model so that `from_pretrained(folder)` loads it."""
        self.module.save_pretrained(folder)  # type: ignore[operator]  # nn.Module types every attribute as a tensor
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def load(self, folder: Path, *, updates: int) -> None:
        """Take the average saved in `folder` up again after `updates` updates.

        Raises: RevprobeError, when the folder is missing, cut off, or holds another model's weights.
        """
        try:
            # One file, or shards that an index lists.
            index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
            if index.is_file():
                files = set(json.loads(index.read_text())["weight_map"].values())
            saved = {name: tensor for file in sorted(files) for name, tensor in load_file(folder / file).items()}
            # strict=False, then checked: a tied weight is saved once under one of its names.
            missing, unexpected = self.module.load_state_dict(saved, strict=False)
        except Exception as error:
            raise RevprobeError(
                f"cannot read the averaged weights in {folder}: {first_line(error)}; delete the checkpoint's folder "
                "to resume from the one before"
            ) from error
        tied = set(getattr(self.module, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            wrong = ", ".join(sorted([*unexpected, *(set(missing) - tied)])[:3])
            raise RevprobeError(f"{folder} holds the averaged weights of another model: {wrong} do not match")
        self.n_averaged.fill_(updates)
