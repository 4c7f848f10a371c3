"""A reading as a file: rows as parquet, numbers and provenance in the schema's metadata, a digest over both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ...atomic_files import written_whole
from ...errors import RevprobeError, first_line

_META, _DIGEST = b"revprobe", b"revprobe.digest"


def write_reading(path: Path, header: dict[str, Any], frame: pd.DataFrame) -> None:
    """Write the rows with a header of plain values, whole or not at all.

    Raises: RevprobeError, naming the column or the key of `meta` that a file cannot hold.
    """
    _require_plain(header)
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        stored = {_META: json.dumps(header).encode()}
        # Of what is read back, not of what was given: objects that are all numbers come back as numbers.
        stored[_DIGEST] = _digest(stored[_META], _as_read(table)).encode()
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **stored})
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise RevprobeError(f"the rows cannot be saved: {_culprit(frame)} ({first_line(error)})") from error
    with written_whole(path) as part:
        pq.write_table(table, part, compression="zstd", write_page_checksum=True)


def read_reading(path: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Header and rows. Raises: RevprobeError, when the file is missing, damaged or not a reading."""
    if not path.is_file():
        raise RevprobeError(f"no reading at {str(path)!r}; expected a parquet file written by Reading.save")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        stored, frame = table.schema.metadata or {}, table.to_pandas()
        if _META not in stored:
            raise RevprobeError(f"{path} is parquet but not a reading of revprobe; use pandas.read_parquet")
        saved = stored.get(_DIGEST, b"").decode()
        # Older files have the digest of the rows with their categories.
        if saved not in (_digest(stored[_META], _as_read(table)), _digest(stored[_META], frame)):
            raise ValueError("its rows or numbers are not those that were saved")
        return json.loads(stored[_META]), frame
    except RevprobeError:
        raise
    except Exception as error:  # a flipped byte surfaces anywhere: arrow, json, unicode, pandas
        raise RevprobeError(f"{path} {_what_is_wrong(path, first_line(error))}") from error


def _what_is_wrong(path: Path, reason: str) -> str:
    """Only what bears our mark is called ours, and may be deleted; the mark is in the file's end, which a cut takes."""
    content = path.read_bytes()
    if _DIGEST in content:
        return f"is damaged ({reason}); delete it and run the same command again"
    if content[:4] == b"PAR1":
        return f"is damaged ({reason}); if a run of revprobe wrote it, delete it and run the same command again"
    return "is no reading of revprobe; expected a parquet file written by Reading.save"


def _require_plain(header: Mapping[str, Any]) -> None:
    """Raises: RevprobeError, for a value that JSON does not have."""
    for name, value in {**header, **{f"meta[{key!r}]": one for key, one in header.get("meta", {}).items()}}.items():
        if name == "meta":
            continue
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise RevprobeError(
                f"{name} is a {type(value).__name__}, {first_line(error, with_type=False)}; expected text, numbers, "
                "lists and mappings of Python, such as str(path) or int(number)"
            ) from error


def _as_read(table: pa.Table) -> pd.DataFrame:
    """The rows as they come out of a file: parquet keeps the categories of texts and not those of numbers."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            kind = field.type.value_type
            table = table.set_column(place, field.with_type(kind), table.column(place).cast(kind))
    return table.to_pandas()


def _culprit(frame: pd.DataFrame) -> str:
    """Which column it is that no file holds."""
    if not frame.columns.is_unique:
        return f"there are two columns {frame.columns[frame.columns.duplicated()][0]!r}; rename one"
    for name in frame:
        try:
            _digest(b"", _as_read(pa.Table.from_pandas(frame[[name]], preserve_index=False)))
        except (pa.ArrowException, TypeError, ValueError):
            kinds = sorted({type(one).__name__ for one in frame[name]})[:4]
            return f"column {name!r} holds {', '.join(kinds)}; expected numbers alone, texts alone, or dates alone"
    return "no column by itself is the cause"


def _digest(header: bytes, frame: pd.DataFrame) -> str:
    """What changes when a number or a row of a saved reading does."""
    rows = pd.util.hash_pandas_object(frame, index=False).to_numpy()
    return hashlib.sha256(header + ",".join(map(str, frame.columns)).encode() + rows.tobytes()).hexdigest()
