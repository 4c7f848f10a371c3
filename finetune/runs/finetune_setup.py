"""From a fine-tuning's config to the objects that train and probe it: relation, base model, rows, pairs, trainer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from ...errors import RevprobeError
from ...models.checkpoints import step_of
from ...models.contract.block_masks import WHOLE
from ...models.peft_adapters import BASE, without_wrapper
from ...models.probed import ProbedModel
from ...models.registry import load_model
from ...probes.decoding.candidates import require_whole_text
from ...probes.decoding.exact_match import AnswerBook
from ...probes.pairs.pairs import ReversalPairs
from ...probes.readings.readings import Readings
from ...relations.catalog import TextRelation, load_relation
from ...relations.evaluation import answer_book, asked_sides, evaluate_relation, rank_relation
from ..config.finetuning import FinetuneConfig
from ..pretraining.tiny_models import build_tiny
from ..training.answers_callback import SnapshotAnswers
from ..training.arguments import training_arguments, uses_cpu
from ..training.checkpointing import ANSWERED, READINGS
from ..training.dataset import PadRows, RowOptions, StatementRows, padding_id
from ..training.distributed import ProcessGroup
from ..training.lora import add_lora, quantization, require_no_adapter, target_modules
from ..training.merged_lora import merged_lora
from ..training.negatives import Negatives
from ..training.prediction_callback import PREDICTIONS, FirstOrderPrediction
from ..training.probe_callback import ProbeCallback
from ..training.trainer import ForwardOnlyTrainer
from .started_with import digests, mask_told

# A column of the pairs and their readings: the loss never hid what the forward query asks for.
FORWARD_UNTRAINED = "forward_untrained"
NO_FINE_TUNING = "fine-tuning, which hides tokens behind it,"


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs that no training step changes.

    Attributes:
        model: the base, without an adapter.
        folder: the run's.
        answers: what counts as right for every question about the relation.
        answer_tokens: how many tokens are decoded for an answer, and filled up to in a masked model's rows.
    """

    config: FinetuneConfig
    relation: TextRelation
    model: ProbedModel
    pairs: ReversalPairs
    rows: StatementRows
    answers: AnswerBook
    answer_tokens: int
    folder: Path

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.config.training.total_steps(len(self.rows))

    @property
    def snapshots(self) -> list[int]:
        """The steps that are checkpointed and probed."""
        return self.config.snapshots.resolve(self.steps)

    @property
    def answer_steps(self) -> list[int]:
        """The snapshots with answers of their own, beside the evaluation after the last."""
        return answer_steps(self.config, self.snapshots)

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """What the config came to, for resolved.json; with digests of the base before any training."""
        lora = self.config.lora
        return {
            "objective": self.model.objective,
            "logit_shift": self.model.logit_shift,
            **mask_told(self.model),
            "begin_token_id": self.model.begin_token_id,
            **({} if self.model.block_size is None else {"block_size": self.model.block_size}),
            "steps": self.steps,
            "snapshots": self.snapshots,
            "rows": len(self.rows),
            "answer_tokens": self.answer_tokens,
            "targets": "all weights" if lora is None else target_modules(self.model, lora.targets),
            "pairs": len(self.pairs),
            "kind": self.pairs.kind,
            "relation": repr(self.relation),
            "asked": self._asked(),
            **digests(self.config, self.relation, self.model, self.rows.rows, self.pairs.digest, self.folder),
        }

    def _asked(self) -> list[list[str]]:
        """The sides that are asked (forward or reverse, and of which facts); none where the config asks nothing."""
        chosen = self.config.evaluation
        if chosen.facts == 0:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no floor is said when it is asked
            sides = asked_sides(self.relation, self.config.relation.direction, templates=chosen.templates)
        return [[about["asked"], about["split"]] for about, _ in sides]

    def ask(self, model: ProbedModel) -> Readings:
        """The exact match of every side that the config's evaluation asks of a model, its LoRA merged in a copy."""
        model = merged_lora(model)
        return evaluate_relation(
            model, self.relation, self.config.relation.direction, answers=self.answers, **self._how
        )

    def ask_at_snapshot(self, model: ProbedModel) -> Readings:
        """What a snapshot's answers hold: exact match where they are asked over training, ranks where asked for."""
        model = merged_lora(model)  # once for both
        asked = self.ask(model) if self.config.evaluation.at == "snapshots" else Readings([])
        if not self.config.evaluation.candidates:
            return asked
        ranked = rank_relation(model, self.relation, self.config.relation.direction, **self._how)
        return Readings([*asked, *ranked])

    @property
    def _how(self) -> dict[str, Any]:
        """How facts are asked, decoding or ranking."""
        chosen = self.config.evaluation
        how = {"templates": chosen.templates, "facts": chosen.facts, "batch_size": chosen.batch_size}
        return how | {"max_new_tokens": self.answer_tokens}

    def wrapped(self, module: nn.Module, **provenance: Any) -> ProbedModel:
        """A model with an adapter, for the probes, as the base was wrapped."""
        return self.model.with_module(without_wrapper(module), **provenance)

    @property
    def wrapping(self) -> dict[str, Any]:
        """How the base was wrapped; it was checked then."""
        base = self.model
        known: dict[str, Any] = {"mask_token_id": base.mask_token_id, "logit_shift": base.logit_shift}
        known |= {"begin_token_id": base.begin_token_id, "tokenizer": base.tokenizer}
        known |= {"block_size": (base.block_size or WHOLE) if base.objective == "masked" else None}
        return {"objective": base.objective, "check": False} | known


def answer_steps(config: FinetuneConfig, snapshots: list[int]) -> list[int]:
    """The snapshots with answers of their own: all where facts are asked there, the last where they are only ranked."""
    asked = config.evaluation
    if asked.facts == 0 or (asked.at == "last" and not asked.candidates):
        return []
    return snapshots if asked.at == "snapshots" else snapshots[-1:]


def prepare(config: FinetuneConfig, folder: Path, team: ProcessGroup) -> Prepared:
    """Load the relation and the base model (or build it), and make rows and pairs of them.

    Raises: RevprobeError, for whatever of these cannot be had, before anything is trained.
    """
    relation = text_relation(config)
    direction = config.relation.direction
    relation.opposite(direction)  # an unknown direction is told before a model is loaded
    tiny, loading = config.model.tiny, loading_options(config)
    source: str | Path = str(config.model.name)
    if tiny is not None:
        source = team.on_rank_zero(lambda: build_tiny(tiny, relation, folder / BASE))
    model = load_model(source, **loading)  # the Trainer places it, unless it is loaded in 4 bits
    require_no_adapter(model)
    model.require_mask_token(NO_FINE_TUNING)
    if team.rank == 0:
        _warn_of_narrow_weights(config, model)
    if config.evaluation.candidates:
        require_whole_text(model)
    answers = answer_book(model, relation, direction)
    answer_tokens = config.evaluation.max_new_tokens or answers.limit
    options = row_options(config, model, answer_tokens)
    pairs = snapshot_pairs(config, relation, model)
    rows = StatementRows(relation.training_rows(direction), model, options)
    return Prepared(config, relation, model, pairs, rows, answers, answer_tokens, folder)


def _warn_of_narrow_weights(config: FinetuneConfig, model: ProbedModel) -> None:
    """Warns: where all weights are trained in a dtype that most of AdamW's steps are too small for."""
    if config.lora is None and model.dtype in (torch.bfloat16, torch.float16):
        kind = str(model.dtype).removeprefix("torch.")
        warnings.warn(
            f"{model.name}: lora: null trains weights in {kind}, which most steps round back to what they were; set "
            "model.dtype: float32 with training.bf16: true",
            stacklevel=4,
        )


def row_options(config: FinetuneConfig, model: ProbedModel, answer_tokens: int) -> RowOptions:
    """What of a statement is trained, as the config has it.

    Raises: RevprobeError, for a causal model asked for something about masks, and a model in blocks for what its
        objective does not take.
    """
    objective = config.objective
    departs = [
        key for key in objective.of_masks if getattr(objective, key) != type(objective).model_fields[key].default
    ]
    if departs and model.objective == "causal":
        raise RevprobeError(f"objective.{departs[0]} is about masks, and {model.name} is causal; leave it out")
    for key in set(departs) & {"one_span", "negatives"}:
        if model.block_size is not None:
            raise RevprobeError(f"objective.{key} is not told for training in blocks, as {model.name} is; leave it out")
    told = {"negatives": objective.negatives != "keep", "pad_sides": objective.pad_sides != "right"}
    bare = next((f"objective.{key}: {getattr(objective, key)}" for key, holds in told.items() if holds), None)
    return RowOptions(
        objective.scope == "response_only",
        objective.whole_entity,
        answer_tokens,
        objective.never_mask,
        objective.end_padding,
        objective.pad_sides,
        bare,
    )


def snapshot_pairs(config: FinetuneConfig, relation: TextRelation, model: ProbedModel) -> ReversalPairs:
    """The pairs that are probed at every snapshot, marked where training never asks what their forward query does."""
    pairs = relation.pairs(model, config.relation.direction, limit=config.snapshots.facts)
    hides_first = config.objective.scope != "response_only" and config.objective.never_mask != "first"
    if hides_first or model.objective != "masked":
        return pairs
    return replace(pairs, flags={**pairs.flags, FORWARD_UNTRAINED: np.ones(len(pairs), dtype=bool)})


def text_relation(config: FinetuneConfig) -> TextRelation:
    """The relation a config names. Raises: RevprobeError, as `load_relation`."""
    chosen = config.relation
    relation = load_relation(chosen.name, chosen.path, **chosen.options)
    assert isinstance(relation, TextRelation), "the config's names are those of text relations"
    return relation


def loading_options(config: FinetuneConfig) -> dict[str, Any]:
    """How `load_model` reads the base: its dtype, the 4 bits where asked for, and what its files do not say."""
    chosen, on_cpu = config.model, uses_cpu(config.training.device)
    dtype = getattr(torch, chosen.dtype) if chosen.dtype else None
    loaded = {"dtype": dtype, **quantization(chosen.quantize, dtype or torch.bfloat16, on_cpu=on_cpu)}
    return loaded | chosen.reads


def placed_options(config: FinetuneConfig) -> dict[str, Any]:
    """`loading_options` and the device training used; weights in 4 bits are placed as they are read."""
    options = loading_options(config)
    device = "cpu" if uses_cpu(config.training.device) else "cuda"
    return options if "device_map" in options else {"device": device, **options}


def build_finetuning(
    config: FinetuneConfig, folder: Path, prepared: Prepared, checkpoint: Path | None
) -> ForwardOnlyTrainer:
    """The trainer of a run with its probes, the adapter, where there is one, fresh from the config's seed.

    Args:
        checkpoint: where training will go on from; its readings are there and not taken again.
    """
    objective = config.objective
    arguments = _arguments(config, folder, prepared.steps)
    # A step has the config's rows, however many processes take them.
    arguments.per_device_train_batch_size = ProcessGroup.of(arguments).per_process(config.training.batch_size)
    lowest, highest = objective.rates or (objective.eps, 1.0)
    set_seed(config.training.seed)
    trainer = ForwardOnlyTrainer(
        model=add_lora(prepared.model, config.lora, checkpointing=config.training.gradient_checkpointing),
        args=arguments,
        train_dataset=prepared.rows,
        data_collator=PadRows(padding_id(prepared.model.tokenizer)),
        processing_class=prepared.model.tokenizer,
        objective=prepared.model.objective,
        mask_token_id=prepared.model.mask_token_id,
        logit_shift=prepared.model.logit_shift if prepared.model.objective == "masked" else 0,
        eps=lowest,
        highest=highest,
        antithetic=objective.antithetic,
        masks="span" if objective.one_span else "rate",
        negatives=Negatives(dial=objective.negatives),
        block_size=prepared.model.block_size,
        reads=config.model.reads,
        snapshots=prepared.snapshots,
    )
    if config.snapshots.during_training:
        _add_probes(trainer, config, folder, prepared, checkpoint)
    return trainer


def _arguments(config: FinetuneConfig, folder: Path, steps: int) -> TrainingArguments:
    """The Trainer's arguments. Raises: RevprobeError, for a tracker that is not installed."""
    training = config.training
    if training.report_to != "none" and find_spec(training.report_to) is None:
        raise RevprobeError(
            f"training.report_to is {training.report_to!r}, which is not installed; `pip install "
            f"{training.report_to}`, or none"
        )
    checkpointing: dict[str, Any] = {}
    if training.gradient_checkpointing:
        # A frozen embedding's output needs no gradient: the reentrant kind would drop every gradient behind it.
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return training_arguments(
        folder,
        steps=steps,
        device=training.device,
        schedule=training.schedule,
        min_learning_rate=training.min_learning_rate,
        adam_beta2=training.adam_beta2,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.gradient_clipping,
        bf16=training.bf16,
        **checkpointing,
        seed=training.seed,
        report_to=training.report_to,
        run_name=config.name,
    )


def _add_probes(
    trainer: ForwardOnlyTrainer, config: FinetuneConfig, folder: Path, prepared: Prepared, checkpoint: Path | None
) -> None:
    common: dict[str, Any] = {"steps": prepared.snapshots, "batch_size": config.snapshots.batch_size}
    wrapping = {"name": folder.resolve().name, **prepared.wrapping}
    done = () if checkpoint is None else (step_of(checkpoint) or 0,)
    probes = ProbeCallback(
        prepared.pairs,
        folder / READINGS,
        done=done,
        parameters=config.snapshots.parameters,
        controls=config.snapshots.controls or (),
        log=trainer.log if config.training.report_to != "none" else None,
        **common,
        **wrapping,
    )
    trainer.add_callback(probes)
    if prepared.answer_steps:
        asking: dict[str, Any] = {"steps": prepared.answer_steps, "done": done}
        trainer.add_callback(SnapshotAnswers(prepared.ask_at_snapshot, folder / ANSWERED, **asking, **wrapping))
    if config.snapshots.predictions:
        trainer.add_callback(FirstOrderPrediction(prepared.pairs, folder / PREDICTIONS, **common, **wrapping))
