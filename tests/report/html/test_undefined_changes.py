"""A change without an interval or a control says so, and prints no "+nan"."""

import math

from revprobe.report.html.finetune_sections import _change


def test_a_change_prints_what_it_has() -> None:
    row = {"o": 0.1, "o_low": math.nan, "o_high": math.nan, "o_control": math.nan, "reason": ""}
    assert _change(row, "o") == "+1.00e-01 (no interval)"
    assert _change(row | {"o_control": 0.02}, "o") == "+1.00e-01 (no interval) (control +2.00e-02)"
    known = row | {"o_low": 0.05, "o_high": 0.15, "o_control": 0.02}
    assert _change(known, "o") == "+1.00e-01 [+5.00e-02, +1.50e-01] (control +2.00e-02)"
    assert _change(row | {"o": math.nan, "reason": "one fact"}, "o") == "one fact"
