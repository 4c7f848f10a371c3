"""The memory plan of a fine-tuning's config: its model's shapes, its adapter, its batches, without a weight loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
            assumed when the relation's file is not there. The plan says which. Queries of the probes are those of
            either direction's texts, and as long as a row where `tokens` is given.
    Raises: RevprobeError, for a model whose config cannot be had, LoRA targets it does not have, and rows that are
        asked for, or filled up by `evaluation.max_new_tokens`, beyond what it takes.
    """
    with quiet_transformers():
        module, objective = on_meta(config.model)
    longest = _longest_row(config, objective) if tokens is None else _Longest(tokens, "as asked", tokens)
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
    if model.max_length is not None:
        _require_taken(config, objective, tokens, model.max_length)
        longest = longest.within(model.max_length)
    if model.block_size is not None:
        longest = longest.beside_a_copy()
    plan = plan_memory(
        adapted,
        batch=training.batch_size,
        tokens=longest.tokens,
        probe_tokens=longest.query,
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
    return MemoryPlan(
        plan.rows, plan.parameters, plan.trained, (*plan.about, f"tokens of a row: {longest.about}", *more)
    )


def _require_taken(config: FinetuneConfig, objective: str, asked: int | None, most: int) -> None:
    """Raises: RevprobeError, for a row of `asked` tokens, or filled up to so many, that training would refuse."""
    name, filled = config.model.name or config.axes["model"], config.evaluation.max_new_tokens
    if asked is not None and asked > most:
        raise RevprobeError(
            f"{asked} tokens of a row: {name} takes at most {most}; ask for no more, or let the plan work them out"
        )
    # There is no prompt without a token.
    if filled is not None and filled >= most and _fills(config, objective):
        raise RevprobeError(
            f"evaluation.max_new_tokens {filled}: rows are filled up to so many behind their prompts, and {name} takes "
            f"at most {most} tokens of a row; lower it, or leave it out"
        )


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
    return max(runs, key=lambda run: _longest_row(run, objective).tokens)


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


class _Longest(NamedTuple):
    """Tokens of the longest training row and how that is known, and tokens of the longest query of the probes."""

    tokens: int
    about: str
    query: int

    def within(self, most: int) -> _Longest:
        """No longer than the model takes: of what is longer training refuses a row, and probing leaves out a pair."""
        above = self.tokens > most
        about = f"{most}, which is what the model takes, of {self.about}" if above else self.about
        return _Longest(min(self.tokens, most), about, min(self.query, most))

    def beside_a_copy(self) -> _Longest:
        return _Longest(2 * self.tokens, f"{self.about}, a noised copy beside a clean one", 2 * self.query)


def _longest_row(config: FinetuneConfig, objective: str) -> _Longest:
    """Tokens of the longest training row, and of the longest query, from above.

    A masked model's rows are filled up to the decoded length: the longest answer of either direction and an end token.
    Rows are of one direction's texts; a pair has a query of the other's, whose wording may be longer.
    """
    direction = config.relation.direction
    try:
        relation = text_relation(config)
        texts = relation.training_rows(direction)
        asked = all_questions(relation, direction)
        opposite = relation.statements[relation.opposite(direction)]
    except RevprobeError as error:
        why = first_line(error, with_type=False)
        about = f"{ASSUMED_TOKENS} assumed, --tokens gives another number ({why})"
        return _Longest(ASSUMED_TOKENS, about, ASSUMED_TOKENS)
    ends = 0 if config.objective.end_padding == "absent" else 1
    answers = [most_tokens(joint_of(one) + answer.strip()) for one in asked for answer in one.answers]
    filled = (config.evaluation.max_new_tokens or max(answers) + 1) if _fills(config, objective) else 0

    def most(row: TrainingText) -> int:
        answer = most_tokens(row.text[row.prompt_length :]) + (ends if objective == "causal" else 0)
        return most_tokens(row.text[: row.prompt_length]) + max(answer, filled) + _AROUND

    longest, trained = max(texts, key=most), {row.fact for row in texts}
    labels = relation.table["fact"].tolist()
    told = [relation.carrier + one.text for one in opposite if labels[one.fact] in trained]
    query = max(most_tokens(text) for text in [*told, *(row.text for row in texts)]) + _AROUND
    up = f", its answer filled up to {filled} tokens" if filled else ""
    about = f"from the longest text of {len(longest.text)} characters{up}; --tokens gives another number"
    return _Longest(most(longest), f"{most(longest)}, {about}", query)


def _fills(config: FinetuneConfig, objective: str) -> bool:
    """Whether rows are filled up behind their answers to the decoded length."""
    return objective == "masked" and config.objective.end_padding != "absent"


def most_tokens(text: str) -> int:
    """Tokens of a text, from above: a digit, a sign and a byte of another script each, two letters of ASCII or blanks.

    >>> most_tokens("born 1912-06-23"), most_tokens("作者")
    (13, 6)
    """
    rest = _TOGETHER.sub("", text)
    return sum(-(-len(run) // _LETTERS) for run in _TOGETHER.findall(text)) + len(rest.encode())
