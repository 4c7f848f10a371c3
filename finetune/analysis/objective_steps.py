"""Steps that are really taken on one class of training terms alone: does the reverse loss move the way it was foretold?

    rp.objective_steps("runs/one-layer-quick/rope-l10-s0", step=1000)

From one checkpoint a copy takes a step of plain gradient descent on each class, at two sizes (where first order holds,
a tenth of the step makes a tenth of the change), and one of the run's own AdamW from its saved state. The latter is
held against the step that AdamW takes without any gradient, since its momentum moves the weights by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from ...hooks.untouched import set_eval_mode, untouched
from ...models.checkpoints import checkpoint_folder
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.passes.batches import prepare_queries
from ...probes.passes.plan import Plan
from ...probes.passes.prompts import facts_of
from ...probes.passes.slopes import loss_slopes
from ...probes.statistics.by_class import CLASS
from ...probes.statistics.coverage import missing_intervals
from ...probes.statistics.estimators import STATISTICS_VERSION
from ...probes.statistics.intervals import mean_over_facts
from ...progress import Progress, counted, shows_progress
from ...relations.letters import LettersRelation
from ...relations.text_relation import TextRelation
from ..runs.one_layer import OneLayerRun
from ..runs.run import Run, pinned_threads
from ..training.adamw_update import adamw_update
from .asked_terms import asked_terms
from .next_step import trainer_at
from .objective_terms import DRAWS, Terms, taken_apart

SIZE = 1e-3  # of a model's step, where no run says how large its own are
NO_RATE = "the learning rate is 0 at this step; pass learning_rate="


@checked
@shows_progress("parts")
def objective_steps(
    model: ProbedModel | nn.Module | Run | str | Path,
    relation: LettersRelation | TextRelation | ReversalPairs | None = None,
    *,
    by: str | Iterable[str] = ("priced", "target", "evidence"),
    direction: str | None = None,
    step: int = -1,
    dial: str | None = None,
    parameters: str | None = None,
    learning_rate: float | None = None,
    draws: int = DRAWS,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> pd.DataFrame:
    """Take a step on each class of training terms, on a copy, and follow the reverse loss of every fact.

    Args:
        model, relation, direction, step, dial, parameters, draws: as in `objective_terms`. Terms that the dial leaves
            out take the step they would take if they were trained.
        by: what tells classes apart, as in `objective_classes`.
        learning_rate: of AdamW's step, and of the larger one of plain descent (the other is a tenth of it); the
            schedule's when None, or the run's largest where that is 0, and 0.001 for a model.
        progress: called with (done, in all) of the facts, the strata, and the classes whose steps are
            taken; None shows a bar, False nothing.
    Returns: a row for each class and step: by..., dropped, optimizer ("sgd" twice, "adamw"), learning_rate, observed
        (change of the reverse loss, nats) and predicted (to first order), error (observed less predicted), each a mean
        over facts with _low and _high (95 %), same_sign, n (facts), reason, statistics_version. Measured in float64.
    Raises: RevprobeError, as `objective_terms`.
    """
    asked = asked_terms(model, relation, direction=direction, step=step, dial=dial, parameters=parameters)
    keys = [by] if isinstance(by, str) else list(by)
    for key in keys:
        if key not in CLASS:
            raise RevprobeError(f"no grouping {key!r}{did_you_mean(str(key), CLASS)}")
    terms = taken_apart(asked, draws, Plan(control=False, batch_size=batch_size, seed=seed, progress=progress))
    steps = _Steps(terms, learning_rate, batch_size)
    classes = pd.DataFrame(terms.classes.classes)
    if bool(classes["dropped"].any()) and "dropped" not in keys:
        keys.append("dropped")
    rows = []
    groups = list(classes.groupby(keys, sort=True)) if keys else [((), classes)]
    for values, part in counted(groups, progress):
        gradient = terms.classes.gradient[part.index.tolist()].double().sum(0)
        rows += [dict(zip(keys, values, strict=True)) | row for row in steps.taken(gradient)]
    return pd.DataFrame(rows).assign(statistics_version=STATISTICS_VERSION)


class _Steps:
    """The checkpoint in float64, what it loses on the reverse queries, and how each step changes that.

    Shapes: `before`, `still` (after AdamW's step without a gradient): pair.
    """

    def __init__(self, terms: Terms, learning_rate: float | None, batch_size: int | None) -> None:
        self.terms, self.batch_size = terms, batch_size
        pairs, model, run = terms.asked.pairs, terms.asked.model, terms.asked.run
        self.model = model.with_module(set_eval_mode(copy.deepcopy(model.module).double()))
        queries = prepare_queries(model, pairs.queries)
        distinct, self.reverse = np.unique(pairs.reverse, return_inverse=True)
        self.queries, self.facts = [queries[one] for one in distinct], facts_of(pairs, "reverse")
        self.rate = terms.adamw.learning_rate if learning_rate is None else learning_rate
        self.size = self.rate if self.rate > 0 else SIZE if run is None else run.config.training.learning_rate
        self.reason = terms.adamw.reason or ("" if self.rate > 0 else NO_RATE)
        self.before = self._losses(None)
        if run is not None and not self.reason:
            self.update = _RunsUpdate(run, terms, learning_rate)
            self.nothing = self.update(torch.zeros(terms.flat.size, dtype=torch.float64))
            self.still = self._losses(self.nothing)

    def taken(self, gradient: Tensor) -> list[dict[str, Any]]:
        """The steps on one class. Shapes: `parameter`."""
        slope = self._slope(gradient)
        rows = []
        for size in (self.size, self.size / 10):
            observed = self._losses(-size * gradient) - self.before
            rows.append({"optimizer": "sgd", "learning_rate": size} | self._row(observed, -size * slope))
        if self.terms.asked.run is not None:
            rows.append({"optimizer": "adamw", "learning_rate": self.rate} | self._adamw(gradient))
        return rows

    def _adamw(self, gradient: Tensor) -> dict[str, Any]:
        """The run's own step on the class, against the one that it takes without a gradient."""
        if self.reason:
            nothing = np.full(len(self.facts), np.nan)
            return self._row(nothing, nothing) | {"reason": self.reason}
        alone = self.update(gradient)
        return self._row(self._losses(alone) - self.still, self._slope(alone - self.nothing))

    def _row(self, observed: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
        """Means over facts. Shapes: `pair, pair`."""
        values = {"observed": observed, "predicted": predicted, "error": observed - predicted}
        found = {name: mean_over_facts(value, self.facts) for name, value in values.items()}
        row: dict[str, Any] = {}
        for name, one in found.items():
            row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
        signs = np.sign([row["observed"], row["predicted"]])
        row["same_sign"] = None if np.isnan(signs).any() else bool(signs[0] == signs[1])
        return row | {"n": found["observed"].facts, "reason": missing_intervals(found)}

    def _slope(self, along: Tensor) -> np.ndarray:
        """Of every pair's reverse loss, along a direction. Shapes: `parameter -> pair`."""
        named = self.terms.flat.named(along)
        return loss_slopes(self.model, self.queries, [named], batch_size=self.batch_size).slope[0][self.reverse]

    def _losses(self, along: Tensor | None) -> np.ndarray:
        """Of every pair's reverse query, the weights moved by `along`. Shapes: `parameter -> pair`."""
        model = self.model
        if along is not None:
            model = model.with_module(copy.deepcopy(model.module))
            named = dict(model.module.named_parameters())
            with torch.no_grad():
                for name, change in self.terms.flat.named(along).items():
                    named[name].add_(change)
        return loss_slopes(model, self.queries, batch_size=self.batch_size).loss[self.reverse]


class _RunsUpdate:
    """torch's own AdamW from a run's saved state: what it would add to the weights, for any gradient."""

    def __init__(self, run: OneLayerRun, terms: Terms, learning_rate: float | None) -> None:
        checkpoint, _, _ = checkpoint_folder(run.path, terms.asked.step, "raw")
        model = terms.asked.model
        with untouched(model.module), pinned_threads(run.config.training.threads):
            self.trainer, _ = trainer_at(run, checkpoint, model, learning_rate=learning_rate)
        self.flat, self.clip = terms.flat, terms.adamw.clip

    def __call__(self, gradient: Tensor) -> Tensor:
        """Clipped as the run's batches are on average. Shapes: `parameter -> parameter`, float64."""
        module = self.trainer.model
        assert module is not None and self.trainer.optimizer is not None, "trainer_at gives it both"
        named = dict(module.named_parameters())
        for name, part in self.flat.named(gradient * self.clip).items():
            named[name].grad = part.to(named[name]).clone()
        updates = adamw_update(self.trainer.optimizer)
        return self.flat.flat([updates[id(named[name])].double() for name in self.flat.names])
