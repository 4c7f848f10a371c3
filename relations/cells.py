"""The cells of a table of facts: which are text as it should be, and what is done with the others.

Text is brought to Unicode's composed form (NFC), so that one name is one string, and blanks around it are taken off;
both are counted. Everything else that is not plain text is refused by row and column, or its row left out and counted.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ..errors import RevprobeError
from .spelling import plain_name

BYTE_ORDER_MARK = "\ufeff"
OVER_LINES = "cell_over_lines"
_UNDECODED = re.compile("[\udc80-\udcff]+")  # what `surrogateescape` leaves of bytes that are no UTF-8
_HALF = re.compile("[\ud800-\udfff]")  # of a pair: JSON can say "\\ud83d" alone, which is no character
# An escape that no reader undid: \" of another CSV dialect, \u00e9 of JSON in JSON, \N for a database's null.
_ESCAPE = re.compile(r"""\\["',\\]|\\u[0-9a-fA-F]{4}|^\\N$""")
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 100
_shortened.maxlist = _shortened.maxtuple = _shortened.maxdict = _shortened.maxset = 4
# UTF-8 that was read as Windows' western encoding and written again: "Ã©" for "é", "â€™" for an apostrophe.
_TWICE_ENCODED = re.compile("[ÂÃâð][\u0080-\u00bf\u0152-\u0178\u2010-\u203a\u20ac\u2122]")


@dataclass(frozen=True)
class Problem:
    """A cell that was changed or a row that was left out: the row as errors name it, its column, and why."""

    row: str
    column: str
    reason: str
    detail: str


@dataclass
class FactTable:
    """Rows of text: `frame` holds the columns asked for first, then the others as they came; `labels` name the rows."""

    frame: pd.DataFrame
    labels: list[str]
    problems: list[Problem] = field(default_factory=list)

    def flag(self, rows: Any, column: str, reason: str) -> None:
        """Note a reason for the rows where `rows` is true; the cells of `column` are the detail. Shapes: `row`."""
        cells = self.frame[column].tolist()
        self.problems += [Problem(self.labels[i], column, reason, repr(cells[i])) for i in np.flatnonzero(rows)]

    def take(self, places: np.ndarray) -> FactTable:
        """Some of the rows; problems stay."""
        return FactTable(
            self.frame.iloc[places].reset_index(drop=True), [self.labels[place] for place in places], self.problems
        )


def shown(value: Any) -> str:
    """A cell as errors show it: its repr, the middle of a long one left out.

    >>> len(shown("x" * 1_000_000))
    100
    """
    return _shortened.repr(value)


def clean(table: FactTable, columns: Sequence[str], bad_rows: str = "error") -> FactTable:
    """Check and normalize the cells of `columns`. Raises: RevprobeError, for the first bad cell unless skipped."""
    frame = table.frame.copy()
    # Line ends in these columns are refused below, as control characters.
    problems = [one for one in table.problems if one.reason != OVER_LINES or one.column not in columns]
    bad: set[int] = set()
    for column in columns:
        cells = []
        for place, (value, label) in enumerate(zip(frame[column], table.labels, strict=True)):
            fault = _fault(value)
            if fault and bad_rows == "error":
                raise RevprobeError(f"{label}: column {column!r} {fault[1]}, or leave such rows out, bad_rows='skip'")
            if fault and place not in bad:
                bad.add(place)
                problems.append(Problem(label, column, f"skipped_{fault[0]}", repr(value)))
            if fault:
                cells.append("")
                continue
            stripped = value.strip()
            composed = unicodedata.normalize("NFC", stripped)
            changes = [("stripped_blanks", stripped != value), ("normalized", composed != stripped)]
            changes.append(("backslash", "\\" in value))
            problems += [Problem(label, column, reason, repr(value)) for reason, changed in changes if changed]
            cells.append(composed)
        frame[column] = pd.Series(cells, index=frame.index, dtype=object)
    kept = [place for place in range(len(frame)) if place not in bad]
    if not kept:
        raise RevprobeError(f"all {len(frame)} rows are bad, the first being {table.labels[0]} ({problems[-1].reason})")
    return FactTable(frame, table.labels, problems).take(np.array(kept))


def _fault(value: Any) -> tuple[str, str] | None:
    """Why a cell cannot be used, as a name and as the rest of a sentence; None when it can."""
    if value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value))):
        # pandas' readers turn the names "NA", "null" and "None" into NaN.
        names = ", or read the file with keep_default_na=False if it is a name" if isinstance(value, float) else ""
        return "empty", f"is empty ({value!r}); fill it{names}"
    if not isinstance(value, str):
        return "not_text", f"holds {shown(value)} ({type(value).__name__}), expected text; write it as text"
    if not plain_name(value.strip(BYTE_ORDER_MARK)):
        return "empty", f"is empty ({shown(value)}); fill it"
    undecoded = _UNDECODED.search(value)
    if undecoded:
        bytes_found = undecoded.group().encode("utf-8", "surrogateescape")
        return "encoding", (
            f"holds the bytes {shown(bytes_found)} in {shown(value.encode('utf-8', 'replace').decode())}, which are "
            "not in the file's encoding: the file may mix encodings; write it in UTF-8, or say encoding='cp1252'"
        )
    if _HALF.search(value):
        return "encoding", f"holds {shown(value)}, in which half of a character is missing; write the whole of it"
    if "\ufffd" in value or _TWICE_ENCODED.search(value):
        return "encoding", (
            f"holds {shown(value)}, which was decoded in a wrong encoding before it was saved; restore it from its "
            "source"
        )
    escape = _ESCAPE.search(value.strip())
    if escape:
        return "escape", (
            f"holds {shown(value)} with the escape {escape.group()}, which no reader undoes here; write the character "
            "itself, a quotation mark in a CSV doubled"
        )
    control = next((c for c in value.strip() if unicodedata.category(c) == "Cc" or c == BYTE_ORDER_MARK), None)
    if control:
        return "control_character", f"holds {shown(value)} with the control character {control!r}; take it out"
    return None
