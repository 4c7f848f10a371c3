"""Reading a table of facts from anywhere: CSV and TSV, JSON lines, parquet, a pandas DataFrame, or a named dataset.

Rows keep the name by which an error can point at them. A byte order mark at the start of a file and blank lines are
skipped and counted; cells are checked by `cells`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import RevprobeError, did_you_mean
from .cells import BYTE_ORDER_MARK, FactTable, Problem, clean

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
BAD_ROWS = ("error", "skip")


def read_table(source: str | Path | pd.DataFrame, columns: Sequence[str], **options: Any) -> FactTable:
    """The rows of a table, its cells in `columns` checked.

    Args:
        source: a path that ends in .csv, .tsv, .jsonl, .json (lines) or .parquet, a DataFrame, or the name of a
            dataset for `datasets.load_dataset` ("owner/name").
        columns: those that must hold text.
        options: encoding ("utf-8"), dataset_split ("train"), dataset_config, rows (first, one past the last), and
            bad_rows: "error", or "skip" to leave bad rows out and list them in `problems`.
    Raises: RevprobeError, naming file, row and column, for what cannot be read.
    """
    rows, bad_rows = options.pop("rows", None), options.pop("bad_rows", "error")
    if bad_rows not in BAD_ROWS:
        raise RevprobeError(f"unknown bad_rows {bad_rows!r}{did_you_mean(str(bad_rows), BAD_ROWS)}")
    raw = open_table(source, **options)
    for column in columns:
        require_column(raw.frame, column, raw_name(source))
    if rows is not None:
        count = len(raw.frame)
        if len(rows) != 2 or not all(isinstance(r, int) for r in rows) or not 0 <= rows[0] < rows[1] <= count:
            raise RevprobeError(
                f"rows={rows!r} of {raw_name(source)}: expected (first, one past the last) within its {count} rows"
            )
        raw = raw.take(np.arange(*rows))
    if not len(raw.frame):
        raise RevprobeError(f"{raw_name(source)} has no rows below its columns {list(raw.frame.columns)}")
    return clean(raw, columns, bad_rows)


def raw_name(source: str | Path | pd.DataFrame) -> str:
    """What errors call a source."""
    return "the frame" if isinstance(source, pd.DataFrame) else str(source)


def require_column(frame: pd.DataFrame, column: str, name: str) -> None:
    """Raises: RevprobeError, when the column is missing or there twice."""
    count = [str(c) for c in frame.columns].count(column)
    if count != 1:
        near = did_you_mean(column, [str(c) for c in frame.columns]) if not count else "; rename all but one"
        raise RevprobeError(f"{name} has {count or 'no'} column{'s' if count > 1 else ''} {column!r}{near}")


def open_table(
    source: str | Path | pd.DataFrame,
    encoding: str = "utf-8",
    dataset_split: str = "train",
    dataset_config: str | None = None,
) -> FactTable:
    """A table as it stands, no cell checked. Raises: RevprobeError, for a source that cannot be opened."""
    if isinstance(source, pd.DataFrame):
        frame = source.reset_index(drop=True).rename(columns=str)
        indexes = enumerate(source.index)
        return FactTable(frame, [f"row {i}" + ("" if index == i else f" (index {index!r})") for i, index in indexes])
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in SUFFIXES:
        raise RevprobeError(f"{path} ends in {suffix!r}, expected one of {', '.join(SUFFIXES)}, or pass a DataFrame")
    if suffix in SUFFIXES or isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        require_file(path)
        readers = {".parquet": _read_parquet, ".csv": _read_csv, ".tsv": _read_csv}
        return readers.get(suffix, read_json_lines)(path, encoding)
    return _read_dataset(str(source), dataset_split, dataset_config)


def require_file(path: Path) -> None:
    """Raises: RevprobeError, when the path is not a file, with the nearest name in its folder."""
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, beside) if beside else ""
        raise RevprobeError(f"there is no file {path}{near}")


def decode(path: Path, encoding: str = "utf-8") -> tuple[str, list[Problem]]:
    """A file's text, bytes that are not in the encoding kept to be told by their cell, and its byte order mark."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") and not encoding.lower().replace("-", "").startswith("utf16"):
        raise RevprobeError(f"{path} begins like UTF-16, not {encoding}; say encoding='utf-16', or save it as UTF-8")
    try:
        text = data.decode(encoding, "surrogateescape")
    except (LookupError, UnicodeDecodeError) as error:
        raise RevprobeError(
            f"{path} cannot be read as {encoding!r}: {error}; name its encoding, encoding=..."
        ) from None
    if not text.startswith(BYTE_ORDER_MARK):
        return text, []
    return text[1:], [Problem("line 1", "", "byte_order_mark", "U+FEFF at the start of the file")]


def _read_csv(path: Path, encoding: str) -> FactTable:
    """A CSV or TSV file, every cell text. The csv module, not pandas: it tells the line, and no name "None" is lost."""
    text, problems = decode(path, encoding)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    rows: list[list[str]] = []
    labels: list[str] = []
    header = next(reader, None)
    if not header:
        raise RevprobeError(f"{path} is empty; expected a line of column names")
    for cells in reader:
        if not cells:
            problems.append(Problem(f"line {reader.line_num}", "", "blank_line", ""))
            continue
        label = f"{path.name}, row {len(rows)} (line {reader.line_num})"
        if len(cells) != len(header):
            missing = f"column {header[len(cells)]!r} is missing" if len(cells) < len(header) else "one has no column"
            raise RevprobeError(f"{label}: {len(cells)} cells for {len(header)} columns, so {missing}; quote commas")
        rows.append(cells)
        labels.append(label)
    return FactTable(pd.DataFrame(rows, columns=[h.strip() for h in header], dtype=object), labels, problems)


def read_json_lines(path: Path, encoding: str = "utf-8") -> FactTable:
    """A file of one JSON object per line, or of one list of them; a key that some lack is an empty cell there."""
    text, problems = decode(path, encoding)
    records: list[dict[str, Any]] = []
    labels: list[str] = []
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise RevprobeError(f"{path} is not JSON: {error}") from None
        labels = [f"{path.name}, row {place}" for place in range(len(records))]
        for record, label in zip(records, labels, strict=True):
            require_object(record, label)
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                if number <= text.count("\n"):
                    problems.append(Problem(f"line {number}", "", "blank_line", ""))
                continue
            label = f"{path.name}, row {len(records)} (line {number})"
            records.append(parse_json_object(line, label))
            labels.append(label)
    columns = list(dict.fromkeys(key for record in records for key in record))
    rows = [[record.get(column) for column in columns] for record in records]
    return FactTable(pd.DataFrame(rows, columns=columns, dtype=object), labels, problems)


def parse_json_object(line: str, label: str) -> dict[str, Any]:
    """Raises: RevprobeError, naming the line, for anything but one JSON object."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RevprobeError(f"{label} is not JSON ({error}); expected one object per line") from None
    return require_object(record, label)


def require_object(record: Any, label: str) -> dict[str, Any]:
    """Raises: RevprobeError, when a row of JSON is not an object."""
    if not isinstance(record, dict):
        raise RevprobeError(f"{label} holds a {type(record).__name__}; expected an object, {{'column': 'text'}}")
    return record


def _read_parquet(path: Path, encoding: str) -> FactTable:
    try:
        frame = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises many kinds, all of them meaning this
        raise RevprobeError(f"{path} is not a parquet file that pyarrow reads: {str(error).splitlines()[0]}") from error
    labels = [f"{path.name}, row {place}" for place in range(len(frame))]
    return FactTable(frame.reset_index(drop=True).rename(columns=str), labels)


def _read_dataset(name: str, split: str, config: str | None) -> FactTable:
    """A dataset by name. Nothing of its repository is executed: data files only."""
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]
    except ImportError:
        raise RevprobeError(f"{name!r} is no file, and reading a dataset by name needs: pip install datasets") from None
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # network, hub and builder each raise their own
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RevprobeError(
            f"{name!r} is neither a file here ({', '.join(SUFFIXES)}) nor a dataset that could be loaded with split "
            f"{split!r}: {why}; offline, download its file elsewhere and pass the path"
        ) from error
    frame = rows.to_pandas()
    return FactTable(frame.rename(columns=str), [f"{name}, row {place}" for place in range(len(frame))])
