"""Reading a table of facts: the cells that templates are filled with, each of them text or an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ...errors import RevprobeError, did_you_mean


@dataclass(frozen=True)
class TextRow:
    """One row: the text of every slot, the label of its fact, and how an error names it ("row 3")."""

    values: Mapping[str, str]
    fact: str
    label: str


def read_rows(frame: pd.DataFrame, columns: Mapping[str, str], fact: str | None = None) -> list[TextRow]:
    """The cells of every row.

    Args:
        columns: slot -> the column that fills it; "target" and "evidence" are among the slots.
        fact: the column of fact labels; by default "target | evidence".
    Raises: RevprobeError, for anything but a frame with rows, a missing or repeated column, one column for target
        and evidence, and a cell that is empty, no text, or has blanks around its text.
    """
    if not isinstance(frame, pd.DataFrame):
        raise RevprobeError(f"expected a pandas DataFrame of facts, got {type(frame).__name__}; pd.read_csv makes one")
    if not len(frame):
        raise RevprobeError(f"the frame has no rows (columns {[str(c) for c in frame.columns]}); a pair needs one")
    for slot, column in {**columns, **({"fact": fact} if fact is not None else {})}.items():
        count = list(frame.columns).count(column)
        if count == 0:
            raise RevprobeError(f"the frame has no column {column!r} (for {slot}){did_you_mean(column, frame.columns)}")
        if count > 1:
            raise RevprobeError(f"the frame has {count} columns {column!r}; rename all but one")
    if columns["target"] == columns["evidence"]:
        raise RevprobeError(f"column {columns['target']!r} is both target and evidence; name two columns")
    labels = row_labels(frame)
    cells = {
        slot: [_text_cell(value, column, where) for value, where in zip(frame[column], labels, strict=True)]
        for slot, column in columns.items()
    }
    if fact is None:
        facts = [f"{t} | {e}" for t, e in zip(cells["target"], cells["evidence"], strict=True)]
    else:
        for value, where in zip(frame[fact], labels, strict=True):
            if _is_empty(value):
                raise RevprobeError(f"{where}: column {fact!r} labels the fact but is empty ({value!r}); fill it")
        facts = [str(value) for value in frame[fact]]
    rows = (dict(zip(cells, values, strict=True)) for values in zip(*cells.values(), strict=True))
    return [TextRow(*row) for row in zip(rows, facts, labels, strict=True)]


def row_labels(frame: pd.DataFrame) -> list[str]:
    """How an error names each row: by its place, and by its index where that is another (which may be missing)."""
    rows = enumerate(frame.index)
    same = ((i, index, pd.api.types.is_scalar(index) and not pd.isna(index) and bool(index == i)) for i, index in rows)
    return [f"row {i}" + ("" if plain else f" (index {index!r})") for i, index, plain in same]


def _text_cell(value: Any, column: str, where: str) -> str:
    if _is_empty(value):
        raise RevprobeError(
            f"{where}: column {column!r} is empty ({value!r}); leave the row out, as with "
            f"frame.dropna(subset=[{column!r}])"
        )
    if not isinstance(value, str):
        raise RevprobeError(
            f"{where}: column {column!r} holds {value!r} ({type(value).__name__}), expected text; make it text with "
            f"frame[{column!r}].astype(str)"
        )
    if value != value.strip():
        raise RevprobeError(
            f"{where}: column {column!r} holds {value!r} with blanks around it, which would change its tokens; use "
            f"frame[{column!r}].str.strip()"
        )
    return str(value)


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))
