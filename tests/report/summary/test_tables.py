"""The last checkpoints as text: every measure's own sample is told, not the largest of them."""

import numpy as np
import pandas as pd
import pytest

from revprobe.finetune.runs.record import NUMBERS, SERIES
from revprobe.report.summary.tables import MEASURES, final_table, format_final_table, raw_with_ema

ANSWERS = ("forward_accuracy", "reverse_accuracy", "forward_probability", "reverse_probability")


def summary(attention: tuple[int, int] | None, gradient: tuple[int, int] | None, weights: str = "raw") -> pd.DataFrame:
    """One checkpoint whose probes have so many pairs and facts; answers have 702 and 26."""
    sizes = dict.fromkeys(ANSWERS, (702, 26)) | {"attention_correlation": attention, "gradient_cosine": gradient}
    about = {"run": "r", "step": 100, "weights": weights, "kind": "same_target"}
    rows = []
    for measure, size in sizes.items():
        if size is not None:
            number = dict.fromkeys(NUMBERS, np.nan) | {"value": 0.5, "low": 0.4, "high": 0.6, "control": 0.0}
            number |= {"n": size[0], "facts": size[1]}
            rows.append(dict.fromkeys(SERIES) | about | {"measure": measure, "reason": ""} | number)
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("attention", "gradient", "pairs", "facts"),
    [
        ((40, 5), (60, 9), "702 / 40 / 60", "26 / 5 / 9"),
        ((702, 26), (702, 26), "702", "26"),
        ((702, 26), (702, 9), "702", "26 / 26 / 9"),
        ((40, 5), None, "702 / 40 / -", "26 / 5 / -"),
    ],
)
def test_facts_are_told_of_each_probe_as_pairs_are(
    attention: tuple[int, int], gradient: tuple[int, int] | None, pairs: str, facts: str
) -> None:
    """The most facts of any measure said 26 where a correlation had 5."""
    shown = format_final_table(final_table(summary(attention, gradient)))
    assert shown[["n pairs", "n facts"]].iloc[0].tolist() == [pairs, facts]
    assert shown[MEASURES["gradient_cosine"]][0] == ("-" if gradient is None else "0.50 [0.40, 0.60] (control 0.00)")


def test_weights_of_other_facts_keep_both_samples_in_their_one_row() -> None:
    both = pd.concat([summary((40, 5), (60, 9)), summary((40, 6), (60, 9), weights="ema")], ignore_index=True)
    (row,) = raw_with_ema(format_final_table(final_table(both))).to_dict("records")
    assert row["n facts"] == "26 / 6 / 9\nraw 26 / 5 / 9" and row["n pairs"] == "702 / 40 / 60"
