"""Is a fact stored once? Whether what the forward states of facts tell apart tells their reverse states apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError, first_line
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel, as_probed
from ...models.structure import states_of
from ...progress import Progress, shows_progress
from ..pairs.pairs import ReversalPairs
from ..pairs.query import Query
from ..passes.alone import in_equal_lengths_if_need_be
from ..passes.asked import asked_pairs, out_of_sight
from ..passes.batches import prepare_queries, queries_per_batch, require_tokens_alone
from ..passes.plan import PassResult, Plan
from ..passes.prompts import null_partners
from ..passes.run import describe
from ..passes.selection import chosen_of
from ..passes.states import states_of_queries
from ..passes.untrained import untrained_twin
from ..readings.reading import Reading
from ..statistics.coverage import first_caution
from ..statistics.estimators import LATER_BLOCK
from ..statistics.intervals import FRACTION, difference_over_facts, proportion_over_facts
from ..statistics.resampling import Facts
from ..statistics.stored_once import (
    CLASSIFIER,
    MAP,
    NUMBERS,
    Places,
    Questions,
    all_alike,
    by_classifier,
    by_map,
)

LEAST_FACTS = 8
_AT_ONCE = 64  # tokens whose rows are taken from an adapted head together
FORWARD_EVIDENCE = "asked of reverse states alone"
ASKED_FORWARD = "its reverse query is asked forward as well, so the fit has seen it"
NOT_ASKED = "not asked for"
NO_CENTRE = "no state of another fold to count from"
NO_EVIDENCE = "no other fact with another target, wrong here as this one is there, has evidence of as many tokens"
NO_UNEMBEDDING = "the model names no unembedding, so there are no rows to map to"
ONE_FORWARD = "one forward query of the fact, so none is left to ask about"
SAME_STATE = "the states are the same for every fact"
TOO_FEW = f"fewer than {LEAST_FACTS} facts"

Found = dict[tuple[str, int], Places]  # (test, layer) -> its places, none where the states are all alike


@checked
@shows_progress("queries")
def probe_stored_once(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    untrained: bool = True,
    ridge: float = 0.1,
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Reading:
    """Test, layer by layer, whether a fact is the same state at the readout row in both directions.

    Two closed-form ridge regressions on the forward states (their mean over target rows; of a causal model the first
    row's, as later ones have read the target's own tokens), asked about reverse ones:
        map         leads to the target's unembedding row. Fitted on other facts and asked about held-out ones (ten
            folds of facts): the right target among all facts' targets. A state that merely carries the evidence's
            token cannot pass it, for no fit has seen what that token goes with.
        classifier  names the fact. Fitted on the forward states of all facts, asked about the reverse states of the
            same ones. Whatever tells the evidence's token in both directions passes it, trained or not: read it
            beside the untrained twin alone.

    The value is the share of pairs whose target the map puts first by the reverse state of the last layer. It is no
    answer of the model: a state may hold what its own unembedding does not say.

    Controls, beside every number: `_control`, fitted to shuffled labels (what chance gives); `_untrained`, the same
    tests on the same configuration with initial weights; `_evidence`, the reverse question with another fact's
    evidence, asked for its own target or fact: what is still found comes from the rest of the query.
    `reading.controls` has their differences from the value, with intervals.

    Args:
        untrained: whether to read the twin; ridge: the penalty, as a share of the states' mean variance.
        layers: all when None; -1 is the embedding.

    Frame: pair, fact, kind, test, direction (of the states asked about), layer; rank (1-based, ties against it), place
    (share of the other candidates below it: 0.5 by chance), correct (1 where it is alone at the top), and the same
    with _control, _untrained, _evidence (reverse alone); reason, reason_untrained, reason_evidence. Undefined: fewer
    than 8 facts, states that are the same for all, forward classification of a fact with one forward query (it takes
    the other half of them), the map of a model that names no unembedding, evidence in a later block, no state of
    another fold to centre on. `meta["target_rows"]`: whether states are the "mean" of target rows or the "first".
    Cost: one forward for each query, and for each reverse query with other evidence; as many of the twin.
    Raises: RevprobeError, for a layer the model lacks, a ridge that is not positive, or virtual tokens.
    """
    model, ridge = as_probed(model), _positive(ridge)
    require_tokens_alone(model, "the states of the query's tokens")
    pairs = asked_pairs(model, pairs, "stored_once")
    plan = Plan(control=control, batch_size=batch_size, seed=seed, progress=progress)
    tests = _Tests.of(model, pairs, plan, ridge, layers)
    own = tests.run(model, 2 if untrained else 1)
    twin = tests.of_twin(model) if untrained else NOT_ASKED
    frame = tests.frame(own, twin, states_of(model).missing("residual"))
    about = describe(model, PassResult(pairs, tests.partner, []), plan) | {"ridge": ridge}
    about["target_rows"] = "first" if model.objective == "causal" else "mean"
    reading = Reading("stored_once", frame, about | {"layers": tests.layers})
    beside = _controls(reading, twin if isinstance(twin, str) else "")
    reading.meta.update({"statistic": reading.measured.statistic, "controls": beside})
    return reading


@dataclass
class _Tests:
    """What is asked of a model and of its twin: the same questions, at the same layers."""

    pairs: ReversalPairs
    plan: Plan
    ridge: float
    layers: list[int]
    queries: list[Query]  # those of the pairs, then reverse ones with other evidence
    size: int
    unseen: np.ndarray
    partner: np.ndarray
    swapped: dict[int, int]  # reverse query -> itself with another fact's evidence
    asked: Questions
    targets: list[tuple[int, ...]]

    @classmethod
    def of(
        cls, model: ProbedModel, pairs: ReversalPairs, plan: Plan, ridge: float, layers: Iterable[int] | None
    ) -> _Tests:
        states = states_of(model)
        there = sorted({*states.of("residual"), *states.missing("residual")})
        chosen = chosen_of("layer", layers, there, model=model, purpose="read")
        queries = prepare_queries(model, pairs.queries)
        size, unseen = queries_per_batch(model, queries, plan.batch_size), out_of_sight(model, queries)
        fact = np.full(len(queries), -1)
        fact[pairs.reverse] = fact[pairs.forward] = np.unique(pairs.facts.astype(str), return_inverse=True)[1]
        width = np.array([len(queries[q].evidence_positions) for q in pairs.reverse])
        partner = null_partners(pairs, width, ["reverse"], seed=plan.seed)
        forward = np.unique(pairs.forward[~unseen[pairs.forward]])
        reverse = np.unique(pairs.reverse[~unseen[pairs.reverse]])
        reverse = reverse[~np.isin(reverse, forward) & np.isin(fact[reverse], fact[forward])]
        swapped: dict[int, int] = {}
        for pair in np.flatnonzero((partner >= 0) & np.isin(pairs.reverse, reverse)):
            own, other = (queries[pairs.reverse[one]] for one in (pair, partner[pair]))
            if swapped.setdefault(int(pairs.reverse[pair]), len(queries)) == len(queries):
                queries.append(_with_evidence(own, other))
        fact = np.concatenate([fact, [fact[q] for q in swapped]]).astype(np.int64)
        targets = sorted({query.target for query in queries})
        target = np.array([targets.index(query.target) for query in queries])
        asked = Questions(forward, reverse, np.array([swapped.get(int(q), -1) for q in reverse]), fact, target)
        return cls(pairs, plan, ridge, chosen, queries, size, unseen, partner, swapped, asked, targets)

    @property
    def too_few(self) -> bool:
        facts = (np.unique(self.asked.fact[some]) for some in (self.asked.forward, self.asked.reverse))
        return min(map(len, facts)) < LEAST_FACTS

    def run(self, model: ProbedModel, times: int, before: int = 0) -> Found:
        """The places of both tests at every layer that has a state, none where states are all alike.

        Args:
            times, before: of so many runs over all queries, how many are done.
        """
        sites = {layer: site for layer, site in states_of(model).of("residual").items() if layer in self.layers}
        if self.too_few or not sites:
            return {}
        count, rows, found = len(self.queries), _unembedding(model, self.targets), Found()

        def report(done: int) -> None:
            if callable(self.plan.progress):
                self.plan.progress(before * count + done, times * count)

        states = in_equal_lengths_if_need_be(
            model, lambda: states_of_queries(model, self.queries, list(sites.values()), self.size, report)
        )
        options: dict[str, Any] = {"ridge": self.ridge, "seed": self.plan.seed, "null": self.plan.control}
        for layer, table in zip(sites, states.astype(np.float64), strict=True):
            alike = all_alike(table[self.asked.forward])
            found[CLASSIFIER, layer] = {} if alike else by_classifier(table, self.asked, **options)
            if rows is not None:
                found[MAP, layer] = {} if alike else by_map(table, rows, self.asked, **options)
        return found

    def of_twin(self, model: ProbedModel) -> Found | str:
        """The same of the untrained twin, or why there is none: the model's own tests stand."""
        try:
            return self.run(untrained_twin(model, self.plan.seed), 2, before=1)
        except RevprobeError as error:
            return first_line(error, with_type=False)

    # ---- what came out ----

    def frame(self, own: Found, twin: Found | str, missing: Mapping[int, str]) -> pd.DataFrame:
        """One row per pair, test, direction and layer. `missing`: the layers without a state, and why."""
        parts = [
            self._rows(test, direction, layer, own, twin, missing.get(layer, ""))
            for test in (CLASSIFIER, MAP)
            for direction in ("forward", "reverse")
            for layer in self.layers
        ]
        frame = pd.concat(parts, ignore_index=True).sort_values("pair", kind="stable", ignore_index=True)
        return frame if self.plan.control else frame.drop(columns=[f"{name}_control" for name in NUMBERS])

    def _rows(self, test: str, direction: str, layer: int, own: Found, twin: Found | str, missing: str) -> pd.DataFrame:
        index, asked = getattr(self.pairs, direction), getattr(self.asked, direction)
        place = np.searchsorted(asked, index).clip(max=max(len(asked) - 1, 0))
        there = asked[place] == index if len(asked) else np.zeros(len(index), dtype=bool)

        def spread(found: Found | str, kind: str) -> np.ndarray:
            """From questions to pairs. Shapes: `-> number pair`."""
            table = found.get((test, layer), {}).get((direction, kind)) if isinstance(found, dict) else None
            return np.full((3, len(index)), np.nan) if table is None else np.where(there, table[:, place], np.nan)

        tables = {"": spread(own, "own"), "_control": spread(own, "control")}
        tables |= {"_untrained": spread(twin, "own"), "_evidence": spread(own, "evidence")}
        reason = self._reasons(test, direction, layer, own, missing, there)
        reason[np.isnan(tables[""][0]) & (reason == "")] = NO_CENTRE
        beside = twin if isinstance(twin, str) else self._reasons(test, direction, layer, twin, missing, there)
        if not isinstance(beside, str):
            beside[np.isnan(tables["_untrained"][0]) & (beside == "")] = NO_CENTRE
        other = np.isnan(tables["_evidence"][0]) & (reason == "")
        evidence = np.where(other, NO_EVIDENCE if direction == "reverse" else FORWARD_EVIDENCE, reason)
        columns: dict[str, Any] = {"pair": np.arange(len(index)), "fact": self.pairs.facts.astype(str)}
        columns |= {"kind": self.pairs.kind, "test": test, "direction": direction, "layer": layer}
        for kind, table in tables.items():
            columns |= {f"{name}{kind}": table[row] for row, name in enumerate(NUMBERS)}
        columns |= {"reason": reason, "reason_untrained": np.where(reason == "", beside, reason)}
        return pd.DataFrame(columns | {"reason_evidence": evidence, **self.pairs.flags})

    def _reasons(
        self, test: str, direction: str, layer: int, found: Found, missing: str, there: np.ndarray
    ) -> np.ndarray:
        """Why a pair has no place in one test, "" where it has one. Shapes: `there` (asked about): `pair -> pair`."""
        places = found.get((test, layer))
        alike = SAME_STATE if places == {} else ""
        whole = missing or (TOO_FEW if self.too_few else "") or (NO_UNEMBEDDING if places is None else "") or alike
        asked_forward = np.isin(self.pairs.reverse, self.asked.forward) & (direction == "reverse")
        apart = np.where(there, "", np.where(asked_forward, ASKED_FORWARD, LATER_BLOCK))
        if direction == "forward" and test == CLASSIFIER:
            facts = self.asked.fact[self.asked.forward]
            lone = np.bincount(facts, minlength=len(self.asked.fact))[self.asked.fact[self.pairs.forward]] < 2
            apart = np.where(there & lone, ONE_FORWARD, apart)
        return np.where(apart == LATER_BLOCK, apart, whole or apart).astype(object)


def _positive(ridge: float) -> float:
    if not (isinstance(ridge, Real) and math.isfinite(ridge) and ridge > 0):
        raise RevprobeError(f"ridge={ridge!r}: expected a positive number; 0.1 is a tenth of the mean variance")
    return float(ridge)


def _with_evidence(query: Query, other: Query) -> Query:
    """A query with the evidence of another, as long as its own."""
    tokens = list(query.token_ids)
    for at, place in zip(query.evidence_positions, other.evidence_positions, strict=True):
        tokens[at] = other.token_ids[place]
    return Query.unchecked(tokens, query.target_positions, query.evidence_positions)


def _unembedding(model: ProbedModel, targets: Sequence[tuple[int, ...]]) -> np.ndarray | None:
    """The row of each target, the mean over its tokens; None where the model names no unembedding of token rows."""
    head = getattr(model.module, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if head is None or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    tokens = [token for target in targets for token in target]
    if max(tokens) >= weight.shape[0]:
        return None
    plain = type(head) is nn.Linear and "weight" in head._parameters and not weight.is_meta
    rows = weight.detach()[tokens].double() if plain else _rows_of(model, head, tokens, weight.shape[1])
    starts = np.cumsum([0, *(len(target) for target in targets)])[:-1]
    sums = np.add.reduceat(rows.double().cpu().numpy(), starts)
    return np.asarray(sums / np.array([len(target) for target in targets])[:, None])


def _rows_of(model: ProbedModel, head: nn.Module, tokens: Sequence[int], width: int) -> torch.Tensor:
    """What a state is multiplied by for each token's logit, by its derivative: the weight is not all of an adapted or a
    quantised head, and is not there before it runs where it waits elsewhere. Shapes: `-> token width`.
    """
    rows: list[torch.Tensor] = []
    with untouched(model.module), torch.enable_grad():
        for start in range(0, len(tokens), _AT_ONCE):
            some = torch.tensor(tokens[start : start + _AT_ONCE], device=model.device)
            state = torch.zeros(1, len(some), width, device=model.device, dtype=model.dtype, requires_grad=True)
            logits = head(state)[0]
            chosen = logits.gather(1, some.to(logits.device)[:, None])
            rows += torch.autograd.grad(chosen.sum(), state)[0][0]
    return torch.stack(rows)


def _controls(reading: Reading, why: str) -> list[dict[str, Any]]:
    """The value beside what the twin and other evidence give, with paired differences; rows of `Reading.controls`."""
    rows = reading.frame[(reading.frame["test"] == MAP) & (reading.frame["direction"] == "reverse")]
    rows = rows[rows["layer"] == rows["layer"].max()]
    own, facts = rows["correct"].to_numpy(dtype=np.float64), Facts.of_rows(rows)
    made = []
    for name in ("untrained", "evidence"):
        other = rows[f"correct_{name}"].to_numpy(dtype=np.float64)
        row: dict[str, Any] = {"control": name, "model": reading.meta["model"] + " untrained" * (name == "untrained")}
        if not np.isfinite(other).any():
            made.append(row | {"reason": why if name == "untrained" and why else str(rows[f"reason_{name}"].iloc[0])})
            continue
        found = proportion_over_facts(other, facts)
        apart = difference_over_facts(own, other, facts, bounds=FRACTION, binary=True)
        row |= {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "facts": found.facts}
        row |= {"difference": apart.value, "difference_low": apart.low, "difference_high": apart.high}
        few = first_caution("proportion", found, apart)
        made.append(row | {"reason": few})
    return made
