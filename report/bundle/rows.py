"""The rows of many readings as one tidy parquet file, a reading at a time: all of them at once may not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ...probes.readings.reading import Reading
from ...probes.readings.readings import Readings, own_apart

Owned = tuple[str, Reading]  # the run's name, and one of its readings
GROUP = 200_000  # rows that are written together: small groups make a long index

_MORE = ("asked", "split")  # what only answers to questions say of themselves


def write_rows(readings: Sequence[Owned], path: Path) -> int:
    """Write the rows of all readings under each other: run, reading, model, step, weights, then the frames' columns.

    A frame's own column of one of these names is `own_step` and the like, as in `Readings.to_frame`.

    Readings have different columns; what one does not have is missing in its rows. A column that is of two kinds that
    no kind of number holds is written as text.
    Returns: the number of rows.
    """
    schema = _schema(readings)
    written, waiting, rows = 0, [], 0
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for table in _tables(readings):
            waiting.append(_fitted(table, schema))
            rows += len(table)
            if rows >= GROUP:
                file.write_table(pa.concat_tables(waiting))
                written, waiting, rows = written + rows, [], 0
        if rows:
            file.write_table(pa.concat_tables(waiting))
    return written + rows


def _tables(readings: Iterable[Owned]) -> Iterator[pa.Table]:
    for run, reading in readings:
        frame = Readings([reading]).frame
        for name in _MORE:
            if name in reading.meta and name not in frame:
                frame.insert(4, name, reading.meta[name])
        frame = own_apart(frame, ["run"])
        frame.insert(0, "run", run)
        yield pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)


def _schema(readings: Iterable[Owned]) -> pa.Schema:
    """Every column of every reading, in the order of their first appearance."""
    kinds: dict[str, pa.DataType] = {}
    for table in _tables(readings):
        for field in table.schema:
            kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            kinds[field.name] = _common(kinds.get(field.name, pa.null()), kind)
    return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in kinds.items()])


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The kind that holds both; text where none does."""
    try:
        both = [pa.schema([("column", kind)]) for kind in (one, other)]
        return pa.unify_schemas(both, promote_options="permissive").field("column").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()


def _fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table.column(field.name)
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a list, where others have a number
            texts = [None if one is None else str(one) for one in column.to_pylist()]
            columns.append(pa.array(texts, type=field.type))
    return pa.table(columns, schema=schema)
