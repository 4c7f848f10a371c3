"""What a report says first: the last checkpoints in sentences, made of the numbers of its table and of nothing else."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from ...probes.figures.theme import interval_text
from .tables import MEASURES

FEW = 3  # more rows than this are told as ranges
_ANSWERS = ("forward_accuracy", "reverse_accuracy")
_SIGNATURES = ("reverse_probability", "attention_correlation", "gradient_cosine")
_WORDS = {name: title.removesuffix(" (%)") for name, title in MEASURES.items()}


def finding(final: pd.DataFrame) -> list[str]:
    """A sentence for each row of `tables.final_table`, value with interval, control and n; ranges where rows are many.

    A measure that was not taken is left out, one that is undefined is said to be. Of two kinds of weights that a run
    was read with, the first of the table speaks.
    """
    rows: list[dict[Any, Any]] = final.drop_duplicates(["run", "kind"]).to_dict("records")
    if not rows:
        return []
    if len(rows) <= FEW:
        return [_sentence(row, len({other["run"] for other in rows}) < len(rows)) for row in rows]
    ranges = [text for measure in (*_ANSWERS, *_SIGNATURES) if (text := _range(rows, measure))]
    count = len({row["run"] for row in rows})
    return [f"{count} runs at their last checkpoints: {'; '.join(ranges)}."] if ranges else []


def _sentence(row: dict[Any, Any], with_kind: bool) -> str:
    name = str(row["run"]) + (f", pairs {row['kind']}" if with_kind and not pd.isna(row["kind"]) else "")
    step = "" if pd.isna(row["step"]) else f" at step {int(row['step']):,}"
    told = [f"{_WORDS[name]} {_number(row, name)}" for name in (*_ANSWERS, *_SIGNATURES) if _measured(row, name)]
    return f"{name}{step}: {'; '.join(told) or 'no reading'}{_counts(row)}."


def _measured(row: dict[Any, Any], measure: str) -> bool:
    return not pd.isna(row[f"{measure}_n"])


def _number(row: dict[Any, Any], measure: str) -> str:
    value, low, high, control = (float(row[f"{measure}{part}"]) for part in ("", "_low", "_high", "_control"))
    if not measure.endswith("accuracy") or math.isnan(value):
        return interval_text(value, low, high, control)
    number, _, rest = interval_text(value, low, high, control, percent=True).partition(" ")
    return f"{number} % {rest}".strip()


def _counts(row: dict[Any, Any]) -> str:
    """n of all measures where they share it, else of each."""
    counts = dict.fromkeys(
        f"{int(row[f'{name}_n']):,} pairs of {int(row[f'{name}_facts']):,} facts"
        for name in (*_ANSWERS, *_SIGNATURES)
        if _measured(row, name) and not pd.isna(row[f"{name}_facts"])
    )
    return f"; n = {' / '.join(counts)}" if counts else ""


def _range(rows: list[dict[Any, Any]], measure: str) -> str:
    """The lowest and the highest value and whose they are; how many are undefined."""
    taken = [row for row in rows if _measured(row, measure)]
    known = sorted((float(row[measure]), str(row["run"])) for row in taken if not math.isnan(row[measure]))
    if not taken:
        return ""
    gone = f", undefined in {len(taken) - len(known)}" if len(known) < len(taken) else ""
    if not known:
        return f"{_WORDS[measure]} undefined in all {len(taken)}"
    (low, lowest), (high, highest) = known[0], known[-1]
    shown = (lambda one: f"{100 * one:.0f} %") if measure.endswith("accuracy") else (lambda one: f"{one:.2f}")
    if shown(low) == shown(high):
        return f"{_WORDS[measure]} {shown(low)} in {'all' if not gone else 'the others'}{gone}"
    return f"{_WORDS[measure]} {shown(low)} ({lowest}) to {shown(high)} ({highest}){gone}"
