"""One writer at a time, on several machines: who is silent is outwaited, and writes no more when he wakes.

Another machine is here a file that says so: its lease is written by hand, and renewed by a thread or not at all.
"""

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import revprobe as rp
from revprobe.atomic_files import folder_written_whole, guarded, require_held, write_text
from revprobe.engines.launcher import STARTED_BY, TAKES_OVER
from revprobe.finetune.training import run_lock as lock_file
from revprobe.finetune.training.checkpointing import complete_checkpoint
from revprobe.finetune.training.run_lock import LOCK, Lease, being_written, run_lock

THEIRS = Lease("another-machine", "far", 7, "theirs", 0.6)


def lease_of(run: Path) -> Lease:
    return Lease(**json.loads((run / LOCK).read_text()))


def put(run: Path, lease: Lease) -> None:
    """As another machine writes it: in place, and without this one's lock being in its way."""
    with (run / LOCK).open("r+b" if (run / LOCK).exists() else "w+b") as file:
        file.write(json.dumps(asdict(lease)).ljust(511).encode() + b"\n")


@contextmanager
def renewing(run: Path, lease: Lease) -> Iterator[None]:
    """Another machine that goes on."""
    over = threading.Event()

    def beat() -> None:
        now = lease
        while not over.wait(0.05):
            now = replace(now, beat=now.beat + 1)
            put(run, now)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPROBE_LEASE_SECONDS", "4")


def test_a_lease_is_renewed_while_it_is_held_and_given_back(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        first = lease_of(tmp_path)
        assert first.process == os.getpid() and first.machine == lock_file.machine()
        time.sleep(1.4)
        later = lease_of(tmp_path)
        assert later.beat > first.beat and later.token == first.token
        write_text(tmp_path / "a.txt", "written")
    assert (tmp_path / LOCK).read_bytes() == b"", "the folder is another than that of a run elsewhere"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to wait for
        with run_lock(tmp_path):
            assert lease_of(tmp_path).token != first.token
    put(tmp_path, first)  # killed on this machine: the kernel has let go of its lock
    began = time.monotonic()
    with run_lock(tmp_path):
        assert time.monotonic() - began < 0.5


def test_a_machine_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, THEIRS)
    with (
        renewing(tmp_path, THEIRS),
        pytest.warns(UserWarning, match=r"was last written from far; watching for 0\.6 s"),
        pytest.raises(rp.RevprobeError, match="is being written by another process, on far; wait for it"),
        run_lock(tmp_path),
    ):
        pass
    assert lease_of(tmp_path).token == "theirs"


def test_a_silent_machine_is_outwaited(tmp_path: Path) -> None:
    """Not a moment before its whole time has passed, which is its own to say."""
    put(tmp_path, replace(THEIRS, seconds=2.5))
    began = time.monotonic()
    with pytest.warns(UserWarning, match="last written from far"), run_lock(tmp_path):
        assert time.monotonic() - began >= 2.5
        assert lease_of(tmp_path).host != "far"


def test_who_takes_over_waits_for_one_that_is_about_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TAKES_OVER, "1")
    put(tmp_path, THEIRS)
    going_on = renewing(tmp_path, THEIRS)
    going_on.__enter__()
    ended: list[float] = []

    def end() -> None:
        ended.append(time.monotonic())
        going_on.__exit__(None, None, None)

    timer = threading.Timer(0.5, end)
    timer.start()
    with pytest.warns(UserWarning, match="last written from far"), run_lock(tmp_path):
        assert ended and time.monotonic() - ended[0] >= THEIRS.seconds * 0.9
    timer.join()


def test_who_lost_the_folder_replaces_nothing_in_it(tmp_path: Path) -> None:
    """Files, folders and checkpoints alike; what lies elsewhere is not concerned."""
    (tmp_path / "run").mkdir()
    run = tmp_path / "run"
    write_text(run / "a.txt", "before")
    with run_lock(run):
        put(run, THEIRS)
        time.sleep(1.4)
        with pytest.raises(
            rp.RevprobeError, match="stops writing, since far has taken the folder; run the same command"
        ):
            write_text(run / "a.txt", "after")
        with pytest.raises(rp.RevprobeError, match="far has taken"), folder_written_whole(run / "b", lambda _: True):
            pass
        working = run / "checkpoints" / "checkpoint-3"
        working.mkdir(parents=True)
        with pytest.raises(rp.RevprobeError, match="far has taken"):
            complete_checkpoint(run, 3, working=working)
        write_text(tmp_path / "elsewhere.txt", "written")
    assert (run / "a.txt").read_text() == "before" and not (run / "b").exists()
    assert not list((run / "checkpoints").glob("step-*"))
    assert lease_of(run) == THEIRS, "it gave back what was another's"
    write_text(run / "a.txt", "after")  # not held any more: whoever writes now answers for it


def test_who_slept_through_half_of_his_time_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process wakes with its thread and its lease as they were; only the clock tells it."""
    with run_lock(tmp_path):
        now = lock_file._now
        monkeypatch.setattr(lock_file, "_now", lambda: now() + 2.1)
        with pytest.raises(rp.RevprobeError, match=r"its lease was not renewed for 2 s"):
            write_text(tmp_path / "a.txt", "after")
    assert not (tmp_path / "a.txt").exists()


def test_who_slept_on_a_machine_of_his_own_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that was closed: nobody has taken the folder, unless somebody has."""
    monkeypatch.delenv("REVPROBE_LEASE_SECONDS")
    with run_lock(tmp_path):
        now, own = lock_file._now, lease_of(tmp_path)
        monkeypatch.setattr(lock_file, "_now", lambda: now() + 3600)
        write_text(tmp_path / "a.txt", "after")
        assert lease_of(tmp_path).token == own.token and lease_of(tmp_path).beat > own.beat
        put(tmp_path, THEIRS)
        monkeypatch.setattr(lock_file, "_now", lambda: now() + 7200)
        with pytest.raises(rp.RevprobeError, match="far has taken the folder"):
            write_text(tmp_path / "a.txt", "later")
    assert (tmp_path / "a.txt").read_text() == "after" and lease_of(tmp_path) == THEIRS


def test_guards_are_asked_by_folder_and_go_with_their_block(tmp_path: Path) -> None:
    def refuse() -> None:
        raise rp.RevprobeError("refused")

    with guarded(tmp_path / "run", refuse):
        with pytest.raises(rp.RevprobeError, match="refused"):
            require_held(tmp_path / "run" / "deep" / "file")
        require_held(tmp_path / "running")
    require_held(tmp_path / "run" / "file")


def test_whether_another_machine_writes_is_told_by_the_age_of_its_lease(tmp_path: Path) -> None:
    assert being_written(tmp_path) is False
    put(tmp_path, replace(THEIRS, seconds=60.0))
    assert being_written(tmp_path) is True
    os.utime(tmp_path / LOCK, (time.time() - 61, time.time() - 61))
    assert being_written(tmp_path) is False
    (tmp_path / LOCK).write_text("half of what anoth")
    assert being_written(tmp_path) is True


def test_a_run_that_was_left_alone_ends(tmp_path: Path) -> None:
    """An engine whose machine part dies leaves processes behind, which would write beside those that take over."""
    holding = (
        "import sys, time; from pathlib import Path; from revprobe.finetune.training.run_lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    gone = 2**22 + 1  # no process has such a number
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", holding, str(tmp_path)],
        env=os.environ | {STARTED_BY: str(gone)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = child.communicate(timeout=60)
    assert out == "held\n" and child.returncode == -15, (out, err)
    assert "stops writing, since the one that started it has ended" in err
