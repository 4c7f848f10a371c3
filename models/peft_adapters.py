"""Adapters (LoRA through peft) on a model: which parameters are theirs, and a saved adapter put back on its base.

A checkpoint of fine-tuning holds the adapter alone, as peft writes it. Its base is named in `adapter_config.json`; a
run that built its own base keeps it in RUN/base, so that a run's folder can be moved.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import RevprobeError, first_line

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The model that a run built for itself, beside its checkpoints.
BASE = "base"


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter.

    >>> is_adapter_parameter("model.layers.0.mlp.up_proj.lora_A.default.weight")
    True
    """
    return ".lora_" in name


def without_wrapper(module: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, its adapter active; any other module as it is.

    Its parameters then have the names they have without an adapter, so that readings can be compared.
    """
    inside = getattr(module, "get_base_model", None)
    return inside() if callable(inside) and hasattr(module, "peft_config") else module


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return isinstance(folder, Path) and (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(adapter: Path) -> str | Path:
    """The model an adapter was trained on: the one its run built, else the folder or hub name its config states.

    Raises: RevprobeError, when the config is damaged or names no base.
    """
    built = adapter.parent.parent / BASE
    if built.is_dir():
        return built
    try:
        stated = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise RevprobeError(
            f"{adapter / ADAPTER_CONFIG} is damaged ({first_line(error)}); expected the file that peft writes"
        ) from error
    if not stated:
        raise RevprobeError(
            f"{adapter / ADAPTER_CONFIG} names no base model; load the base yourself and use peft's PeftModel"
        )
    return Path(stated) if Path(stated).is_dir() else str(stated)


def put_on(module: nn.Module, adapter: Path) -> nn.Module:
    """The module with a saved adapter active on it, frozen and in eval mode.

    Raises: RevprobeError, when the adapter's weights are pickled, missing, cut off or of another model.
    """
    from peft import PeftModel, get_peft_model_state_dict  # seconds to import, and only adapters need it
    from safetensors import safe_open

    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise RevprobeError(f"{adapter} holds no {ADAPTER_WEIGHTS}; an adapter is read from safetensors only")
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
            saved = set(weights.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that it is renaming
            adapted: Any = PeftModel.from_pretrained(module, adapter)
    except Exception as error:
        raise RevprobeError(f"cannot put the adapter {adapter} on its base model: {first_line(error)}") from error
    # peft leaves a missing tensor at its initial value, and one too many unread; both are another model's adapter.
    wrong = sorted(set(get_peft_model_state_dict(adapted)) ^ saved)
    if wrong:
        raise RevprobeError(f"the adapter {adapter} is of another model: {', '.join(wrong[:3])} do not match")
    return without_wrapper(adapted).eval()
