"""The tidy frame of an assumption audit: one row per layer, head, direction and plane, each NaN with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..pairs.pairs import ReversalPairs
from ..passes.prompts import facts_of
from ..statistics.by_head import head_correlations
from ..statistics.group_correlation import CONSTANT
from ..theory.key_covariance import (
    FACTS_PER_ENTRY,
    adverse_alignment,
    alignment,
    centred,
    concentration,
    correlation_over_keys,
    cross_plane,
    directions_of,
    mean_share,
    measured_bound,
    traces,
    verdict,
    worse,
)
from ..theory.score_correlation import mean_bound

SAME_KEY = "the keys are the same for every fact"
PLANE = ["frequency", "rho", "rho_low", "rho_high", "trace", "trace_low", "trace_high", "query_share"]
HEAD = ["cross_share", "cross_low", "cross_high", "null", "null_low", "null_high", "trace_spread"]
HEAD += ["query_concentration", "query_mean_share", "bound_assumed", "bound_measured", "exact", "correlation"]
HEAD += ["correlation_low", "correlation_high", "key_match", "query_match"]
VERDICTS = ("direction_verdict", "verdict", "why")
DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True)
class Audited:
    """The pairs that are audited, and the facts behind them.

    `forward`, `reverse`, `group`, `fact`, `distance`: of each pair its two queries, its group, its fact by number, and
    the tokens between readout row and evidence; `strata`: of each fact; `reason_bound`: why there is no bound.
    """

    kind: str
    forward: np.ndarray
    reverse: np.ndarray
    group: np.ndarray
    fact: np.ndarray
    distance: np.ndarray
    strata: np.ndarray
    reason_bound: str

    @classmethod
    def of(cls, pairs: ReversalPairs, kept: np.ndarray, shift: int, strata: Mapping[str, int], reason: str) -> Audited:
        """Args: `kept`, the numbers of the pairs; `strata`, of each fact by its name."""
        names, fact = np.unique(facts_of(pairs).unit[kept], return_inverse=True)
        stratum = np.array([strata[name] for name in names], dtype=np.int64)
        distance = np.abs(pairs.offsets(shift)[0][kept])
        indices = pairs.forward[kept], pairs.reverse[kept], pairs.groups(shift)[kept]
        return cls(pairs.kind, *indices, fact, distance, stratum, reason)

    @property
    def strata_count(self) -> int:
        return len(np.unique(self.strata))

    @property
    def freedom(self) -> int:
        """Facts, one less for each stratum but the first: its mean is one more that was taken off."""
        return len(self.strata) - max(self.strata_count - 1, 0)

    def by_fact(self, values: np.ndarray) -> np.ndarray:
        """The mean over each fact's pairs. Shapes: `pair ... -> fact ...`."""
        sums = np.zeros((len(self.strata), *values.shape[1:]), dtype=np.promote_types(values.dtype, np.float64))
        np.add.at(sums, self.fact, values)
        return np.asarray(sums / np.bincount(self.fact).reshape(-1, *[1] * (values.ndim - 1)))

    def over_groups(self, values: np.ndarray) -> np.ndarray:
        """The mean over groups of the mean over each one's pairs, as correlations are. Shapes: `pair ... -> ...`."""
        group = np.unique(self.group, return_inverse=True)[1].reshape(-1)
        share = 1 / np.bincount(group)[group]
        return np.asarray(np.tensordot(share / share.sum(), values, axes=1))

    def correlations(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """The measured correlation of each head, with its interval. Shapes: `query head -> head` three times."""
        count, heads = len(self.fact), scores.shape[1]
        columns: dict[str, Any] = {"pair": np.tile(np.arange(count), heads), "layer": 0}
        columns |= {"head": np.repeat(np.arange(heads), count), "fact": np.tile(self.fact.astype(str), heads)}
        columns |= {"group": np.tile(self.group, heads)}
        for side in DIRECTIONS:
            columns[f"score_{side}"] = scores[getattr(self, side)].T.reshape(-1)
        found = head_correlations(pd.DataFrame(columns)).dropna(subset=["head"]).sort_values("head")
        names = {"value": "correlation", "low": "correlation_low", "high": "correlation_high"}
        return {name: found[column].to_numpy(dtype=np.float64) for column, name in names.items()}


def layer_rows(
    audited: Audited,
    layer: int,
    query: np.ndarray,
    key: np.ndarray,
    score: np.ndarray,
    *,
    frequencies: np.ndarray,
    permutations: int,
    seed: int,
) -> pd.DataFrame:
    """The rows of a layer with planes. Shapes: `query`, `key`: `query head plane`; `score`: `query head`."""
    keys = [audited.by_fact(key[getattr(audited, side)]) for side in DIRECTIONS]
    queries = [query[getattr(audited, side)].astype(np.complex128) for side in DIRECTIONS]
    apart = [centred(one, audited.strata) for one in keys]
    varies = np.logical_and(*(_varies(one, whole) for one, whole in zip(apart, keys, strict=True)))
    matches = {"key_match": _cosine(*apart, axes=(0, 2)), "query_match": _cosine(*queries, axes=2).mean(0)}
    found = [
        _measured(audited, one, asked, frequencies, permutations, seed)
        for one, asked in zip(apart, queries, strict=True)
    ]
    verdicts = worse(*(one["direction_verdict"][:, 0] for one in found))[:, None]
    whole = {name: values[:, None] for name, values in matches.items()} | {"verdict": verdicts}
    beside = {name: values[:, None] for name, values in audited.correlations(score).items()}
    beside["reason"] = np.where(varies, "", SAME_KEY)[:, None]
    parts = []
    for side, own in zip(DIRECTIONS, found, strict=True):
        tables = {name: np.where(varies[:, None], one, _nothing(one)) for name, one in (own | whole).items()}
        parts.append(_rows(audited, layer, np.arange(len(varies)), side, len(frequencies), tables | beside))
    return pd.concat(parts, ignore_index=True)


def rows_without_planes(audited: Audited, layer: int, heads: int, score: np.ndarray | None, why: str) -> pd.DataFrame:
    """The rows of a layer that has none, one per head and direction; what was measured of its scores all the same."""
    measured = {} if score is None or not len(audited.fact) else audited.correlations(score)
    tables: dict[str, np.ndarray] = {name: values[:, None] for name, values in measured.items()}
    tables |= {"reason": np.full((1, 1), why, dtype=object)}
    parts = [_rows(audited, layer, np.arange(heads), side, None, tables) for side in DIRECTIONS]
    return pd.concat(parts, ignore_index=True)


def _varies(apart: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """In which heads keys vary by more than rounding. Shapes: `fact head plane, fact head plane -> head`."""
    spread, size = (np.sqrt(np.square(np.abs(one)).sum((0, 2))) for one in (apart, keys))
    return np.asarray(spread > CONSTANT * size)


def _measured(
    audited: Audited, keys: np.ndarray, queries: np.ndarray, frequencies: np.ndarray, permutations: int, seed: int
) -> dict[str, np.ndarray]:
    """Everything of one direction. Shapes: `fact head plane, pair head plane -> head plane` or `head 1` each."""
    cross = cross_plane(keys, frequencies, audited.strata, permutations=permutations, seed=seed)
    rho, trace = alignment(keys, audited.by_fact(directions_of(queries))), traces(keys)
    energy = np.square(np.abs(queries))
    share = (energy / energy.sum(-1, keepdims=True)).mean(0)
    per_plane = dict(zip(PLANE, (np.broadcast_to(frequencies, share.shape), *rho, *trace, share), strict=True))
    heads, head_dim = keys.shape[1], 2 * keys.shape[2]
    assumed = measured = exact = np.full(heads, np.nan)
    judged = np.full(heads, None, dtype=object), np.full(heads, "", dtype=object)
    if not audited.reason_bound:
        assumed = np.full(heads, audited.over_groups(mean_bound(frequencies, audited.distance)))
        adverse = adverse_alignment(rho[0], rho[2])
        measured = audited.over_groups(measured_bound(queries, adverse, trace[0], audited.distance, frequencies))
        exact = audited.over_groups(correlation_over_keys(keys, queries, audited.distance, frequencies))
        judged = verdict(cross, assumed, measured, audited.freedom, head_dim)
    of_head = [cross.share, cross.low, cross.high, cross.null, cross.null_low, cross.null_high, trace[0].std(-1)]
    of_head += [concentration(queries), mean_share(queries), assumed, measured, exact]
    tables = per_plane | {name: values[:, None] for name, values in zip(HEAD, of_head, strict=False)}
    tables["direction_verdict"], tables["why"] = (one[:, None] for one in judged)
    return tables


def _nothing(values: np.ndarray) -> Any:
    return np.nan if values.dtype != object else None


def _cosine(one: np.ndarray, other: np.ndarray, *, axes: int | tuple[int, ...]) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        sizes = np.square(np.abs(one)).sum(axes) * np.square(np.abs(other)).sum(axes)
        return np.asarray((np.conj(one) * other).real.sum(axes) / np.sqrt(sizes))


def _rows(
    audited: Audited, layer: int, heads: np.ndarray, side: str, planes: int | None, tables: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """One direction of a layer, head by head. Shapes: each of `tables`: `head plane`, `head 1` or `1 1`."""
    shape = len(heads), planes or 1
    wide = lambda values: np.broadcast_to(values, shape).reshape(-1)  # noqa: E731
    rows = shape[0] * shape[1]
    columns: dict[str, Any] = {"kind": pd.Categorical([audited.kind] * rows), "layer": layer}
    columns["head"] = wide(heads[:, None])
    columns["direction"] = pd.Categorical([side] * rows, categories=DIRECTIONS)
    columns["plane"] = pd.array([pd.NA] * rows if planes is None else wide(np.arange(planes)), dtype="Int64")
    columns |= {name: wide(tables.get(name, np.nan)).astype(np.float64) for name in [*PLANE, *HEAD]}
    columns |= {"facts": len(audited.strata), "pairs": len(audited.fact)}
    needed = pd.NA if planes is None else FACTS_PER_ENTRY * 2 * planes
    columns["facts_needed"] = pd.array([needed] * rows, dtype="Int64")
    reason = wide(tables["reason"]).astype(object)
    texts: dict[str, Any] = {name: wide(tables.get(name, None)).astype(object) for name in VERDICTS}
    texts |= {"why": np.where(pd.isna(texts["why"]), "", texts["why"]), "reason": reason}
    texts["reason_bound"] = np.where(reason != "", reason, audited.reason_bound)
    return pd.DataFrame(columns | {name: pd.Categorical(values) for name, values in texts.items()})
