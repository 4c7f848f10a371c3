"""What the theory says about the correlation of forward and reverse attention scores, as numbers.

A forward query sees the evidence D_f tokens to its right, a reverse query sees it D_r tokens to its left, and RoPE
turns plane k of the key by theta_k for each token between them. For a query q with the share w_k = |q_k|^2 / |q|^2 in
plane k, and keys whose blocks are independent across planes, of equal variance, and aligned with q by rho_k in [0, 1]:

    rope_conditional_correlation   the correlation itself, for given w, rho and distances           App. A.3, B.3
    rope_query_bound               its lower bound at equal distances, for a given q                App. A.3
    rope_correlation_bound         the mean of that bound over q ~ N(0, I)                          Thm. 4.3
    rope_limit_bound               the same for a head dimension that grows without end             App. B.1
    rope_correlation_tail          how often, over q, the bound exceeds a threshold                 App. B.2
    rope_asymmetric_bound          distances that differ: the worst admissible rho                  App. B.3
    alibi_correlation              ALiBi: exactly 1                                                 Prop. 4.5

The mean is a bound on the mean only: at rho = 0 about half of all queries lie below it. Nothing here needs training;
it holds at initialisation too.

Shapes below: plane (the d / 2 planes of a head), draw (random queries), and `...` for any leading shape; distances are
tokens, as a number or an array, and every result has their shape. All of it is float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import sici

from ...arguments import checked
from ...errors import RevprobeError
from .checks import distance_pairs, distances, number, plane_frequencies, whole_number, within

BASE = 10_000.0  # Su et al. 2024, and the paper's


def rope_frequencies(d: int | float, base: float = BASE) -> np.ndarray:
    """theta_k = base^(-2k/d), the angle in radians by which one token turns plane k. Shapes: `-> plane`.

    Raises: RevprobeError, when d is not even and positive or base not positive.
    """
    expected = "an even number of at least 2, two for each plane"
    size = whole_number("head dimension d", d, 2, expected)
    if size % 2:
        raise RevprobeError(f"head dimension d={d!r}: expected {expected}")
    if not number("base", base, 0.0) > 0:
        raise RevprobeError(f"base={base!r}: expected a positive number; RoPE's own is {BASE:.0f}")
    return float(base) ** (-np.arange(0, size, 2) / size)


@checked
def rope_correlation_bound(d: int | float, distance: ArrayLike, base: float = BASE) -> Any:
    """The least mean, over queries, of the correlation of forward and reverse score at equal distances.

    (2/d) sum_k cos(2 D theta_k). A bound on the mean: see `rope_query_bound` for a given query.
    Shapes: `... -> ...`.
    Args:
        d: head dimension.
        distance: D, the tokens between readout row and evidence, on either side.
        base: of the frequencies.
    Raises: RevprobeError, for an odd d, a base that is not positive or a negative distance.
    Source: paper Thm. 4.3, Table 3.
    """
    return mean_bound(rope_frequencies(d, base), distance)


def mean_bound(frequencies: ArrayLike, distance: ArrayLike) -> Any:
    """`rope_correlation_bound` for given theta_k; a plane that does not turn has theta_k = 0.

    Shapes: `plane, ... -> ...`.
    """
    return _turned_back(distance, plane_frequencies(frequencies)).mean(-1)[()]


@checked
def rope_query_bound(
    weights: ArrayLike, distance: ArrayLike, base: float = BASE, *, frequencies: ArrayLike | None = None
) -> Any:
    """The least correlation of forward and reverse score at equal distances, given the query.

    sum_k w_k cos(2 D theta_k). Shapes: `weights`: `... plane`; `distance`: `...`, broadcast over the leading shape of
    `weights`, whose shape the result has.
    Args:
        weights: |q_k|^2 of each plane, or w_k: any scale. Rotation keeps it, so q may be taken after RoPE.
        frequencies: theta_k of each plane, `plane`, where a model's own differ from base^(-2k/d).
    Returns: the bound; NaN for a query that is zero.
    Raises: RevprobeError, for a negative weight or distance, or frequencies of another number of planes.
    Source: paper App. A.3.
    """
    share = _shares(weights)
    turned = _turned_back(distance, _frequencies(share.shape[-1], base, frequencies))
    return (share * turned).sum(-1)[()]


@checked
def rope_conditional_correlation(
    weights: ArrayLike,
    alignment: ArrayLike,
    distance_forward: ArrayLike,
    distance_reverse: ArrayLike,
    base: float = BASE,
    *,
    frequencies: ArrayLike | None = None,
    variance: ArrayLike = 1.0,
) -> Any:
    """The correlation of forward and reverse score over keys, given the query: no bound, the number itself.

    The key block of plane k has the covariance (v_k / 2) (I + rho_k (2 u u^T - I)), u the direction of q_k: v_k is its
    variance, rho_k how far it lies along the query. Then, with A_k = cos((D_f + D_r) theta_k) and
    B_k = cos((D_f - D_r) theta_k), and weights w_k v_k for w_k,

        sum w_k (A_k + rho_k B_k) / sqrt(sum w_k (1 + rho_k cos 2 D_f theta_k) sum w_k (1 + rho_k cos 2 D_r theta_k))

    Shapes: `weights`, `alignment`, `variance`: `... plane`; distances `...`, broadcast over the leading shape.
    Args:
        weights: |q_k|^2 of each plane, any scale.
        alignment: rho_k in [-1, 1]. The theorem's assumption is rho_k in [0, 1] and equal variances; outside of it
            this number is still exact, and `rope_query_bound` need not hold.
        variance: v_k, any scale.
        frequencies: theta_k of each plane, where a model's own differ from base^(-2k/d).
    Returns: the correlation; NaN where one of the scores does not vary.
    Raises: RevprobeError, for an alignment outside [-1, 1], a negative weight, variance or distance.
    Source: paper App. A.3 and B.3.
    """
    rho = within("alignment", alignment, -1.0, 1.0)
    size, spread = within("weights", weights, 0.0, np.inf), within("variance", variance, 0.0, np.inf)
    try:
        np.broadcast_shapes(rho.shape, size.shape, spread.shape)
    except ValueError as error:
        shapes = f"weights {size.shape}, alignment {rho.shape}, variance {spread.shape}"
        raise RevprobeError(f"{shapes}: expected shapes `... plane` that broadcast together") from error
    weights = size * spread
    share = _shares(weights)
    theta = _frequencies(share.shape[-1], base, frequencies)
    far, near, ahead, behind = _asymmetric_cosines(distance_forward, distance_reverse, theta)
    covariance = (share * (far + rho * near)).sum(-1)
    variances = [(share * (1.0 + rho * cosine)).sum(-1) for cosine in (ahead, behind)]
    return _correlation(covariance, *variances)[()]


@checked
def rope_limit_bound(distance: ArrayLike, base: float = BASE) -> Any:
    """`rope_correlation_bound` for d to infinity: (Ci(2D) - Ci(2D / base)) / ln(base), the integral of cos(2D base^-x)
    over x in [0, 1]. Shapes: `... -> ...`; 1 at distance 0.

    Raises: RevprobeError, for a negative distance or a base of at most 1, where no integral stands behind it.
    Source: paper App. B.1.
    """
    if not number("base", base, 0.0) > 1:
        raise RevprobeError(f"base={base!r}: the limiting integral needs a base above 1; RoPE's own is {BASE:.0f}")
    twice = 2.0 * distances(distance)
    with np.errstate(invalid="ignore", divide="ignore"):
        integral = (sici(twice)[1] - sici(twice / base)[1]) / np.log(base)
    return np.where(twice == 0, 1.0, integral)[()]


@checked
def rope_correlation_tail(d: int | float, distance: ArrayLike, tau: ArrayLike, base: float = BASE) -> Any:
    """At least how large a share of queries q ~ N(0, I) has a correlation of at least tau, at equal distances.

    w is Dirichlet(1, ..., 1) over the n = d / 2 planes, so the q-specific bound has mean mu = mean(c) and variance
    s2 = sum_k (c_k - mu)^2 / (n (n + 1)), c_k = cos(2 D theta_k). By Cantelli's inequality the share is at least
    (mu - tau)^2 / ((mu - tau)^2 + s2).

    Shapes: `distance`: `...`, `tau`: broadcast with it.
    Returns: a probability; NaN where tau is not below mu, about which the inequality says nothing.
    Raises: RevprobeError, as `rope_correlation_bound` does.
    Source: paper App. B.2, Table 4.
    """
    return tail_bound(rope_frequencies(d, base), distance, tau)


def tail_bound(frequencies: ArrayLike, distance: ArrayLike, tau: ArrayLike) -> Any:
    """`rope_correlation_tail` for given theta_k. Shapes: `plane, ..., ... -> ...`."""
    cosines = _turned_back(distance, plane_frequencies(frequencies))
    planes = cosines.shape[-1]
    mean = cosines.mean(-1)
    spread = np.square(cosines - mean[..., None]).sum(-1) / (planes * (planes + 1))
    gap = mean - within("tau", tau, -np.inf, np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(gap > 0, np.square(gap) / (np.square(gap) + spread), np.nan)[()]


@checked
def rope_asymmetric_bound(
    d: int | float,
    distance_forward: ArrayLike,
    distance_reverse: ArrayLike,
    base: float = BASE,
    samples: int | float = 4_000,
    seed: int = 0,
    *,
    frequencies: ArrayLike | None = None,
) -> pd.DataFrame:
    """The worst admissible alignment at distances that may differ, averaged over random queries.

    The surrogate sum w_k (A_k + rho_k B_k) / sum w_k (1 + rho_k A_k B_k) replaces the denominator of the correlation by
    its arithmetic mean. It is at least gamma when sum w_k (A_k - gamma + rho_k B_k (1 - gamma A_k)) >= 0, and
    1 - gamma A_k > 0, so its minimum over rho in [0, 1] lies at rho_k = 1 where B_k < 0 and 0 elsewhere, for every w:
    no iteration is needed. It is below the correlation only where it is not negative, so the exact correlation at
    that rho stands beside it.

    Args:
        samples, seed: random queries q ~ N(0, I).
        frequencies: theta_k of each plane, `plane`, where a model's own differ from base^(-2k/d).
    Returns: one row per pair of distances (broadcast and flattened): distance_forward, distance_reverse, bound (mean
        surrogate over draws of w), bound_error (its standard error), exact (mean correlation at that rho),
        exact_error, negative (share of draws whose surrogate is negative), samples, seed. The same draws serve every
        pair of distances.
    Raises: RevprobeError, for an odd d, a negative distance, distances that do not broadcast, frequencies of another
        number of planes, or fewer than 2 samples.
    Source: paper App. B.3, Table 5.
    """
    samples = whole_number("samples", samples, 2, "at least 2 random queries, a whole number, for a mean and its error")
    own = rope_frequencies(d, base)
    theta = own if frequencies is None else plane_frequencies(frequencies, len(own))
    forward, reverse = (part.ravel() for part in distance_pairs(distance_forward, distance_reverse))
    far, near, ahead, behind = (part.T for part in _asymmetric_cosines(forward, reverse, theta))
    worst = (near < 0).astype(np.float64)
    # |q_k|^2 of q ~ N(0, I) is exponential, and everything below is free of its scale: Dirichlet needs no division.
    energy = np.random.default_rng(seed).exponential(size=(samples, len(theta)))
    covariance = energy @ (far + worst * near)
    surrogate = covariance / (energy @ (1.0 + worst * far * near))
    exact = _correlation(covariance, energy @ (1.0 + worst * ahead), energy @ (1.0 + worst * behind))
    columns = {"distance_forward": forward, "distance_reverse": reverse}
    columns |= {"bound": surrogate.mean(0), "bound_error": surrogate.std(0, ddof=1) / np.sqrt(samples)}
    columns |= {"exact": exact.mean(0), "exact_error": exact.std(0, ddof=1) / np.sqrt(samples)}
    return pd.DataFrame(columns | {"negative": (surrogate < 0).mean(0), "samples": samples, "seed": seed})


@checked
def alibi_correlation(distance_forward: ArrayLike, distance_reverse: ArrayLike | None = None) -> Any:
    """Exactly 1: ALiBi's two scores are q^T k / sqrt(d) minus constants, so keys move both alike.

    True of every encoding that adds a bias to the score and leaves queries and keys alone, whatever the distances, as
    long as the content score varies. Shapes: `..., ... -> ...`.
    Raises: RevprobeError, for a negative distance.
    Source: paper Prop. 4.5.
    """
    forward, _ = distance_pairs(distance_forward, distance_forward if distance_reverse is None else distance_reverse)
    return np.ones(forward.shape)[()]


def _turned_back(distance: ArrayLike, theta: np.ndarray) -> np.ndarray:
    """cos(2 D theta_k). Shapes: `... -> ... plane`."""
    return np.cos(2.0 * distances(distance)[..., None] * theta)


def _asymmetric_cosines(forward: ArrayLike, reverse: ArrayLike, theta: np.ndarray) -> tuple[np.ndarray, ...]:
    """A_k, B_k, cos(2 D_f theta_k) and cos(2 D_r theta_k). Shapes: `..., ... -> ... plane` each."""
    f, r = (tokens[..., None] for tokens in distance_pairs(forward, reverse))
    return tuple(np.cos(tokens * theta) for tokens in (f + r, f - r, 2.0 * f, 2.0 * r))


def _correlation(covariance: np.ndarray, forward: np.ndarray, reverse: np.ndarray) -> np.ndarray:
    """Covariance over the root of two variances; NaN where one of them is nothing but rounding."""
    tiny = 64 * np.finfo(np.float64).eps
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.clip(covariance / np.sqrt(forward * reverse), -1.0, 1.0)
    return np.where((forward > tiny) & (reverse > tiny), ratio, np.nan)


def _frequencies(planes: int, base: float, given: ArrayLike | None) -> np.ndarray:
    if given is None:
        return rope_frequencies(2 * planes, base)
    return plane_frequencies(given, planes)


def _shares(weights: ArrayLike) -> np.ndarray:
    """Weights that sum to 1 over planes; NaN where they are all zero."""
    values = within("weights", weights, 0.0, np.inf)
    if not values.ndim:
        raise RevprobeError(f"weights={weights!r}: expected one for each plane")
    with np.errstate(invalid="ignore", divide="ignore"):
        return values / values.sum(-1, keepdims=True)
