"""Text files of facts, CSV, TSV and JSON lines, read in the dialect they are written in or refused by row and column.

A CSV doubles quotation marks inside quoted cells (RFC 4180); blanks between a comma and a quotation mark are dialect as
well. A TSV either quotes as a CSV does, or its quotation marks are letters like any other: one mark that closes no cell
tells, and a file that is both is refused. No name comes out otherwise than its dialect says without being counted.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import RevprobeError
from .cells import BYTE_ORDER_MARK, OVER_LINES, FactTable, Problem, shown

_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_DOUBLED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


def decode(path: Path, encoding: str = "utf-8") -> tuple[str, list[Problem]]:
    """A file's text, bytes that are not in the encoding kept to be told by their cell, and its byte order mark."""
    data = path.read_bytes()
    if data[:4] in (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff") and not _is_like(encoding, "utf32"):
        raise RevprobeError(f"{path} begins like UTF-32, not {encoding}; say encoding='utf-32', or save it as UTF-8")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") and not _is_like(encoding, "utf16", "utf32"):
        raise RevprobeError(f"{path} begins like UTF-16, not {encoding}; say encoding='utf-16', or save it as UTF-8")
    try:
        text = data.decode(encoding, "surrogateescape")
    except (LookupError, UnicodeDecodeError, TypeError) as error:
        raise RevprobeError(
            f"{path} cannot be read as {encoding!r}: {error}; name its encoding, encoding=..."
        ) from None
    if not text.startswith(BYTE_ORDER_MARK):
        return text, []
    return text[1:], [Problem("line 1", "", "byte_order_mark", "U+FEFF at the start of the file")]


def _is_like(encoding: str, *names: str) -> bool:
    return str(encoding).lower().replace("-", "").replace("_", "").startswith(names)


# ---- CSV and TSV ----


@dataclass(frozen=True)
class _Row:
    """A row's cells and the lines it stands on, from 1."""

    cells: list[str]
    first: int
    last: int


class _StrayMark(Exception):
    """The row at the line `first` has a quotation mark that opens or closes no cell."""

    def __init__(self, first: int) -> None:
        self.first = first


def read_delimited(path: Path, encoding: str) -> FactTable:
    """A CSV or TSV file, every cell text. The csv module, not pandas: it tells the line, and no name "None" is lost.

    Raises: RevprobeError, naming row and column, for quotation marks that fit no dialect; naming the row, for cells too
        many or too few.
    """
    text, problems = decode(path, encoding)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    parsed, found = _in_its_dialect(text, delimiter, path)
    problems += found
    if not parsed or not parsed[0].cells:
        raise RevprobeError(f"{path} is empty; expected a line of column names")
    header = [name.strip() for name in parsed[0].cells]
    rows: list[list[str]] = []
    labels: list[str] = []
    for row in parsed[1:]:
        if not row.cells:
            problems.append(Problem(f"line {row.last}", "", "blank_line", ""))
            continue
        label = f"{path.name}, row {len(rows)} (line {row.last})"
        count = len(row.cells)
        if count != len(header):
            missing = f"column {header[count]!r} is missing" if count < len(header) else "one has no column"
            raise RevprobeError(f"{label}: {count} cells for {len(header)} columns, so {missing}; quote commas")
        # A quotation mark that nobody meant swallows lines like this one; a text of several lines looks the same.
        long = [(name, cell) for name, cell in zip(header, row.cells, strict=True) if "\n" in cell or "\r" in cell]
        problems += [Problem(label, name, OVER_LINES, repr(cell)) for name, cell in long]
        rows.append(row.cells)
        labels.append(label)
    return FactTable(pd.DataFrame(rows, columns=header, dtype=object), labels, problems)


def _in_its_dialect(text: str, delimiter: str, path: Path) -> tuple[list[_Row], list[Problem]]:
    """The rows, and what is to be known of how they were read."""
    if '"' not in text:
        return _parse(text, delimiter, quoting=csv.QUOTE_NONE), []
    closed, problems = _without_blanks_before_quotes(text, delimiter)
    try:
        quoted = _parse(closed, delimiter)
    except _StrayMark as stray:
        literal = _parse(text, delimiter, quoting=csv.QUOTE_NONE) if delimiter == "\t" else []
        if literal and not any(_DOUBLED.fullmatch(cell) for row in literal for cell in row.cells):
            return literal, []
        raise _told(stray, text, delimiter, path) from None
    if delimiter == "\t":
        problems += _unneeded_marks(quoted, closed, path)
    return quoted, problems


def _without_blanks_before_quotes(text: str, delimiter: str) -> tuple[str, list[Problem]]:
    """The text with quoted cells that begin where their cell does, and those that did not; no other cell is touched."""
    pieces, problems, end, line = [], [], 0, 1
    for quoted in re.finditer(rf'(?<![^{delimiter}\r\n])( *+)"(?:[^"]|"")*+"', text):
        if quoted[1]:
            line += text.count("\n", end, quoted.start())
            problems.append(Problem(f"line {line}", "", "blanks_before_quotes", quoted[0]))
            pieces.append(text[end : quoted.start()])
            end = quoted.end(1)
    return "".join([*pieces, text[end:]]), problems


def _parse(text: str, delimiter: str, **dialect: Any) -> list[_Row]:
    """All rows. Raises: _StrayMark, where a quotation mark is not one that the dialect has."""
    rows, last = [], 0
    with _cells_of_any_length(len(text)):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, **dialect)
        try:
            for cells in reader:
                rows.append(_Row(cells, last + 1, reader.line_num))
                last = reader.line_num
        except csv.Error:
            raise _StrayMark(last + 1) from None
    return rows


@contextmanager
def _cells_of_any_length(length: int) -> Iterator[None]:
    """The csv module's limit on a cell, a setting of the process, out of the way."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, length))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _told(stray: _StrayMark, text: str, delimiter: str, path: Path) -> RevprobeError:
    """The row and the column of a quotation mark that fits no dialect."""
    lines = list(io.StringIO(text, newline=""))
    at_header = stray.first == 1
    header = next(csv.reader([lines[0]], delimiter=delimiter)) if not at_header else []
    place, cell = _stray_cell("".join(itertools.islice(lines, stray.first - 1, None)), delimiter)
    column = repr(header[place].strip()) if place < len(header) else f"number {place + 1}"
    # Rows are counted as elsewhere: without the header and blank lines.
    before = _parse("".join(lines[: stray.first - 1]), delimiter, skipinitialspace=True)
    row = sum(bool(one.cells) for one in before) - 1
    where = "the header" if at_header else f"row {row}"
    return RevprobeError(
        f"{path.name}, {where} (line {stray.first}): column {column} holds {shown(cell)}, where a quotation mark "
        "stands that closes no quoted cell; quote the whole cell and double the marks inside it, or take them out"
    )


def _stray_cell(text: str, delimiter: str) -> tuple[int, str]:
    """The number of a row's first cell whose quotation marks do not enclose it, and the cell up to its line's end."""
    column = place = 0
    while True:
        start = place + len(text[place:]) - len(text[place:].lstrip(" "))
        quoted = _QUOTED.match(text, start)
        end = quoted.end() if quoted else start
        if text[start : start + 1] == '"' and (not quoted or text[end : end + 1] not in (delimiter, "\r", "\n", "")):
            return column, re.split("[\r\n]", text[place:], maxsplit=1)[0]
        place = text.find(delimiter, end)
        if place < 0:
            return column, text[start:]
        place, column = place + 1, column + 1


def _unneeded_marks(rows: list[_Row], text: str, path: Path) -> list[Problem]:
    """Cells of a TSV that lost quotation marks which nothing in them called for: they may have been part of a name."""
    lines = list(io.StringIO(text, newline=""))
    if lines[0].startswith('"'):
        return []  # every cell is quoted, the header's too
    problems, number = [], -1
    for row in rows:
        number += bool(row.cells)
        if row.first != row.last:
            continue
        raw = lines[row.first - 1].rstrip("\r\n").split("\t")
        if len(raw) == len(row.cells):
            label = f"{path.name}, row {number - 1} (line {row.last})"
            lost = [place for place, cell in enumerate(row.cells) if raw[place] == f'"{cell}"']
            names = [*rows[0].cells, *[""] * len(row.cells)]
            problems += [Problem(label, names[place], "quotes_taken_off", raw[place]) for place in lost]
    return problems


# ---- JSON ----


def read_json_lines(path: Path, encoding: str = "utf-8") -> FactTable:
    """A file of one JSON object per line, or of one list of them; a key that some lack is an empty cell there."""
    return table_of(*read_records(path, encoding))


def table_of(records: list[dict[str, Any]], labels: list[str], problems: list[Problem]) -> FactTable:
    """Records as a table, a column for every key."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    rows = [[record.get(column) for column in columns] for record in records]
    return FactTable(pd.DataFrame(rows, columns=columns, dtype=object), labels, problems)


def read_records(path: Path, encoding: str = "utf-8") -> tuple[list[dict[str, Any]], list[str], list[Problem]]:
    """The JSON objects of a file, their names in errors, and what was skipped. Lines end at "\\n" and nowhere else.

    Raises: RevprobeError, naming the line, for what is not JSON, not an object, or has a key twice.
    """
    text, problems = decode(path, encoding)
    records: list[dict[str, Any]] = []
    labels: list[str] = []
    if text.lstrip().startswith("["):
        for place, record in enumerate(_parsed(text, str(path))):
            labels.append(f"{path.name}, row {place}")
            records.append(_require_object(record, labels[-1]))
        return records, labels, problems
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            labels.append(f"{path.name}, row {len(records)} (line {number})")
            records.append(_require_object(_parsed(line, labels[-1], "; expected one object per line"), labels[-1]))
        elif number < len(lines):
            problems.append(Problem(f"line {number}", "", "blank_line", ""))
    return records, labels, problems


def _parsed(text: str, label: str, expected: str = "") -> Any:
    try:
        return json.loads(text, object_pairs_hook=_with_each_key_once)
    except (ValueError, RecursionError) as error:
        raise RevprobeError(f"{label} is not JSON ({error}){expected}") from None


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python keeps the last of two equal keys, and drops the other in silence."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return record


def _require_object(record: Any, label: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise RevprobeError(f"{label} holds a {type(record).__name__}; expected an object, {{'column': 'text'}}")
    return record
