"""Hold a checkpoint against the model it was read into: no tensor missing, none left over, none of another size.

transformers alone would fill a gap at random and print a report; a probe would then measure noise.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import RevprobeError, first_line
from .families.known import PublishedFiles

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_IN_A_LAYER = re.compile(r"\.\d+\.")
_SHOWN = 5


def load_weights(
    folder: str | Path, config: PreTrainedConfig, kind: Any, published: PublishedFiles | None, **options: Any
) -> nn.Module:
    """The module of a config with the weights of a folder or hub name, in eval mode.

    Args:
        kind: an Auto class; for `published` files, the class itself.
        published: how a family's files are laid out, which lie in a folder then.
        options: of `from_pretrained`.
    Raises: RevprobeError, for weights that are pickled, missing, in files elsewhere, or not the model's; and what
        `from_pretrained` and safetensors raise.
    """
    require_safetensors(folder)
    source: str | Path | None = folder
    official: Callable[[str], str] = str
    options |= {"config": config, "use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
    if published is not None:
        source, official = None, published.family.official_name
        options["state_dict"] = published.translate(read_tensors(Path(folder)))
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


def require_match(
    info: Mapping[str, Any], source: object, *, strict: bool = True, official: Callable[[str], str] = str
) -> None:
    """Raise unless the checkpoint had exactly the tensors of the model.

    Args:
        info: `output_loading_info` of `from_pretrained`: missing_keys, unexpected_keys, mismatched_keys.
        strict: False lets tensors outside the layers be left over (BERT's pooler, another task's head: published
            checkpoints carry them), with a warning that names them.
        official: turns a tensor's name here into its name in the checkpoint, for the message.
    Raises: RevprobeError, naming the tensors.
    """
    outside: list[str] = []
    keys = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    mismatched = info["mismatched_keys"]
    keys["mismatched"] = sorted(f"{name} ({tuple(found)} for {tuple(asked)})" for name, found, asked in mismatched)
    if not strict:
        outside = [name for name in keys["unexpected"] if not _IN_A_LAYER.search(name)]
        keys["unexpected"] = [name for name in keys["unexpected"] if name not in outside]
    wrong = [f"{kind} {_listed(names, official)}" for kind, names in keys.items() if names]
    if wrong:
        raise RevprobeError(
            f"{source} does not match its config: {'; '.join(wrong)}; it is a checkpoint of another model or a "
            "damaged one"
        )
    if outside:
        warnings.warn(
            f"{source}: {_listed(outside, official)} left over; the language model has no place for them", stacklevel=2
        )


def _listed(names: list[str], official: Callable[[str], str]) -> str:
    shown = [name if official(name) == name else f"{official(name)} (here {name})" for name in names[:_SHOWN]]
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown) + rest
