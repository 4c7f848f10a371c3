"""What is taken apart: a model, the rows it is trained on, what is asked in reverse, and what a run minimises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ...errors import RevprobeError, did_you_mean
from ...hooks.gradients.spread_weights import require_whole
from ...models.checkpoints import checkpoint_folder
from ...models.probed import ProbedModel, as_probed
from ...probes.pairs.pairs import ReversalPairs
from ...relations.letters import LettersRelation
from ...relations.text_relation import TextRelation
from ..config.one_layer import DIALS, RunConfig
from ..runs.finetune_setup import text_relation
from ..runs.finetuning import FinetuneRun
from ..runs.one_layer import OneLayerRun
from ..runs.open import open_run
from ..runs.run import Run
from ..training.block_diffusion import require_one_block
from ..training.dataset import RowOptions
from .mask_sets import RATES, MaskLaw, law_of
from .masked_samples import Objective
from .term_rows import TermRow, rows_of_pairs, rows_of_relation


@dataclass(frozen=True)
class Asked:
    """What is taken apart, whichever way it was named."""

    model: ProbedModel
    rows: list[TermRow]
    pairs: ReversalPairs
    objective: Objective
    run: OneLayerRun | None = None
    step: int = -1


def asked_terms(
    given: ProbedModel | nn.Module | Run | str | Path,
    relation: LettersRelation | TextRelation | ReversalPairs | None = None,
    *,
    direction: str | None = None,
    step: int = -1,
    dial: str | None = None,
    rates: str | None = None,
    answer_tokens: int | None = None,
) -> Asked:
    """What `objective_terms` takes apart, from its arguments."""
    run = open_run(given) if isinstance(given, str | Path) else given if isinstance(given, Run) else None
    options, objective = RowOptions(answer_tokens=answer_tokens or 0), Objective()
    if isinstance(run, OneLayerRun):
        step = checkpoint_folder(run.path, step, "raw")[1]
        model = run.load(step, "raw")
        objective, relation = objective_of(run.config, step), relation or run.relation
    elif isinstance(run, FinetuneRun):
        model, config = run.load(step), run.config
        response_only = config.objective.scope == "response_only"
        own = int(run.resolved.get("answer_tokens", 0))
        answer_tokens = own if answer_tokens is None else answer_tokens
        options = RowOptions(response_only, config.objective.whole_entity, answer_tokens)
        relation, direction = relation or text_relation(config), direction or config.relation.direction
    else:
        assert not isinstance(given, str | Path | Run), "a run of either kind"
        model = as_probed(given)
    if model.objective != "masked":
        raise RevprobeError(f"{model.name} is causal: its terms have no masks to tell apart; pass a masked model")
    require_one_block(model, "objective_terms")
    require_whole(model.module, "objective_terms")
    if relation is None:
        raise RevprobeError(f"{model.name} alone says nothing of what it is trained on; pass a relation, or pairs")
    objective = _with(objective, dial, rates, relation)
    if isinstance(relation, ReversalPairs):
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
    return Asked(model, rows, pairs, objective, run if isinstance(run, OneLayerRun) else None, step)


def objective_of(config: RunConfig, step: int) -> Objective:
    """What a one-layer run minimises in the step that follows `step`."""
    training = config.training
    return Objective(law_of(training), training.loss, training.dial_at(step), training.negative_weight)


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
        law = MaskLaw(rates, law.masks, law.eps)
    return Objective(law, objective.per, dial, objective.dropped_weight)
