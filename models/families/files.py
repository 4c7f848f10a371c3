"""What lies at a place before any weights are read: the config.json and the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from ...errors import RevprobeError, first_line

Settings = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Files:
    """A folder, one safetensors file, or a name on the hub.

    Attributes:
        place: a Path, or the hub name as a string.
        settings: config.json as it stands; empty without one.
    """

    place: str | Path
    settings: Settings = field(default_factory=dict)

    @classmethod
    def at(cls, place: str | Path, **options: Any) -> Files:
        """The files of a place. Raises: what transformers raises for a config.json that is missing or no JSON.

        Args:
            options: of `from_pretrained`, for the hub.
        """
        bare = isinstance(place, Path) and bool(weight_files(place)) and not config_beside(place).is_file()
        if bare:
            return cls(place)
        where = place.parent if isinstance(place, Path) and place.is_file() else place
        settings, _ = PreTrainedConfig.get_config_dict(where, **options)
        return cls(place, settings)

    @property
    def name(self) -> str:
        """The hub name, or that of the folder or file."""
        return self.place if isinstance(self.place, str) else self.place.stem

    @property
    def model_type(self) -> str:
        return str(self.settings.get("model_type", ""))

    @property
    def architectures(self) -> list[str]:
        return list(self.settings.get("architectures") or [])

    @cached_property
    def shapes(self) -> Shapes:
        """Tensor name -> shape, from the headers of the safetensors here; empty for what is still on the hub."""
        found: dict[str, tuple[int, ...]] = {}
        for path in weight_files(self.place) if isinstance(self.place, Path) else []:
            found |= header(path)
        return found


def header(path: Path) -> Shapes:
    """Tensor name -> shape, as a file of safetensors says before its numbers.

    Raises: RevprobeError, naming the file, when it is missing, cut off or none.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RevprobeError(
            f"cannot load the weights of {path}: {first_line(error)}; the file is cut off or damaged, so download or "
            "save it again"
        ) from error


def config_beside(place: Path) -> Path:
    """The config.json of a folder, or beside a file."""
    return (place.parent if place.is_file() else place) / "config.json"


def weight_files(place: Path) -> list[Path]:
    """The safetensors of a folder, or the file itself; those that transformers writes come alone where there are some.

    `save_pretrained` names them model.safetensors or model-00001-of-00002.safetensors; others lie beside them as notes.
    """
    if place.is_file():
        return [place] if place.suffix == ".safetensors" else []
    every = sorted(place.glob("*.safetensors"))
    return [path for path in every if path.name.startswith("model")] or every
