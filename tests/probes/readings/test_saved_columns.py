"""What is saved is read again, whatever its columns are; what a file cannot hold is refused when it is written."""

import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from revprobe import Reading, RevprobeError
from revprobe.probes.readings import parquet
from tiny import made_probabilities

ABOUT = {"model": "m", "step": 3, "weights": "raw", "kind": "same_target", "objective": "masked"}
SIZE = 20
# Values of one column: objects are what `apply`, `map` and merges leave.
COLUMNS = {
    "objects, all numbers": pd.Series(range(SIZE), dtype=object),
    "objects, numbers and none": pd.Series([1, None] * 10, dtype=object),
    "objects, fractions and none": pd.Series([1.5, None] * 10, dtype=object),
    "objects, truths and none": pd.Series([True, None] * 10, dtype=object),
    "objects, texts and none": pd.Series(["a", None] * 10, dtype=object),
    "objects, texts and NaN": pd.Series(["a", np.nan] * 10, dtype=object),
    "objects, none": pd.Series([None] * SIZE, dtype=object),
    "dates": pd.Series([datetime.date(2026, 1, 2)] * SIZE, dtype=object),
    "times": pd.Series([pd.Timestamp("2026-01-02 03:04:05.6")] * SIZE),
    "nullable whole": pd.Series([1, None] * 10, dtype="Int64"),
    "nullable truths": pd.Series([True, None] * 10, dtype="boolean"),
    "arrow's texts": pd.Series(["a", None] * 10, dtype="string[pyarrow]"),
    "arrow's numbers": pd.Series([1, None] * 10, dtype="int64[pyarrow]"),
    "half precision": pd.Series(np.arange(SIZE, dtype=np.float16)),
    "single precision": pd.Series(np.arange(SIZE, dtype=np.float32) / 3),
    "bytes": pd.Series(np.arange(SIZE, dtype=np.uint8)),
    "categories of texts": pd.Series(["b", "a"] * 10).astype("category"),
    "categories of numbers": pd.Series([7, 3] * 10).astype("category"),
    "categories with gaps": pd.Series([7, None] * 10, dtype="Int64").astype("category"),
    "categories of truths": pd.Series([True, False] * 10).astype("category"),
    "more categories than rows have": pd.Series(["a"] * SIZE, dtype=pd.CategoricalDtype(["z", "a"])),
}


def reading(**columns: object) -> Reading:
    made = made_probabilities(0, "abcdefghij", ABOUT)
    assert len(made.frame) == SIZE
    return Reading(made.name, made.frame.assign(**columns), made.meta)


@pytest.mark.parametrize("what", COLUMNS)
def test_a_reading_with_any_column_is_read_as_it_was_saved(what: str, tmp_path: Path) -> None:
    """Saved without a word, it was refused as damaged, with the advice to delete it."""
    saved = reading(note=COLUMNS[what])
    found = Reading.load(saved.save(tmp_path / "r.parquet"))
    assert (found.value, found.interval) == (saved.value, saved.interval)
    for one, other in zip(found.frame["note"], COLUMNS[what], strict=True):
        assert (pd.isna(one) and pd.isna(other)) or one == other


@pytest.mark.parametrize("kind", ["category", "object", "convert_dtypes", "pyarrow"])
def test_frames_of_other_kinds_are_read_again(kind: str, tmp_path: Path) -> None:
    frame = reading().frame
    texts = [name for name in frame if name in ("fact", "kind", "direction")]
    made = {
        "category": lambda: frame.astype(dict.fromkeys([*texts, "rank"], "category")),
        "object": lambda: frame.astype(object),
        "convert_dtypes": lambda: frame.convert_dtypes(),
        "pyarrow": lambda: frame.convert_dtypes(dtype_backend="pyarrow"),
    }[kind]()
    saved = Reading("reverse_probability", made, ABOUT)
    assert Reading.load(saved.save(tmp_path / "r.parquet")).value == saved.value == reading().value


def test_a_changed_number_is_still_found(tmp_path: Path) -> None:
    """In a column of each kind: the digest is of what is read, category or not."""
    for what in ("categories of numbers", "objects, all numbers", "nullable whole"):
        file = reading(note=COLUMNS[what]).save(tmp_path / "r.parquet")
        table = pq.read_table(file)
        changed = pa.Table.from_pandas(table.to_pandas().assign(note=5), preserve_index=False)
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), file)
        with pytest.raises(RevprobeError, match="not those that were saved"):
            Reading.load(file)


def test_files_of_before_are_still_read(tmp_path: Path) -> None:
    """Their digest was of the frame itself, categories and all."""
    saved = reading(note=COLUMNS["categories with gaps"].astype("Int64"), text=COLUMNS["categories of texts"])
    file = saved.save(tmp_path / "r.parquet")
    table = pq.read_table(file)
    stored = dict(table.schema.metadata)
    stored[parquet._DIGEST] = parquet._digest(stored[parquet._META], saved.frame).encode()
    pq.write_table(table.replace_schema_metadata(stored), file)
    assert Reading.load(file).value == saved.value


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ([[1, 2]] * SIZE, "column 'note' holds list; expected numbers alone, texts alone, or dates alone"),
        (pd.Series([1, "a"] * 10, dtype=object), "column 'note' holds int, str; expected numbers alone"),
        ([{"a": 1}] * SIZE, "column 'note' holds dict"),
        (pd.Series([object()] * SIZE, dtype=object), "column 'note' holds object"),
    ],
)
def test_a_column_that_no_file_holds_is_named(column: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(RevprobeError, match=said):
        reading(note=column).save(tmp_path / "r.parquet")
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.int64(3), r"meta\['mine'\] is a int64, .*; expected text, numbers, lists and mappings"),
        (Path("x"), r"meta\['mine'\] is a \w*Path, .*such as str\(path\)"),
        ({"deep": [np.float32(1)]}, r"meta\['mine'\] is a dict, .*float32"),
    ],
)
def test_what_a_meta_cannot_hold_is_named(value: object, said: str, tmp_path: Path) -> None:
    made = reading()
    with pytest.raises(RevprobeError, match=said):
        Reading(made.name, made.frame, made.meta | {"mine": value}).save(tmp_path / "r.parquet")


def test_two_columns_of_one_name_are_named(tmp_path: Path) -> None:
    made = reading()
    twice = pd.concat([made.frame, made.frame[["rank"]]], axis=1)
    with pytest.raises(RevprobeError, match="two columns 'rank'; rename one"):
        parquet.write_reading(tmp_path / "r.parquet", {"meta": {}}, twice)
