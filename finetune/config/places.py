"""Where the models and the files of a config lie: the same config with its folders elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .fields import Section
from .loading import checked_config

Kind = TypeVar("Kind", bound=Section)
# Where the examples say that they lie: `revprobe pretrain mini-models`, `revprobe data data`.
MODELS, DATA = Path("runs/mini-models"), Path("data")
# The keys that hold a path: a model's name (a folder, or a name on the hub, which lies in no folder) and a relation's.
_KEYS = ("name", "path")


def placed(config: Kind, places: Mapping[Path, Path]) -> Kind:
    """The same config, its models and files read from elsewhere.

    Args:
        places: a folder that the config names -> the folder to read instead; what lies in neither stays where it is.
    """
    return checked_config(
        _moved(config.model_dump(), places), type(config), f"the config {getattr(config, 'name', '')}"
    )


def elsewhere(path: str | Path, places: Mapping[Path, Path]) -> Path:
    """A path with the folder it lies in replaced.

    >>> elsewhere("data/trex", {Path("data"): Path("files")}).as_posix()
    'files/trex'
    """
    for place, other in places.items():
        if Path(path).is_relative_to(place):
            return other / Path(path).relative_to(place)
    return Path(path)


def same_elsewhere(planned: Section, found: Section) -> bool:
    """Whether a config is the planned one, wherever models and data lay and on whatever device it was trained."""
    return _alike(planned.model_dump(mode="json"), found.model_dump(mode="json"))


def _moved(values: Any, places: Mapping[Path, Path]) -> Any:
    if isinstance(values, list):
        return [_moved(value, places) for value in values]
    if not isinstance(values, Mapping):
        return values
    moved = {}
    for key, value in values.items():
        new = elsewhere(value, places) if key in _KEYS and isinstance(value, str) else value
        # A value that lies in none of them keeps its spelling: "GSAI-ML/LLaDA-8B-Base" is no path.
        moved[key] = str(new) if isinstance(new, Path) and new != Path(value) else _moved(value, places)
    return moved


def _alike(planned: Any, found: Any, key: str = "") -> bool:
    if isinstance(planned, Mapping) and isinstance(found, Mapping):
        return planned.keys() == found.keys() and all(_alike(planned[name], found[name], name) for name in planned)
    if key in _KEYS and isinstance(planned, str) and isinstance(found, str):
        return _same_file(planned, found)
    return key == "device" or bool(planned == found)


def _same_file(planned: str, found: str) -> bool:
    """Equal, or as deep in another folder than MODELS or DATA."""
    for place in (MODELS, DATA):
        if Path(planned).is_relative_to(place):
            inner = Path(planned).relative_to(place).parts
            return Path(found).parts[-len(inner) :] == inner
    return planned == found
