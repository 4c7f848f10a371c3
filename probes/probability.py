"""The transfer probe: does the model answer when asked backwards?"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from torch import nn

from ..arguments import checked
from ..models.probed import ProbedModel, as_probed
from ..progress import Progress, shows_progress
from .pairs.pairs import ReversalPairs
from .passes.likelihood import Target, no_partner
from .passes.plan import PassResult, Plan
from .passes.prompts import DIRECTIONS, shown_queries
from .passes.run import describe, run_pass
from .readings.draw_error import with_draw_error
from .readings.reading import Reading
from .statistics.partners import partner_column
from .statistics.resampling import SHOWN_IN


@checked
@shows_progress("queries")
def probe_reverse_probability(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    mode: str = "chain",
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Reading:
    """Probability of the target under the forward and the reverse query; the value is the reverse mean.

    `mode="chain"` reveals the target left to right and multiplies the conditionals; "parallel" multiplies the
    probabilities with the whole target hidden (masked models only). The control is the probability that the query of
    another fact of the same group, with another target of as many tokens and other evidence, at which this one is
    wrong, gives to this target; NaN where there is no such fact. `layers` is accepted as everywhere and unused:
    a probability has no layer.

    Frame: pair, fact, kind, direction, probability, log_probability (nats), rank (1-based, ties against the target,
    the worst over target tokens), argmax_match (rank is 1), probability_control, argmax_match_control (0 or 1; NaN
    without a partner), reason. Of a model that is read in blocks also reason_control: where evidence lies in a
    later block than a readout row, the query has no numbers (rank and argmax_match are NaN too), nor has the
    control that is priced there. Where pairs show the model the same and ask for several targets (a child's two
    parents), the column targets says for each row how many, and the caution that a right model cannot rank them all
    first: ask the relation's questions, which take any. In blocks "chain" is how such a model writes, each token
    after all that stand before it; "parallel" hides a target that spans several blocks in all of them, a sight that
    it never meets. Of a model that hides tokens behind random ones, all are of its mean distribution over draws of
    these, at each step of a chain; a column more, probability_error, is the draws' standard error of a row,
    `reading.draw_error` that of the value.
    Raises: RevprobeError, when the queries do not fit the model or its logits are NaN.
    Source: paper Sec. 5 (Fig. 3, right; Tables 1 and 2).
    """
    del layers
    model = as_probed(model)
    plan = Plan(probability=True, mode=mode, control=control, batch_size=batch_size, seed=seed, progress=progress)
    return probability_reading(model, run_pass(model, pairs, plan), plan)


def probability_reading(model: ProbedModel, result: PassResult, plan: Plan) -> Reading:
    """Join the priced targets of a pass to pairs and directions."""
    assert result.likelihoods is not None, "the pass was planned without probabilities"
    pairs, blocks = result.pairs, model.block_size is not None
    shown = dict(zip(DIRECTIONS, shown_queries(model, pairs), strict=True))
    frames = []
    for direction, index in (("forward", pairs.forward), ("reverse", pairs.reverse)):
        own = [pairs.queries[q].target for q in index]
        value, rank = result.likelihoods.look_up(index, own)
        # The pair's own target at the query of its control.
        partner = result.likelihoods.partner.get(direction, np.full(len(index), -1))
        other = np.where(partner >= 0, index[partner], -1)
        control_value, control_rank = result.likelihoods.look_up(other, own)
        reasons = result.unseen_reasons(index[:, None], other)
        unseen, beside = (reason != "" for reason in reasons.values())
        value, rank = (np.where(unseen, np.nan, numbers) for numbers in (value, rank))
        control_value = np.where(unseen | beside, np.nan, control_value)
        if plan.control:
            why = no_partner(pairs, model.logit_shift, partner, seed=plan.seed)
            reasons["reason_control"] = np.where(unseen | beside, reasons["reason_control"], why)
        columns = {
            "pair": np.arange(len(index)),
            "fact": pairs.facts.astype(str),
            "kind": pairs.kind,
            "direction": direction,
            "probability": np.exp(value),
            "log_probability": value,
            "rank": rank if blocks else rank.astype(np.int64),
            "argmax_match": np.where(np.isnan(rank), np.nan, rank == 1) if blocks else rank == 1,
            "probability_control": np.exp(control_value),
            "argmax_match_control": np.where(np.isnan(control_value), np.nan, control_rank == 1),
            **reasons,
            **pairs.flags,
            **partner_column(pairs.facts, partner, pairs.flags.get(SHOWN_IN[direction])),
            "targets": right_targets(shown[direction], own),
        }
        frames.append(pd.DataFrame(columns))
    frame = pd.concat(frames, ignore_index=True).sort_values(["pair", "direction"], kind="stable", ignore_index=True)
    if frame["targets"].max() == 1:
        frame = frame.drop(columns="targets")
    if not plan.control:
        frame = frame.drop(columns=["probability_control", "argmax_match_control", "reason_control"], errors="ignore")
    reading = Reading("reverse_probability", frame, describe(model, result, plan))
    reading.meta.update({"statistic": reading.measured.statistic, "mode": plan.mode})
    return with_draw_error(reading, [probability_reading(model, one, plan) for one in result.without])


def right_targets(shown: Sequence[Hashable], targets: Sequence[Target]) -> np.ndarray:
    """For each pair how many targets the pairs have whose query shows the model the same: one at most is likeliest.

    Args:
        shown: what the model is shown of each pair's query in one direction, as `shown_queries` says.

    Shapes: `pair, pair -> pair`.
    """
    asked: dict[Hashable, set[Target]] = {}
    for prompt, target in zip(shown, targets, strict=True):
        asked.setdefault(prompt, set()).add(target)
    count = {prompt: _exclusive(some) for prompt, some in asked.items()}
    return np.array([count[prompt] for prompt in shown])


def _exclusive(targets: set[Target]) -> int:
    """How many targets are no beginning of another, which a causal model may hold likeliest as well."""
    following = pairwise([*sorted(targets), ()])
    return sum(longer[: len(target)] != target for target, longer in following)
