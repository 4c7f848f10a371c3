"""Hold a checkpoint against the model it was read into: no tensor missing, none left over, none of another size.

transformers alone would fill a gap at random and print a report; a probe would then measure noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import RevprobeError, first_line
from .bases.matching import require_match
from .families.family import PublishedFiles

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_weights(
    folder: str | Path, config: PreTrainedConfig, kind: Any, published: PublishedFiles | None, **options: Any
) -> nn.Module:
    """The module of a config with the weights of a folder or hub name, in eval mode.

    Args:
        kind: an Auto class; for `published` files, the class itself.
        published: a family's files; those whose tensors are translated here lie in a folder.
        options: of `from_pretrained`.
    Raises: RevprobeError, for weights that are pickled, missing, in files elsewhere, or not the model's; and what
        `from_pretrained` and safetensors raise.
    """
    require_safetensors(folder)
    source: str | Path | None = folder
    official: Callable[[str], str] = str
    options |= {"config": config, "use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
    if published is not None and published.family.translates:
        tensors = read_tensors(Path(folder))
        source, options["state_dict"] = None, published.translate(tensors)
        if options["state_dict"].keys() != tensors.keys():  # what was saved here has our names
            official = published.family.official_name
    module, info = kind.from_pretrained(source, **options)
    # Published checkpoints of transformers' own classes may carry another task's head.
    require_match(info, folder, strict=not type(module).__module__.startswith("transformers."), official=official)
    return module.eval()


def require_safetensors(folder: str | Path) -> None:
    """Raise unless a folder holds safetensors, and an index of them, there or in the cache, names files beside it."""
    if isinstance(folder, str):
        if isinstance(cached := try_to_load_from_cache(folder, SAFE_WEIGHTS_INDEX_NAME), str):
            require_shards_inside(Path(cached).parent)
        return
    if not any(folder.glob("model*.safetensors*")):
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        raise RevprobeError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read; convert them to "
            "safetensors"
            if pickles
            else f"{folder} holds no model.safetensors; the checkpoint is missing or was cut off while being saved"
        )
    require_shards_inside(folder)


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


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's model.safetensors, or of the shards that its index names (see `require_shards_inside`).

    Raises: what safetensors raises for a file that is missing or damaged.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return load_file(folder / SAFE_WEIGHTS_NAME)
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}


def _leaves(name: str) -> bool:
    paths = PurePosixPath(name), PureWindowsPath(name)
    return any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths)
