"""No number without an interval goes without a reason: value, control and excess alike."""

import numpy as np
import pytest

from revprobe.probes.statistics.coverage import ONE_FACT, SAME_FOR_ALL
from revprobe.probes.statistics.estimators import Measured, with_control

FACTS = np.repeat(np.arange(20), 2).astype(str)


def lacking(found: Measured) -> dict[str, int]:
    """Which numbers have no interval, by their edges alone, with the pairs behind each."""
    assert found.control is not None and found.excess is not None
    edges = {"value": (found.estimate.low, found.estimate.n), "control": (found.control.interval[0], found.control.n)}
    edges["excess"] = found.excess.low, found.excess.n
    return {name: n for name, (low, n) in edges.items() if np.isnan(low)}


def test_a_control_that_is_the_same_for_every_fact_says_so() -> None:
    values = np.random.default_rng(0).normal(size=40)
    found = with_control(values, np.zeros(40), FACTS, {}, "x")
    assert lacking(found) == {"control": 40} and found.undefined == {f"{SAME_FOR_ALL} (control)": 40}


def test_a_control_of_one_fact_says_so_beside_the_excess_over_it() -> None:
    draw = np.random.default_rng(0)
    null = np.full(40, np.nan)
    null[:2] = 0.3, 0.4
    found = with_control(draw.random(40), null, FACTS, {}, "x", bounds=(0.0, 1.0), alone=np.zeros(40, dtype=bool))
    assert lacking(found) == {"control": 2, "excess": 2}
    assert found.undefined == {ONE_FACT: 2, f"{ONE_FACT} (control)": 2}


@pytest.mark.parametrize("null", [0.5, 0.25])
def test_what_is_said_of_the_value_is_not_said_again_of_its_control(null: float) -> None:
    found = with_control(np.full(40, 0.5), np.full(40, null), FACTS, {}, "x")
    assert lacking(found) == {"value": 40, "control": 40, "excess": 40} and found.undefined == {SAME_FOR_ALL: 40}
