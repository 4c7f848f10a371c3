"""What `load_model` is told beside the place: dtype, device and objective, checked before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import RevprobeError, did_you_mean, first_line, shown
from .probed import OBJECTIVES, ProbedModel
from .rotary import is_inverse_frequency


def checked_choices(
    dtype: torch.dtype | str | None,
    device: torch.device | str | int | None,
    objective: str | None,
    options: dict[str, Any],
) -> torch.dtype | str | None:
    """The dtype, also by its older name, which is taken out of the options.

    Raises: RevprobeError, for a dtype, device or objective that is none, and for a dtype that is given twice.
    """
    _require_device(device)
    dtype = _one_dtype(dtype, options)
    _require_choices(dtype, objective)
    return dtype


def _one_dtype(dtype: torch.dtype | str | None, options: dict[str, Any]) -> torch.dtype | str | None:
    """The dtype, also by the name that transformers had for it; taken out of the options. Raises: RevprobeError."""
    older = options.pop("torch_dtype", None)
    if older is not None and dtype is not None:
        raise RevprobeError(
            f"dtype={shown(dtype)} and torch_dtype={shown(older)} are one option; leave torch_dtype out"
        )
    if older is not None and not isinstance(older, torch.dtype | str):
        raise RevprobeError(f"torch_dtype={shown(older)}: expected a torch.dtype or its name; pass dtype='bfloat16'")
    return older if dtype is None else dtype


def _require_choices(dtype: torch.dtype | str | None, objective: str | None) -> None:
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise RevprobeError(f"dtype={shown(dtype)}{did_you_mean(dtype, ['auto', 'float32', 'bfloat16', 'float16'])}")
    if objective is not None and objective not in OBJECTIVES:
        raise RevprobeError(f"unknown objective {shown(objective)}{did_you_mean(objective, OBJECTIVES)}")


def require_no_subfolder(options: Mapping[str, Any], source: str | Path) -> None:
    """Raise for `subfolder=`: config, tokenizer and the check of the files would be of the folder above."""
    if inside := options.get("subfolder"):
        raise RevprobeError(
            f"subfolder={shown(inside)}: name the folder itself, load_model({str(Path(source) / str(inside))!r}); of a "
            "repository on the hub download it first (huggingface_hub.snapshot_download)"
        )


def _require_device(device: torch.device | str | int | None) -> None:
    """Try the device before a model is loaded for it."""
    try:
        if device is not None and torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no numbers")
    except Exception as error:  # AssertionError for a torch without CUDA, RuntimeError for other names and numbers
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise RevprobeError(
            f"device {str(device)!r} cannot be used here ({first_line(error, with_type=False)}); expected one of "
            f"{', '.join(there)}"
        ) from error


def placed(model: ProbedModel, dtype: Any, device: Any) -> ProbedModel:
    """The model in a dtype and on a device; inverse frequencies that are not saved keep their precision.

    In bfloat16 an angle is off by a part in 500. Other buffers (tables of sines) are cast, as the numbers are that they
    meet.
    """
    if dtype not in (None, "auto"):
        worked_out = {
            (part, name): part._buffers[name]
            for part in model.module.modules()
            for name in part._non_persistent_buffers_set
            if is_inverse_frequency(name) and part._buffers.get(name) is not None
        }
        model.module.to(dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
        for (part, name), kept in worked_out.items():
            part._buffers[name] = kept
    if device is not None:
        model.module.to(device)
    return model
