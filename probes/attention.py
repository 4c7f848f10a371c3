"""The routing probe: do forward and reverse queries score the evidence alike?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..arguments import checked
from ..errors import RevprobeError
from ..models.probed import ProbedModel, as_probed
from ..models.structure import attention_of
from ..progress import Progress, shows_progress
from .controls import NEIGHBOUR, PARENT, SINK, UNTRAINED, Controls, Parent, Reader
from .pairs.pairs import ReversalPairs
from .passes.beside import LEFT_OUT, beside_evidence
from .passes.plan import PassResult, Plan
from .passes.run import describe, run_pass
from .passes.selection import chosen_of
from .passes.untrained import untrained_twin
from .readings.draw_error import with_draw_error
from .readings.reading import Reading
from .statistics.estimators import LATER_BLOCK

EVIDENCE_HIDDEN = "evidence hidden by the attention mask"


@checked
@shows_progress("queries")
def probe_attention_correlation(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
    bounds: bool = False,
    controls: str | Iterable[str] = (),
    parent: Parent | None = None,
) -> Reading:
    """Correlate the attention score of the evidence, seen from the readout row, between forward and reverse queries.

    The value is the mean over groups (one forward and one reverse offset) of the Pearson correlation over facts
    within the group, over all layers and heads; with fewer than 8 facts in every group, the pooled correlation of
    deviations from group means (`meta["statistic"]` says which). The control shuffles facts within groups.

    Frame: pair, fact, group, kind, layer, head, offset_forward, offset_reverse (first evidence token minus first
    readout row, tokens), distance_forward, distance_reverse (nearest edges, tokens), score_forward, score_reverse
    (pre-softmax, mean over readout rows and evidence tokens), weight_forward, weight_reverse (post-softmax, summed
    over evidence tokens), reason. Evidence in a later block of a model that is read in blocks has neither score nor
    weight. A layer without softmax attention (linear attention, state space), or whose attention
    cannot be read, has NaN rows, as many heads of them as the widest layer that has some; `meta["left_out"]` gives the
    reason for each module whose attention is not read (cross attention, pooled, in blocks). A layer is a numbered
    module of the model; one that computes its heads in several calls has them in the order of the calls. Of a model
    that hides tokens behind random ones, scores and weights are means over draws of these (`reading.draw_error`).
    Args:
        bounds: also work out the theory's lower bound for each pair and head from its queries (see `with_bounds`), for
            `plot(kind="bounds")`; one more pass over the queries.
        controls: what else the number is held against, of "untrained", "neighbour", "sink" and "parent", or "all" (the
            last only with a parent); see `Reading.controls`. One more pass each, neighbour and sink together one.
        parent: the model of that control, alone or with pairs of its own: (model, pairs).
    Raises: RevprobeError, when the queries do not fit the model, no attention is seen, a layer is asked for that the
        model lacks, or a control is not known.
    Source: paper Sec. 4.2 and 5 (Fig. 3, left).
    """
    model = as_probed(model)
    layers = readable_layers(model, layers)
    plan = Plan(attention=True, control=control, batch_size=batch_size, seed=seed, progress=progress)
    asked = Controls.asked(controls, parent)
    reading = attention_reading(model, run_pass(model, pairs, plan), plan, layers)
    reading = asked.beside(reading, attention_controls(model, pairs, plan, asked, layers))
    if not bounds:
        return reading
    from .theory.model_bounds import with_bounds  # it needs this module's readings

    return with_bounds(reading, model, pairs, batch_size=batch_size, progress=progress)


def attention_reading(
    model: ProbedModel,
    result: PassResult,
    plan: Plan,
    layers: Iterable[int] | None = None,
    hidden: str = EVIDENCE_HIDDEN,
) -> Reading:
    """Join the scores of a pass to pairs.

    Args:
        hidden: what is said of a score that the mask forbids.
    Raises: RevprobeError, for a layer that the model lacks.
    """
    there = sorted({*result.score, *result.without_attention})
    wanted = chosen_of("layer", layers, there, model=model, purpose="read")
    pairs = result.pairs
    offsets, distances = pairs.offsets(model.logit_shift), pairs.distances()
    columns: dict[str, Any] = {"pair": np.arange(len(pairs)), "fact": pairs.facts.astype(str)}
    columns |= {"group": pairs.groups(model.logit_shift), "kind": pairs.kind}
    columns |= {"offset_forward": offsets[0], "offset_reverse": offsets[1]}
    base = pd.DataFrame(columns | {"distance_forward": distances[0], "distance_reverse": distances[1], **pairs.flags})
    most = max((scores.shape[1] for scores in result.score.values()), default=0)
    nothing = dict.fromkeys(("score_forward", "score_reverse", "weight_forward", "weight_reverse"), np.nan)
    parts = []
    for layer in wanted:
        if layer in result.score:
            parts += [_head_frame(result, base, layer, head, hidden) for head in range(result.score[layer].shape[1])]
        else:
            why = result.without_attention[layer]
            parts += [base.assign(layer=layer, head=head, **nothing, reason=why) for head in range(most)]
    frame = pd.concat(parts, ignore_index=True) if parts else base.iloc[:0]
    reading = Reading("attention_correlation", frame, describe(model, result, plan))
    reading.meta["statistic"] = reading.measured.statistic
    return with_draw_error(reading, [attention_reading(model, one, plan, layers) for one in result.without])


def attention_controls(
    model: ProbedModel, pairs: ReversalPairs, plan: Plan, asked: Controls, layers: Iterable[int] | None = None
) -> dict[str, Reader]:
    """What takes each control of an attention reading; the layers of a parent are its own, all of them."""
    plain = replace(plan, control=False, share=None)

    def read(other: ProbedModel, own: ReversalPairs, chosen: Iterable[int] | None = None) -> Reading:
        return attention_reading(other, run_pass(other, own, plain), plain, chosen)

    @cache
    def passes() -> dict[str, PassResult | None]:
        return beside_evidence(model, pairs, plain)

    def beside(name: str) -> Reading:
        result = passes()[name]
        if result is None:
            raise RevprobeError(f"all {LEFT_OUT[name]}")
        return attention_reading(model, result, plain, layers, EVIDENCE_HIDDEN.replace("evidence", name))

    readers: dict[str, Reader] = {
        UNTRAINED: lambda: read(untrained_twin(model, plan.seed), pairs, layers),
        NEIGHBOUR: partial(beside, NEIGHBOUR),
        SINK: partial(beside, SINK),
    }
    if asked.parent is None:
        return readers
    other, own = asked.parent
    return readers | {PARENT: partial(read, other, own or pairs)}


def readable_layers(model: ProbedModel, layers: Iterable[int] | None) -> list[int] | None:
    """The layers asked for, found before a long pass over the pairs; None for all.

    Raises: RevprobeError, for a layer the model lacks, or when no attention is seen.
    """
    if layers is None:
        return None
    attention = attention_of(model)
    return chosen_of("layer", layers, sorted({*attention.heads, *attention.without}), model=model, purpose="read")


def _head_frame(result: PassResult, base: pd.DataFrame, layer: int, head: int, forbidden: str) -> pd.DataFrame:
    """The rows of one head; a score the mask forbids, or that was not read in its batch, is NaN with its reason."""
    sides = {"forward": result.pairs.forward, "reverse": result.pairs.reverse}
    columns: dict[str, np.ndarray] = {"layer": np.full(len(base), layer), "head": np.full(len(base), head)}
    for side, queries in sides.items():
        score, seen = result.score[layer][queries, head], ~result.unseen[queries]
        columns[f"score_{side}"] = np.where(np.isfinite(score) & seen, score, np.nan)
    for side, queries in sides.items():
        columns[f"weight_{side}"] = np.where(result.unseen[queries], np.nan, result.weight[layer][queries, head])
    later = result.unseen[result.pairs.forward] | result.unseen[result.pairs.reverse]
    hidden = np.isnan(columns["score_forward"]) | np.isnan(columns["score_reverse"])
    unread = np.isnan(columns["weight_forward"]) | np.isnan(columns["weight_reverse"])
    reasons = np.select([later, unread, hidden], [LATER_BLOCK, result.without_attention.get(layer, ""), forbidden], "")
    return base.assign(**columns, reason=reasons)
