"""Which terms of the training objective move the reverse answer, and which way.

    found = rp.objective_terms("runs/one-layer-quick/rope-l10-s0", step=1000)
    rp.objective_classes(found, by=["priced", "target", "evidence"])

The objective is a sum over terms: one hidden token of one row under one set of masks. A small step against its gradient
changes the reverse loss by -lr <g_objective, g_reverse>, and the product on the right is a sum over classes of terms.
So each class has a share of the loss, and a pressure on the reverse answer: positive where its step lowers the reverse
loss, negative where it raises it.

Source: paper Thm 4.6, which says that one class (target hidden, evidence visible) presses the right way; here all are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from ...hooks.untouched import untouched
from ...models.checkpoints import checkpoint_folder
from ...models.probed import ProbedModel, as_probed
from ...probes.pairs.pairs import ReversalPairs
from ...probes.passes.asked import asked_pairs
from ...probes.passes.plan import PassResult, Plan
from ...probes.passes.run import describe
from ...probes.readings.reading import Reading
from ...relations.letters import LettersRelation
from ...relations.text_relation import TextRelation
from ..config.one_layer import RunConfig
from ..runs.finetune_setup import text_relation
from ..runs.finetuning import FinetuneRun
from ..runs.one_layer import OneLayerRun
from ..runs.open import open_run
from ..runs.run import Run
from ..training.dataset import RowOptions
from .adamw_map import AdamWMap, adamw_map, no_map
from .class_gradients import ClassGradients, Objective, class_gradients
from .mask_sets import RATES, MaskLaw, law_of
from .reverse_gradients import (
    CONTROL,
    LETTERS,
    LOSS,
    FlatParameters,
    ReverseGradients,
    by_role,
    require_room,
    reverse_gradients,
)
from .term_rows import TermRow, rows_by_shape, rows_of_pairs, rows_of_relation

DIALS = ("keep", "drop-right", "drop-left", "drop-both", "drop-right-matched", "drop-left-matched", "mirror")
MOMENTUM, DECAY = "momentum", "decay"
DRAWS = 8192


@checked
def objective_terms(
    model: ProbedModel | nn.Module | Run | str | Path,
    relation: LettersRelation | TextRelation | ReversalPairs | None = None,
    *,
    direction: str | None = None,
    step: int = -1,
    dial: str | None = None,
    rates: str | None = None,
    answer_tokens: int | None = None,
    draws: int = DRAWS,
    batch_size: int | None = None,
    control: bool = True,
    seed: int = 0,
) -> Reading:
    """The training objective by class of its terms, and each class's pressure on the reverse answer.

    A class is what is priced (target, evidence, a placeholder or template token left or right of the evidence, end
    tokens after the answer, other), whether target and evidence are visible, how many tokens (or entities masked as
    one) are hidden, and whether the dial leaves the term out. The value is the whole objective's pressure, the inner
    product of its gradient with that of the reverse loss: a step of plain gradient descent changes the reverse loss by
    -lr times it, to first order. The control holds the same gradients against the same targets under the reverse
    queries of other facts. `objective_classes` gives the classes with their shares, cosines and changes.

    Rows of at most 5 tokens that can be hidden are enumerated: all sets of masks, with their exact weights. Of longer
    rows sets are drawn, stratified by class; `sampling_error` says what that leaves open. Measured without dropout, on
    the weights as they are.

    Args:
        model: a masked model, or a run (its folder), whose config then gives rows, masks, dial and optimizer.
        relation: what is trained, in `direction`; or pairs, whose forward queries then are the rows of training and
            whose reverse queries are asked. A run's own when None.
        step: of a run, the checkpoint; its raw weights, which are what the optimizer moves.
        dial: which negatives are left out ("keep": none); the run's own at this step when None. Terms it leaves out
            keep their numbers, marked `dropped`, with the factor they are trained with.
        rates: how masking rates are drawn; the run's own when None, "independent" for a model.
        answer_tokens: of text, what answers are filled up to with end tokens; a fine-tuning's own, or 0, when None.
        draws: masked sequences in all, where not every set is enumerated.

    Frame: one row per fact, class and role of parameters: fact, priced, target, evidence (visible, hidden, partly),
    masks, dropped, factor (what the dial multiplies the term by), role; loss (the class's part of the objective, alike
    in all its rows); inner (with the gradient of the fact's reverse loss), inner_letters and inner_margin (with its two
    parts, -log p(target | candidates) and -log p(candidates)), inner_control, all before the factor; adamw,
    adamw_letters, adamw_margin (first-order change by the run's coming AdamW step in nats, factor, rate and clip
    included; NaN with reason_adamw where no state is kept); norm, norm_reverse (of the gradients of the class and of
    the mean reverse loss). The classes "momentum" and "decay" hold what that step does whatever the gradient is.
    Raises: RevprobeError, for a causal model, a dial on text, a model without a relation, and as the probes.
    """
    asked = asked_terms(
        model, relation, direction=direction, step=step, dial=dial, rates=rates, answer_tokens=answer_tokens
    )
    plan = Plan(control=control, batch_size=batch_size, seed=seed)
    return taken_apart(asked, draws, plan).reading(plan)


def taken_apart(asked: Asked, draws: int, plan: Plan) -> Terms:
    """The classes of an objective with their gradients, and those that they are held against."""
    pairs = asked_pairs(asked.model, asked.pairs, "objective_terms")
    module = asked.model.module
    with untouched(module):
        flat = FlatParameters(module)
        flat.require_gradients()
        require_room(flat.size, 3 * len(set(pairs.facts)) + 200, flat.parameters[0].dtype)
        options: dict[str, Any] = {"control": plan.control, "batch_size": plan.batch_size, "seed": plan.seed}
        reverse = reverse_gradients(asked.model, pairs, flat, **options)
        tables = rows_by_shape(asked.rows)
        classes = class_gradients(asked.model, tables, asked.objective, flat, reverse.mean, draws=draws, seed=plan.seed)
        adamw = no_map() if asked.run is None else adamw_map(asked.run, asked.step, flat)
    return Terms(replace(asked, pairs=pairs), flat, classes, reverse, adamw)


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
    training: Any = config.training
    dial_at = getattr(training, "dial_at", lambda _: "keep")
    weight = float(getattr(training, "negative_weight", 0.0))
    return Objective(law_of(training), getattr(training, "loss", "token"), dial_at(step), weight)


def _with(
    objective: Objective, dial: str | None, rates: str | None, relation: LettersRelation | TextRelation | ReversalPairs
) -> Objective:
    """The objective with the dial and the rates that were asked for."""
    dial = objective.dial if dial is None else dial
    if dial not in DIALS:
        raise RevprobeError(f"unknown dial {dial!r}{did_you_mean(dial, DIALS)}")
    if dial != "keep" and isinstance(relation, TextRelation):
        raise RevprobeError(f"dial {dial!r} leaves out placeholders, which {relation.name} has none of; use 'keep'")
    law = objective.law
    if rates is not None:
        if rates not in RATES:
            raise RevprobeError(f"unknown rates {rates!r}{did_you_mean(rates, RATES)}")
        law = MaskLaw(rates, law.masks, law.eps)
    return Objective(law, objective.per, dial, objective.dropped_weight)


@dataclass(frozen=True)
class Terms:
    """What was found, on its way to a frame. Shapes: fact, class, role."""

    asked: Asked
    flat: FlatParameters
    classes: ClassGradients
    reverse: ReverseGradients
    adamw: AdamWMap

    @property
    def factor(self) -> np.ndarray:
        """What the dial multiplies each class by. Shapes: `-> class`."""
        dropped = np.array([one.dropped for one in self.classes.classes])
        return np.where(dropped, self.asked.objective.dropped_weight, 1.0)

    @property
    def gram(self) -> pd.DataFrame:
        """Products of the classes' gradients, all parameters. Shapes: `class class`."""
        return pd.DataFrame(self.classes.gram(self.flat)[0])

    def reading(self, plan: Plan) -> Reading:
        """The reading of an objective."""
        about = describe(self.asked.model, PassResult(self.asked.pairs, np.array([]), []), plan) | self.about()
        reading = Reading("objective_terms", self.frame(plan.control), about, self.gram)
        reading.meta["statistic"] = reading.measured.statistic
        return reading

    def about(self) -> dict[str, Any]:
        """What the reading says of itself besides."""
        classes, adamw, objective = self.classes, self.adamw, self.asked.objective
        loss = float(np.array(classes.losses) @ self.factor)
        along = self.factor @ classes.deviation
        error = float(np.sqrt((along**2).sum() / (len(along) * (len(along) - 1))))
        return {
            "objective_loss": loss,
            "per": objective.per,
            "dial": objective.dial,
            "rates": objective.law.rates,
            "masks": objective.law.masks,
            "eps": objective.law.eps,
            "sequences": classes.sequences,
            "enumerated": classes.enumerated,
            "sampling_error": error,
            "deviations": classes.deviation.tolist(),
            "reverse_loss": float(self.reverse.loss[LOSS].mean()),
            "reverse_letters_loss": float(self.reverse.loss[LETTERS].mean()),
            "learning_rate": adamw.learning_rate,
            "clip": adamw.clip,
            "gradient_norms": adamw.norms,
            "reason_adamw": adamw.reason,
        }

    def frame(self, control: bool) -> pd.DataFrame:
        """One row per class, role and fact, those of momentum and decay last."""
        gradient, squares = self.classes.gradient, self.classes.gram(self.flat)[1]
        tables = [
            self._rows(role, product, squares[role])
            for role, product in self._products(gradient, self.adamw.per_gradient)
        ]
        frame = pd.concat(tables, ignore_index=True)
        rest = [
            self._of_the_step(name, vector)
            for name, vector in ((MOMENTUM, self.adamw.momentum), (DECAY, self.adamw.decay))
            if vector is not None and bool(vector.any())
        ]
        frame = pd.concat([frame, *rest], ignore_index=True)
        frame["reason_adamw"] = self.adamw.reason
        frame["masks"] = frame["masks"].astype("Int64")
        order = ["class_number", "role", "fact"]
        frame = frame.sort_values(order, kind="stable", ignore_index=True)
        return frame if control else frame.drop(columns="inner_control")

    def _products(self, gradient: Tensor, scale: Tensor | None) -> list[tuple[str, dict[str, np.ndarray]]]:
        """Products with each part of each fact's reverse loss, by role. Shapes: `-> class fact` each."""
        parts, facts = self.reverse.gradient.shape[:2]
        against = self.reverse.gradient.flatten(0, 1)
        split = lambda product: product.cpu().numpy().reshape(-1, parts, facts)  # noqa: E731
        moved = None if scale is None else dict(by_role(self.flat, gradient.double() * scale, against))
        found = []
        for role, product in by_role(self.flat, gradient, against):
            own = split(product)
            update = np.full_like(own, np.nan) if moved is None else split(moved[role])
            columns = {"inner": own[:, LOSS], "inner_letters": own[:, LETTERS], "inner_control": own[:, CONTROL]}
            columns["inner_margin"] = own[:, LOSS] - own[:, LETTERS]
            columns |= {"adamw": update[:, LOSS], "adamw_letters": update[:, LETTERS]}
            columns["adamw_margin"] = update[:, LOSS] - update[:, LETTERS]
            found.append((role, columns))
        return found

    def _rows(self, role: str, columns: dict[str, np.ndarray], squares: np.ndarray) -> pd.DataFrame:
        classes, facts = self.classes.classes, self.reverse.facts
        each = np.repeat(np.arange(len(classes)), len(facts))
        table = pd.DataFrame(classes).loc[each].reset_index(drop=True)
        table.insert(0, "fact", np.tile(facts, len(classes)))
        factor = self.factor[each]
        # What is trained is the term times the factor, and so is what the optimizer makes of it.
        numbers = {
            name: part.reshape(-1) * (factor if name.startswith("adamw") else 1) for name, part in columns.items()
        }
        norm = np.sqrt(np.maximum(squares, 0.0))[each]
        reverse = float(self.reverse.mean[self.flat.spans[role]].double().norm())
        about: dict[str, Any] = {"class_number": each, "factor": factor, "role": role}
        about |= {"loss": np.array(self.classes.losses)[each]}
        return table.assign(**about, **numbers, norm=norm, norm_reverse=reverse)

    def _of_the_step(self, name: str, vector: Tensor) -> pd.DataFrame:
        """What the coming step does whatever the gradient is."""
        tables = []
        for role, columns in self._products(vector[None].double(), torch.ones_like(vector)):
            moved = {key: part[0] for key, part in columns.items() if key.startswith("adamw")}
            about: dict[str, Any] = {"fact": self.reverse.facts, "priced": name, "role": role, "factor": 1.0}
            about |= {"dropped": False, "class_number": len(self.classes.classes) + (name == DECAY)}
            tables.append(pd.DataFrame(about | moved))
        return pd.concat(tables, ignore_index=True)
