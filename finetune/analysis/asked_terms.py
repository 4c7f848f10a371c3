"""What is taken apart: a model, the rows it is trained on, what is asked in reverse, and what a run minimises."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ...errors import RevprobeError, did_you_mean
from ...hooks.gradients.spread_weights import require_whole
from ...models.checkpoints import checkpoint_folder
from ...models.peft_adapters import adapter_parameters
from ...models.probed import ProbedModel, as_probed
from ...probes.pairs.pairs import ReversalPairs
from ...relations.letters import LettersRelation
from ...relations.text_relation import TextRelation
from ..config.objective import ObjectiveOptions
from ..config.one_layer import DIALS, RunConfig
from ..runs.finetune_setup import row_options, text_relation
from ..runs.finetuning import FinetuneRun
from ..runs.one_layer import OneLayerRun
from ..runs.open import open_run
from ..runs.run import Run
from ..training.block_diffusion import require_one_block
from ..training.dataset import RowOptions
from ..training.probe_callback import asked_parameters
from .mask_sets import RATES, MaskLaw, law_of
from .masked_samples import Objective
from .term_rows import TermRow, rows_of_pairs, rows_of_relation


@dataclass(frozen=True)
class Asked:
    """What is taken apart, whichever way it was named.

    `parameters` says whose gradients are compared ("all", "lora", "both"), `names` which those are (None:
    all there are).
    """

    model: ProbedModel
    rows: list[TermRow]
    pairs: ReversalPairs
    objective: Objective
    run: OneLayerRun | None = None
    step: int = -1
    parameters: str = "all"
    names: list[str] | None = None


def asked_terms(
    given: ProbedModel | nn.Module | Run | str | Path,
    relation: LettersRelation | TextRelation | ReversalPairs | None = None,
    *,
    direction: str | None = None,
    step: int = -1,
    dial: str | None = None,
    rates: str | None = None,
    answer_tokens: int | None = None,
    parameters: str | None = None,
) -> Asked:
    """What `objective_terms` takes apart, from its arguments."""
    run = open_run(given) if isinstance(given, str | Path) else given if isinstance(given, Run) else None
    options, objective, own = RowOptions(answer_tokens=answer_tokens or 0), Objective(), None
    if isinstance(run, OneLayerRun):
        step = checkpoint_folder(run.path, step, "raw")[1]
        model = run.load(step, "raw")
        objective, relation = objective_of(run.config, step), relation or run.relation
    elif isinstance(run, FinetuneRun):
        model, own = run.load(step), run.config
        relation, direction = relation or text_relation(own), direction or own.relation.direction
    else:
        assert not isinstance(given, str | Path | Run), "a run of either kind"
        model = as_probed(given)
    _require_masked(model)
    if isinstance(run, FinetuneRun) and own is not None:
        decoded = int(run.resolved.get("answer_tokens", 0))
        options = row_options(own, model, decoded if answer_tokens is None else answer_tokens)
        objective = objective_of_text(own.objective)
    if relation is None:
        raise RevprobeError(f"{model.name} alone says nothing of what it is trained on; pass a relation, or pairs")
    objective = _with(objective, dial, rates, relation)
    if isinstance(relation, ReversalPairs):
        _require_plain_rows(options)
        rows, pairs = rows_of_pairs(model, relation), relation
    else:
        rows = rows_of_relation(model, relation, direction, options)
        pairs = (
            relation.pairs(model, placements="mirror")
            if isinstance(relation, LettersRelation)
            else relation.pairs(model, direction or relation.directions[0])
        )
    if pairs.kind != "same_target":
        raise RevprobeError(f"pairs of kind {pairs.kind!r} ask for another token in reverse; use same_target pairs")
    # What is trained, where nobody says otherwise: an adapter freezes everything else.
    owner = parameters or ("lora" if adapter_parameters(model.module) else "all")
    names = asked_parameters(model, owner)
    return Asked(model, rows, pairs, objective, run if isinstance(run, OneLayerRun) else None, step, owner, names)


def _require_masked(model: ProbedModel) -> None:
    """Raises: RevprobeError, for a model whose terms cannot be told apart."""
    if model.objective != "masked":
        raise RevprobeError(f"{model.name} is causal: its terms have no masks to tell apart; pass a masked model")
    require_one_block(model, "objective_terms")
    require_whole(model.module, "objective_terms")


def objective_of(config: RunConfig, step: int) -> Objective:
    """What a one-layer run minimises in the step that follows `step`."""
    training = config.training
    return Objective(law_of(training), training.loss, training.dial_at(step), training.negative_weight)


def objective_of_text(options: ObjectiveOptions) -> Objective:
    """What a fine-tuning minimises. Raises: RevprobeError, for what has no law of its sets of masks, or no parts."""
    if options.one_span:
        raise RevprobeError(
            "objective.one_span masks one span a row, and objective_terms knows the law of masks at a rate alone; take "
            "a run without it"
        )
    for key in ("negatives", "pad_sides"):
        if (value := getattr(options, key)) != ObjectiveOptions.model_fields[key].default:
            raise RevprobeError(
                f"objective.{key}: {value} is about the end tokens around bare pairs, whose sides objective_terms does "
                "not tell apart; take a run without it"
            )
    low, high = options.rates or (options.eps, 1.0)
    return Objective(MaskLaw(eps=low, highest=high))


def _require_plain_rows(options: RowOptions) -> None:
    """Raises: RevprobeError, where a run leaves out tokens of its statements, which pairs do not tell."""
    said = {
        "scope: response_only": options.response_only,
        "whole_entity: true": options.whole_entity,
        f"never_mask: {options.never_mask}": options.never_mask is not None,
    }
    departs = [words for words, holds in said.items() if holds]
    if departs:
        raise RevprobeError(
            f"objective.{departs[0]} is about statements, and the rows of pairs are their forward queries; pass a "
            "relation, or none for the run's own"
        )


def _with(
    objective: Objective, dial: str | None, rates: str | None, relation: LettersRelation | TextRelation | ReversalPairs
) -> Objective:
    """The objective with the dial and the rates that were asked for."""
    dial = objective.dial if dial is None else dial
    if dial not in DIALS["masked"]:
        raise RevprobeError(f"unknown dial {dial!r}{did_you_mean(dial, DIALS['masked'])}")
    if dial != "keep" and isinstance(relation, TextRelation):
        raise RevprobeError(f"dial {dial!r} leaves out placeholders, which {relation.name} has none of; use 'keep'")
    law = objective.law
    if rates is not None:
        if rates not in RATES:
            raise RevprobeError(f"unknown rates {rates!r}{did_you_mean(rates, RATES)}")
        law = replace(law, rates=rates)
    return Objective(law, objective.per, dial, objective.dropped_weight)
