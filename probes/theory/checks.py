"""What the formulas accept: finite numbers in a range, in shapes that fit; anything else is refused by its value."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...errors import RevprobeError

MOST = 2**26  # dimensions or draws; more would not fit in memory


def within(name: str, values: ArrayLike, low: float, high: float) -> np.ndarray:
    """As float64. Raises: RevprobeError, naming the first value outside [low, high] or not finite."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RevprobeError(f"{name} {values!r}: expected numbers") from error
    wrong = ~(np.isfinite(array) & (array >= low) & (array <= high))
    if wrong.any():
        least = f" of at least {low:g}" if np.isfinite(low) else ""
        expected = f"numbers in [{low:g}, {high:g}]" if np.isfinite(high) else f"finite numbers{least}"
        raise RevprobeError(f"{name} {float(array[wrong].flat[0])!r}: expected {expected}")
    return array


def number(name: str, value: Any, low: float, high: float = np.inf) -> float:
    """One number of `within`. Raises: RevprobeError, also for several."""
    array = within(name, value, low, high)
    if array.ndim:
        raise RevprobeError(f"{name} of shape {array.shape}: expected one number")
    return float(array)


def whole_number(name: str, value: Any, least: int, why: str) -> int:
    """An integer of at least `least`; `why` ends the sentence that refuses anything else. Raises: RevprobeError."""
    whole = not isinstance(value, bool) and isinstance(value, (int, float, np.integer, np.floating))
    if not whole or not least <= value <= MOST or value != int(value):
        raise RevprobeError(f"{name}={value!r}: expected {why}")
    return int(value)


def distances(distance: ArrayLike, name: str = "distance") -> np.ndarray:
    """Tokens, float64. Raises: RevprobeError, for one that is negative or not finite."""
    return within(name, distance, 0.0, np.inf)


def distance_pairs(forward: ArrayLike, reverse: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Forward and reverse distances of one shape. Raises: RevprobeError, when they do not broadcast."""
    f, r = distances(forward), distances(reverse)
    try:
        f, r = np.broadcast_arrays(f, r)
    except ValueError as error:
        raise RevprobeError(
            f"forward distances of shape {f.shape}, reverse of shape {r.shape}: expected one for each, or one for all"
        ) from error
    return f, r


def both_distances(forward: Any, reverse: Any) -> tuple[float, float]:
    """One forward and one reverse distance. Raises: RevprobeError, for one that is negative or not finite."""
    return number("distance_forward", forward, 0.0), number("distance_reverse", reverse, 0.0)


def plane_frequencies(frequencies: ArrayLike, planes: int | None = None) -> np.ndarray:
    """theta_k as given. Shapes: `-> plane`. Raises: RevprobeError, for another number of planes, or none."""
    theta = within("frequencies", frequencies, -np.inf, np.inf)
    if theta.ndim != 1 or not len(theta) or planes not in (None, len(theta)):
        expected = "one for each plane" if planes is None else f"one for each of the {planes} planes"
        raise RevprobeError(f"frequencies of shape {theta.shape}: expected {expected}")
    return theta
