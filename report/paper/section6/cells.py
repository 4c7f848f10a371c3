"""One cell of Table 7 and of what stands beside it: its seeds as text, at the two readings that every cell has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from ....probes.figures.theme import rounded
from ..table7 import cell_text
from .frames import FINISHED, Section6
from .plan import LEARNED, SEEDS, Cell
from .verdicts import passes

MARK, MADE_AGAIN = "†", "‡"
NOT_ASKED = "not asked"
_SHOWN = ["value", "low", "high", "n", "facts"]
At = Callable[[Section6, Cell, int], int | None]


def at_last(found: Section6, cell: Cell, seed: int) -> int | None:
    """The common last step; None of a run that is not finished."""
    return found.steps(cell, seed)


def at_reached(found: Section6, cell: Cell, seed: int) -> int | None:
    """The first checkpoint of at least 90 % forward; None where there is none."""
    return found.reached(cell, seed)


def seed_rows(
    found: Section6, cell: Cell, asked: str, split: str = "train", at: At = at_last, table: str = "answers"
) -> list[dict[str, Any]]:
    """The rows of the seeds that have one, in order."""
    rows = []
    for seed in SEEDS:
        step = at(found, cell, seed)
        row = None if step is None else found.curve(cell, seed, asked, split, table).get(step)
        if row is not None:
            rows.append(row)
    return rows


def cell_words(
    found: Section6, cell: Cell, asked: str, split: str = "train", at: At = at_last, table: str = "answers"
) -> str:
    """Mean, spread, interval, seeds, questions and facts; what is missing of the planned seeds is said."""
    rows = seed_rows(found, cell, asked, split, at, table)
    if not rows:
        return lacking(found, cell, at)
    finished = len(_finished(found, cell))
    lost, why = finished - len(rows), "without 90 % forward" if at is at_reached else "missing"
    without = f", {lost} {why}" * (lost > 0) + _left(finished)
    return f"{cell_text(pd.DataFrame(rows, columns=_SHOWN))}{without}{mark(found, cell)}"


def _finished(found: Section6, cell: Cell) -> list[int]:
    return [seed for seed in SEEDS if found.status(cell, seed) == FINISHED]


def _left(finished: int) -> str:
    """Of the planned seeds, those that are not in yet."""
    return f", {len(SEEDS) - finished} not in" if finished < len(SEEDS) else ""


def lacking(found: Section6, cell: Cell, at: At) -> str:
    """Why no seed of a cell has a number."""
    finished = _finished(found, cell)
    if not finished:
        return "; ".join(dict.fromkeys(found.status(cell, seed) for seed in SEEDS))
    return f"90 % forward never reached{_left(len(finished))}" if at is at_reached else NOT_ASKED


def mark(found: Section6, cell: Cell) -> str:
    """How many seeds are below 90 % forward at the last step, and how many start from a small model made again."""
    forward = [found.last(cell, seed, "forward") for seed in SEEDS]
    low = sum(value is not None and passes(value, ">=", LEARNED) is not True for value in forward)
    counts = ((MARK, low), (MADE_AGAIN, found.starts_again(cell)))
    return "".join(f" {sign}{count}" for sign, count in counts if count)


def by_seed(values: Sequence[float | None], *, percent: bool = True, digits: int = 1) -> str:
    """Of each seed; "-" where there is none.

    >>> by_seed([0.5, None, 0.25])
    '50.0, -, 25.0'
    """
    return ", ".join(
        "-" if value is None else "undefined" if math.isnan(value) else rounded(value, digits, percent)
        for value in values
    )


def mean(values: Sequence[float | None]) -> float:
    """Over the seeds that have a number; NaN without one."""
    defined = [value for value in values if value is not None and not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
