"""What mixtures of experts have in common: files with a tensor for each expert, and classes with one for all."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from ...errors import RevprobeError
from .matching import listed

_EXPERT = re.compile(r"(?P<layer>.*\.experts\.)(?P<number>\d+)(?P<part>\.\w+\.weight)")


class GroupedExperts:
    """Put before a class of transformers whose experts are one tensor: they are multiplied in groups where that goes.

    transformers looks for the experts in the source of the class, and there are none in a subclass's.
    """

    config: PreTrainedConfig

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def _grouped_mm_can_dispatch(self) -> bool:
        """The grouped product takes no float64; transformers then runs one expert after the other."""
        if self.config.dtype in (torch.float64, "float64"):
            raise ValueError(f"{type(self).__name__}: grouped products of experts take no float64")
        return True


def require_experts(names: Iterable[str], count: int, source: object) -> None:
    """Raise unless each projection has a tensor for every expert.

    They are stacked in the order of their numbers, and a gap would only show if the number of tensors were wrong too.
    Args:
        names: of a file's tensors, as published.
        count: how many experts the config says there are.
    Raises: RevprobeError, naming the tensors that are missing or left over.
    """
    there: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name in names:
        if match := _EXPERT.fullmatch(name):
            there[match["layer"], match["part"]].add(int(match["number"]))
    wrong = [f"{layer}{n}{part}" for (layer, part), found in there.items() for n in found ^ set(range(count))]
    if wrong:
        raise RevprobeError(
            f"{source} does not match its config of {count} experts: {listed(sorted(wrong))} missing or left over; it is "
            "a checkpoint of another model or a damaged one"
        )
