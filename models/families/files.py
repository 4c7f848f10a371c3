"""What lies at a place before any weights are read: the config.json and the names and shapes of its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...errors import RevprobeError, first_line

_LOOKED_FOR = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
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

        A folder whose weights are one file under a name of its own stands for that file.
        Args:
            options: of `from_pretrained`, for the hub.
        """
        if isinstance(place, Path) and len(several := bare_weights(place)) == 1:
            (place,) = several
        if isinstance(place, Path) and weight_files(place) and not config_beside(place).is_file():
            return cls(place)
        where = place.parent if isinstance(place, Path) and place.is_file() else place
        settings, _ = PreTrainedConfig.get_config_dict(where, **options)
        return cls(place, settings)

    @property
    def name(self) -> str:
        """The hub name, also of a snapshot in the hub's cache, or that of the folder or file."""
        if isinstance(self.place, str):
            return self.place
        # A folder's dots are no suffix.
        return name_in_cache(self.place) or (self.place.stem if self.place.is_file() else self.place.name)

    @property
    def model_type(self) -> str:
        return str(self.settings.get("model_type", ""))

    @property
    def architectures(self) -> list[str]:
        return list(self.settings.get("architectures") or [])

    @cached_property
    def shapes(self) -> Shapes:
        """Tensor name -> shape, from the headers of the safetensors here; empty for what is still on the hub.

        Raises: RevprobeError, for a file that is cut off or no safetensors.
        """
        return self._headers[0]

    @property
    def notes(self) -> Mapping[str, str]:
        """What the safetensors here say of themselves in their headers. Raises: as `shapes`."""
        return self._headers[1]

    @cached_property
    def _headers(self) -> tuple[Shapes, Mapping[str, str]]:
        shapes: dict[str, tuple[int, ...]] = {}
        notes: dict[str, str] = {}
        if isinstance(self.place, Path) and (self.place / SAFE_WEIGHTS_INDEX_NAME).is_file():
            shards_of(self.place)  # names a file that is missing; without it tensors would seem to be
        for path in weight_files(self.place) if isinstance(self.place, Path) else []:
            found, said = header(path)
            shapes |= found
            notes |= said
        return shapes, notes

    def rows(self, *names: str) -> int | None:
        """Rows of the first of these tensors that is here; None where none is. Raises: as `shapes`."""
        return next((self.shapes[name][0] for name in names if self.shapes.get(name)), None)


def name_in_cache(folder: Path) -> str | None:
    """The hub name of a snapshot that the hub's client has downloaded, whose folder is called by its commit.

    >>> name_in_cache(Path("/cache/models--GSAI-ML--LLaDA-1.5/snapshots/0123abc"))
    'GSAI-ML/LLaDA-1.5'
    """
    kept = re.search(r"(?:^|/)models--([^/]+)/snapshots/[^/]+$", folder.as_posix())
    return kept and kept[1].replace("--", "/", 1)


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


def bare_weights(place: Path) -> list[Path]:
    """The safetensors of a folder that hold weights, where none has a name that transformers would look for.

    Notes beside them (reference outputs, statistics) have no tensor that is called a weight.
    """
    if not place.is_dir() or any(any(place.glob(name)) for name in _LOOKED_FOR):
        return []
    return [path for path in weight_files(place) if any(name.endswith(".weight") for name in header(path)[0])]


def header(path: Path) -> tuple[Shapes, Mapping[str, str]]:
    """Tensor name -> shape, and the metadata, which stand in a file before its numbers.

    Raises: RevprobeError, naming a file that is missing, cut off or no safetensors.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            return shapes, tensors.metadata() or {}
    except Exception as error:  # whatever safetensors raises: a header that is none, a file shorter than it says
        raise RevprobeError(
            f"cannot load the weights of {path}: {first_line(error)}; the file is cut off or no safetensors, so "
            "download or save it again"
        ) from error


def shards_of(place: Path) -> list[Path]:
    """The files that a checkpoint is read from: its model.safetensors, else those that its index names, or the file.

    Raises: RevprobeError, for a file that the index names and that is not there.
    """
    if place.is_file():
        return [place]
    index = place / SAFE_WEIGHTS_INDEX_NAME
    if (place / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return [place / SAFE_WEIGHTS_NAME]
    require_shards_inside(place)
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    shards = [place / name for name in sorted(set(named))]
    for shard in shards:
        if not shard.is_file():
            raise RevprobeError(
                f"{index} names {shard.name!r}, which is not there; download this one of {len(shards)} files again"
            )
    return shards


def require_shards_inside(folder: Path) -> None:
    """Raise unless every file that an index of safetensors names lies in its folder.

    A folder's own links (the hub's cache is made of them) go where whoever made them says; an index is a text that came
    with the weights, and must not choose among the other files of this machine.
    Raises: RevprobeError, naming the index and the first such file.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = sorted(name for name in named if _leaves(name))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RevprobeError(
                f"{index} is no index of safetensors ({first_line(error)}); expected a weight_map of tensors to files"
            ) from error
        if outside:
            raise RevprobeError(
                f"{index} names {outside[0]!r}, which lies outside its folder; put the file into it and name it there"
            )


def _leaves(name: str) -> bool:
    paths = PurePosixPath(name), PureWindowsPath(name)
    return any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths)
