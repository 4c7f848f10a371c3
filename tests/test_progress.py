"""How far a long call is: one bar with the time left where it can be seen, the caller's function, or nothing.

The clock is a fake one, so that a slow call takes no time; the calls are small functions of our own and public ones.
"""

import inspect
import io
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import revprobe as rp
from revprobe import progress as module
from revprobe.finetune.runs.progress import bars
from revprobe.finetune.runs.sweeps import Sweep
from revprobe.progress import Progress, counted, counted_together, shows_progress
from revprobe.report.html.report import write_report
from tiny import gpt2


class Screen(io.StringIO):
    """What a terminal was sent."""

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    found = Screen()
    looked_at(found, monkeypatch)
    monkeypatch.delenv("RANK", raising=False)
    return found


def looked_at(stderr: io.StringIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's own view of stderr: pytest puts back that of everyone between a fixture and its test."""
    monkeypatch.setattr(module, "sys", SimpleNamespace(modules=sys.modules, stderr=stderr))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars that were made, held here, so that it is not the collector that closes them."""
    found: list[Any] = []
    make = module._made
    monkeypatch.setattr(module, "_made", lambda *about: found.append(make(*about)) or found[-1])
    return found


def slow(clock: Clock, seconds: float = 1.0) -> Callable[..., list[int]]:
    """A call over ten items of so many seconds each."""

    @shows_progress("items")
    def read_ten(*, fail_at: int = 99, progress: Progress | bool | None = None) -> list[int]:
        done = []
        for item in counted(range(10), progress):
            clock.now += seconds
            done.append(item)
            if item == fail_at:
                raise rp.RevprobeError("item: expected another")
        return done

    return read_ten


def test_a_slow_call_shows_a_bar_with_the_time_left_that_is_gone_at_the_end(
    screen: Screen, clock: Clock, made: list[Any]
) -> None:
    assert slow(clock)() == list(range(10)), "the call gives what it gives"
    text = screen.getvalue()
    assert "read_ten" in text and "1.00s/items" in text, text
    first = next(part for part in text.split("\r") if "/10" in part)
    assert "2/10 [00:02<00:08," in first, f"after two items of one second each eight are left: {first!r}"
    assert text.rstrip(" \n").endswith("\r"), "the line is cleared"
    assert [bar.disable for bar in made] == [True], "the bar is closed"


def test_a_quick_call_shows_nothing(screen: Screen, clock: Clock) -> None:
    slow(clock, seconds=0.1)()
    assert screen.getvalue() == "", "two seconds have not passed"


def test_false_shows_nothing_and_a_function_is_called_instead(screen: Screen, clock: Clock) -> None:
    told: list[tuple[int, int]] = []
    slow(clock)(progress=False)
    slow(clock)(progress=lambda *counts: told.append(counts))
    assert told == [(done, 10) for done in range(1, 11)]
    assert screen.getvalue() == "", screen.getvalue()
    slow(clock)(progress=True)
    assert "read_ten" in screen.getvalue(), "True is as None"


def test_a_call_that_raises_leaves_no_bar_and_the_next_one_has_its_own(
    screen: Screen, clock: Clock, made: list[Any]
) -> None:
    with pytest.raises(rp.RevprobeError, match="expected another"):
        slow(clock)(fail_at=5)
    assert [bar.disable for bar in made] == [True], "the bar is closed"
    assert screen.getvalue().rstrip(" \n").endswith("\r"), "and its line is cleared"
    before = len(screen.getvalue())
    slow(clock)()
    assert "read_ten" in screen.getvalue()[before:], "the next call is no part of the one that failed"


def test_calls_inside_a_call_show_no_bar_of_their_own(screen: Screen, clock: Clock) -> None:
    inner = slow(clock)

    @shows_progress("checkpoints")
    def outer(*, progress: Progress | bool | None = None) -> None:
        for _ in counted(range(3), progress):
            inner()

    outer()
    assert "outer" in screen.getvalue() and "read_ten" not in screen.getvalue(), screen.getvalue()
    screen.truncate(0)
    outer(progress=False)
    outer(progress=lambda *_: None)
    assert "read_ten" not in screen.getvalue(), "who wants none, or draws his own, gets none from inside"


def test_bars_of_the_command_line_stand_alone(screen: Screen, clock: Clock) -> None:
    with bars():
        slow(clock)()
    assert "read_ten" not in screen.getvalue(), "two bars at once"


@pytest.mark.parametrize("where", ["no terminal", "no stderr", "another thread", "another process", "bars are off"])
def test_nothing_is_drawn_where_nobody_looks(
    where: str, screen: Screen, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    if where == "no terminal":
        looked_at(log, monkeypatch)
    if where == "no stderr":
        looked_at(None, monkeypatch)
    if where == "another process":
        monkeypatch.setenv("RANK", "1")
    if where == "bars are off":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    run = threading.Thread(target=slow(clock)) if where == "another thread" else SimpleNamespace(start=slow(clock))
    run.start()
    if isinstance(run, threading.Thread):
        run.join()
    assert (log.getvalue(), screen.getvalue()) == ("", ""), where


def test_a_count_that_begins_anew_and_one_that_grows(screen: Screen, clock: Clock) -> None:
    @shows_progress("queries", reads=lambda name, done, total: (done, total, name))
    def two_lists(*, progress: Callable[[str, int, int], None] | bool | None = None) -> None:
        assert callable(progress)
        for name, total in (("a", 4), ("b", 6)):
            for done in range(1, total + 1):
                clock.now += 1.0
                progress(name, done, total + (done > 3))

    two_lists()
    shown = [part for part in screen.getvalue().split("\r") if "items" in part or "queries" in part]
    assert any("1/6 " in part and ", b]" in part for part in shown), f"the second list counts from its start: {shown}"
    assert any("/7 " in part for part in shown), f"a total that grows is shown: {shown}"


def test_in_a_notebook_it_is_the_notebooks_kind(tmp_path: Path) -> None:
    """In a real kernel: a widget is displayed, and nothing is written to stderr."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    code = """
from revprobe import progress
progress.DELAY = -1.0
@progress.shows_progress("items")
def read(*, progress=None):
    for done in range(3):
        if progress is not None:
            progress(done + 1, 3)
read()
read(progress=False)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = notebook.cells[0].outputs
    widgets = [out for out in outputs if "application/vnd.jupyter.widget-view+json" in out.get("data", {})]
    assert len(widgets) == 1, outputs
    assert not [out for out in outputs if out.get("name") == "stderr"], outputs


def test_several_lists_are_counted_as_one() -> None:
    told: list[tuple[int, int]] = []
    watch = counted_together(5, lambda *counts: told.append(counts))
    assert [*watch("abc"), *watch("de")] == list("abcde")
    assert told == [(done, 5) for done in range(1, 6)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small run with three checkpoints."""
    config = {
        "name": "small",
        "model": {"position_encoding": "rope", "d_model": 8},
        "relation": {"length": 3, "alphabet": 4},
        "training": {"steps": 2, "batch_size": 8, "warmup_steps": 0, "device": "cpu"},
        "snapshots": {"every": 1},
    }
    return rp.train(config, tmp_path_factory.mktemp("runs") / "small", listener=False)


@pytest.mark.parametrize("name", ["storage_curves", "placeholder_storage", "pressure", "one_step", "compare"])
def test_calls_over_a_run_count_its_checkpoints(
    name: str, run: Any, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DELAY", -1.0)
    told: list[tuple[int, int]] = []
    call = getattr(rp, name)
    call(run, progress=lambda *counts: told.append(counts))
    assert told and told == [(done, len(told)) for done in range(1, len(told) + 1)], told
    call(run, progress=False)
    assert screen.getvalue() == "", "nothing where nothing is asked for"
    call(run)
    assert f"{name}:" in screen.getvalue() and "probe_" not in screen.getvalue(), screen.getvalue()


def test_training_shows_its_steps_and_the_loss(
    tmp_path: Path, run: Any, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DELAY", -1.0)
    rp.train(run.config, tmp_path / "shown")
    assert "train:" in screen.getvalue() and "/2 [" in screen.getvalue(), screen.getvalue()
    assert "probe:" not in screen.getvalue(), "readings on the way have no bar of their own"
    screen.truncate(0)
    rp.train(run.config, tmp_path / "silent", listener=False)
    assert "train:" not in screen.getvalue(), screen.getvalue()


def test_a_report_counts_what_it_reads(
    run: Any, screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading once for the numbers and once for the tabs: of both, the counts go on to the end."""
    monkeypatch.setattr(module, "DELAY", -1.0)
    told: list[tuple[int, int]] = []
    records, page = [run.record(progress=False)], tmp_path / "report.html"
    write_report(records, page, progress=lambda *counts: told.append(counts))
    total = 2 * len(records[0].readings)
    assert told == [(done, total) for done in range(1, total + 1)] and total > 0, told
    write_report(records, page, progress=False)
    assert screen.getvalue() == "", "nothing where nothing is asked for"
    write_report(records, page)
    assert "write_report:" in screen.getvalue() and f"/{total} " in screen.getvalue(), screen.getvalue()


def test_reading_a_run_and_a_sweep_counts_what_is_read(
    run: Any, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of many checkpoints, or a sweep of many runs, takes seconds before there is anything to draw."""
    monkeypatch.setattr(module, "DELAY", -1.0)
    monkeypatch.setattr(Sweep, "config", SimpleNamespace(runs=lambda: [run.config]))
    readings, sweep = run.readings(progress=False), Sweep(run.path.parent)
    load = partial(rp.Readings.load, run.path / "readings")
    each = len(readings)
    calls = [("readings", run.readings, each), ("record", run.record, each), ("load", load, each)]
    calls += [("measures", readings.measures, each), ("summary", readings.summary, each)]
    calls += [("to_frame", readings.to_frame, each), ("plot", readings.plot, each)]
    roles = readings.select(name="gradient_cosine")[0]
    calls += [("summary", partial(roles.summary, by="role"), roles.frame["role"].nunique())]
    calls += [("theory_tables", partial(rp.theory_tables, samples=2), 3)]
    calls += [("records", sweep.records, 1), ("summary", sweep.summary, 1)]
    for name, call, total in calls:
        told: list[tuple[int, int]] = []
        call(progress=lambda *counts, told=told: told.append(counts))
        assert told == [(done, total) for done in range(1, total + 1)] and total > 0, (name, told)
        call(progress=False)
        assert screen.getvalue() == "", f"{name}: nothing where nothing is asked for"
        call()
        assert f"{name}:" in screen.getvalue() and f"/{total} " in screen.getvalue(), screen.getvalue()
        screen.truncate(0)
        screen.seek(0)


def test_a_probe_shows_its_queries(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DELAY", -1.0)
    model = gpt2()
    rp.probe_reverse_probability(model, rp.letter_pairs(5, model=model)[:4])
    assert "probe_reverse_probability:" in screen.getvalue() and "queries" in screen.getvalue()


# What takes pairs, prompts or runs and shows no progress, and why.
SILENT = {"edit_attention": "a context: what is run inside it is the caller's"}


def test_every_public_call_over_pairs_prompts_or_runs_tells_how_far_it_is() -> None:
    """A new function that takes some of these and no `progress` turns this red."""
    loops, silent = {"pairs", "prompts", "questions", "run", "runs"}, set()
    for name in rp.__all__:
        value = getattr(rp, name)
        if inspect.isfunction(value):
            parameters = set(inspect.signature(value).parameters)
            if loops & parameters and not {"progress", "listener"} & parameters:
                silent.add(name)
    assert silent - set(SILENT) == set(), "give them a progress= with @shows_progress"
