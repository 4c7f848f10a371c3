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
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.passes.asked import asked_pairs
from ...probes.passes.plan import PassResult, Plan
from ...probes.passes.prompts import facts_of
from ...probes.passes.run import describe
from ...probes.readings.reading import Reading
from ...probes.statistics.by_class import SIZES
from ...probes.statistics.resampling import SHOWN
from ...progress import Progress, shows_progress
from ...relations.letters import LettersRelation
from ...relations.text_relation import TextRelation
from ..runs.run import Run
from .adamw_map import AdamWMap, adamw_map, no_map
from .asked_terms import Asked, asked_terms
from .class_gradients import ClassGradients, class_gradients
from .class_slopes import class_slopes, reverse_direction
from .reverse_gradients import (
    CONTROL,
    LETTERS,
    LOSS,
    FlatParameters,
    ReverseGradients,
    by_role,
    fits,
    reverse_gradients,
)
from .term_rows import rows_by_shape

MOMENTUM, DECAY = "momentum", "decay"
MODES = ("gradients", "slopes")
ONE_GRADIENT = "mode='slopes' holds one gradient, that of the mean reverse loss"
DRAWS = 8192


@checked
@shows_progress("parts")
def objective_terms(
    model: ProbedModel | nn.Module | Run | str | Path,
    relation: LettersRelation | TextRelation | ReversalPairs | None = None,
    *,
    direction: str | None = None,
    step: int = -1,
    dial: str | None = None,
    rates: str | None = None,
    answer_tokens: int | None = None,
    parameters: str | None = None,
    mode: str | None = None,
    draws: int = DRAWS,
    batch_size: int | None = None,
    control: bool = True,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> Reading:
    """The training objective by class of its terms, and each class's pressure on the reverse answer.

    A class is what is priced (target, evidence, a placeholder or template token left or right of the evidence, end
    tokens after the answer, other), whether target and evidence are visible, how many tokens (or entities masked as
    one) are hidden, and whether the dial leaves the term out. The value is the whole objective's pressure, the inner
    product of its gradient with that of the reverse loss: a step of plain gradient descent changes the reverse loss by
    -lr times it, to first order. The control holds the same gradients against the same targets under the reverse
    queries of other facts. n counts reverse queries. `objective_classes` gives the classes with shares and cosines.

    Rows of at most 5 tokens that can be hidden are enumerated: all sets of masks, with exact weights. Of longer rows
    sets are drawn, by class; `sampling_error` says what is left open. Without dropout, on the weights as they are.

    Args:
        model: a masked model, or a run (its folder), whose config then gives rows, masks, dial and optimizer.
        relation: what is trained, in `direction`; or pairs, whose forward queries then are the rows of training and
            whose reverse queries are asked. A run's own when None.
        step: of a run, the checkpoint; its raw weights, which are what the optimizer moves.
        dial: which negatives are left out ("keep": none); the run's own at this step when None. Terms it leaves out
            keep their numbers, marked `dropped`, with the factor they are trained with.
        rates: how masking rates are drawn; the run's own when None, "independent" for a model.
        mode: "gradients" holds that of every class and fact; "slopes" the mean reverse loss's alone, for large models:
            no cosines, roles, intervals or optimizer then. None: the first wherever it fits into 8 GB.
        answer_tokens: of text, what answers are filled up to with end tokens; a fine-tuning's own, or 0, when None.
        parameters: "all" (an adapter's left out), "lora" (these alone), "both"; None: an adapter's, where there is one.
        draws: masked sequences in all, where not every set is enumerated.
        progress: called with facts, then strata, done and in all; None shows a bar, False nothing.
    Frame: one row per fact, class and role of parameters: fact, priced, target, evidence (visible, hidden, partly),
    masks, dropped, factor (what the dial multiplies the term by), role; loss (the class's part of the objective, alike
    in all its rows); inner (with the gradient of the fact's reverse loss), inner_letters and inner_margin (with its two
    parts, -log p(target | candidates) and -log p(candidates)), inner_control, all before the factor; adamw,
    adamw_letters, adamw_margin (first-order change by the run's coming AdamW step in nats, factor, rate and clip
    included; NaN with reason_adamw where no state is kept); norm, norm_reverse (of the gradients of the class and of
    the mean reverse loss); queries, facts (behind the row's reverse loss), queries_control, facts_control (those that
    have another fact's query). The classes "momentum" and "decay" hold what that step does whatever the gradient is.
    Raises: RevprobeError, for a causal model, a dial on text, a run's one_span, no relation, and as the probes.
    """
    options: dict[str, Any] = {"dial": dial, "rates": rates, "answer_tokens": answer_tokens, "parameters": parameters}
    asked = asked_terms(model, relation, direction=direction, step=step, **options)
    plan = Plan(control=control, batch_size=batch_size, seed=seed, progress=progress)
    take = along_the_mean if _by_slopes(asked, mode) else _with_gradients
    return take(asked, draws, plan)


def _with_gradients(asked: Asked, draws: int, plan: Plan) -> Reading:
    return taken_apart(asked, draws, plan).reading(plan)


def _by_slopes(asked: Asked, mode: str | None) -> bool:
    """Whether one direction alone is held. Raises: RevprobeError, for an unknown mode."""
    if mode not in (None, *MODES):
        raise RevprobeError(f"unknown mode {mode!r}{did_you_mean(str(mode), MODES)}")
    return mode == "slopes" or (mode is None and not fits(asked.model.module, len(set(asked.pairs.facts)), asked.names))


def taken_apart(asked: Asked, draws: int, plan: Plan) -> Terms:
    """The classes of an objective with their gradients, and those that they are held against."""
    pairs = asked_pairs(asked.model, asked.pairs, "objective_terms")
    module = asked.model.module
    with untouched(module):
        flat = FlatParameters(module, asked.names)
        flat.require_gradients()
        options: dict[str, Any] = {"seed": plan.seed, "progress": plan.progress}
        reverse = reverse_gradients(
            asked.model, pairs, flat, control=plan.control, batch_size=plan.batch_size, **options
        )
        tables = rows_by_shape(asked.rows)
        classes = class_gradients(asked.model, tables, asked.objective, flat, reverse.mean, draws=draws, **options)
        adamw = no_map()
        if asked.run is not None:
            adamw = adamw_map(asked.run, asked.step, flat, classes.weighted_sum(factors(asked, classes)))
    return Terms(replace(asked, pairs=pairs), flat, classes, reverse, adamw)


def factors(asked: Asked, classes: ClassGradients) -> np.ndarray:
    """What the dial multiplies each class by. Shapes: `-> class`."""
    dropped = np.array([one.dropped for one in classes.classes])
    return np.where(dropped, asked.objective.dropped_weight, 1.0)


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
        return factors(self.asked, self.classes)

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
        classes, adamw = self.classes, self.adamw
        return about_draws(self.asked, np.array(classes.losses), self.factor, classes.deviation) | {
            "mode": "gradients",
            "sequences": classes.sequences,
            "enumerated": classes.enumerated,
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
        facts = facts_of(self.asked.pairs, "reverse")
        if facts.sizes["prompts"]:
            frame[SHOWN] = frame["fact"].map(dict(zip(facts.label, facts.unit, strict=True)))
        return frame if control else frame.drop(columns=["inner_control", *SIZES[2:]])

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
        about |= {"loss": np.array(self.classes.losses)[each]} | self._sizes(len(classes))
        return table.assign(**about, **numbers, norm=norm, norm_reverse=reverse)

    def _sizes(self, times: int) -> dict[str, np.ndarray]:
        """How many reverse queries and facts are behind each row and its control. Shapes: `-> (times fact)` each."""
        queries, with_control = self.reverse.queries
        found = (queries, queries > 0, with_control, with_control > 0)
        return {name: np.tile(one.astype(np.int64), times) for name, one in zip(SIZES, found, strict=True)}

    def _of_the_step(self, name: str, vector: Tensor) -> pd.DataFrame:
        """What the coming step does whatever the gradient is."""
        tables = []
        for role, columns in self._products(vector[None].double(), torch.ones_like(vector)):
            moved = {key: part[0] for key, part in columns.items() if key.startswith("adamw")}
            about: dict[str, Any] = {"fact": self.reverse.facts, "priced": name, "role": role, "factor": 1.0}
            about |= {"dropped": False, "class_number": len(self.classes.classes) + (name == DECAY)} | self._sizes(1)
            tables.append(pd.DataFrame(about | moved))
        return pd.concat(tables, ignore_index=True)


def along_the_mean(asked: Asked, draws: int, plan: Plan) -> Reading:
    """The reading of an objective whose gradients are never held: each class's product with the mean reverse loss's."""
    pairs = asked_pairs(asked.model, asked.pairs, "objective_terms")
    tables, parts = rows_by_shape(asked.rows), ["loss", "letters", *(["control"] if plan.control else [])]
    found, losses, norms, sizes = {}, {}, {}, {}
    with untouched(asked.model.module):
        for part in parts:
            along, losses[part], sizes[part] = reverse_direction(
                asked.model, pairs, part, asked.names, batch_size=plan.batch_size, seed=plan.seed
            )
            norms[part] = (
                float(torch.stack([g.double().square().sum() for g in along.values()]).sum().sqrt()) if along else 0.0
            )
            found[part] = class_slopes(
                asked.model, tables, asked.objective, along, draws=draws, seed=plan.seed, progress=plan.progress
            )
    own, nan = found["loss"], float("nan")
    classes = list(own.losses)
    frame = pd.DataFrame(classes).assign(class_number=range(len(classes)), role="all", loss=list(own.losses.values()))
    frame.insert(0, "fact", f"mean of {len(set(pairs.facts))} facts")
    frame["factor"] = np.where(frame["dropped"], asked.objective.dropped_weight, 1.0)
    frame["inner"], frame["inner_letters"] = list(own.slopes.values()), list(found["letters"].slopes.values())
    frame["inner_margin"] = frame["inner"] - frame["inner_letters"]
    if plan.control:
        frame["inner_control"] = list(found["control"].slopes.values()) if norms["control"] else nan
    behind = [*sizes["loss"], *sizes.get("control", ())]
    frame = frame.assign(**dict(zip(SIZES, behind, strict=False)))  # two of them without a control
    frame = frame.assign(adamw=nan, adamw_letters=nan, adamw_margin=nan, norm=nan, norm_reverse=norms["loss"])
    frame = frame.assign(reason_adamw=ONE_GRADIENT, masks=frame["masks"].astype("Int64"))
    deviation = np.stack(list(own.deviations.values()))
    about = about_draws(asked, np.array(frame["loss"]), np.array(frame["factor"]), deviation)
    about |= {"sequences": own.sequences, "enumerated": own.enumerated, "reverse_loss": losses["loss"]}
    about |= {"reverse_letters_loss": losses["letters"], "learning_rate": nan, "reason_adamw": ONE_GRADIENT}
    about = describe(asked.model, PassResult(pairs, np.array([]), []), plan) | about | {"mode": "slopes"}
    reading = Reading("objective_terms", frame, about)
    reading.meta["statistic"] = reading.measured.statistic
    return reading


def about_draws(asked: Asked, losses: np.ndarray, factor: np.ndarray, deviation: np.ndarray) -> dict[str, Any]:
    """What a reading says of its objective and of the draw. Shapes: `class, class, class replicate`."""
    objective, along = asked.objective, factor @ deviation
    return {
        "objective_loss": float(losses @ factor),
        "per": objective.per,
        "dial": objective.dial,
        "rates": objective.law.rates,
        "masks": objective.law.masks,
        "eps": objective.law.eps,
        "highest": objective.law.highest,
        "parameters": asked.parameters,
        "sampling_error": float(np.sqrt((along**2).sum() / (len(along) * (len(along) - 1)))),
        "deviations": deviation.tolist(),
    }
