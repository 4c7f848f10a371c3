"""The families, and the config.json of a folder or hub name read as what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from .family import Family, Settings
from .radd import RADD

FAMILIES = (RADD,)


@dataclass(frozen=True)
class PublishedFiles:
    """A checkpoint in the layout of a family, with its config.json as it stands."""

    family: Family
    settings: Settings

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its tensors under our names. Raises: RevprobeError, when a constant is not what is worked out here."""
        return self.family.translate(tensors, self.settings)


def read_config(place: str | Path, **options: Any) -> tuple[PreTrainedConfig, PublishedFiles | None]:
    """The config of a folder or hub name, and how its files are laid out where that is a family's own way.

    Args:
        options: of `from_pretrained`, for the hub.
    Raises: what transformers raises for a file that is missing, no JSON, or of an architecture it does not know.
    """
    settings, _ = PreTrainedConfig.get_config_dict(place, **options)
    for family in FAMILIES:
        if family.recognises(settings):
            return AutoConfig.for_model(**family.to_config(settings)), PublishedFiles(family, settings)
    # False, not None: None would ask on the terminal whether to run the repository's code.
    return AutoConfig.from_pretrained(place, trust_remote_code=False, **options), None
