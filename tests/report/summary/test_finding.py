"""The paragraph that a report opens on: each number in it is one of the table, with what it came with."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from revprobe.report.summary.finding import FEW, finding
from revprobe.report.summary.tables import MEASURES


def row(name: str, **values: Any) -> dict[str, Any]:
    """A row of `final_table` with nothing measured but what is given, as (value, low, high, control, n, facts)."""
    made: dict[str, Any] = {"run": name, "step": 500, "weights": "raw", "kind": "same_target"}
    for measure in MEASURES:
        numbers = values.get(measure, (math.nan,) * 4 + (None, None))
        made |= dict(
            zip([measure + end for end in ("", "_low", "_high", "_control", "_n", "_facts")], numbers, strict=True)
        )
    return made | {key: value for key, value in values.items() if key not in MEASURES}


def told(*rows: dict[str, Any]) -> list[str]:
    return finding(pd.DataFrame(list(rows)))


MEASURED = {
    "forward_accuracy": (1.0, 0.96, 1.0, 0.04, 2106, 26),
    "reverse_accuracy": (0.13, 0.09, 0.17, 0.0, 2106, 26),
    "attention_correlation": (0.525, 0.41, 0.62, 0.021, 2106, 26),
}


def test_one_run_is_told_with_interval_control_and_n() -> None:
    assert told(row("rope", **MEASURED)) == [
        "rope at step 500: forward accuracy 100.0 % [96.0, 100.0] (control 4.0); reverse accuracy 13.0 % [9.0, 17.0] "
        "(control 0.0); attention correlation 0.53 [0.41, 0.62] (control 0.02); n = 2,106 pairs of 26 facts."
    ]


def test_what_is_undefined_or_not_measured_is_no_number() -> None:
    gone = MEASURED | {"attention_correlation": (math.nan, math.nan, math.nan, math.nan, 0, 0)}
    (text,) = told(row("rope", **gone))
    assert "attention correlation undefined" in text and "gradient cosine" not in text and "nan" not in text
    assert "2,106 pairs of 26 facts / 0 pairs of 0 facts" in text
    assert told(row("empty")) == ["empty at step 500: no reading."] and told() == []


def test_a_run_speaks_once_for_each_kind_of_pairs() -> None:
    """Averaged weights stand in the table below; kinds of pairs are other questions."""
    again = row("rope", weights="ema", **MEASURED)
    assert len(told(row("rope", **MEASURED), again)) == 1
    other = row("rope", kind="swapped", **MEASURED)
    first, second = told(row("rope", **MEASURED), other)
    assert first.startswith("rope, pairs same_target at") and second.startswith("rope, pairs swapped at")


def test_many_runs_are_told_as_ranges_with_their_runs() -> None:
    rows = [
        row(f"run-{place}", **MEASURED | {"reverse_accuracy": (place / 10, 0, 1, 0.0, 10, 5)}) for place in range(FEW)
    ]
    undefined = MEASURED | {"reverse_accuracy": (math.nan, math.nan, math.nan, math.nan, 0, 0)}
    (text,) = told(*rows, row("last", **undefined))
    assert text == (
        f"{FEW + 1} runs at their last checkpoints: forward accuracy 100 % in all; "
        "reverse accuracy 0 % (run-0) to 20 % (run-2), undefined in 1; attention correlation 0.53 in all."
    )
