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
        made[f"{measure}_reason"] = ""
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
    (text,) = told(row("rope", **gone, attention_correlation_reason="26 × constant scores"))
    assert (
        "attention correlation undefined (26 × constant scores);" in text
        and "gradient cosine" not in text
        and "nan" not in text
    )
    assert "2,106 pairs of 26 facts / 0 pairs of 0 facts" in text
    assert told(row("empty")) == ["empty at step 500: no reading."] and told() == []


def test_a_value_without_an_interval_says_over_how_few_facts() -> None:
    """None at all, or one of no width, which would claim certainty."""
    for ends in ((math.nan, math.nan), (1.0, 1.0)):
        (text,) = told(row("rope", forward_accuracy=(1.0, *ends, 0.04, 3, 1)))
        assert "forward accuracy 100.0 % (no interval: 1 fact) (control 4.0);" in text, text


def test_a_run_speaks_once_for_each_kind_of_pairs() -> None:
    """The averaged weights where there are some, as in the figures; kinds of pairs are other questions."""
    again = row("rope", weights="ema", **MEASURED | {"reverse_accuracy": (0.5, 0.4, 0.6, 0.0, 2106, 26)})
    (text,) = told(row("rope", **MEASURED), again)
    assert text.startswith("rope at step 500 (average of the weights): ") and "50.0 % [40.0, 60.0]" in text
    other = row("rope", kind="swapped", **MEASURED)
    first, second = told(row("rope", **MEASURED), other)
    assert first.startswith("rope, pairs same_target at") and second.startswith("rope, pairs swapped at")


def test_many_runs_are_told_as_ranges_with_their_intervals() -> None:
    rows = [
        row(f"run-{place}", **MEASURED | {"reverse_accuracy": (place / 10, place / 20, 0.5, place / 100, 10, 5)})
        for place in range(FEW)
    ]
    rows[1]["forward_accuracy_low"] = 0.9
    undefined = MEASURED | {"reverse_accuracy": (math.nan, math.nan, math.nan, math.nan, 0, 0)}
    (text,) = told(*rows, row("last", **undefined, reverse_accuracy_reason="26 × masked out"))
    assert text == (
        f"{FEW + 1} runs at their last checkpoints: forward accuracy 100.0 % [90.0, 100.0] in all (control 4.0 %); "
        "reverse accuracy 0.0 % [0.0, 50.0] (run-0) to 20.0 % [10.0, 50.0] (run-2) (controls 0.0 to 2.0 %), undefined "
        "in 1 (26 × masked out); attention correlation 0.53 [0.41, 0.62] in all (control 0.02); n = 0 to 2,106 pairs "
        "of 0 to 26 facts."
    )
