"""Hold a checkpoint against the model it was read into: no tensor missing, none left over, none of another size.

transformers alone would fill a gap at random and print a report; a probe would then measure noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import RevprobeError
from .bases.matching import require_match, require_tied, without_report
from .families.family import PublishedFiles
from .families.files import header, require_shards_inside, shards_of
from .peft_adapters import ADAPTER_CONFIG

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")  # of a Trainer


def load_weights(
    folder: str | Path, config: PreTrainedConfig, kind: Any, published: PublishedFiles | None, **options: Any
) -> nn.Module:
    """The module of a config with the weights of a folder or hub name, in eval mode.

    Args:
        kind: an Auto class; for `published` files, the class itself.
        published: a family's files; those whose tensors are translated here lie in a folder, or are `folder` itself.
        options: of `from_pretrained`.
    Raises: RevprobeError, for weights that are pickled, missing, in files elsewhere, an adapter's, or not the model's;
        and what `from_pretrained` and safetensors raise.
    """
    require_safetensors(folder, **{key: options[key] for key in ("cache_dir", "revision") if options.get(key)})
    source: str | Path | None = folder
    official: Callable[[str], str] = str
    options |= {"config": config, "use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
    options["ignore_mismatched_sizes"] = True  # they are refused below, by their names
    if published is not None and published.family.translates:
        tensors = read_tensors(Path(folder))
        source, options["state_dict"] = None, published.translate(tensors)
        if options["state_dict"].keys() != tensors.keys():  # what was saved here has our names
            official = published.family.official_name
    with without_report():
        module, info = kind.from_pretrained(source, **options)
    if source is None and published is not None:  # transformers was given tensors; an adapter says where its base is
        by_name = published.files.place if isinstance(published.files.place, str) else folder
        module.name_or_path = module.config._name_or_path = str(by_name)
    # Published checkpoints of transformers' own classes may carry another task's head.
    require_match(info, folder, strict=not type(module).__module__.startswith("transformers."), official=official)
    require_tied(module, folder)
    return module.eval()


def require_safetensors(folder: str | Path, **cached: Any) -> None:
    """Raise unless a folder holds whole safetensors; an index, there or in the cache, must name files beside it.

    An adapter is refused too, which transformers would put on a base, from pickled weights where there are no others.
    Args:
        cached: cache_dir and revision, for a hub name.
    """
    if isinstance(folder, str):
        if isinstance(found := try_to_load_from_cache(folder, SAFE_WEIGHTS_INDEX_NAME, **cached), str):
            require_shards_inside(Path(found).parent)
        _require_no_adapter(try_to_load_from_cache(folder, ADAPTER_CONFIG, **cached))
        return
    _require_no_adapter(folder / ADAPTER_CONFIG)
    if folder.is_dir() and not any(folder.glob("model*.safetensors*")):
        require_no_pickles(folder)
        raise RevprobeError(
            f"{folder} holds no model.safetensors; the checkpoint is missing or was cut off while being saved"
        )
    require_shards_inside(folder)
    for shard in shards_of(folder):
        header(shard)


def _require_no_adapter(config: Any) -> None:
    if isinstance(config, str | Path) and Path(config).is_file():
        raise RevprobeError(
            f"{config} says that an adapter lies beside these weights; put the one that is meant into a folder of its "
            "own"
        )


def require_no_pickles(place: Path) -> None:
    """Raise when a folder's weights, or the file itself, are pickled. The recipe in the error runs as it stands."""
    found = [place] if place.is_file() else [file for pattern in _PICKLES for file in sorted(place.glob(pattern))]
    found = [file for file in found if f"*{file.suffix}" in _PICKLES and not file.name.startswith(_NO_WEIGHTS)]
    if not found:
        return
    first, folder = found[0], found[0].parent
    alike = first.name if len(found) == 1 else f"{re.split(r'[-_.]?[0-9]', first.name)[0]}*{first.suffix}"
    raise RevprobeError(
        f"{place} holds only pickled weights ({first.name}), which can run code when read; convert them once, which "
        f"runs none: `{conversion(folder / alike, folder / SAFE_WEIGHTS_NAME)}` (a training run's file keeps its "
        "tensors under a key, such as ['state_dict'])"
    )


def conversion(pickled: str | Path, written: str | Path) -> str:
    """Code that writes pickled tensors (a pattern, for several files) as safetensors and refuses what is no tensor.

    Each is copied, since tied weights share their memory, which safetensors does not take.
    """
    return (
        "import glob, torch; from safetensors.torch import save_file; "
        f"files = glob.glob({str(pickled)!r}); "
        "read = [torch.load(file, map_location='cpu', weights_only=True) for file in files]; "
        "tensors = {name: tensor.clone() for part in read for name, tensor in part.items()}; "
        f"save_file(tensors, {str(written)!r}, {{'format': 'pt'}})"
    )


def read_tensors(place: Path) -> dict[str, Tensor]:
    """The tensors of a folder or file of safetensors (see `require_safetensors`)."""
    return {name: tensor for shard in shards_of(place) for name, tensor in load_file(shard).items()}
