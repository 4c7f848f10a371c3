"""The last checkpoint of each run, as a table of numbers and as text.

Raw and EMA weights, and the two kinds of pairs, keep rows of their own in both; a page puts the two weights in one row.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from ...errors import RevprobeError
from ...finetune.runs.record import NUMBERS, SERIES
from ...probes.figures.theme import interval_text

MEASURES = {
    "forward_accuracy": "forward accuracy (%)",
    "reverse_accuracy": "reverse accuracy (%)",
    "forward_probability": "forward probability",
    "reverse_probability": "reverse probability",
    "attention_correlation": "attention correlation",
    "gradient_cosine": "gradient cosine",
}
# Each probe may have pairs of its own; the four measures of the answer share theirs.
COUNTED = ("reverse_probability", "attention_correlation", "gradient_cosine")
PAIRS, FACTS = "n pairs", "n facts"


def last_checkpoints(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of each run's last checkpoint."""
    return summary[summary["step"].fillna(-1) == summary.groupby("run")["step"].transform("max").fillna(-1)]


def final_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint of each run: one row per run, weights and kind of pairs.

    Returns: the columns of SERIES, then for each measure (fractions, cosines and correlations, as in `summary.csv`)
        `<measure>`, `<measure>_low`, `<measure>_high`, `<measure>_control`, `<measure>_n`, `<measure>_facts`; NaN
        where it was not measured (its n is missing) or is undefined; and `<measure>_reason`, why points are, counted.
        `format_final_table` makes text of it.
    Raises: RevprobeError, when a measure stands twice at one checkpoint.
    """
    last = last_checkpoints(summary)
    twice = last[last.duplicated([*SERIES, "measure"])]
    if len(twice):
        row = twice.iloc[0]
        raise RevprobeError(
            f"{row['measure']} of run {row['run']!r} stands twice at step {row['step']}: expected one reading per "
            "probe, weights and kind; give runs different names and probe each checkpoint with one set of pairs"
        )
    rows = []
    for _, part in last.groupby(SERIES, sort=False, dropna=False):
        final: dict[str, Any] = {name: part[name].iloc[0] for name in SERIES}
        for about in part.to_dict("records"):
            final[f"{about['measure']}_reason"] = "" if pd.isna(about.get("reason")) else about["reason"]
        for measure, *numbers in part[["measure", *NUMBERS]].itertuples(index=False):
            known = [math.nan if pd.isna(number) else number for number in numbers]
            final |= dict(zip(_columns(measure), known, strict=True))
        rows.append(final)
    return pd.DataFrame(
        rows, columns=[*SERIES, *(name for measure in MEASURES for name in [*_columns(measure), f"{measure}_reason"])]
    )


def _columns(measure: str) -> list[str]:
    return [measure if number == "value" else f"{measure}_{number}" for number in NUMBERS]


def format_final_table(table: pd.DataFrame) -> pd.DataFrame:
    """`final_table` as text for people: `0.53 [0.41, 0.62] (control 0.02)`, accuracies in per cent.

    "undefined" is a value that could not be computed, "-" one that was not measured. n pairs is one number where the
    probes share their pairs, else those of answer / attention / gradient; so is n facts.
    """
    rows = []
    for row in table.to_dict("records"):
        shown = {"run": str(row["run"]), "step": _count(row["step"])}
        shown |= {name: "-" if pd.isna(row[name]) else str(row[name]) for name in ("weights", "kind")}
        for measure, title in MEASURES.items():
            shown[title] = "-"
            if not pd.isna(row[f"{measure}_n"]):
                value, low, high, control = (
                    float(row[f"{measure}{part}"]) for part in ("", "_low", "_high", "_control")
                )
                shown[title] = interval_text(value, low, high, control, percent=measure.endswith("accuracy"))
        rows.append(shown | {title: _by_probe(row, number) for title, number in ((FACTS, "facts"), (PAIRS, "n"))})
    return pd.DataFrame(rows, columns=["run", "step", "weights", "kind", *MEASURES.values(), FACTS, PAIRS])


def raw_with_ema(shown: pd.DataFrame) -> pd.DataFrame:
    """The text of `format_final_table` with a run's two kinds of weights in one row, raw ones on lines of their own.

    A row without a fellow of the same run, step and kind of pairs stays as it is.
    """
    rows = []
    for _, part in shown.groupby(["run", "step", "kind"], sort=False):
        by_weights = {row["weights"]: row for row in part.to_dict("records")}
        if set(by_weights) != {"ema", "raw"}:
            rows += part.to_dict("records")
            continue
        ema, raw = by_weights["ema"], by_weights["raw"]
        both = {title: f"{ema[title]}\nraw {raw[title]}" for title in MEASURES.values()}
        both |= {title: "-" for title in MEASURES.values() if ema[title] == raw[title] == "-"}
        both |= {title: f"{ema[title]}\nraw {raw[title]}" for title in (FACTS, PAIRS) if ema[title] != raw[title]}
        rows.append(ema | both | {"weights": "ema, raw"})
    return pd.DataFrame(rows, columns=shown.columns)


def _by_probe(row: dict[Any, Any], number: str) -> str:
    """How many pairs ("n") or facts are behind each probe's number: one number where they share them."""
    counts = [_count(row[f"{measure}_{number}"]) for measure in COUNTED]
    return counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def _count(number: Any) -> str:
    return "-" if pd.isna(number) else f"{int(number):,}"


def cell_lines(text: str) -> list[str]:
    """A cell's value, and apart from it the interval and the control or the counts where the text has them.

    >>> cell_lines("0.53 [0.30, 0.71] (control 0.00)")
    ['0.53', '[0.30, 0.71]', 'control 0.00']
    >>> cell_lines("masked (rates [0.15, 0.15])")
    ['masked (rates [0.15, 0.15])']
    >>> cell_lines("0.24 [0.21, 0.28]\\nraw 0.25 [0.21, 0.29]")
    ['0.24', '[0.21, 0.28]', 'raw 0.25', '[0.21, 0.29]']
    """
    first, newline, more = text.partition("\n")
    if newline:
        return [*cell_lines(first), *cell_lines(more)]
    value, bracket, rest = text.partition(" [")
    if not bracket or "(" in value or not rest.replace(")", "").endswith((*"0123456789]", " facts")):
        return [text]
    low_high, _, control = rest.partition("] ")
    return [value, f"[{low_high.rstrip(']')}]", *filter(None, [control.strip("()")])]
