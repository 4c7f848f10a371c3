"""What mixtures of experts have in common: files with a tensor for each expert, and classes with one for all."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ...errors import RevprobeError
from .matching import listed

# Entries of a row that torch's grouped product wants a multiple of: 16 bytes in the narrowest dtype, bfloat16.
_ALIGNED = 8
_EXPERT = re.compile(r"(?P<layer>.*\.experts\.)\d+\..*")


class GroupedExperts:
    """Put before a class of transformers whose experts are one tensor: they are multiplied in groups where that goes.

    transformers looks for the experts in the source of the class, and there are none in a subclass's. What cannot be
    grouped runs one expert after the other, which is the same sum.
    """

    config: PreTrainedConfig

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def _grouped_mm_can_dispatch(self) -> bool:
        """Raises: ValueError, as transformers expects it, where torch's grouped product would fail once it is run."""
        config: Any = self.config.get_text_config()
        uneven = [size for size in (config.hidden_size, config.moe_intermediate_size) if size % _ALIGNED]
        if uneven or config.dtype in (torch.float64, "float64"):
            raise ValueError(
                f"{type(self).__name__}: experts of width {config.hidden_size} and {config.moe_intermediate_size} in "
                f"{config.dtype} cannot be multiplied in groups; use experts_implementation='eager'"
            )
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to()` and its kin do. The kernel was chosen for the type that the weights had when they were read."""
        moved: Any = super()._apply(fn, recurse)  # type: ignore[misc]
        if moved.dtype == torch.float64:
            moved.config._experts_implementation = "eager"
        return moved


def require_experts(names: Collection[str], count: int, source: object) -> None:
    """Raise unless every layer that has experts has each of them whole.

    They are stacked in the order of their numbers, and a gap would only show if the number of tensors were wrong too.
    Args:
        names: of a file's tensors, as published.
        count: how many experts the config says there are.
    Raises: RevprobeError, naming the tensors that are missing or left over.
    """
    there = {match["layer"]: set[str]() for name in names if (match := _EXPERT.fullmatch(name))}
    for layer, found in there.items():
        found.update(name for name in names if name.startswith(layer))
    wrong = sorted(
        name
        for layer, found in there.items()
        for name in found ^ {f"{layer}{n}.{part}_proj.weight" for n in range(count) for part in ("gate", "up", "down")}
    )
    if wrong:
        raise RevprobeError(
            f"{source} does not match its config of {count} experts: {listed(wrong)} missing or left over; it is a "
            "checkpoint of another model or a damaged one"
        )
