"""Fixtures copied to be damaged, in the ways in which a download is, and the line that `load_model` says then."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import revprobe as rp
from tiny import FIXTURES

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def copied(name: str, folder: Path) -> Path:
    """A fixture's own files, without the outputs beside them; the folder's name need not say what it is."""
    return Path(shutil.copytree(FIXTURES / name, folder, ignore=shutil.ignore_patterns("reference.safetensors")))


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def set_in_config(folder: Path, **changed: object) -> None:
    (folder / "config.json").write_text(json.dumps(settings(folder) | changed))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write the weights anew, as `change` leaves the dict of tensors."""
    weights = load_file(folder / WHOLE)
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WHOLE, {"format": "pt"})


def in_shards(folder: Path) -> list[Path]:
    """The same checkpoint in two files and an index; what belongs together lies in both."""
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    shards, weight_map = [], {}
    for number in (1, 2):
        shards.append(folder / f"model-{number:05}-of-00002.safetensors")
        own = {key: tensors[key] for key in sorted(tensors)[number - 1 :: 2]}
        save_file(own, shards[-1], {"format": "pt"})
        weight_map |= dict.fromkeys(own, shards[-1].name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shards


def in_cache(folder: Path, name: str, cache: Path, revision: str = "main", commit: str = "0" * 40) -> Path:
    """Put a folder where the hub's client would have put its download."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)
    return cache


def refusal(place: Path, **told: object) -> str:
    """What is said, in one line, of a checkpoint that does not load."""
    with pytest.raises(rp.RevprobeError) as caught:
        rp.load_model(place, **told)
    assert "\n" not in str(caught.value)
    return str(caught.value)
