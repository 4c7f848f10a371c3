"""Causal tracing: which state, put back into a corrupted query, brings the answer back?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from ...hooks.states import KINDS, States
from ...models.probed import ProbedModel, as_probed
from ...models.structure import states_of
from ...progress import Progress, shows_progress
from ..decoding.forced import forced_steps
from ..decoding.masked import Unmasking, unmasking
from ..pairs.pairs import ReversalPairs
from ..pairs.query import Query
from ..passes.asked import asked_pairs, out_of_sight
from ..passes.batches import prepare_queries, queries_per_batch, require_tokens_alone
from ..passes.likelihood import Likelihoods
from ..passes.plan import PassResult, Plan
from ..passes.run import describe
from ..passes.selection import chosen_of
from ..passes.state_runs import PARTS, Place, StateResult, StateRuns, Trial
from ..readings.reading import Reading
from ..statistics.estimators import LATER_BLOCK
from .other_evidence import other_evidence, with_evidence
from .trace_frame import LEAST_DIFFERENCE, NO_OTHER, NO_THIRD, Entry, trace_frame

POSITIONS = ("target", "evidence", "template")


@checked
@shows_progress("runs")
def probe_causal_trace(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    site: str = "residual",
    positions: str | Iterable[str] = POSITIONS,
    mode: str = "chain",
    steps: int | None = None,
    block_length: int | None = None,
    algorithm: str | None = None,
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Reading:
    """Put one clean state back into a corrupted query, and see how much of the target's log-probability returns.

    A query is corrupted by the evidence of another fact of its group, of as many tokens, in the place of its own. Then
    one state of the clean query is put in, at one layer (and head) and one part of the query, and the model runs on.
    The effect is log P(target) with that state less that of the corrupted query, in nats; `share` is the effect over
    (clean - corrupted), NaN where these differ by less than 0.5 nats. The control puts in, at the same place, the state
    of the query with a third fact's evidence.

    The value is the mean effect over pairs under the reverse query, each pair's mean over the frame's layers, heads,
    parts and steps; `summary(by=["direction", "layer", "part"])` has one number a place.

    Args:
        site: "residual" (the stream that a layer hands on; layer -1 is what the first block is given), "attention" or
            "mlp" (what that writes), "head" (what one head read, before the output projection).
        positions: one or several parts: "target" (the rows that the target is read from), "evidence", "template" (all
            other tokens), "all". With shift 1 a row may hold evidence and is part of both: meta["rows_on_evidence"].
        mode: "chain" or "parallel", as in `probe_reverse_probability`: the state is put back in each conditional of a
            target (whose own row is then the "target"), or all tokens are hidden at once.
        steps, block_length, algorithm: of a masked model, as in `decode`: the target is written in so many denoising
            steps, and the state put back at one of them, each in turn. The order is the decoder's own on the clean
            query, the tokens are the true ones: the effect is on the log-probability that this writes the whole target.
        layers, heads: all when None; heads of site "head" only.

    Frame: pair, fact, kind, direction, step (from 1) and revealed (tokens; both with `steps` only), part, layer, head
    (missing but for site "head"), log_probability (clean), log_probability_corrupted, log_probability_patched, effect
    (nats), share (fraction), effect_control, share_control; reason, reason_share and reason_control (why each is NaN).
    Cost: 3 forward passes per query (and token in chain mode, or step, and those that find the order), and one per
    place, twice with a control; meta["forwards"] counts the sequences that were run.
    Raises: RevprobeError, for an unknown option or one that has no say, a layer or head the model lacks, or queries
        that do not fit the model.
    Source: Meng et al. 2022 (arXiv 2202.05262), Sec. 2.1, with other tokens instead of noise, as Zhang & Nanda 2023
        (arXiv 2309.16042) recommend.
    """
    model = as_probed(model)
    parts = [positions] if isinstance(positions, str) else list(positions)
    _require_known("site", [site], KINDS)
    _require_known("positions", parts, PARTS)
    if heads is not None and site != "head":
        raise RevprobeError(f"heads={heads!r} has no say at site={site!r}: leave it out, or use site='head'")
    how = _writing(model, mode, steps, block_length, algorithm)
    plan = Plan(mode=mode, control=control, batch_size=batch_size, seed=seed, progress=progress)
    parts = [part for part in PARTS if part in parts]
    return _Trace(model, asked_pairs(model, pairs, "causal_trace"), plan, site, parts, how).reading(layers, heads)


def _writing(
    model: ProbedModel, mode: str, steps: int | None, block_length: int | None, algorithm: str | None
) -> Unmasking | None:
    """The decoder whose steps are followed; None where the target is priced without one."""
    if steps is None:
        given = {"block_length": block_length, "algorithm": algorithm}
        unused = next((name for name, value in given.items() if value is not None), None)
        if unused is not None:
            raise RevprobeError(f"{unused}={given[unused]!r} has no say without steps=: leave it out, or give steps=")
        return None
    if model.objective == "causal":
        raise RevprobeError(f"steps={steps!r} for {model.name}: a causal model does not denoise; leave steps out")
    if mode != "chain":
        raise RevprobeError(f"mode={mode!r} has no say with steps={steps!r}: leave one of them out")
    return unmasking(model, steps=steps, block_length=block_length, algorithm=algorithm)


def _require_known(what: str, values: Sequence[str], known: Sequence[str]) -> None:
    if not values:
        raise RevprobeError(f"{what} []: expected some of {', '.join(map(repr, known))}")
    for value in values:
        if value not in known:
            raise RevprobeError(f"unknown {what} {value!r}{did_you_mean(str(value), known)}")


@dataclass
class _Trace:
    """One call of the probe: from options to trials, and from results to the frame."""

    model: ProbedModel
    pairs: ReversalPairs
    plan: Plan
    site: str
    parts: Sequence[str]
    how: Unmasking | None
    forwards: int = 0
    trials: list[Trial] = field(default_factory=list)
    units: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)  # what is run -> its trials, one per token

    def reading(self, layers: Iterable[int] | None, heads: Iterable[int] | None) -> Reading:
        model, pairs = self.model, self.pairs
        require_tokens_alone(model, "the positions that a state is put back at")
        queries = prepare_queries(model, pairs.queries)
        size = queries_per_batch(model, queries, self.plan.batch_size)
        states = states_of(model)
        places, missing, about = self._places(states, layers, heads)
        entries = self._entries(queries, self._steps(queries, size))
        sites = {layer: site for layer, site in states.of(self.site).items() if any(p.layer == layer for p in places)}
        result = StateRuns(model, sites, self.trials, places, size, self.plan.progress).run()
        frame = self._frame(entries, result, places, missing)
        reading = Reading("causal_trace", frame, describe(model, PassResult(pairs, np.array([]), []), self.plan))
        shared = [{p - model.logit_shift for p in q.target_positions} & {*q.evidence_positions} for q in queries]
        about |= {"site": self.site, "positions": list(self.parts), "least_difference": LEAST_DIFFERENCE}
        about |= {"mode": self.plan.mode} if self.how is None else {"writing": self.how.describe()}
        about |= {"rows_on_evidence": sum(map(bool, shared)), "forwards": self.forwards + result.forwards}
        reading.meta.update(about | {"statistic": reading.measured.statistic})
        return reading

    def _places(
        self, states: States, layers: Iterable[int] | None, heads: Iterable[int] | None
    ) -> tuple[list[Place], dict[int, str], dict[str, Any]]:
        """Every place, and the chosen layers without the state, with the reason."""
        sites, without = states.of(self.site), states.missing(self.site)
        chosen = chosen_of("layer", layers, sorted({*sites, *without}), model=self.model, purpose="trace")
        most = max((site.heads for site in sites.values()), default=1)
        kept = chosen_of("head", heads, range(most), model=self.model, purpose="trace")
        places = [
            Place(layer, head, part)
            for layer in chosen
            if layer in sites
            for head in ([one for one in kept if one < sites[layer].heads] if self.site == "head" else [None])
            for part in self.parts
        ]
        missing = {layer: without[layer] for layer in chosen if layer in without}
        about: dict[str, Any] = {"layers": chosen, "layers_without_state": list(missing)}
        return places, missing, about | ({"heads": kept} if self.site == "head" else {})

    def _steps(self, queries: Sequence[Query], size: int) -> list[list[Query]]:
        """The queries that price each query's target, one after the other."""
        if self.how is not None:
            steps, self.forwards = forced_steps(self.model, queries, self.how, size)
            return steps
        pricing = Likelihoods.of(self.model, queries, self.pairs, self.plan.mode)
        if self.plan.mode == "parallel":
            return [[query] for query in queries]
        return [list(pricing.conditionals(q, query.target)) for q, query in enumerate(queries)]

    def _entries(self, queries: Sequence[Query], steps: Sequence[Sequence[Query]]) -> list[Entry]:
        """One for each pair and direction, and with `steps=` each step; the trials behind them are collected."""
        pairs, unseen = self.pairs, out_of_sight(self.model, queries)
        other, third = other_evidence(pairs, self.model.logit_shift, seed=self.plan.seed)
        third = third if self.plan.control else np.full(len(pairs), -1)
        entries = []
        for pair in range(len(pairs)):
            for direction, index in (("forward", pairs.forward), ("reverse", pairs.reverse)):
                q = int(index[pair])
                evidence = [queries[index[one]].evidence if one >= 0 else None for one in (other[pair], third[pair])]
                reason = LATER_BLOCK if unseen[q] else NO_OTHER if evidence[0] is None else ""
                trials = [] if reason else self._trials_of(q, steps[q], *evidence)
                about = pair, direction, reason, "" if evidence[1] is not None else NO_THIRD
                if self.how is None:
                    entries.append(Entry(*about, tuple(trials), tuple(trials)))
                    continue
                for number, step in enumerate(steps[q]):
                    own = tuple(trials[number : number + 1])
                    entries.append(Entry(*about, own, tuple(trials), number + 1, len(step.target_positions)))
        return entries

    def _trials_of(
        self, q: int, steps: Sequence[Query], other: Sequence[int] | None, third: Sequence[int] | None
    ) -> list[int]:
        key = q, other, third
        if key not in self.units:
            assert other is not None, "a query without another fact's evidence is not run"
            first = len(self.trials)
            self.trials += [
                Trial(step, with_evidence(step, other), None if third is None else with_evidence(step, third))
                for step in steps
            ]
            self.units[key] = list(range(first, len(self.trials)))
        return self.units[key]

    def _frame(
        self, entries: Sequence[Entry], result: StateResult, places: Sequence[Place], missing: dict[int, str]
    ) -> pd.DataFrame:
        frame = trace_frame(self.pairs, entries, result, [*places], missing, self.parts)
        dropped = [] if self.plan.control else ["effect_control", "share_control", "reason_control"]
        dropped += ["step", "revealed"] if self.how is None else []
        return frame.drop(columns=dropped)
