"""The description of a family of published checkpoints: data, by which its files are read into one of our classes.

The classes stand elsewhere; a description knows config.json and the names of tensors, and no forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How the files of one family are read.

    Attributes:
        name: as people call it.
        recognises: whether a config.json is the family's.
        to_config: the settings of our config, `model_type` among them, from the published config.json.
        key_map: published name of a module or tensor -> ours; `{}` stands for the number of a layer.
        fused: published name of a tensor -> the names here of the equal blocks of rows it is made of, in order.
        constants: published name of a buffer that is worked out here -> the check of its value, which raises.
        tokenizer: where the family's tokenizer comes from when its checkpoints bring none; a name on the hub.
    """

    name: str
    recognises: Callable[[Settings], bool]
    to_config: Callable[[Settings], dict[str, Any]]
    key_map: Mapping[str, str]
    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    constants: Mapping[str, Callable[[Tensor, Settings], None]] = field(default_factory=dict)
    tokenizer: str | None = None

    def translate(self, tensors: Mapping[str, Tensor], config: Settings) -> dict[str, Tensor]:
        """A checkpoint's tensors under our names; what the family does not know keeps its own.

        Raises: RevprobeError, when a constant is not what the forward pass here works out.
        """
        ours: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name in self.constants:
                self.constants[name](tensor, config)
                continue
            parts = next((found for one, parts in self.fused.items() if (found := _renamed(name, one, *parts))), [])
            if parts and tensor.shape[0] % len(parts) == 0:
                # Copies, so that saving meets no tensors that share their memory.
                ours |= {part: rows.clone() for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True)}
            else:
                ours[_first(name, self.key_map.items())] = tensor
        return ours

    def official_name(self, name: str) -> str:
        """The published name of one of our tensors; other names stay as they are."""
        pairs = [(here, published) for published, here in self.key_map.items()]
        pairs += [(part, published) for published, parts in self.fused.items() for part in parts]
        return _first(name, pairs)


def _first(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The name as the first pair that fits renames it; as it is where none does."""
    found = (_renamed(name, before, after) for before, after in pairs)
    return next((one[0] for one in found if one), name)


def _renamed(name: str, before: str, *after: str) -> list[str]:
    """The name with its beginning `before` put as each of `after`, the layer's number kept; empty where it has none."""
    match = re.fullmatch(re.escape(before).replace(r"\{\}", r"(\d+)") + r"(\.\w+)?", name)
    if match is None:
        return []
    *layers, rest = match.groups("")
    return [one.format(*layers) + rest for one in after]
