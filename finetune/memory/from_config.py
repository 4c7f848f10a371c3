"""The memory plan of a fine-tuning's config: its model's shapes, its adapter, its batches, without a weight loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from ...errors import RevprobeError, first_line
from ...models.contract.block_masks import WHOLE
from ...models.contract.introspect import hidden_by_noise
from ...models.families.known import family_of_config
from ...models.hub import quiet_transformers
from ...models.probed import ProbedModel
from ...models.published import config_of, published_config, published_dtype
from ...models.registry import stated_objective
from ..config.finetuning import FinetuneConfig, FinetunedModel
from ..pretraining.layouts import untrained
from ..runs.finetune_setup import NO_FINE_TUNING, text_relation
from ..training.lora import add_lora
from .live_bytes import AnsweredYes
from .plan import GB, RESERVE, MemoryPlan, plan_memory

# Tokens of a row when its texts are not at hand: a statement of two names, and padding for the answer.
ASSUMED_TOKENS = 64
# Characters of ASCII that a token stands for at least, in names cut up by a byte-level BPE; of any other script it may
# not hold more than one byte.
_CHARACTERS = 2


def plan_finetuning(config: FinetuneConfig, *, tokens: int | None = None) -> MemoryPlan:
    """What `revprobe finetune` will need for a config, from shapes alone.

    Args:
        tokens: of the longest row; worked out from the relation's longest text when None (two characters of ASCII a
            token, one byte of UTF-8 of any other), and assumed when the relation's file is not there. The plan says
            which.
    Raises: RevprobeError, for a model whose config cannot be had, or LoRA targets it does not have.
    """
    tokens, about = (tokens, "as asked") if tokens is not None else _longest_row(config)
    with quiet_transformers():
        module, objective = on_meta(config.model)
    training, snapshots = config.training, config.snapshots
    with AnsweredYes():  # one traced pass finds the projections
        # There is no tokenizer to name a mask token; token ids do not matter to shapes.
        nameless = objective == "masked" and getattr(module.config, "mask_token_id", None) is None
        nameless &= hidden_by_noise(module) is None
        size = WHOLE if config.model.bidirectional else config.model.block_size
        told: dict[str, Any] = {"mask_token_id": 0 if nameless else None, "block_size": size}
        model = _OnMeta(module, objective=objective, check=False, **told)
        model.require_mask_token(NO_FINE_TUNING)
        adapted = add_lora(model, config.lora)
    if model.block_size is not None:
        tokens, about = 2 * tokens, f"{about}, a noised copy beside a clean one"
    plan = plan_memory(
        adapted,
        batch=training.batch_size,
        tokens=tokens,
        checkpointing=training.gradient_checkpointing,
        objective=objective,
        probe_batch=snapshots.batch_size,
        prediction=snapshots.predictions,
        four_bit=config.model.quantize is not None,
    )
    wide = next(module.parameters()).dtype == torch.float32
    # Frozen weights lose nothing in bfloat16; those that are trained would hardly move.
    way = "" if config.lora is None else "; set model.dtype: bfloat16"
    more = (f"bf16 with float32 weights: autocast's copies are not counted{way}",) if training.bf16 and wide else ()
    return MemoryPlan(plan.rows, plan.parameters, plan.trained, (*plan.about, f"tokens of a row: {about}", *more))


def plan_table(plan: MemoryPlan, memory: int) -> pd.DataFrame:
    """A plan as text: a row for each purpose, a column for each phase, the sums, and what `memory` bytes leave."""
    frame = plan.to_frame().rename(columns=lambda phase: str(phase))
    frame.loc["reserve (CUDA context, allocator)"] = RESERVE
    frame.loc["headroom"] = memory - frame.loc[["tensors in all", "reserve (CUDA context, allocator)"]].sum()
    shown = frame.map(lambda size: _amount(int(size)))
    shown.insert(0, "what", shown.index)
    return shown.reset_index(drop=True)


def _amount(size: int) -> str:
    """Bytes as GB or MB of 10^9 and 10^6."""
    if not size:
        return "-"
    return f"{size / GB:.2f} GB" if abs(size) >= GB // 20 else f"{size / 10**6:.2f} MB"


def require_room(plan: MemoryPlan, memory: int) -> None:
    """Raises: RevprobeError, when the plan does not fit into `memory` bytes; it says what to lower."""
    if plan.headroom(memory) < 0:
        raise RevprobeError(
            f"the plan needs {(plan.peak() + RESERVE) / GB:.1f} GB and there are {memory / GB:.1f}: lower "
            "training.batch_size or snapshots.batch_size, or set training.gradient_checkpointing: true, model.dtype: "
            "bfloat16 or model.quantize: 4bit"
        )


def memory_here() -> tuple[int, str]:
    """The memory to plan for, in bytes, and where the number comes from: the first GPU's, else 48 GB."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return int(found.total_memory), found.name
    return 48 * GB, "a 48 GB GPU"


def on_meta(chosen: FinetunedModel) -> tuple[nn.Module, str]:
    """The module a config's model names, with shapes and no numbers, and its objective ("masked" or "causal").

    A published checkpoint is known by name; any other needs its config.json, in a folder or from the hub.
    Raises: RevprobeError, when there is none.
    """
    if chosen.tiny is not None:
        tokenizer: Any = _Vocabulary(chosen.tiny.vocabulary)
        with torch.device("meta"):
            return untrained(chosen.tiny, tokenizer), "causal" if chosen.tiny.layout == "llama" else "masked"
    name = str(chosen.name)
    known = None if Path(name).is_dir() else published_config(name)
    settings = known if known is not None else config_of(name)
    stated = published_dtype(known) if known is not None else getattr(settings, "dtype", None) or "float32"
    dtype = getattr(torch, chosen.dtype or str(stated).removeprefix("torch."))
    objective = stated_objective(settings, name)
    with torch.device("meta"):
        if (family := family_of_config(settings)) is not None:
            kind: Any = family.class_for(objective)
            return kind._from_config(settings, dtype=dtype), objective
        auto = AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM
        return auto.from_config(settings, dtype=dtype, trust_remote_code=False), objective


class _OnMeta(ProbedModel):
    """A model whose input, too, has shapes and no numbers."""

    device = torch.device("meta")


class _Vocabulary:
    """As many tokens as a tokenizer yet to be learned will have at most."""

    bos_token_id, eos_token_id, pad_token_id, mask_token_id = 0, 1, 2, 3

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def _longest_row(config: FinetuneConfig) -> tuple[int, str]:
    """Tokens of the longest training text, from above, and how that is known."""
    try:
        texts = text_relation(config).training_texts(config.relation.direction)
    except RevprobeError as error:
        why = first_line(error, with_type=False)
        return ASSUMED_TOKENS, f"{ASSUMED_TOKENS} assumed, --tokens gives another number ({why})"
    longest = max(texts, key=most_tokens)
    tokens = most_tokens(longest) + (config.evaluation.max_new_tokens or 0)
    return tokens, f"{tokens}, from the longest text of {len(longest)} characters; --tokens gives another number"


def most_tokens(text: str) -> int:
    """Tokens of a text, from above."""
    ascii_only = sum(map(str.isascii, text))
    return -(-ascii_only // _CHARACTERS) + len(text.encode()) - ascii_only
