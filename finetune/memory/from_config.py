"""The memory plan of a fine-tuning's config: its model's shapes, its adapter, its batches, without a weight loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
from ...probes.decoding.exact_match import joint_of
from ...probes.passes.batches import ONE_PAIR
from ...relations.evaluation import all_questions
from ...relations.text_relation import TrainingText
from ..config.finetuning import FinetuneConfig, FinetunedModel
from ..pretraining.layouts import untrained
from ..runs.finetune_setup import NO_FINE_TUNING, text_relation
from ..training.lora import add_lora
from .live_bytes import AnsweredYes
from .plan import GB, PHASES, RESERVE, MemoryPlan, plan_memory

# Tokens of a row when its texts are not at hand: a statement of two names, and padding for the answer.
ASSUMED_TOKENS = 64
# Letters of ASCII that a token stands for at least, in names cut up by a byte-level BPE; of any other script it may not
# hold more than one byte, and digits and signs stand alone in many tokenizers.
_LETTERS = 2
_TOGETHER = re.compile(r"[A-Za-z\s]+", re.ASCII)
# Begin and end tokens that a tokenizer puts around a text.
_AROUND = 2


def plan_finetuning(config: FinetuneConfig, *, tokens: int | None = None) -> MemoryPlan:
    """What `revprobe finetune` will need for a config, from shapes alone.

    Args:
        tokens: of the longest row; worked out from the relation's texts when None (two letters of ASCII a token, one
            digit, sign or byte of UTF-8 of any other), a masked model's answers filled up to the decoded length, and
            assumed when the relation's file is not there. The plan says which.
    Raises: RevprobeError, for a model whose config cannot be had, or LoRA targets it does not have.
    """
    with quiet_transformers():
        module, objective = on_meta(config.model)
    asked, (tokens, about) = tokens, (tokens, "as asked") if tokens is not None else _longest_row(config, objective)
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
    if model.max_length is not None and tokens > model.max_length:  # longer rows are refused when they are trained
        if asked is not None:
            raise RevprobeError(f"{tokens} tokens of a row: {config.model.name} takes at most {model.max_length}")
        tokens, about = model.max_length, f"{model.max_length}, which is what the model takes; by its letters {about}"
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


def those_to_plan(runs: Sequence[FinetuneConfig]) -> list[FinetuneConfig]:
    """Of the runs of a sweep that differ in direction and seed alone, the first with the longest row, in their order.

    A direction's texts may be longer than the other's, and its answers, which a masked model's rows are filled up to.
    """
    alike: dict[tuple[str, str], dict[str, FinetuneConfig]] = {}
    for run in runs:
        alike.setdefault((str(run.model), str(run.label)), {}).setdefault(run.relation.direction, run)
    return [_with_longest_row(list(some.values())) for some in alike.values()]


def _with_longest_row(runs: Sequence[FinetuneConfig]) -> FinetuneConfig:
    if len(runs) == 1:
        return runs[0]
    with quiet_transformers():
        objective = on_meta(runs[0].model)[1]
    return max(runs, key=lambda run: _longest_row(run, objective)[0])


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


def require_room(plan: MemoryPlan, memory: int, config: FinetuneConfig) -> None:
    """Raises: RevprobeError, when the plan of a config does not fit into `memory` bytes; it says what to lower."""
    if plan.headroom(memory) < 0:
        ways = _ways(plan, memory, config)
        raise RevprobeError(
            f"the plan needs {(plan.peak() + RESERVE) / GB:.1f} GB and there are {memory / GB:.1f}: "
            f"{', or '.join([*ways, 'take a smaller model or a larger GPU'])}"
        )


def _ways(plan: MemoryPlan, memory: int, config: FinetuneConfig) -> list[str]:
    """What makes the phases that do not fit smaller, as keys of a config that may be set so.

    A smaller batch is no way where what is held beside it is too much already.
    """
    training, snapshots, model, ways = config.training, config.snapshots, config.model, []
    full = [phase for phase in PHASES if plan.peak(phase) + RESERVE > memory]
    passes = [phase for phase in full if plan.held(phase) + RESERVE <= memory]
    if "training" in passes and training.batch_size > 1:
        ways.append("lower training.batch_size (gradient_accumulation makes up for it)")
    if "training" in passes and not training.gradient_checkpointing:
        ways.append("set training.gradient_checkpointing: true")
    if {"probing", "prediction"} & {*passes} and (snapshots.batch_size or ONE_PAIR + 1) > ONE_PAIR:
        ways.append("lower snapshots.batch_size")
    if "prediction" in full and plan.held(PHASES[0]) + RESERVE <= memory:
        ways.append("set snapshots.predictions: false")
    if config.lora is None:  # all weights in bfloat16 would hardly move, and in 4 bits they are not trained
        ways.append("train an adapter in place of all weights (lora: {rank: 16}, snapshots.parameters: lora)")
    elif model.quantize is None:
        held = sum(size for phase, what, size in plan.rows if (phase, what) == (PHASES[0], "weights"))
        if held > 3 * plan.parameters:  # four bytes each
            ways.append("set model.dtype: bfloat16")
        with_it = "" if snapshots.parameters == "lora" else " with snapshots.parameters: lora"
        ways.append(f"set model.quantize: 4bit{with_it}")
    return ways


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


def _longest_row(config: FinetuneConfig, objective: str) -> tuple[int, str]:
    """Tokens of the longest training row, from above, and how that is known.

    A masked model's rows are filled up to the decoded length: the longest answer of either direction and an end token.
    """
    try:
        relation = text_relation(config)
        texts = relation.training_rows(config.relation.direction)
        asked = all_questions(relation, config.relation.direction)
    except RevprobeError as error:
        why = first_line(error, with_type=False)
        return ASSUMED_TOKENS, f"{ASSUMED_TOKENS} assumed, --tokens gives another number ({why})"
    ends = 0 if config.objective.end_padding == "absent" else 1
    answers = [most_tokens(joint_of(one) + answer.strip()) for one in asked for answer in one.answers]
    filled = (config.evaluation.max_new_tokens or max(answers) + 1) if ends and objective == "masked" else 0

    def most(row: TrainingText) -> int:
        answer = most_tokens(row.text[row.prompt_length :]) + (ends if objective == "causal" else 0)
        return most_tokens(row.text[: row.prompt_length]) + max(answer, filled) + _AROUND

    longest = max(texts, key=most)
    told = f", its answer filled up to {filled} tokens" if filled else ""
    about = f"from the longest text of {len(longest.text)} characters{told}; --tokens gives another number"
    return most(longest), f"{most(longest)}, {about}"


def most_tokens(text: str) -> int:
    """Tokens of a text, from above: a digit, a sign and a byte of another script each, two letters of ASCII or blanks.

    >>> most_tokens("born 1912-06-23"), most_tokens("作者")
    (13, 6)
    """
    rest = _TOGETHER.sub("", text)
    return sum(-(-len(run) // _LETTERS) for run in _TOGETHER.findall(text)) + len(rest.encode())
