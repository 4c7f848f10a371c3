"""A file appears whole or not at all: a write that fails leaves the old content, and nothing beside it."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import revprobe as rp
from revprobe import RevprobeError
from revprobe.atomic_files import folder_written_whole, write_text, written_whole
from tiny import pairs_at, radd


def test_the_file_is_there_only_after_the_block(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with written_whole(path) as part:
        part.write_bytes(b"half")
        assert not path.exists()
        part.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(type(error)), written_whole(path) as part:
        part.write_text("ne", encoding="utf-8")
        raise error
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_threads_write_one_path_each_whole(tmp_path: Path) -> None:
    """The dashboard and notebooks write from threads; a name shared by them lets one rename the other's half."""
    path, started = tmp_path / "a.txt", threading.Barrier(2)

    def write(letter: str) -> None:
        with written_whole(path) as part:
            started.wait(timeout=60)
            part.write_text(letter * 10, encoding="utf-8")
            started.wait(timeout=60)
        seen.append(path.read_text(encoding="utf-8"))

    seen: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, "ab"))
    assert set(seen) <= {"a" * 10, "b" * 10} and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_the_error_that_comes_out(tmp_path: Path) -> None:
    with pytest.raises(RevprobeError, match=r"no folder '.*absent'; make it"), written_whole(tmp_path / "absent" / "a"):
        pass


def test_a_folder_of_that_name_is_not_written_over(tmp_path: Path) -> None:
    """The rename would say so after the work, by its working name."""
    with pytest.raises(RevprobeError, match="is a folder; expected the name of a file"), written_whole(tmp_path):
        pass


def test_a_part_is_not_taken_for_a_finished_file(tmp_path: Path) -> None:
    """Readers find readings by their ending; what another process is still writing must not match."""
    with written_whole(tmp_path / "a.parquet") as part:
        part.touch()
        assert list(tmp_path.glob("*.parquet")) == []


def test_text_keeps_its_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "é\r\nz\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\r\nz\n".encode()


# --- folders ---------------------------------------------------------------------------------------------------------


def is_table(entry: Path) -> bool:
    return entry.suffix == ".csv"


def test_a_folder_is_replaced_only_after_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "readings"
    for text in ("old", "new"):
        with folder_written_whole(folder, is_table) as part:
            (part / f"{text}.csv").write_text(text)
            assert [path.name for path in folder.glob("*")] == ([] if text == "old" else ["old.csv"])
    assert [path.name for path in folder.iterdir()] == ["new.csv"] and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "readings"
    with folder_written_whole(folder, is_table) as part:
        (part / "old.csv").touch()
    with pytest.raises(type(error)), folder_written_whole(folder, is_table) as part:
        (part / "new.csv").touch()
        raise error
    assert [path.name for path in folder.iterdir()] == ["old.csv"] and list(tmp_path.iterdir()) == [folder]


def test_a_writer_that_dies_between_the_renames_loses_neither_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "readings", Path.rename
    with folder_written_whole(folder, is_table) as part:
        (part / "old.csv").touch()

    def dies(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt), folder_written_whole(folder, is_table) as part:
        (part / "new.csv").touch()
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ZeroDivisionError), folder_written_whole(folder, is_table):
        raise ZeroDivisionError
    assert [path.name for path in folder.iterdir()] == ["old.csv"]


@pytest.mark.parametrize("save", ["readings", "sweep", "comparison"])
def test_what_is_saved_as_a_folder_never_replaces_what_is_not_its_own(tmp_path: Path, save: str) -> None:
    """`save(".")` or `save("my-project")` by mistake would otherwise take everything there with it."""
    model, pairs = radd(), pairs_at((2, 5), (5, 2))
    made = {
        "readings": lambda: rp.probe(model, pairs),
        "sweep": lambda: rp.block_sweep(model, pairs, sizes=[8, None], only=["attention"]),
        "comparison": lambda: rp.compare_models({"a": model, "b": model}, pairs, only=["attention"]),
    }[save]()
    place = tmp_path / "my-project"
    made.save(place)
    made.save(place)  # over its own
    (place / "thesis.tex").write_text("years of work")
    with pytest.raises(RevprobeError, match=r"holds 'thesis\.tex', which would be lost"):
        made.save(place)
    assert (place / "thesis.tex").read_text() == "years of work"
    # A folder of years, or of a repository's history, is no model's or size's readings, whatever its name.
    for name in ("2024", ".git", "block_sweep", "comparison"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "first.jpg").touch()
        with pytest.raises(RevprobeError, match=f"holds '{name}', which would be lost"):
            made.save(tmp_path / "photos")
        (tmp_path / "photos" / name / "first.jpg").unlink()
        (tmp_path / "photos" / name).rmdir()
    (tmp_path / "photos").rmdir()
    assert sorted(os.listdir(tmp_path)) == ["my-project"]
