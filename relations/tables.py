"""Reading a table of facts from anywhere: CSV and TSV, JSON lines, parquet, a pandas DataFrame, or a named dataset.

Rows keep the name by which an error can point at them. A byte order mark at the start of a file and blank lines are
skipped and counted; cells are checked by `cells`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ..errors import RevprobeError, did_you_mean, first_line
from ..probes.pairs.fact_rows import row_labels
from .cells import FactTable, clean
from .text_files import read_delimited, read_json_lines

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
        whole = isinstance(rows, Sequence) and len(rows) == 2 and all(isinstance(row, int) for row in rows)
        if not whole or not 0 <= rows[0] < rows[1] <= count:
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
        return FactTable(frame, row_labels(source))
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in SUFFIXES:
        raise RevprobeError(f"{path} ends in {suffix!r}, expected one of {', '.join(SUFFIXES)}, or pass a DataFrame")
    if suffix in SUFFIXES or isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        require_file(path)
        readers = {".parquet": _read_parquet, ".csv": read_delimited, ".tsv": read_delimited}
        return readers.get(suffix, read_json_lines)(path, encoding)
    return _read_dataset(str(source), dataset_split, dataset_config)


def require_file(path: Path) -> None:
    """Raises: RevprobeError, when the path is not a file, with the nearest name in its folder."""
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, beside) if beside else ""
        raise RevprobeError(f"there is no file {path}{near}")


def _read_parquet(path: Path, encoding: str) -> FactTable:
    try:
        # Without pandas' own notes in the file: a column of names that a frame had as its index is a column.
        frame = pq.read_table(path).to_pandas(ignore_metadata=True)
    except Exception as error:  # pyarrow raises many kinds, all of them meaning this
        raise RevprobeError(f"{path} is not a parquet file that pyarrow reads: {first_line(error)}") from error
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
        why = first_line(error, with_type=not str(error))
        raise RevprobeError(
            f"{name!r} is neither a file here ({', '.join(SUFFIXES)}) nor a dataset that could be loaded with split "
            f"{split!r}: {why}; offline, download its file elsewhere and pass the path"
        ) from error
    frame = rows.to_pandas()
    return FactTable(frame.rename(columns=str), [f"{name}, row {place}" for place in range(len(frame))])
