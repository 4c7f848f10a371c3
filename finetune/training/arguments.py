"""The Trainer's arguments, lean: no tqdm, no reporting unless asked for, checkpoints left to the snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ...errors import RevprobeError


def training_arguments(
    folder: Path,
    *,
    steps: int,
    device: str = "cpu",
    schedule: str = "constant",
    min_learning_rate: float = 0.0,
    **options: Any,
) -> TrainingArguments:
    """TrainingArguments for `steps` optimizer steps; `options` go through.

    Args:
        device: as in a config ("auto", "cpu", "cuda").
        schedule: after the warm-up, "constant" or "cosine" (down to `min_learning_rate` at the last step).
    """
    on_cpu = uses_cpu(device)
    settings: dict[str, Any] = {
        "max_steps": steps,
        "lr_scheduler_type": "constant_with_warmup" if schedule == "constant" else "cosine",
        "use_cpu": on_cpu,
        # The CPU with pinned threads is deterministic as it is; CUDA has to be asked.
        "full_determinism": not on_cpu,
        "save_strategy": "no",  # ForwardOnlyTrainer saves at the snapshots
        "logging_strategy": "steps",
        "logging_steps": max(1, steps // 200),
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    if min_learning_rate:
        settings |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": min_learning_rate}}
    arguments = TrainingArguments(output_dir=str(folder), **settings | options)
    if not on_cpu and arguments.n_gpu > 1:
        # Several GPUs in one process would split the batch (DataParallel) and change the bits; torchrun is the way.
        arguments._n_gpu = 1
    return arguments


def uses_cpu(device: str) -> bool:
    """Whether a config's `device` means the CPU here. Raises: RevprobeError, for cuda without a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RevprobeError("training.device is 'cuda', but torch sees no GPU here; use auto or cpu")
    return device == "cpu" or not torch.cuda.is_available()
