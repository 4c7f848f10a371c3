"""A reading as a file: rows as parquet, numbers and provenance in the schema's metadata, a digest over both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ...atomic_files import written_whole
from ...errors import RevprobeError, first_line

_META, _DIGEST = b"revprobe", b"revprobe.digest"


def write_reading(path: Path, header: dict[str, Any], frame: pd.DataFrame) -> None:
    """Write the rows with a header of plain values, whole or not at all."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    stored = {_META: json.dumps(header).encode()}
    stored[_DIGEST] = _digest(stored[_META], frame).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **stored})
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
        if _digest(stored[_META], frame) != stored.get(_DIGEST, b"").decode():
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


def _digest(header: bytes, frame: pd.DataFrame) -> str:
    """What changes when a number or a row of a saved reading does."""
    rows = pd.util.hash_pandas_object(frame, index=False).to_numpy()
    return hashlib.sha256(header + ",".join(map(str, frame.columns)).encode() + rows.tobytes()).hexdigest()
