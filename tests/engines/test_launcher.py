"""The engines by name, and the default: processes here, for which nothing of another engine is imported."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import revprobe as rp
from revprobe.engines import local
from revprobe.engines.child import Child, Ending, News
from revprobe.engines.known import ENGINES, launcher
from revprobe.engines.launcher import Display, Work
from revprobe.engines.local import LocalLauncher
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.finetune.runs.sweeps import work_of

SWEEP = """
name: grid
base:
  relation: {length: 4, alphabet: 8}
  model: {d_model: 16}
  training: {steps: 2, batch_size: 16, warmup_steps: 1, ema_decay: null, device: cpu}
  snapshots: {every: 2}
cells: [{position_encoding: alibi}, {objective: causal}]
"""


@pytest.fixture(scope="module")
def works() -> list[Work]:
    return [work_of(run) for run in parse_config(SWEEP, SweepConfig, "test").runs()]


def test_runs_of_this_machine_import_no_other_engine(tmp_path: Path) -> None:
    """Ray takes seconds to import and starts threads; who does not ask for it must not pay."""
    code = (
        "import sys\n"
        "asked = []\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'ray' or name.startswith('ray.'): asked.append(name)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import revprobe as rp\n"
        "rp.run_sweep('grid.yaml', jobs=2)\n"
        "assert 'revprobe.engines.local' in sys.modules\n"
        "assert not asked and 'ray' not in sys.modules, asked\n"
        "assert 'revprobe.engines.ray' not in sys.modules\n"
        "print('none')\n"
    )
    (tmp_path / "grid.yaml").write_text(SWEEP.replace(", {objective: causal}", ""))
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("none\n"), done.stdout + done.stderr
    assert all(run.finished for run in rp.open_sweep(tmp_path / "runs" / "grid").runs)


def test_local_is_the_default() -> None:
    assert isinstance(launcher("local"), LocalLauncher) and ENGINES[0] == "local"
    assert launcher("local").jobs == 1 and launcher("local", jobs=3).jobs == 3  # type: ignore[attr-defined]


def test_a_wrong_engine_and_an_address_for_none_are_named(tmp_path: Path) -> None:
    """Before the sweep's folder is made."""
    with pytest.raises(rp.RevprobeError, match="no engine 'locl' to run on; the closest is 'local'"):
        rp.run_sweep(parse_config(SWEEP, SweepConfig, "test"), on="locl", out=tmp_path)
    with pytest.raises(rp.RevprobeError, match=r"address 'here:1': local runs have none"):
        rp.run_sweep(parse_config(SWEEP, SweepConfig, "test"), address="here:1", out=tmp_path)
    with pytest.raises(rp.RevprobeError, match="batched=True trains all runs in this process"):
        rp.run_sweep(parse_config(SWEEP, SweepConfig, "test"), on="ray", batched=True, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_runs_that_were_not_asked_for_are_left_alone(tmp_path: Path) -> None:
    sweep = parse_config(SWEEP, SweepConfig, "test")
    with pytest.raises(rp.RevprobeError, match="grid has no run 'alibi-l4-s1'; the closest is 'alibi-l4-s0'"):
        rp.run_sweep(sweep, out=tmp_path, only=["alibi-l4-s1"])
    assert not list(tmp_path.iterdir())
    made = rp.run_sweep(sweep, out=tmp_path, only=["arm-l4-s0"])
    assert {run.path.name: run.finished for run in made.runs} == {"arm-l4-s0": True}
    assert rp.open_sweep(tmp_path / "grid").config == sweep, "the whole plan stays the folder's"


def test_a_work_carries_what_an_engine_places_it_by(works: list[Work]) -> None:
    config = parse_config(SWEEP.replace("device: cpu", "device: cuda, threads: 3"), SweepConfig, "test")
    assert [(one.name, one.threads, one.device) for one in map(work_of, config.runs())] == [
        ("alibi-l4-s0", 3, "cuda"),
        ("arm-l4-s0", 3, "cuda"),
    ]
    assert {(one.verb, one.steps, one.threads) for one in works} == {("train", 2, 1)}


# ---- a work's process ----


class _Printing(Child):
    """A child that prints what a test wants instead of doing its work."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-c", code], stdout=subprocess.PIPE, start_new_session=True
        )


LINES = (
    'import time\nprint(\'{"step": 1, "steps": 3, "loss": null}\')\nprint(\'a library says [1, 2\')\n'
    'time.sleep(0.6)\nprint(\'{"step": 3, "steps": 3, "loss": 0.5}\', end=\'\')\n'
)


@pytest.mark.parametrize("patient", [False, True])
def test_news_are_the_lines_that_are_news(patient: bool) -> None:
    """Also the last one, whose line nobody ended; and with patience, silence is told as None."""
    child = _Printing(LINES)
    told: Iterator[News | None] = child.news_or_none(0.1) if patient else child.news()
    heard = list(told)
    assert [one for one in heard if one] == [(1, 3, None), (3, 3, 0.5)]
    assert (None in heard) == patient
    assert child.process.wait() == 0


def test_a_child_that_does_not_end_when_asked_is_killed() -> None:
    child = _Printing("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('{}')\ntime.sleep(60)")
    assert child.process.stdout is not None and child.process.stdout.readline() == b"{}\n"
    child.stop(0.2)
    assert child.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("ending", "problem"),
    [
        (Ending(0, "note: slow"), None),
        (Ending(1, "note: slow\nerror: no such model\nbye"), "no such model"),
        (Ending(-9, ""), "killed by signal 9; run the same command again to go on"),
        (Ending(3, "it went\nwrong"), "wrong"),
        (Ending(3, ""), "ended with code 3 and no message"),
    ],
)
def test_how_a_child_ended_is_one_line(ending: Ending, problem: str | None) -> None:
    assert ending.problem == problem


def test_a_failing_work_does_not_stop_the_others(works: list[Work], tmp_path: Path) -> None:
    """Its line is the child's error line, and the notes of all come out."""
    (tmp_path / works[0].name).mkdir()
    (tmp_path / works[0].name / "notes.txt").write_text("mine")
    said: list[str] = []
    steps: dict[str, list[int]] = {work.name: [] for work in works}
    display = Display(lambda work: lambda step, of, loss: steps[work.name].append(step), said.append)
    problems = LocalLauncher(2).run_all(works, tmp_path, display)
    assert list(problems) == [works[0].name] and "not a run and not empty" in problems[works[0].name]
    assert rp.open_run(tmp_path / works[1].name).finished and steps[works[1].name][-1] == 2
    assert any(line.startswith(f"{works[1].name}: finished in ") for line in said), said


def test_a_work_whose_process_cannot_be_started_does_not_stop_the_others(
    works: list[Work], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more processes or files: its own problem, in one line, and the other trains to its end."""

    class Scarce(Child):
        def __init__(self, work: Work, folder: Path, *others: object) -> None:
            if work.name == works[0].name:
                raise OSError(24, "Too many open files")
            super().__init__(work, folder)

    monkeypatch.setattr(local, "Child", Scarce)
    said: list[str] = []
    display = Display(lambda work: lambda *news: None, said.append)
    problems = LocalLauncher(2).run_all(works, tmp_path, display)
    assert list(problems) == [works[0].name]
    assert "process could not be started" in problems[works[0].name] and "Too many open" in problems[works[0].name]
    assert rp.open_run(tmp_path / works[1].name).finished
    assert any(line.startswith(f"{works[0].name}: failed: its process") for line in said)


def test_a_work_has_the_threads_that_its_config_says(works: list[Work], tmp_path: Path) -> None:
    """Whatever the one that starts it has set for itself; the sums, so the bits, rest on them."""
    child = Child(works[0], tmp_path, {"OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": "7"})
    environ = Path(f"/proc/{child.process.pid}/environ")
    if not environ.exists():
        pytest.skip("this system does not show a process's environment")
    seen: dict[str, str] = {}
    ends = time.monotonic() + 20
    while "OMP_NUM_THREADS" not in seen and time.monotonic() < ends:  # empty for an instant, while it is replaced
        seen = dict(line.split("=", 1) for line in environ.read_text().split("\0") if "=" in line)
    child.stop()
    assert child.ended().code != 0
    assert (seen["OMP_NUM_THREADS"], seen["MKL_NUM_THREADS"]) == ("1", "1")
