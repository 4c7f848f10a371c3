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

    A measure that was not taken is left out, one that is undefined is said to be, and why. Of two kinds of weights that
    a run was read with, the average speaks, as in the figures, and the sentence says so.
    """
    rows: list[dict[Any, Any]] = _speaking(final).to_dict("records")
    if not rows:
        return []
    if len(rows) <= FEW:
        return [_sentence(row, len({other["run"] for other in rows}) < len(rows)) for row in rows]
    ranges = [text for measure in (*_ANSWERS, *_SIGNATURES) if (text := _range(rows, measure))]
    count = len({row["run"] for row in rows})
    return [f"{count} runs at their last checkpoints: {'; '.join(ranges)}{_all_counts(rows)}."] if ranges else []


def _speaking(final: pd.DataFrame) -> pd.DataFrame:
    """One row for each run and kind of pairs, in their order; `read` says with which weights where there are two."""
    if final.empty:
        return final
    keys = ["run", "kind"]
    weights = final.assign(average=final["weights"].eq("ema")).groupby(keys, sort=False, dropna=False)
    both = weights["average"].transform("any") & (weights["weights"].transform("nunique") > 1)
    told = final.assign(read=both.map({True: " (average of the weights)", False: ""}))
    averaged = told[told["weights"].eq("ema") | ~both]
    return averaged.drop_duplicates(keys)


def _sentence(row: dict[Any, Any], with_kind: bool) -> str:
    name = str(row["run"]) + (f", pairs {row['kind']}" if with_kind and not pd.isna(row["kind"]) else "")
    step = "" if pd.isna(row["step"]) else f" at step {int(row['step']):,}"
    told = [f"{_WORDS[name]} {_number(row, name)}" for name in (*_ANSWERS, *_SIGNATURES) if _measured(row, name)]
    return f"{name}{step}{row['read']}: {'; '.join(told) or 'no reading'}{_counts(row)}."


def _measured(row: dict[Any, Any], measure: str) -> bool:
    return not pd.isna(row[f"{measure}_n"])


def _number(row: dict[Any, Any], measure: str, *, control: bool = True) -> str:
    """Value, interval and control; why there is no value, and over how few facts there is no interval."""
    value, low, high, beside = (float(row[f"{measure}{part}"]) for part in ("", "_low", "_high", "_control"))
    if math.isnan(value):
        return f"undefined{_why(row, measure)}"
    percent = measure.endswith("accuracy")
    number, _, rest = interval_text(value, low, high, beside if control else math.nan, percent=percent).partition(" ")
    if not low < high:  # one of no width would claim certainty
        facts = row[f"{measure}_facts"]
        none = "(no interval)" if pd.isna(facts) else f"(no interval: {int(facts):,} fact{'' if facts == 1 else 's'})"
        rest = f"{none} {rest}"
    return f"{number}{' %' if percent else ''} {rest}".strip()


def _why(row: dict[Any, Any], measure: str) -> str:
    reason = row.get(f"{measure}_reason")
    return f" ({reason})" if isinstance(reason, str) and reason else ""


def _counts(row: dict[Any, Any]) -> str:
    """n of all measures where they share it, else of each."""
    counts = dict.fromkeys(
        f"{int(row[f'{name}_n']):,} pairs of {int(row[f'{name}_facts']):,} facts"
        for name in (*_ANSWERS, *_SIGNATURES)
        if _measured(row, name) and not pd.isna(row[f"{name}_facts"])
    )
    return f"; n = {' / '.join(counts)}" if counts else ""


def _all_counts(rows: list[dict[Any, Any]]) -> str:
    """n over all runs and measures: the fewest to the most pairs, and facts."""
    measured = [(row, name) for row in rows for name in (*_ANSWERS, *_SIGNATURES) if _measured(row, name)]
    pairs = [int(row[f"{name}_n"]) for row, name in measured]
    facts = [int(row[f"{name}_facts"]) for row, name in measured if not pd.isna(row[f"{name}_facts"])]
    return f"; n = {_span(pairs)} pairs of {_span(facts)} facts" if facts else ""


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _range(rows: list[dict[Any, Any]], measure: str) -> str:
    """The lowest and the highest value with their intervals and whose they are; how many are undefined, and why."""
    taken = [row for row in rows if _measured(row, measure)]
    known = sorted((row for row in taken if not math.isnan(row[measure])), key=lambda row: float(row[measure]))
    if not taken:
        return ""
    lost = [row for row in taken if math.isnan(row[measure])]
    gone = f", undefined in {len(lost)}{_why(lost[0], measure)}" if lost else ""
    if not known:
        return f"{_WORDS[measure]} undefined in all {len(taken)}{_why(lost[0], measure)}"
    low, high = (_number(row, measure, control=False) for row in (known[0], known[-1]))
    controls = _controls(known, measure)
    if float(known[0][measure]) == float(known[-1][measure]):
        widest = min(known, key=lambda row: float(row[f"{measure}_low"]) - float(row[f"{measure}_high"]))
        whose = "in all" if not gone else "in the others"
        return f"{_WORDS[measure]} {_number(widest, measure, control=False)} {whose}{controls}{gone}"
    return f"{_WORDS[measure]} {low} ({known[0]['run']}) to {high} ({known[-1]['run']}){controls}{gone}"


def _controls(rows: list[dict[Any, Any]], measure: str) -> str:
    """What the controls of all runs come to: the lowest to the highest."""
    known = sorted(float(row[f"{measure}_control"]) for row in rows if not math.isnan(row[f"{measure}_control"]))
    if not known:
        return ""
    percent = measure.endswith("accuracy")
    low, high = (interval_text(one, math.nan, math.nan, percent=percent) for one in (known[0], known[-1]))
    unit = " %" if percent else ""
    return f" (controls {low} to {high}{unit})" if low != high else f" (control {low}{unit})"
