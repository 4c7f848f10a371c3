"""From a run's config to the objects that train and probe it: model, tokenizer, arguments, pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from ...errors import RevprobeError
from ...models.gpt2 import one_layer_gpt2
from ...models.letters import letter_tokenizer
from ...models.probed import ProbedModel
from ...models.radd import RaddConfig, RaddForMaskedLM
from ...probes.pairs.pairs import ReversalPairs
from ...relations.catalog import LettersRelation
from ..config.one_layer import RunConfig


def build_model(config: RunConfig) -> tuple[PreTrainedModel, Any]:
    """The untrained model and its tokenizer, from torch's current random state, for sequences of `relation.length`."""
    tokenizer = letter_tokenizer(config.relation.alphabet)
    size = config.model.model_dump(exclude={"family", "position_encoding"})
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config.model.family == "gpt2":
        return one_layer_gpt2(**tokens, **size, max_length=config.relation.length), tokenizer
    radd = RaddConfig(
        **tokens,
        **size,
        mask_token_id=tokenizer.mask_token_id,
        position_encoding=config.model.position_encoding or "rope",
        max_length=config.relation.length,
    )
    return RaddForMaskedLM(radd), tokenizer


def probe_pairs(relation: LettersRelation, model: ProbedModel) -> dict[str, ReversalPairs]:
    """Which pairs each probe sees at a snapshot.

    The correlation needs every combination of distances ("grid"). The cosine takes the same two positions swapped,
    the left one first in the sequence: every distance equally often. Probabilities and accuracies weigh every
    placement equally ("mirror").
    """
    masked = model.objective == "masked"
    return {
        "attention": relation.pairs(model, placements="grid"),
        "gradient": relation.pairs(model, placements="mirror", offset=0 if masked else None),
        "probability": relation.pairs(model, placements="mirror"),
    }


def training_arguments(config: RunConfig, folder: Path) -> TrainingArguments:
    """The Trainer's arguments: lean (no tqdm, no reporting, batched rows), every random draw from the config's seed."""
    training = config.training
    return lean_arguments(
        folder,
        steps=training.steps,
        device=training.device,
        schedule=training.schedule,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.gradient_clipping,
        seed=training.seed,
    )


def lean_arguments(
    folder: Path, *, steps: int, device: str = "cpu", schedule: str = "constant", **options: Any
) -> TrainingArguments:
    """TrainingArguments for `steps` optimizer steps, checkpoints left to the snapshots; `options` go through.

    Args:
        device: as in a config ("auto", "cpu", "cuda").
        schedule: after the warm-up, "constant" or "cosine" (down to zero at the last step).
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
