"""The alignment probe: would a forward update also lower the reverse loss?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas as pd
from torch import nn

from ..arguments import checked
from ..errors import RevprobeError
from ..hooks.layer_numbers import LayerNumbers
from ..models.probed import ProbedModel, as_probed
from ..models.structure import ParameterRole, layer_numbers_of, parameter_role
from ..progress import Progress, shows_progress
from .controls import NEIGHBOUR, NOT_ATTENDED, PARENT, SINK, UNTRAINED, Controls, Parent, Reader
from .pairs.pairs import ReversalPairs
from .passes.asked import asked_pairs
from .passes.batches import queries_per_batch
from .passes.beside import LEFT_OUT, neighbour_targets
from .passes.plan import PassResult, Plan
from .passes.run import describe, run_pass
from .passes.selection import listed
from .passes.untrained import twin_parameters, untrained_twin
from .readings.draw_error import with_draw_error
from .readings.reading import Reading
from .statistics.estimators import NO_UNLIKE
from .statistics.partners import partner_column
from .statistics.resampling import SHOWN_IN, derangement

# Of `cross=True`: queries run about (facts / batch) times each; beyond this many cells that is hours.
MOST_CELLS = 250_000


@checked
@shows_progress("queries")
def probe_gradient_cosine(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    parameters: Sequence[str] | None = None,
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    control: bool = True,
    cross: bool = False,
    progress: Progress | bool | None = None,
    seed: int = 0,
    controls: str | Iterable[str] = (),
    parent: Parent | None = None,
) -> Reading:
    """Cosine between the gradients of the forward and of the reverse loss over all (or the named) parameters.

    The loss of a query is the mean negative log-likelihood over its target tokens, all hidden at once. Gradients
    are exact and per example, and none is ever formed (`hooks.gradients.recorder`). The value is the mean over pairs;
    the control is the cosine with the reverse query of another fact of the same group (of another target, other
    evidence and another prompt), and `excess` their difference, since prompts alone already share most of a gradient.
    `cross=True` adds `reading.cross`, the cosine of
    every fact's forward gradient with every fact's reverse gradient (see `cross_cosines`).

    Frame: one row per pair and parameter (three for a fused query-key-value projection of declared layout, with roles
    q, k and v; see `models.structure`): pair, fact, kind, parameter, role, layer, inner, norm_forward, norm_reverse,
    floor_forward, floor_reverse (rounding level of the norms), and inner_control, norm_control, floor_control.
    A cosine whose norm does not exceed its rounding level is NaN. Where a pair has no numbers, since its evidence lies
    in a later block, or no control, since all other facts of the group share its target, evidence or prompt, two
    columns more, reason and reason_control, say so. Of a model that
    hides tokens behind random ones, the gradients are those of the mean loss over draws (`reading.draw_error`).
    `meta["coverage"]`: the share of the model's parameters that the reading speaks of, and the others by reason;
    `meta["one_by_one"]`: the parameters whose gradient a batch does not tell apart by query (tables without a batch,
    experts in one tensor, weights used outside their module), with the reason. They are as exact as the others, each
    query being run once more by itself: one more forward and backward pass per query.
    Args:
        controls: what else the number is held against, of "untrained", "neighbour" and "parent", or "all" (the last
            only with a parent); see `Reading.controls`. One more pass each.
        parent: the model of that control, alone or with pairs of its own: (model, pairs).
    Raises: RevprobeError, when a parameter is unknown, or cut off from the loss by something that detaches, or a
        control is not known.
    Source: paper Sec. 4.3 and 5 (Fig. 3, middle).
    """
    model = as_probed(model)
    names = chosen_parameters(model, parameters, layers)
    plan = Plan(gradient=True, parameters=names, control=control, batch_size=batch_size, seed=seed, progress=progress)
    asked = Controls.asked(controls, parent)
    result = run_pass(model, pairs, plan)
    reading = gradient_reading(model, result, plan)
    reading = asked.beside(reading, gradient_controls(model, pairs, plan, asked))
    return replace(reading, cross=cross_cosines(model, result.pairs, plan)) if cross else reading


def chosen_parameters(
    model: ProbedModel, parameters: Sequence[str] | None, layers: Iterable[int] | None
) -> list[str] | None:
    """The parameter names of a pass: those asked for, inside the layers asked for; None for all.

    Raises: RevprobeError, when none is left.
    """
    if layers is None:
        return None if parameters is None else list(parameters)
    wanted = set(listed("layer", layers))
    names = list(parameters) if parameters is not None else [name for name, _ in model.module.named_parameters()]
    layer_of = layer_numbers_of(model)
    kept = [name for name in names if layer_of(name) in wanted]
    if not kept:
        raise RevprobeError(
            f"layers {sorted(wanted)} hold none of the parameters of {model.name}; leave layers out or name others"
        )
    return kept


def gradient_reading(model: ProbedModel, result: PassResult, plan: Plan) -> Reading:
    """Join the products of a pass to pairs, one row per pair and parameter."""
    pairs = result.pairs
    layer_of = layer_numbers_of(model)
    names, roles = zip(*(_part_of(label, layer_of) for label in result.parameters), strict=True)
    count, width = len(pairs), len(result.parameters)
    columns: dict[str, np.ndarray] = {
        "pair": np.repeat(np.arange(count), width),
        "fact": np.repeat(pairs.facts.astype(str), width),
        "kind": np.full(count * width, pairs.kind, dtype=object),
        "parameter": np.tile(np.array(names, dtype=object), count),
        "role": np.tile(np.array([r.role for r in roles], dtype=object), count),
        "inner": result.inner.reshape(-1),
    }
    once = dict(pairs.flags) | partner_column(pairs.facts, result.partner, pairs.flags.get(SHOWN_IN["reverse"]))
    columns |= {name: np.repeat(values, width) for name, values in once.items()}
    sides = {"forward": pairs.forward, "reverse": pairs.reverse}
    columns |= {f"norm_{side}": result.norm[index].reshape(-1) for side, index in sides.items()}
    columns |= {f"floor_{side}": result.floor[index].reshape(-1) for side, index in sides.items()}
    if plan.control:
        # The same forward queries against the partner's reverse query; NaN where a group has one fact.
        alone, other = (result.partner < 0)[:, None], pairs.reverse[result.partner]
        columns["inner_control"] = result.inner_control.reshape(-1)
        for name, values in (("norm", result.norm), ("floor", result.floor)):
            columns[f"{name}_control"] = np.where(alone, np.nan, values[other]).reshape(-1)
    if model.block_size is not None:
        columns = _without_unseen(columns, result, width)
    if plan.control:
        columns = _without_unlike(columns, result, pairs.groups(model.logit_shift), width)
    frame = pd.DataFrame(columns)
    layers = pd.Series([r.layer for r in roles] * count, dtype="Int64")  # nullable: embeddings have no layer
    frame.insert(5, "layer", layers)
    reading = Reading("gradient_cosine", frame, describe(model, result, plan))
    reading.meta.update(
        {
            "statistic": reading.measured.statistic,
            "parameters": "all" if plan.parameters is None else list(plan.parameters),
            "coverage": coverage(model, result, plan),
        }
    )
    if result.one_by_one:
        reading.meta["one_by_one"] = dict(sorted(result.one_by_one.items()))
    return with_draw_error(reading, [gradient_reading(model, one, plan) for one in result.without])


def gradient_controls(model: ProbedModel, pairs: ReversalPairs, plan: Plan, asked: Controls) -> dict[str, Reader]:
    """What takes each control of a gradient reading; of a parent all parameters, since names differ."""
    plain = replace(plan, control=False, share=None)

    def read(other: ProbedModel, own: ReversalPairs, parameters: Sequence[str] | None = plain.parameters) -> Reading:
        own_plan = replace(plain, parameters=parameters)
        return gradient_reading(other, run_pass(other, own, own_plan), own_plan)

    def untrained() -> Reading:
        parameters = twin_parameters(model, plain.parameters)
        return read(untrained_twin(model, plan.seed), pairs, parameters)

    def neighbour() -> Reading:
        beside = neighbour_targets(model, asked_pairs(model, pairs, "gradient"))
        if beside is None:
            raise RevprobeError(f"all {LEFT_OUT[NEIGHBOUR]}")
        return read(model, beside)

    # Each is read once, whatever parts of the parameters are asked about.
    readers: dict[str, Reader] = {UNTRAINED: cache(untrained), NEIGHBOUR: cache(neighbour), SINK: NOT_ATTENDED}
    if asked.parent is None:
        return readers
    other, theirs = asked.parent
    return readers | {PARENT: cache(partial(read, other, theirs or pairs, None))}


def _without_unseen(columns: dict[str, np.ndarray], result: PassResult, width: int) -> dict[str, np.ndarray]:
    """The columns with the reasons of a model that is read in blocks, and no numbers where there is one."""
    pairs, controlled = result.pairs, "inner_control" in columns
    control = np.where(result.partner >= 0, pairs.reverse[result.partner], -1)
    reasons = result.unseen_reasons(np.stack([pairs.forward, pairs.reverse], axis=1), control)
    own, other = (np.repeat(reason, width) for reason in reasons.values())
    kept = {}
    for name, values in columns.items():
        if name.startswith(("inner", "norm_", "floor_")):
            gone = (own != "") | (other != "") if name.endswith("_control") else own != ""
            values = np.where(gone, np.nan, values)
        kept[name] = values
    return kept | {"reason": own} | ({"reason_control": other} if controlled else {})


def _without_unlike(
    columns: dict[str, np.ndarray], result: PassResult, groups: np.ndarray, width: int
) -> dict[str, np.ndarray]:
    """The columns with the reason of pairs that are not alone in their group, and have none in it for a control."""
    alone = derangement(result.pairs.facts.astype(str), groups) < 0
    why = np.repeat(np.where((result.partner < 0) & ~alone, NO_UNLIKE, ""), width)
    if not (why != "").any():
        return columns
    none = np.full(len(why), "", dtype=object)
    own, control = columns.get("reason", none), columns.get("reason_control", none)
    return columns | {"reason": own, "reason_control": np.where((own == "") & (control == ""), why, control)}


def coverage(model: ProbedModel, result: PassResult, plan: Plan) -> dict[str, object]:
    """Which part of the model a gradient reading speaks of.

    Returns: `share`, of all elements of the parameters, those that were asked for and that a loss reaches (a fraction;
        the gradient of the others is zero or was not wanted); `not_covered`, the names of the others by reason.
    """
    asked = set(plan.parameters if plan.parameters is not None else dict(model.module.named_parameters()))
    sizes = {name: p.numel() for name, p in model.module.named_parameters()}
    left_out = {
        "not asked for": sorted(set(sizes) - asked),
        "does not reach the loss": sorted((asked & set(sizes)) - result.reached),
    }
    covered = sum(size for name, size in sizes.items() if name in result.reached)
    return {
        "share": covered / max(sum(sizes.values()), 1),
        "not_covered": {reason: names for reason, names in left_out.items() if names},
    }


def _part_of(label: str, layer_of: LayerNumbers) -> tuple[str, ParameterRole]:
    """A label's parameter and role; the parts of a fused projection ("name[q]") have roles of their own."""
    name, _, part = label.removesuffix("]").partition("[")
    role = parameter_role(name)
    return name, ParameterRole(part or role.role, layer_of(name))


def cross_cosines(model: ProbedModel, pairs: ReversalPairs, plan: Plan) -> pd.DataFrame:
    """Cosine of every forward gradient with every reverse gradient of the same group, averaged over groups.

    Returns: facts (forward) x facts (reverse); the diagonal is what the probe reports, NaN where two facts share no
        group or a norm is below its rounding level.
    Raises: RevprobeError, when there are more than MOST_CELLS combinations.
    """
    left, right = _combinations(model, pairs, plan.batch_size)
    # Labels that sort as the combinations are ordered, block by block, so that batches share queries.
    places = np.array([f"{n:09d}" for n in range(len(left))], dtype=object)
    crossed = replace(pairs, forward=pairs.forward[left], reverse=pairs.reverse[right], facts=places, flags={})
    summed = Plan(
        gradient=True,
        parameters=plan.parameters,
        control=False,
        batch_size=plan.batch_size,
        seed=plan.seed,
        progress=plan.progress,
        summed=True,
    )
    result = run_pass(model, crossed, summed)
    forward, reverse = result.norm[crossed.forward, 0], result.norm[crossed.reverse, 0]
    above_floor = (forward > result.floor[crossed.forward, 0]) & (reverse > result.floor[crossed.reverse, 0])
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.where(above_floor, result.inner[:, 0] / (forward * reverse), np.nan)
    facts = pairs.facts.astype(str)
    table = pd.DataFrame({"forward": facts[left], "reverse": facts[right], "cosine": cosine})
    return table.pivot_table(index="forward", columns="reverse", values="cosine", aggfunc="mean")


def _combinations(model: ProbedModel, pairs: ReversalPairs, batch_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Every ordered couple of pairs of one group, in blocks that fit a batch."""
    groups = pairs.groups(model.logit_shift)
    cells = int((np.bincount(groups) ** 2).sum())
    if cells > MOST_CELLS:
        raise RevprobeError(
            f"cross=True over {len(pairs)} pairs makes {cells:,} combinations, over {MOST_CELLS:,}; take fewer"
        )
    order = np.argsort(groups, kind="stable")
    couples = [
        np.stack(np.meshgrid(members, members, indexing="ij"), -1).reshape(-1, 2)
        for members in np.split(order, np.cumsum(np.bincount(groups))[:-1])
    ]
    left, right = np.concatenate(couples).T
    block = max(1, queries_per_batch(model, pairs.queries, batch_size) // 2)
    rank = np.empty(len(pairs), dtype=int)
    rank[order] = np.arange(len(pairs))
    blocked = np.lexsort((rank[right], rank[left], rank[right] // block, rank[left] // block))
    return left[blocked], right[blocked]
