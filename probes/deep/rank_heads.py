"""Heads ranked by what their route to the evidence does to the answer, and what the best do on facts not ranked by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from ...models.probed import ProbedModel, as_probed
from ...models.structure import attention_of
from ...progress import Progress, shows_progress
from ..pairs.pairs import ReversalPairs
from ..passes.asked import asked_pairs
from ..passes.plan import PassResult, Plan
from ..passes.prompts import facts_of
from ..passes.run import describe
from ..readings.reading import Reading
from ..route_edit import probe_route_edit
from ..statistics.causal_trace import place_means
from ..statistics.resampling import SHOWN, SHOWN_IN, kin

BY, DIRECTIONS = ("effect", "excess"), ("reverse", "forward")
EDITS = {"knockout": -1.0, "transplant": 1.0}  # the sign under which a larger effect is a head that carries more
NO_RANKING = "no head has an effect on the training facts"
NO_OTHER_HEAD = "no other head of the layer is left to compare with"


@checked
@shows_progress("sequences")
def rank_heads(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    by: str = "effect",
    edit: str = "knockout",
    direction: str = "reverse",
    top: int | None = None,
    others: int = 4,
    mode: str = "chain",
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Reading:
    """Rank heads by their route's effect on one half of the facts, and show the best on the other half.

    The route of each head, from the readout rows to the evidence, is edited alone, as `probe_route_edit` does it, for a
    random half of the facts. The `top` heads are then edited for the other facts, and there stands what is reported:
    the effect on the facts that a head was chosen by is too large by the luck that chose it. The control is the mean
    effect, on the same held-out facts, of `others` heads drawn at random from the same layer, none of them a top one.

    The value is the mean effect of the top heads over held-out pairs, in nats; `summary(by=["rank", "layer", "head"])`
    has each head's own. Heads are edited one at a time: their effects need not add up.

    Args:
        top: how many heads are shown; 5 when None, or as many as there are.
        by: "effect", or "excess": the effect less that of the same edit at other positions (twice the runs).
        edit: "knockout" (the effect is the log-probability that is lost) or "transplant" (that is gained with the route
            that the other direction's query has in this head).
        direction: of the queries that are edited, "reverse" or "forward".
        mode, layers, heads: as in `probe_route_edit`.
        progress: called with (sequences run, sequences so far foreseen); the second grows when heads are chosen.

    Frame: one row per held-out pair and top head: pair, fact, kind, direction, rank, layer, head, effect (nats),
    effect_control (mean over the random heads), reason, reason_control. meta["ranking"] has every head's mean effect
    (or excess) on the training facts, the largest first, meta["others"] the random heads of each layer.
    Cost: for each query about one forward pass per head, once over the training facts, and one per top and random head
    over the others (for each target token in chain mode; transplants twice as many); meta["forwards"] counts them.
    Raises: RevprobeError, for fewer than two facts, an unknown option, a layer or head the model lacks, or queries that
        do not fit the model.
    """
    model = as_probed(model)
    for what, value, known in (("by", by, BY), ("edit", edit, EDITS), ("direction", direction, DIRECTIONS)):
        if value not in known:
            raise RevprobeError(f"unknown {what} {value!r}{did_you_mean(value, known)}")
    for what, count in (("top", top), ("others", others)):
        if count is not None and count < 1:
            raise RevprobeError(f"{what}={count!r}: expected at least 1 head")
    there = _heads_asked(model, layers, heads)
    if top is not None and 0 < there < top:
        raise RevprobeError(f"top={top}: {there} heads are ranked; expected at most so many")
    own = asked_pairs(model, pairs, "route_edit")
    plan = Plan(mode=mode, control=control, batch_size=batch_size, seed=seed, progress=progress)
    return _Ranking(model, own, plan, by, edit, direction).reading(top or 5, others, layers, heads)


def _heads_asked(model: ProbedModel, layers: Iterable[int] | None, heads: Iterable[int] | None) -> int:
    """How many heads are ranked; of layers or heads that the model lacks, the edits say so."""
    chosen = None if layers is None else {*layers}
    wanted = None if heads is None else {*heads}
    counts = [most for layer, most in attention_of(model).heads.items() if chosen is None or layer in chosen]
    return sum(sum(wanted is None or head in wanted for head in range(most)) for most in counts)


@dataclass
class _Ranking:
    """One call: two halves of the facts, and the route edits of each."""

    model: ProbedModel
    pairs: ReversalPairs
    plan: Plan
    by: str
    edit: str
    direction: str
    forwards: int = 0
    drawn: dict[int, list[int]] = field(default_factory=dict)  # layer -> its random heads

    def reading(self, top: int, others: int, layers: Iterable[int] | None, heads: Iterable[int] | None) -> Reading:
        train, test = self._halves()
        trained = self._effects(train, layers, heads, against=self.by == "excess")
        means = place_means(trained, ["layer", "head"], self.by)
        means = means.sort_values(["value", "layer", "head"], ascending=[False, True, True])
        ranking = means[["layer", "head", "value", "n"]].astype(object).to_dict("records")
        best = [(one["layer"], one["head"]) for one in ranking[:top]]
        self._draw(best, [(one["layer"], one["head"]) for one in ranking], others)
        about: dict[str, Any] = {"by": self.by, "edit": self.edit, "direction": self.direction, "mode": self.plan.mode}
        about |= {"top": len(best), "others": {str(layer): drawn for layer, drawn in sorted(self.drawn.items())}}
        about |= {"training_facts": sorted({str(fact) for fact in self.pairs.facts[train]}), "ranking": ranking}
        done = PassResult(self.pairs, np.array([]), [])
        reading = Reading("head_ranking", self._frame(test, best), describe(self.model, done, self.plan) | about)
        reading.meta.update({"forwards": self.forwards, "statistic": reading.measured.statistic})
        return reading

    def _halves(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs to rank by and those to show the best on, by fact; the training half takes the odd one.

        Facts that ask the very same query, or share prompts, are one: it would be ranked by and shown on.
        """
        asked = getattr(self.pairs, self.direction).tolist()
        drawn = kin(facts_of(self.pairs, self._prompts).unit, asked)
        names, fact = np.unique(drawn, return_inverse=True)
        if len(names) < 2:
            raise RevprobeError("pairs of one fact: expected at least two, one to rank by and one to show the best on")
        chosen = np.random.default_rng(self.plan.seed).permutation(len(names))[: (len(names) + 1) // 2]
        training = np.isin(fact, chosen)
        return np.flatnonzero(training), np.flatnonzero(~training)

    @property
    def _prompts(self) -> str | None:
        """The direction whose prompts its numbers come from; None for both, of which a transplant is."""
        return None if self.edit == "transplant" else self.direction

    def _effects(
        self, part: np.ndarray, layers: Iterable[int] | None, heads: Iterable[int] | None, *, against: bool
    ) -> pd.DataFrame:
        """What editing each head alone does to some of the pairs: pair, fact, layer, head, effect, excess, reason."""
        pairs = self.pairs
        if self.edit == "knockout":  # needs no donor: with both sides alike, each query is run once
            side = getattr(pairs, self.direction)
            pairs = replace(pairs, forward=side, reverse=side)
        pairs = pairs.take(part)
        before = self.forwards

        def count(done: int, total: int) -> None:
            self.forwards = before + done
            if callable(self.plan.progress):
                self.plan.progress(before + done, before + total)

        options: dict[str, Any] = {"mode": self.plan.mode, "batch_size": self.plan.batch_size, "seed": self.plan.seed}
        options |= {"layers": layers, "heads": heads, "control": against, "progress": count}
        frame = probe_route_edit(self.model, pairs, edit=self.edit, scope="head", **options).frame
        rows = frame[(frame["direction"] == self.direction) & (frame["scope"] == "head")]
        sign = EDITS[self.edit]
        found = rows[["fact", "kind", "direction", "layer", "head", "reason"]].assign(
            pair=part[rows["pair"].to_numpy()], effect=sign * rows["change"]
        )
        return found.assign(excess=found["effect"] - sign * rows["change_control"]) if against else found

    def _draw(self, best: Sequence[tuple[int, int]], ranked: Sequence[tuple[int, int]], others: int) -> None:
        """Random heads of each layer that has a top head, among those that were ranked."""
        draw = np.random.default_rng([self.plan.seed, 1])
        for layer in sorted({layer for layer, _ in best}):
            left = sorted(head for at, head in ranked if at == layer and (layer, head) not in best)
            count = min(others, len(left)) if self.plan.control else 0
            self.drawn[layer] = sorted(draw.permutation(np.array(left, dtype=int))[:count].tolist())

    def _frame(self, test: np.ndarray, best: Sequence[tuple[int, int]]) -> pd.DataFrame:
        """One row per held-out pair and top head."""
        parts = []
        for layer, drawn in self.drawn.items():
            tops = [head for at, head in best if at == layer]
            found = self._effects(test, [layer], sorted({*tops, *drawn}), against=False)
            beside = found[found["head"].isin(drawn)].groupby("pair")["effect"].mean()
            for head in tops:
                rows = found[found["head"] == head].assign(rank=best.index((layer, head)) + 1)
                parts.append(rows.assign(effect_control=rows["pair"].map(beside).astype(float)))
        frame = pd.concat(parts, ignore_index=True) if parts else self._unranked(test)
        defined, alone = frame["reason"] == "", frame["effect_control"].isna()
        frame["effect_control"] = frame["effect_control"].where(defined)
        frame["reason_control"] = np.select([~defined, alone], [frame["reason"], NO_OTHER_HEAD], "").astype(str)
        columns = ["pair", "fact", "kind", "direction", "rank", "layer", "head", "effect"]
        columns += ["effect_control", "reason", "reason_control"] if self.plan.control else ["reason"]
        frame = frame[columns].astype({"rank": "Int64", "layer": "Int64", "head": "Int64"})
        for name in [one for one in (SHOWN, *SHOWN_IN.values()) if one in self.pairs.flags]:
            if name == SHOWN or self._prompts is not None:
                frame[name] = self.pairs.flags[name][frame["pair"].to_numpy()]
        return frame.sort_values(["pair", "rank"], kind="stable", ignore_index=True)

    def _unranked(self, test: np.ndarray) -> pd.DataFrame:
        about = {"pair": test, "fact": self.pairs.facts[test].astype(str), "kind": self.pairs.kind}
        about |= {"direction": self.direction, "rank": pd.NA, "layer": pd.NA, "head": pd.NA, "effect": np.nan}
        return pd.DataFrame(about | {"effect_control": np.nan, "reason": NO_RANKING})
