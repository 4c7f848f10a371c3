"""The assumption audit: does what the routing bound takes for granted hold of a model's own keys and queries?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ...arguments import checked
from ...hooks.attention import tap_queries
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel, as_probed
from ...models.rotary import STILL, TURNS, LayerPositions, Rotary, seen_positions
from ...models.structure import attention_of
from ...progress import Progress, shows_progress
from ..attention import EVIDENCE_HIDDEN
from ..pairs.pairs import ReversalPairs
from ..passes.alone import in_equal_lengths_if_need_be
from ..passes.asked import asked_pairs, out_of_sight
from ..passes.batches import in_batches, make_batch, prepare_queries, queries_per_batch, require_tokens_alone
from ..passes.likelihood import readout
from ..passes.plan import PassResult, Plan
from ..passes.prompts import facts_of, shown_queries
from ..passes.run import describe
from ..passes.selection import chosen_of
from ..readings.reading import Reading
from ..statistics.estimators import LATER_BLOCK
from ..theory.checks import whole_number
from ..theory.key_covariance import FACTS_PER_ENTRY, TOLERANCE
from ..theory.model_bounds import NOT_SEEN, reasons_without_bound
from .assumption_frame import Audited, layer_rows, rows_without_planes

NO_PLANES = "queries do not turn with position (ALiBi, other biases or none), so there are no planes"
LENGTHS = "its angles depend on the length, and the queries differ in length"
ONE_SIDE = "a causal model sees evidence on one side only, and the bound is about two"
ALONE = "no other fact is asked at the same places"
SHOWN_BEFORE = "the model is shown another fact's pair with the same prompts"
LEAST_PERMUTATIONS = 40  # fewer have no 95 % range


@checked
@shows_progress("queries")
def audit_assumptions(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    permutations: int = 200,
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Reading:
    """Measure what the routing theorem assumes, layer by layer and head by head, and what its bound is without it.

    Keys of the evidence and queries of the readout row are taken as the scores see them (after bias, norm and
    rotation) and turned back to position 0. A fact's key is the mean over its pairs, less the mean over the facts that
    are asked at the same places. Pairs that the theorem speaks of (one target and one evidence token, equal distances
    on opposite sides) are audited if there are any; else all, without a bound and without a verdict. In a layer whose
    mask hides a pair's evidence from either query (a window), it is audited without that pair.

    A head's verdict is 'cannot tell' with fewer facts than 2 x head dimension; 'holds' where the cross-plane share lies
    inside the 95 % of its null AND the bound with measured values lies within 0.05 of the assumed one, in both
    directions; else 'fails'. The null permutes each plane's fact labels on their own. 'holds' means that nothing was
    found against the assumption, and 1 in 20 heads fails by chance.

    The value is the mean cross-plane share over the frame's heads and directions, beside its null as control. Its
    interval, and the null's, are the means of the heads' own: as wide as if all heads went together.

    Args:
        permutations: of the null, at least 40; layers: all when None.

    Frame: one row per layer, head, direction (of the queries whose keys and queries are taken) and plane. Of the plane:
    frequency, rho (alignment) and trace (over its mean over planes), each with _low and _high (95 %, over facts),
    query_share (w_k, mean over queries). Of head and direction, the same in each of its rows: cross_share (fraction of
    the covariance's square; cross_low, cross_high), null (null_low, null_high), trace_spread (standard deviation of
    trace over planes), query_concentration (1 for isotropic queries), query_mean_share (|mean q|^2 / mean |q|^2);
    bound_assumed, bound_measured, exact (by q and the whole covariance) and correlation (measured, of both directions'
    scores, with its interval), means over groups; key_match and query_match (cosines between the directions; the
    theorem has one key and one query, so 1); facts, pairs, facts_needed; direction_verdict, why, verdict (the head's).
    reason: why planes have no number; reason_bound: why there is no bound and no verdict. A layer without planes, or
    that shows no evidence, has one row per head and direction.
    Cost: one forward per query, and permutations x products of keys.
    Raises: RevprobeError, when no attention call is seen, for a layer the model lacks, fewer than 40 permutations,
        queries that do not fit the model, or virtual tokens.
    Source: paper Assumption 4.2, Thm. 4.3, App. A.3.
    """
    model = as_probed(model)
    require_tokens_alone(model, "the keys of the query's tokens")
    permutations = whole_number(
        "permutations", permutations, LEAST_PERMUTATIONS, f"a whole number of at least {LEAST_PERMUTATIONS}"
    )
    pairs = asked_pairs(model, pairs, "attention")
    plan = Plan(control=True, batch_size=batch_size, seed=seed, progress=progress)
    audit = _Audit.of(model, pairs, plan, layers)
    about: dict[str, Any] = describe(model, PassResult(pairs, np.array([]), []), plan)
    reading = Reading("assumption_audit", audit.frame(permutations), about)
    about |= {"layers": audit.layers, "permutations": permutations, "tolerance": TOLERANCE}
    about["pairs_audited"] = len(audit.audited.fact)
    about |= {"facts_per_entry": FACTS_PER_ENTRY, "strata": audit.audited.strata_count}
    about |= {"pairs_left_out": audit.left_out, "pairs_hidden": audit.hidden_in()}
    about["statistic"] = reading.measured.statistic
    return reading


@dataclass
class _Vectors:
    """What one layer was seen to do with each query.

    `query`, `key`: means over readout rows and over evidence tokens, turned back, complex64; None where the layer has
    no planes. `score`: mean of q . k over rows and tokens; `hidden`: whether the mask keeps some of the evidence from
    some row, in any head. Shapes: `query head plane` twice, `query head`, `query`.
    """

    query: np.ndarray | None
    key: np.ndarray | None
    score: np.ndarray
    hidden: np.ndarray


@dataclass
class _Audit:
    """One call: the pairs that are audited, and the vectors of every layer."""

    model: ProbedModel
    plan: Plan
    layers: list[int]
    heads: dict[int, int]
    missing: dict[int, str]
    rotary: dict[int, Rotary]
    pairs: ReversalPairs
    unseen: np.ndarray  # of each query, whether its evidence is in a later block
    audited: Audited
    left_out: dict[str, int]
    seen: dict[int, _Vectors] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ProbedModel, pairs: ReversalPairs, plan: Plan, layers: Iterable[int] | None) -> _Audit:
        queries = prepare_queries(model, pairs.queries)
        attention = attention_of(model)
        there = sorted({*attention.heads, *attention.without})
        chosen = chosen_of("layer", layers, there, model=model, purpose="audit")
        most = max(attention.heads.values(), default=0)
        lengths = {len(query.token_ids) for query in queries}
        positions = [seen_positions(model, length=length) for length in sorted({min(lengths), max(lengths)})]
        unseen = out_of_sight(model, queries)
        audited, left_out = _audited(model, pairs, unseen)
        found = {layer: _planes_of([some.get(layer) for some in positions]) for layer in chosen}
        missing = {layer: attention.without.get(layer, why) for layer, (_, why) in found.items() if why}
        rotary = {layer: one for layer, (one, _) in found.items() if one is not None}
        heads = {layer: attention.heads.get(layer, most) for layer in chosen}
        audit = cls(model, plan, chosen, heads, missing, rotary, pairs, unseen, audited, left_out)
        in_equal_lengths_if_need_be(model, lambda: audit._see(queries))
        return audit

    def _see(self, queries: list[Any]) -> None:
        """Run the queries of the audited pairs. Vectors of others stay NaN and are never read."""
        model = self.model
        asked = np.unique(np.concatenate([self.audited.forward, self.audited.reverse]))
        size, done = queries_per_batch(model, queries, self.plan.batch_size), 0
        length = lambda q: len(queries[q].token_ids)  # noqa: E731
        attention = attention_of(model)
        with untouched(model.module), torch.no_grad():
            for numbers in in_batches(model, asked.tolist(), size, length):
                batch = make_batch(model, [queries[q] for q in numbers])
                rows, columns = batch.attention_rows, batch.attention_columns
                with tap_queries(model.module, rows, attention, columns) as calls:
                    readout(model, batch)
                places = [_numbers(one) for one in (batch.rows, batch.columns)]
                weights = [_mean_weights(one) for one in (batch.is_target, batch.is_evidence)]
                for layer in {*self.layers} & {*calls}:
                    query, key, hidden = calls[layer].query, calls[layer].key, calls[layer].hidden
                    assert key is not None and hidden is not None, "the tap was asked for keys"
                    cells = (batch.is_target[:, None, :, None] & batch.is_evidence[:, None, None]).to(hidden.device)
                    vectors = [_numbers(query), _numbers(key)]
                    self._keep(layer, len(queries), numbers, vectors, places, weights)
                    self.seen[layer].hidden[numbers] = (hidden & cells).flatten(1).any(1).cpu().numpy()
                done += len(numbers)
                if callable(self.plan.progress):
                    self.plan.progress(done, len(asked))

    def _keep(
        self,
        layer: int,
        count: int,
        numbers: list[int],
        vectors: list[np.ndarray],
        places: list[np.ndarray],
        weights: list[np.ndarray],
    ) -> None:
        """Add a batch's vectors. Shapes: `vectors`: `batch head at dim`; `places`, `weights`: `batch at`."""
        query, key = vectors
        score = np.einsum("bhrd,bhcd,br,bc->bh", query, key, *weights, optimize=True)
        rotary = self.rotary.get(layer)
        if layer not in self.seen:
            heads, planes = query.shape[1], query.shape[3] // 2
            empty = lambda: np.full((count, heads, planes), np.nan, dtype=np.complex64)  # noqa: E731
            tables = (empty(), empty()) if rotary is not None else (None, None)
            beside = np.full((count, heads), np.nan), np.zeros(count, dtype=bool)
            self.seen[layer] = _Vectors(tables[0], tables[1], *beside)
        kept = self.seen[layer]
        kept.score[numbers] = score
        if rotary is None:
            return
        for table, one, place, weight in zip((kept.query, kept.key), vectors, places, weights, strict=True):
            assert table is not None, "a layer with planes keeps vectors"
            table[numbers] = np.einsum("bhap,ba->bhp", rotary.turned_back(one, place[:, None]), weight)

    def frame(self, permutations: int) -> pd.DataFrame:
        """The rows of every layer, in order."""
        parts = []
        for layer in self.layers:
            vectors, why = self.seen.get(layer), self.missing.get(layer, "")
            scores = None if vectors is None else vectors.score
            audited, left_out = self._audited_in(layer)
            if not len(audited.fact):
                why = why or (EVIDENCE_HIDDEN if EVIDENCE_HIDDEN in left_out else next(iter(left_out), ALONE))
            if why or vectors is None or vectors.query is None or vectors.key is None:
                parts.append(rows_without_planes(audited, layer, self.heads[layer], scores, why or NOT_SEEN))
                continue
            frequencies, seed = self.rotary[layer].frequencies, self.plan.seed
            options: dict[str, Any] = {"frequencies": frequencies, "permutations": permutations, "seed": seed}
            parts.append(layer_rows(audited, layer, vectors.query, vectors.key, vectors.score, **options))
        return pd.concat(parts, ignore_index=True)

    def _audited_in(self, layer: int) -> tuple[Audited, dict[str, int]]:
        """The pairs whose evidence the layer's mask shows to both queries, and how many are not audited, by reason."""
        if layer not in self.seen or not self.seen[layer].hidden.any():
            return self.audited, self.left_out
        return _audited(self.model, self.pairs, self.unseen, self.seen[layer].hidden)

    def hidden_in(self) -> dict[str, int]:
        """Layer -> how many pairs it does not show their evidence, of layers where there are any."""
        counts = {str(layer): self._audited_in(layer)[1].get(EVIDENCE_HIDDEN, 0) for layer in self.layers}
        return {layer: count for layer, count in counts.items() if count}


def _planes_of(found: list[LayerPositions | None]) -> tuple[Rotary | None, str]:
    """How a layer's keys turn, for the shortest and the longest query; or why that is not known."""
    kinds = {None if one is None else one.kind for one in found}
    first = found[0]
    if first is None or None in kinds:
        return None, NOT_SEEN
    if kinds == {STILL}:
        return None, NO_PLANES
    if kinds != {TURNS}:
        return None, next(one.reason for one in found if one is not None and one.kind != TURNS)
    rotaries = [one.rotary for one in found if one is not None and one.rotary is not None]
    if any(not np.array_equal(one.angles, rotaries[0].angles) for one in rotaries):
        return None, LENGTHS
    return rotaries[0], ""


def _audited(
    model: ProbedModel, pairs: ReversalPairs, unseen: np.ndarray, hidden: np.ndarray | None = None
) -> tuple[Audited, dict[str, int]]:
    """The pairs that are audited, and how many are not, by reason.

    Args: `unseen`, `hidden`, of each query, whether its evidence is in a later block, or behind a layer's mask.
    """
    later = unseen[pairs.forward] | unseen[pairs.reverse]
    without = reasons_without_bound(pairs, model.logit_shift)
    if model.objective == "causal":
        without = np.full(len(pairs), ONE_SIDE, dtype=object)
    bounded = (without == "") & ~later
    reason = "" if bounded.any() else _commonest(without[~later], LATER_BLOCK)
    out = np.where(later, LATER_BLOCK, without if bounded.any() else "").astype(object)
    if hidden is not None:
        out[(out == "") & (hidden[pairs.forward] | hidden[pairs.reverse])] = EVIDENCE_HIDDEN
    kept = np.flatnonzero(out == "")
    groups, facts = pairs.groups(model.logit_shift), facts_of(pairs).unit
    if facts_of(pairs).sizes["prompts"]:  # the same keys and queries, to the bit
        again = pd.Series([*zip(*shown_queries(model, pairs), strict=True)])[kept].duplicated().to_numpy()
        out[kept[again]] = SHOWN_BEFORE
        kept = kept[~again]
    strata = _strata(facts[kept], groups[kept])
    alone = np.array([Counter(strata.values())[strata[fact]] < 2 for fact in facts[kept]], dtype=bool)
    out[kept[alone]] = ALONE
    left_out = {why: int(count) for why, count in Counter(out[out != ""]).items()}
    return Audited.of(pairs, np.flatnonzero(out == ""), model.logit_shift, strata, reason), left_out


def _commonest(reasons: np.ndarray, otherwise: str) -> str:
    return str(Counter(reasons).most_common(1)[0][0]) if len(reasons) else otherwise


def _strata(facts: np.ndarray, groups: np.ndarray) -> Mapping[str, int]:
    """The stratum of each fact: facts asked at the same places (in the same groups, as often) have one."""
    asked: dict[str, list[int]] = {}
    for fact, group in zip(facts, groups, strict=True):
        asked.setdefault(str(fact), []).append(int(group))
    numbers: dict[tuple[int, ...], int] = {}
    return {fact: numbers.setdefault(tuple(sorted(some)), len(numbers)) for fact, some in asked.items()}


def _numbers(values: torch.Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


def _mean_weights(there: torch.Tensor) -> np.ndarray:
    """Weights of a mean over the tokens that are there. Shapes: `batch at -> batch at`."""
    marked = _numbers(there)
    return np.asarray(marked / marked.sum(1, keepdims=True))
