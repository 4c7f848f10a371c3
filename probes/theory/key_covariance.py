"""Assumption 4.2 held against measured keys and queries: what it says of their covariance, and the bound without it.

A head's key at position 0 has a block in each plane that RoPE turns. Of the keys' covariance S over facts, for a given
query q, the assumption says

    no covariance across planes      S is block-diagonal
    equal traces                     tr S_k is the same in every plane
    no adverse alignment             S_k = (v_k / 2) (I + rho_k (2 u u^T - I)),  rho_k in [0, 1],  u along q_k

and the bound's mean over queries takes q ~ N(0, I). Planes are complex numbers here: with key z_k and query q_k of a
plane, |z_k|^2 is its part of the trace, cos 2 phi_k = Re(z_k^2 conj(q_k / |q_k|)^2) / |z_k|^2 its alignment, and the
score of a key D tokens on is Re sum_k z_k e^(i D theta_k) conj(q_k).

Shapes below: fact (or pair), head, plane; keys and queries are complex. Keys are deviations: their mean over the facts
that they are compared with is zero (`centred`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..statistics.intervals import COSINE, mean_intervals, student
from .score_correlation import rope_conditional_correlation

NUMBERS = ("share", "low", "high", "null", "null_low", "null_high")
HOLDS, FAILS, CANNOT_TELL = "holds", "fails", "cannot tell"
TOLERANCE = 0.05  # by how much the bound may move when measured values stand in it
ROUNDING = 1e-12  # of a share: what is left where there is one plane alone
FACTS_PER_ENTRY = 2  # of a head: with fewer, a covariance of rank n looks cross-planar under independence


def centred(keys: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Less the mean of each stratum. Shapes: `fact ..., fact -> fact ...`."""
    stratum = np.unique(strata, return_inverse=True)[1]
    sums = np.zeros((stratum.max() + 1, *keys.shape[1:]), dtype=keys.dtype)
    np.add.at(sums, stratum, keys)
    counts = np.bincount(stratum).reshape(-1, *[1] * (keys.ndim - 1))
    return np.asarray(keys - (sums / counts)[stratum])


# --- covariance across planes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossPlane:
    """The share of ||S||^2 (Frobenius) that lies between planes, in [0, 1], and its null. Shapes: `head` each.

    share, low, high: with a 95 % interval over facts (jackknife); null: mean over permutations of each plane's fact
    labels on their own; null_low, null_high: between which 95 % of them lie.
    """

    share: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray


def cross_plane(
    keys: np.ndarray, frequencies: np.ndarray, strata: np.ndarray, *, permutations: int, seed: int
) -> CrossPlane:
    """How much of the keys' covariance crosses planes, and how much does so when planes are independent.

    A sample of n facts has covariance across planes however independent these are, the more so the fewer the facts:
    so the share says nothing without the null. Planes that do not turn are one block, whatever covariance they have:
    no angle tells them apart.

    Args:
        frequencies: theta_k of each plane.
        strata: facts are exchangeable within one: they are permuted, and were centred, there.
    Shapes: `keys`: `fact head plane`.
    """
    by_head = np.ascontiguousarray(keys.transpose(1, 0, 2))
    still = np.asarray(frequencies) == 0
    whole, within = _square(_real(by_head)), _within(by_head, still)
    share = _crossing(whole, within)
    low, high = _jackknife(share, by_head, still, whole, within)
    null = _null(by_head, still, within, strata, permutations, seed)
    edges = np.percentile(null, [2.5, 97.5], axis=0) if permutations else np.full((2, len(share)), np.nan)
    return CrossPlane(share, low, high, null.mean(0) if permutations else edges[0], *edges)


def _real(planes: np.ndarray) -> np.ndarray:
    """Shapes: `... plane -> ... (plane 2)`."""
    return np.ascontiguousarray(planes).view(np.float64)


def _square(vectors: np.ndarray) -> np.ndarray:
    """||X^T X||^2, by the smaller of X^T X and X X^T. Shapes: `head fact entry -> head`."""
    turned = vectors.swapaxes(1, 2)
    product = vectors @ turned if vectors.shape[1] < vectors.shape[2] else turned @ vectors
    return np.asarray(np.square(product).sum((1, 2)))


def _within(planes: np.ndarray, still: np.ndarray) -> np.ndarray:
    """The part of ||S||^2 in the blocks. Shapes: `head fact plane -> head`."""
    turning = planes[..., ~still]
    trace, twice = np.square(np.abs(turning)).sum(1), np.square(turning).sum(1)
    blocks = ((trace**2 + np.abs(twice) ** 2) / 2).sum(-1)
    return np.asarray(blocks + _square(_real(planes[..., still]))) if still.any() else np.asarray(blocks)


def _crossing(whole: np.ndarray, within: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.clip(1 - within / whole, 0.0, 1.0)
    return np.asarray(np.where(whole > 0, np.where(share > ROUNDING, share, 0.0), np.nan))


def _jackknife(
    share: np.ndarray, planes: np.ndarray, still: np.ndarray, whole: np.ndarray, within: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A 95 % interval of the share from what it is without each fact in turn. Shapes: `head` each."""
    turning, rest = planes[..., ~still], _real(planes[..., still])
    size = np.square(np.abs(turning))
    # x^T S x and |x|^4 of each fact: whole, and block by block. Without x, ||S - x x^T||^2.
    trace, twice = size.sum(1, keepdims=True), np.square(turning).sum(1, keepdims=True)
    own = ((size * trace + (np.conj(twice) * np.square(turning)).real) / 2).sum(-1) + _onto(rest)
    fourth = np.square(size).sum(-1) + np.square(np.square(rest).sum(-1))
    everything = _real(planes)
    left = _crossing(
        whole[:, None] - 2 * _onto(everything) + np.square(np.square(everything).sum(-1)),
        within[:, None] - 2 * own + fourth,
    )
    facts = planes.shape[1]
    error = np.sqrt((facts - 1) / facts * np.square(left - left.mean(1, keepdims=True)).sum(1))
    width = student(facts - 1) * error
    return np.clip(share - width, 0.0, 1.0), np.clip(share + width, 0.0, 1.0)


def _onto(vectors: np.ndarray) -> np.ndarray:
    """x^T S x of each fact. Shapes: `head fact entry -> head fact`."""
    return np.asarray(np.square(vectors @ vectors.swapaxes(1, 2)).sum(-1))


def _null(
    planes: np.ndarray, still: np.ndarray, within: np.ndarray, strata: np.ndarray, permutations: int, seed: int
) -> np.ndarray:
    """The share when each block's facts are permuted on their own, within strata. Shapes: `-> permutation head`.

    The blocks themselves do not change, so ||S||^2 is all that has to be worked out anew.
    """
    generator, stratum = np.random.default_rng(seed), np.unique(strata, return_inverse=True)[1]
    facts, turning = planes.shape[1], int((~still).sum())
    place = np.argsort(stratum, kind="stable")
    order = np.empty((turning + 1, facts), dtype=np.int64)
    block = np.where(still, turning, np.cumsum(~still) - 1)
    found = np.empty((permutations, len(planes)))
    for draw in range(permutations):
        order[:, place] = np.argsort(generator.random(order.shape) + stratum, axis=1)
        shuffled = planes[:, order[block].T, np.arange(len(still))]
        found[draw] = _crossing(_square(_real(shuffled)), within)
    return found


# --- planes and queries ---------------------------------------------------------------------------------------------


def alignment(keys: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rho_k, with its 95 % interval over facts: sum |z_k|^2 cos 2 phi_k / sum |z_k|^2.

    Args:
        directions: of each fact's query, (q_k / |q_k|)^2, or the mean of that over its queries.
    Returns: value, low, high in [-1, 1]; NaN for a plane in which no key varies or no query lies.
    Shapes: `fact head plane, fact head plane -> head plane` three times.
    """
    along = (np.square(keys) * np.conj(directions)).real
    size = np.where(np.abs(directions) > 0, np.square(np.abs(keys)), 0.0)
    return _by_plane(along, size, COSINE)


def traces(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """v_k over its mean over planes, with its 95 % interval over facts: 1 everywhere if traces are equal.

    Shapes: `fact head plane -> head plane` three times.
    """
    size = np.square(np.abs(keys))
    planes = size.shape[-1]
    mean = np.broadcast_to(size.mean(-1, keepdims=True), size.shape)
    if planes == 1:
        one = np.ones(size.shape[1:])
        return one, one, one
    return _by_plane(size, mean, (0.0, float(planes)))


def _by_plane(
    sums: np.ndarray, counts: np.ndarray, bounds: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratios over facts with intervals. Shapes: `fact head plane, fact head plane -> head plane` three times."""
    shape = sums.shape[1:]
    # Squares of float32 numbers: what is this far below the largest is rounding.
    counts = np.where(counts > 1e-12 * counts.max(initial=0.0), counts, 0.0)
    flat = [np.where(counts > 0, part, 0.0).reshape(len(sums), -1) for part in (sums, counts)]
    with np.errstate(invalid="ignore", divide="ignore"):
        value, low, high = mean_intervals(flat[0], flat[1], bounds=bounds)
    there = flat[1].sum(0) > 0
    edges = [np.where(there, np.clip(edge, *bounds), np.nan).reshape(shape) for edge in (value, low, high)]
    return edges[0], edges[1], edges[2]


def directions_of(queries: np.ndarray) -> np.ndarray:
    """(q_k / |q_k|)^2, 0 where a query is. Shapes: `... plane -> ... plane`."""
    size = np.abs(queries)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(size > 0, np.square(queries / size), 0.0))


def concentration(queries: np.ndarray) -> np.ndarray:
    """How unevenly queries fill the planes: the mean over queries of sum_k w_k^2, over what it is for q ~ N(0, I).

    1 for isotropic queries; at least (planes + 1) / (2 planes), where all planes share alike; at most
    (planes + 1) / 2, all in one. Shapes: `query head plane -> head`.
    """
    energy = np.square(np.abs(queries))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = energy / energy.sum(-1, keepdims=True)
    return np.asarray(np.square(share).sum(-1).mean(0) * (queries.shape[-1] + 1) / 2)


def mean_share(queries: np.ndarray) -> np.ndarray:
    """|mean q|^2 / mean |q|^2: about 1/n for n independent isotropic queries, 1 if all are one vector.

    Shapes: `query head plane -> head`.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.square(np.abs(queries.mean(0))).sum(-1) / np.square(np.abs(queries)).mean(0).sum(-1))


# --- the bound and the correlation ----------------------------------------------------------------------------------


def measured_bound(
    queries: np.ndarray, adverse: np.ndarray, trace: np.ndarray, distance: np.ndarray, frequencies: ArrayLike
) -> np.ndarray:
    """The theorem's bound with measured queries and traces, and the alignment where it is worse than assumed.

    The bound is the least correlation over rho_k in [0, 1]. At equal distances the correlation never falls as a rho_k
    grows, so that least lies at 0, and where rho_k is known to be negative it lies there.
    Args:
        adverse: rho_k where it is below 0, else 0.
    Shapes: `pair head plane, head plane, head plane, pair, plane -> pair head`.
    """
    weights, apart = np.square(np.abs(queries)), np.asarray(distance, dtype=np.float64)[:, None]
    spread = np.nan_to_num(trace)
    return np.asarray(
        rope_conditional_correlation(weights, adverse, apart, apart, frequencies=frequencies, variance=spread)
    )


def adverse_alignment(rho: np.ndarray, high: np.ndarray) -> np.ndarray:
    """rho where its 95 % interval lies below 0, else 0.

    Chance alone makes every second rho negative, by some 1/sqrt(facts): taken as they are, these would lower the bound
    of keys that have no alignment at all. Shapes: `head plane, head plane -> head plane`.
    """
    return np.asarray(np.where(high < 0, rho, 0.0))


def correlation_over_keys(
    keys: np.ndarray, queries: np.ndarray, distance: np.ndarray, frequencies: np.ndarray
) -> np.ndarray:
    """q^T R_D S R_D q over the root of its two variances: the correlation itself, cross-plane covariance included.

    For each query, over all keys, the evidence D tokens on and D tokens back. Shapes: `fact head plane,
    pair head plane, pair, plane -> pair head`; NaN where a score does not vary.
    """
    turn = np.exp(1j * np.asarray(distance, dtype=np.float64)[:, None, None] * frequencies)
    by_head = keys.transpose(1, 2, 0)
    ahead, behind = (
        (np.conj(queries) * one).transpose(1, 0, 2) @ by_head  # head pair fact
        for one in (turn, np.conj(turn))
    )
    forward, reverse = ahead.real, behind.real
    both, own, other = (forward * reverse).sum(-1), np.square(forward).sum(-1), np.square(reverse).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.clip(both / np.sqrt(own * other), -1.0, 1.0).T)


def verdict(
    cross: CrossPlane, assumed: np.ndarray, measured: np.ndarray, facts: int, head_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the measurement says of the assumption in each head, and why where it fails. Shapes: `head -> head, head`.

    Args:
        assumed, measured: the bound with the values that are assumed, and with those that were measured.
        facts: those of the covariance; below 2 x head_dim nothing can be told.
    """
    moved = np.asarray(measured - assumed)
    above, below = cross.share > cross.null_high, cross.share < cross.null_low
    moves = ~(np.abs(moved) <= TOLERANCE)
    outside = np.select(
        [above, below], ["cross-plane covariance above the null", "cross-plane covariance below the null"], ""
    )
    words = np.array([f"the bound moves by {by:+.3f}" if move else "" for by, move in zip(moved, moves, strict=True)])
    why = np.array(["; ".join(filter(None, both)) for both in zip(outside, words, strict=True)], dtype=object)
    if facts < FACTS_PER_ENTRY * head_dim:
        few = f"{facts} facts: expected at least {FACTS_PER_ENTRY} x head dimension {head_dim}"
        return np.full(len(moved), CANNOT_TELL, dtype=object), np.full(len(moved), few, dtype=object)
    return np.where(why == "", HOLDS, FAILS).astype(object), why


def worse(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A head's verdict from those of its two directions; none where one has none. Shapes: `head, head -> head`."""
    order = [None, CANNOT_TELL, FAILS, HOLDS]
    worst = [order[min(order.index(each) for each in both)] for both in zip(one, other, strict=True)]
    return np.array(worst, dtype=object)
