"""A file appears whole or not at all: a write that fails leaves the old content, and nothing beside it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from revprobe import RevprobeError
from revprobe.atomic_files import write_text, written_whole


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
