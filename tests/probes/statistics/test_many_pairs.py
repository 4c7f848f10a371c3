"""What the statistics of many pairs take of memory, a pair."""

import tracemalloc

import numpy as np
import pytest

from revprobe.probes.statistics import resampling
from revprobe.probes.statistics.group_correlation import group_correlation


def scores(pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    forward = generator.normal(size=(pairs, 2))
    reverse = forward + generator.normal(size=(pairs, 2))
    return forward, reverse, np.arange(pairs), np.arange(pairs) % 3


def test_shuffles_of_many_pairs_are_not_held() -> None:
    """Held, they are 800 bytes a pair and twice that while they are put together: most of a long probe's memory."""
    pairs = resampling._KEPT + 1
    given = scores(pairs)
    tracemalloc.start()
    try:
        found = group_correlation(*given)
        left, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.null) == resampling.SHUFFLES
    assert most < 1000 * pairs and left < 50 * pairs, f"{most / pairs:.0f} bytes a pair, {left / pairs:.0f} afterwards"


@pytest.mark.parametrize("alone", [False, True])
def test_drawn_one_by_one_they_are_the_same(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in groups that are shuffled whole and in those with a fact that has no other."""
    forward, reverse, facts, groups = scores(60)
    groups = np.where(np.arange(60) == 7, 9, groups) if alone else groups
    held = group_correlation(forward, reverse, facts, groups)
    monkeypatch.setattr(resampling, "_KEPT", 0)
    drawn = group_correlation(forward, reverse, facts, groups)
    np.testing.assert_array_equal(drawn.null, held.null)
    assert len(held.null) >= resampling.SHUFFLES and (drawn.value, drawn.low) == (held.value, held.low)
