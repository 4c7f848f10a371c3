"""What the terminal prints of finished runs."""

import io

import numpy as np
import pandas as pd
from rich.console import Console

from revprobe.report.summary.tables import NUMBERS, SERIES
from revprobe.report.summary.terminal import print_final


def test_a_number_that_is_missing_at_the_end_says_why() -> None:
    """Earlier checkpoints had one; what they lacked is not said of the last."""
    about = dict.fromkeys(SERIES, "") | {"run": "sdar", "weights": "raw", "kind": "same_target", "caution": ""}
    row = about | dict.fromkeys(NUMBERS, 0.5) | {"n": 16, "facts": 16}
    lost = row | dict.fromkeys(NUMBERS, np.nan) | {"n": 0, "facts": 0}
    summary = pd.DataFrame(
        [
            lost | {"step": 0, "measure": "gradient_cosine", "reason": "16 gradient below the rounding floor"},
            lost | {"step": 9, "measure": "gradient_cosine", "reason": "16 evidence in a later block"},
            lost | {"step": 9, "measure": "attention_correlation", "reason": "16 evidence in a later block"},
            row | {"step": 9, "measure": "reverse_probability", "reason": ""},
        ]
    )
    console = Console(file=io.StringIO(), width=200)
    print_final(summary, console)
    said = console.file.getvalue()
    assert "attention correlation, gradient cosine: 16 evidence in a later block" in said
    assert "rounding floor" not in said
    print_final(summary.drop(columns=["reason", "caution"]), console)  # files of earlier statistics
