"""The dashboard shows the folder as it is, reads nothing outside it, and what is broken breaks nothing else."""

import fcntl
import json
import math
import os
import shutil
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import revprobe as rp
from revprobe import Reading, RevprobeError
from revprobe.cli.main import app as command_line
from revprobe.finetune.config.loading import dump_config
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.finetune.runs.alerts import ALERTS
from revprobe.finetune.runs.kept_tables import TABLES
from revprobe.finetune.training.run_lock import run_lock
from revprobe.probes.figures.theme import COLOURS
from revprobe.report.dashboard import folder as dashboard_data
from revprobe.report.dashboard.app import make_app
from revprobe.report.dashboard.choices import settle
from revprobe.report.dashboard.folder import RunsFolder
from revprobe.report.dashboard.listed_runs import BOUND, Listed, ReadingFile, short_words, state_words
from revprobe.report.dashboard.open_pair import PairOpener, disagreement
from revprobe.report.dashboard.page import alerts_shown
from revprobe.report.dashboard.pair_strips import opened_pair, shade
from revprobe.report.dashboard.run_list import runs_list
from revprobe.report.dashboard.server import TOKEN, make_dashboard_server
from revprobe.report.dashboard.view import LAST, View
from revprobe.report.dashboard.views import (
    alerts_judged,
    checkpoint_figure,
    chosen_weights,
    curves,
    filter_values,
    filtered,
    pair_row,
    reading_at,
)
from revprobe.report.summary.alerts import alerts_table
from revprobe.report.summary.families import stem_of
from revprobe.report.summary.seed_bands import SEEDS_KEY, pool_seeds
from tiny import module_at

ATTENTION = "attention_correlation"


made = module_at(Path(__file__).with_name("dashboard_runs.py"))


def listed(folder: Path) -> dict[str, Listed]:
    return {run.key: run for run in RunsFolder(folder).scan()}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, its readings really taken from its checkpoints."""
    folder = tmp_path_factory.mktemp("real")
    made.write_real_run(folder / "rope-s0", made.run_config("rope-s0"))
    return folder


def test_every_kind_of_run_is_listed_where_it_stands(tmp_path: Path, real: Path) -> None:
    """One-layer runs, fine-tunings, and a sweep in the order of its config with what has not begun."""
    shutil.copytree(real / "rope-s0", tmp_path / "alone")
    made.write_run(tmp_path / "ft", 0, 5, config=made.finetune_config("ft"))
    base = made.run_config("x").model_dump(exclude={"name"})
    sweep = SweepConfig(
        name="grid", base=base, cells=[{"position_encoding": ["rope", "alibi"], "length": 4, "seed": 0}]
    )
    second, first = reversed([run.name for run in sweep.runs()])
    made.write_run(tmp_path / "grid" / second, 0, config=sweep.runs()[1])
    (tmp_path / "grid" / "sweep.yaml").write_text(dump_config(sweep))
    (tmp_path / "theory").mkdir()
    (tmp_path / "theory" / "theory.csv").write_text("no run")
    found = listed(tmp_path)
    assert list(found) == ["alone", "ft", f"grid/{first}", f"grid/{second}"], "or a folder that is no run is listed"
    assert [run.state for run in found.values()] == ["finished", "interrupted", "not begun", "interrupted"]
    assert found["alone"].axes == {"objective": "masked", "position_encoding": "rope", "length": 4, "seed": 0}
    assert found["ft"].axes["dataset"] == "invented_names" and found["ft"].steps == [0, 5] and found["ft"].total == 10
    assert found[f"grid/{first}"].group == "grid" and found[f"grid/{first}"].axes["length"] == 4
    assert found["ft"].last == 5
    assert list(listed(tmp_path / "alone")) == ["."], "a single run can be looked at by itself"


def broken_folder(folder: Path) -> None:
    made.write_run(folder / "sound", 0, 5)
    (folder / "empty").mkdir()
    made.write_run(folder / "no-config", 0)
    (folder / "no-config" / "config.yaml").unlink()
    made.write_run(folder / "bad-config", 0)
    (folder / "bad-config" / "config.yaml").write_text("model: [unclosed")
    made.write_run(folder / "bytes", 0)
    (folder / "bytes" / "config.yaml").write_bytes(b"\xff\xfe\x00name")
    made.write_run(folder / "small")
    (folder / "small" / "config.yaml").write_text("layout: llada\ncorpus: {told: once}\n")
    cut = made.write_run(folder / "cut", 0, 5) / "readings" / "step-000005" / "attention_correlation.raw.parquet"
    cut.write_bytes(cut.read_bytes()[:-200])
    flipped = made.write_run(folder / "flipped", 0, 5) / "readings" / "step-000005" / "reverse_probability.raw.parquet"
    middle = bytearray(flipped.read_bytes())
    middle[100:160] = bytes(byte ^ 0xFF for byte in middle[100:160])
    flipped.write_bytes(bytes(middle))
    failed = made.write_run(folder / "failed", 0)
    (failed / "problem.txt").write_text(made.EVIL)
    ft = made.write_run(folder / "ft", 0, config=made.finetune_config("ft"))
    (ft / "resolved.json").write_text("{")
    made.write_run(folder / "begun")
    (folder / "begun" / "readings" / ".step-000000.part").mkdir(parents=True)
    (folder / "sweep").mkdir()
    (folder / "sweep" / "sweep.yaml").write_text("{")


@pytest.mark.parametrize(
    ("key", "state", "words"),
    [
        ("empty", "empty", "no config.yaml yet"),
        ("no-config", "damaged", "half-written: it has no config.yaml"),
        ("bad-config", "damaged", "config.yaml"),
        ("bytes", "damaged", "config.yaml"),
        ("small", "empty", "one small model, pretrained: no run, so nothing to draw"),
        ("cut", "interrupted", "interrupted at step 5 of 10, last checkpoint 2 min ago"),
        ("flipped", "interrupted", "at step 5 of 10"),
        ("failed", "failed", "failed: <script>document.title"),
        ("ft", "damaged", "resolved.json is damaged"),
        ("begun", "interrupted", "interrupted before its first checkpoint"),
        ("sweep", "damaged", "sweep.yaml"),
        ("sound", "interrupted", "interrupted at step 5 of 10"),
    ],
)
def test_a_run_that_is_not_whole_says_why(tmp_path: Path, key: str, state: str, words: str) -> None:
    broken_folder(tmp_path)
    run = listed(tmp_path)[key]
    told = state_words(run, (run.written or 0.0) + 130)
    assert run.state == state and words in told, told
    assert "\n" not in told, "the state is one line"


def test_broken_runs_leave_the_others_drawn_and_damaged_files_are_named(tmp_path: Path) -> None:
    """All at once: what is sound is drawn, also of a run with one damaged file, and each damage has a line."""
    broken_folder(tmp_path)
    folder = RunsFolder(tmp_path)
    figure, table, _, problems = curves(folder, folder.scan(), weights="ema", bands="facts")
    drawn = {trace.meta["run"] for trace in figure.data}
    assert drawn == {"sound", "no-config", "bad-config", "bytes", "cut", "flipped", "failed", "ft"}
    assert len(problems) == 2, problems
    assert problems[0].startswith("cut: ") and "damaged" in problems[0], problems[0]
    assert problems[1].startswith("flipped: ") and "reverse_probability.raw.parquet is damaged" in problems[1]
    # Only the probabilities of step 5 are lost; the correlation of the same step is there.
    row = table.set_index("run").loc["flipped"]
    assert row["step"] == "5" and row["forward probability"] == "-" and row["attention correlation"] != "-"
    assert len(runs_list(folder.scan(), ["sound"], now=0.0)) >= 1, "the list is made of them all"


def test_numbers_on_the_page_are_those_of_the_readings(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "a", 0, 5)
    folder = RunsFolder(tmp_path)
    figure, *_ = curves(folder, folder.scan(), weights="ema", bands="facts")
    drawn = next(t for t in figure.data if t.meta["part"] == "value" and t.yaxis == "y")
    files = [run / "readings" / f"step-{step:06d}" / f"{ATTENTION}.raw.parquet" for step in (0, 5)]
    assert list(drawn.y) == [Reading.load(file).value for file in files]
    assert all(trace.visible for trace in figure.data)


def test_a_file_is_parsed_again_only_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polling an unchanged folder opens no readings file; a new checkpoint costs its own files and no others."""
    run = made.write_run(tmp_path / "a", 0, 5)
    loaded: list[Path] = []
    real_load = Reading.load
    monkeypatch.setattr(dashboard_data.Reading, "load", lambda path: loaded.append(path) or real_load(path))
    described: list[Path] = []
    real_open = dashboard_data.open_read_run
    monkeypatch.setattr(
        dashboard_data, "open_read_run", lambda path, text: described.append(path) or real_open(path, text)
    )
    folder = RunsFolder(tmp_path)
    version = folder.version(folder.scan())
    folder.measures(folder.scan())
    assert len(loaded) == 4 and len(described) == 1
    folder.measures(folder.scan())
    assert folder.version(folder.scan()) == version, "nothing changed"
    assert len(loaded) == 4 and len(described) == 1, "an unchanged folder was read again"
    made.write_step(run, 10)
    runs = folder.scan()
    assert folder.version(runs) != version and runs[0].steps == [0, 5, 10]
    folder.measures(runs)
    assert len(loaded) == 6 and {path.parent.name for path in loaded[4:]} == {"step-000010"}
    changed = run / "readings" / "step-000000" / f"{ATTENTION}.raw.parquet"
    changed.write_bytes(changed.read_bytes()[:-9])
    _, problems = folder.measures(folder.scan())
    assert loaded[6:] == [changed.resolve()] and "damaged" in problems["a"][0]


@pytest.fixture
def opened_paths() -> Iterator[list[str]]:
    """Every path that Python opens or lists from here on."""
    seen: list[str] = []
    on = [True]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if on[0] and event in ("open", "os.scandir", "os.listdir") and arguments:
            seen.append(str(arguments[0]))

    sys.addaudithook(hear)  # cannot be removed again, only told to be quiet
    yield seen
    on[0] = False


def test_nothing_outside_the_folder_is_read(
    tmp_path: Path, opened_paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links out of the folder, to a run, into one, and by way of another link, and a neighbour of a like name."""
    outside = made.write_run(tmp_path / "runs-secret" / "secret", 0)
    inside = tmp_path / "runs"
    made.write_run(inside / "sound", 0)
    (inside / "linked-run").symlink_to(outside)
    (inside / "linked-up").symlink_to("..")
    for name in ("readings", "config.yaml", "checkpoints"):
        made.write_run(inside / f"with-{name}", 0)
        part = inside / f"with-{name}" / name
        shutil.rmtree(part) if part.is_dir() else part.unlink()
        part.symlink_to(outside / name)
    made.write_run(inside / "one-file", 0)
    file = inside / "one-file" / "readings" / "step-000000" / f"{ATTENTION}.raw.parquet"
    file.unlink()
    file.symlink_to(outside / "readings" / "step-000000" / file.name)
    made.write_run(inside / "by-way")
    (inside / "by-way" / "readings").symlink_to(inside / "with-readings" / "readings")
    made.write_run(inside / "twice", 0)  # a link to another run of the folder leads nowhere out
    (inside / "sound-again").symlink_to(inside / "sound")
    opened_paths.clear()
    loads: list[Path] = []
    real_load = Reading.load
    monkeypatch.setattr(dashboard_data.Reading, "load", lambda path: loads.append(path) or real_load(path))
    folder = RunsFolder(inside)
    runs = {run.key: run for run in folder.scan()}
    folder.measures(list(runs.values()))
    bad = {key for key, run in runs.items() if run.state == "damaged"}
    names = {"linked-run", "linked-up", "with-readings", "with-config.yaml", "with-checkpoints", "one-file", "by-way"}
    assert bad == names, runs
    assert all("leads out of" in str(runs[key].problem) and not runs[key].files for key in bad), runs
    assert {path.parts[-4] for path in loads} == {"sound", "twice"}
    touched = [path for path in opened_paths if "runs-secret" in str(Path(path).resolve())]
    assert not touched, touched
    for key in ("../runs-secret/secret", str(outside), "sound/../../runs-secret/secret", "..", "", "sound-again"):
        with pytest.raises(RevprobeError, match="no run"):
            folder.run(key)
    sneaked = ReadingFile(outside / "readings" / "step-000000" / file.name, 0, ATTENTION, "raw", (0, 0))
    numbers, problems = folder.measures([Listed("x", "", "x", "open", files=(sneaked,))])
    assert numbers.empty and "leads out of" in problems["x"][0], "a path is checked again when it is opened"


def test_many_runs_are_listed_with_one_bounded_read_each(tmp_path: Path, opened_paths: list[str]) -> None:
    """A hundred runs: the list opens each config once, no readings file, and nothing again while nothing changes."""
    run = made.write_run(tmp_path / "run-000", 0, 5, 10)
    for name in ("stored_evidence", "route_edit", "causal_trace", "objective_terms"):
        (run / "readings" / "step-000010" / f"{name}.raw.parquet").write_text("not to be opened for a list")
    for name in TABLES.values():
        (run / name).write_text("not to be opened for a list")
    for place in range(1, 100):
        shutil.copytree(tmp_path / "run-000", tmp_path / f"run-{place:03d}")
    folder = RunsFolder(tmp_path)
    opened_paths.clear()
    runs = folder.scan()
    assert len(runs) == 100 and {run.state for run in runs} == {"interrupted"}
    opened = [path for path in opened_paths if Path(path).is_file()]
    configs = [str(tmp_path / f"run-{place:03d}" / "config.yaml") for place in range(100)]
    assert sorted(opened) == configs, "a file was opened beside the configs, or one of them twice"
    opened_paths.clear()
    folder.scan()
    assert not [path for path in opened_paths if Path(path).is_file()], "an unchanged run was read again"


def test_alerts_are_listed_without_opening_anything_and_shown_as_in_the_report(
    tmp_path: Path, opened_paths: list[str]
) -> None:
    """What the run has written of its alerts is told by its size; the page's table is judged from the numbers drawn."""
    rules = [{"measure": "attention_correlation", "below": 2.0}, {"measure": "reverse_accuracy", "above": 2.0}]
    config = made.run_config("x").model_dump() | {"alerts": rules}
    ruled = RunConfig.model_validate(config)
    for name, text in {"crossed": "attention correlation ...\n", "holds": "", "silent": None}.items():
        run = made.write_run(tmp_path / name, 0, 5, config=ruled)
        if text is not None:
            (run / ALERTS).write_text(text)
    made.write_run(tmp_path / "without", 0, 5)
    opened_paths.clear()
    folder = RunsFolder(tmp_path)
    runs = {run.key: run for run in folder.scan()}
    opened = {Path(path).name for path in opened_paths if Path(path).is_file()}
    assert opened == {"config.yaml"}, "the list opened more"
    assert {key: run.alerted for key, run in runs.items()} == {
        **{"crossed": True, "holds": False, "silent": None, "without": None}
    }
    words = {key: str(runs_list([run], [], now=0.0)[0]) for key, run in runs.items()}
    assert "interrupted, alert, step 5" in words["crossed"] and "state problem" in words["crossed"]
    assert "of 2 alerts one or more crossed" in words["crossed"] and "2 alerts, none crossed" in words["holds"]
    assert "2 alerts, not judged by the run yet" in words["silent"] and "alert" not in words["without"]
    assert "state problem" not in words["holds"] + words["silent"] + words["without"]
    before = folder.version(folder.scan())
    (tmp_path / "holds" / ALERTS).write_text("now crossed\n")
    assert folder.version(folder.scan()) != before, "the page is not told"
    table = alerts_judged(folder, list(runs.values()))
    reported = alerts_table([rp.open_run(tmp_path / key).record() for key in ("crossed", "holds", "silent")])
    pd.testing.assert_frame_equal(table, reported)
    assert table["state"].tolist() == ["crossed"] * 3 + ["holds"] * 3 and table["since step"].tolist() == ["0"] * 6
    shown = str(alerts_shown(table))
    assert "3 of 6 alerts are crossed" in shown and "of 9 facts" in shown
    assert alerts_shown(alerts_judged(folder, [runs["without"]])) == []


def test_no_more_is_read_of_a_config_than_a_config_has(tmp_path: Path) -> None:
    """300 MB in the place of a config: the reason is given, and neither the bytes nor their YAML are taken in."""
    run = made.write_run(tmp_path / "a", 0)
    os.truncate(run / "config.yaml", 300_000_000)
    tracemalloc.start()
    problem = listed(tmp_path)["a"].problem
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"more than {BOUND:,} bytes" in str(problem)
    assert peak < 10 * BOUND, f"{peak:,} bytes at once"


def test_a_run_that_is_held_trains_and_one_that_is_not_can_be_resumed(tmp_path: Path) -> None:
    """Its process holds the run's lock; whoever only looks never keeps a run from being taken up."""
    base = made.run_config("x").model_dump(exclude={"name"})
    sweep = SweepConfig(name="grid", base=base, cells=[{"position_encoding": "rope", "length": 4, "seed": [0, 1]}])
    names = [run.name for run in sweep.runs()]
    for name, config in zip(names, sweep.runs(), strict=True):
        made.write_run(tmp_path / "grid" / name, 0, 5, config=config)
    (tmp_path / "grid" / "sweep.yaml").write_text(dump_config(sweep))
    made.write_run(tmp_path / "toy", 0)
    made.write_run(tmp_path / "renamed", 0)
    folder = RunsFolder(tmp_path)
    with run_lock(tmp_path / "grid" / names[0]):
        runs = {run.key: run for run in folder.scan()}
        first, second = (runs[f"grid/{name}"] for name in names)
        assert (first.state, second.state) == ("training", "interrupted")
        now = float(first.written or 0) + 150
        assert short_words(first, now) == "training, 2 min ago, step 5 of 10"
        assert state_words(first, now) == "training, step 5 of 10, last checkpoint 2 min ago"
    assert folder.run(f"grid/{names[0]}").state == "interrupted", "the lock was let go"
    command = f"resume with `revprobe sweep {tmp_path}/grid/sweep.yaml --out {tmp_path}`"
    assert state_words(second, now).endswith(command), state_words(second, now)
    assert runs["toy"].resume == f"revprobe train {tmp_path}/toy/config.yaml --out {tmp_path}"
    assert runs["renamed"].resume == "", "its config would go on in another folder"
    asking = (tmp_path / "toy" / ".lock").open("a+")
    fcntl.flock(asking, fcntl.LOCK_SH)
    letting_go = threading.Timer(0.08, asking.close)
    letting_go.start()
    with run_lock(tmp_path / "toy"):  # waits for whoever only asks
        letting_go.join()


def test_a_view_comes_out_of_its_address_as_it_went_in() -> None:
    view = View(
        tab="pair",
        runs=("grid/a b&c=d", "e"),
        search="ro%pe",
        only={"state": ("training", "failed"), "seed": ("0",)},
        run="e",
        step=500,
        stored="raw",
        figure="scatter",
        layer=3,
        head=0,
        fact=made.EVIL,
        pair=7,
        weights="both",
        bands="seeds",
    )
    assert View.from_address(view.address()) == view
    assert View().address() == "" and View.from_address("") == View()
    assert View.from_address(View(runs=()).address()).runs == (), "no run chosen is not the usual run"
    wrong = "?tab=secrets&step=1e9&layer=-7&pair=%00&head=99999999999999&weights=&only.password=x&figure=../x"
    assert View.from_address(wrong) == View()
    assert View.from_address("?" + "&".join(["chosen=x"] * 5_000)) == View(), "longer than any page writes"


def test_what_an_address_asks_for_is_looked_up_in_the_folder(tmp_path: Path, real: Path) -> None:
    """Runs, steps, layers and facts that are not there become those that are; an address says what is not usual."""
    shutil.copytree(real / "rope-s0", tmp_path / "a")
    made.write_run(tmp_path / "b", 0, 5)
    folder = RunsFolder(tmp_path)
    first = settle(folder, View())
    assert first.view.runs == ("a",) and first.address == ""
    done = settle(folder, View(tab="pair", runs=("../a", "b"), run="../a", step=7, layer=9, fact="zz", pair=3))
    assert done.gone == ["../a"] and done.view.runs == ("b",) and done.view.run == "b"
    assert (done.view.step, done.view.layer, done.view.fact, done.view.pair) == (LAST, -1, None, None)
    assert done.address == "?tab=pair&chosen=b&stored=raw"
    kept = settle(folder, View(tab="pair", runs=("a",), step=10, layer=0, head=0, fact="b"))
    assert (kept.view.step, kept.view.layer, kept.view.head, kept.view.fact) == (10, 0, 0, "b")
    assert kept.view.pair is not None, "a fact's first pair is opened"
    assert settle(folder, kept.view).view == kept.view, "a settled view stays as it is"
    made.write_run(tmp_path / "0-new", 0)
    assert settle(folder, first.view).view.runs == ("a",), "a run that begins takes nobody's place"


def test_a_list_that_nothing_is_left_of_says_so(tmp_path: Path) -> None:
    made.write_run(tmp_path / "a", 0)
    shown = str(runs_list([], [], now=0.0, narrowed="'zz' with state failed"))
    assert "No run matches 'zz' with state failed." in shown
    assert "There are no runs in this folder yet" in str(runs_list([], [], now=0.0))


def test_dots_have_the_colours_of_the_figure(tmp_path: Path) -> None:
    """Each drawn run by its key: also of two runs of one name, and of seeds that one line stands for."""
    for group, encoding in {"one": "rope", "two": "alibi"}.items():
        for seed in (0, 1):
            config = made.run_config(f"same-s{seed}", position_encoding=encoding, seed=seed)
            made.write_run(tmp_path / group / f"same-s{seed}", 0, 5, config=config)
    folder = RunsFolder(tmp_path)
    keys = [run.key for run in folder.scan()]
    for bands in ("facts", "seeds"):
        figure, *_ = curves(folder, folder.scan(), weights="ema", bands=bands)
        colours = figure.layout.meta["colours"]
        assert sorted(colours) == keys, bands
        assert {colours[key] for key in keys if key.startswith("one")} == {COLOURS["rope"]}
        assert {colours[key] for key in keys if key.startswith("two")} == {COLOURS["alibi"]}


@pytest.mark.parametrize("weight", [n / 50 for n in range(51)])
def test_numbers_on_cells_are_readable_on_every_colour(weight: float) -> None:
    """WCAG's contrast of 4.5 to 1, by its own formula."""
    look = shade(weight)
    red, green, blue = (int(one) for one in look["background"][4:-1].split(","))
    ink = tuple(int(look["color"][place : place + 2], 16) for place in (1, 3, 5))

    def bright(colour: tuple[int, ...]) -> float:
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((bright((red, green, blue)), bright(ink)))
    assert (high + 0.05) / (low + 0.05) >= 4.5, look


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RevprobeError, match=r"no folder at '.*nowhere'; expected one that holds runs"):
        RunsFolder(tmp_path / "nowhere")


def measures(**columns: list[Any]) -> pd.DataFrame:
    size = len(next(iter(columns.values())))
    fixed = {"run": "a", "family": "f", "weights": "raw", "kind": "same_target", "measure": "gradient_cosine"}
    fixed |= {"step": 0, "value": 0.5, "low": 0.4, "high": 0.6, "control": 0.1, "n": 9, "reason": ""}
    filled = {name: [value] * size for name, value in fixed.items()} | columns
    return pd.DataFrame(filled | {name: [0.0] * size for name in ("control_low", "excess_low")})


def test_seeds_are_pooled_as_mean_and_range() -> None:
    """By hand: mean and range over seeds at each step, controls averaged, the fewest pairs, never the bootstrap's."""
    rows = measures(
        run=["r-s0", "r-s1", "r-s2", "other"],
        family=["f", "f", "f", "g"],
        value=[0.1, 0.4, 0.7, 0.9],
        control=[0.0, 0.3, 0.0, 0.2],
        n=[9, 8, 9, 5],
    )
    pooled, notes = pool_seeds(rows, {})
    assert pooled["run"].tolist() == ["r (3 seeds)", "other"] and notes == []
    np.testing.assert_allclose(pooled["value"], [0.4, 0.9])
    np.testing.assert_allclose(pooled["low"], [0.1, math.nan])
    np.testing.assert_allclose(pooled["high"], [0.7, math.nan])
    np.testing.assert_allclose(pooled["control"], [0.1, 0.2])
    assert pooled["n"].tolist() == [8, 5]


def test_seeds_are_not_pooled_where_one_is_undefined_or_not_there_yet() -> None:
    rows = measures(
        run=["r-s0", "r-s1", "r-s0"], step=[0, 0, 5], value=[0.1, math.nan, 0.3], reason=["", "9 constant scores", ""]
    )
    pooled, notes = pool_seeds(rows, {})
    assert pooled["step"].tolist() == [0] and math.isnan(pooled["value"].item())
    assert pooled["reason"].item() == "1 of 2 seeds: 9 constant scores"
    assert notes == ["r (2 seeds): step 5 left out, which not all 2 seeds have reached"]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["rope-s0", "rope-s11"], "rope"),
        (["alone-s0"], "alone-s0"),
        (["first", "second"], "first ..."),
    ],
)
def test_a_family_is_called_by_what_its_runs_share(names: list[str], label: str) -> None:
    assert stem_of(names) == label


def test_seeds_of_one_config_are_a_family_and_other_configs_are_not(tmp_path: Path) -> None:
    for name, changes in {
        "a-s0": {},
        "a-s1": {"seed": 1},
        "b-s0": {"length": 5},
        "c-s0": {"position_encoding": "alibi"},
    }.items():
        made.write_run(tmp_path / name, 0, config=made.run_config(name, **changes))
    family = {key: run.family for key, run in listed(tmp_path).items()}
    assert family["a-s0"] == family["a-s1"] and len(set(family.values())) == 3
    folder = RunsFolder(tmp_path)
    figure, table, *_ = curves(folder, folder.scan(), weights="ema", bands="seeds")
    names = {trace.meta["run"] for trace in figure.data}
    assert names == {"a (2 seeds)", "b-s0", "c-s0"} and figure.layout.title.text == SEEDS_KEY
    assert table["run"].tolist() == ["a-s0", "a-s1", "b-s0", "c-s0"], "the table keeps the single runs"


def test_weights_are_chosen_per_run(tmp_path: Path) -> None:
    """EMA where a run keeps one, raw for the others; raw alone; both."""
    made.write_run(tmp_path / "both", 0, weights=("raw", "ema"))
    made.write_run(tmp_path / "only-raw", 0)
    folder = RunsFolder(tmp_path)
    rows, _ = folder.measures(folder.scan())
    told = {
        view: set(map(tuple, chosen_weights(rows, view)[["run", "weights"]].to_numpy()))
        for view in ("ema", "raw", "both")
    }
    assert told["ema"] == {("both", "ema"), ("only-raw", "raw")}
    assert told["raw"] == {("both", "raw"), ("only-raw", "raw")}
    assert told["both"] == told["ema"] | told["raw"]
    figure, *_ = curves(folder, folder.scan(), weights="both", bands="facts")
    assert len({trace.name for trace in figure.data}) == 3 and all(trace.visible for trace in figure.data)
    done = settle(folder, View(tab="checkpoint", runs=("both",)))
    assert done.view.stored == "ema" and done.view.step == LAST
    assert done.offers["step"][0] == {"label": "last (step 0)", "value": LAST}


def test_filters_keep_the_runs_with_a_wanted_value_on_every_axis() -> None:
    runs = [
        Listed(f"g/{length}-{seed}", "g", "x", "open", axes={"length": length, "seed": seed})
        for length in (20, 10)
        for seed in (0, 1)
    ]
    assert filter_values(runs, "length") == ["10", "20"] and filter_values(runs, "model") == []
    assert [run.key for run in filtered(runs, {"length": ["10"], "seed": ["1"], "group": []})] == ["g/10-1"]
    assert [run.key for run in filtered(runs, {}, "20-")] == ["g/20-0", "g/20-1"]


def test_a_pair_opens_down_to_its_tokens(real: Path) -> None:
    """The row of weights is the model's own: it sums to one, its evidence is the reading's weight and score, and the
    probability is that of the checkpoint's logits.
    """
    folder = RunsFolder(real)
    run = folder.run("rope-s0")
    reading = reading_at(folder, run, ATTENTION, 10, "raw")
    opener = PairOpener(folder)
    for pair in (0, 17, len(reading.frame) - 1):
        row, opened = pair_row(reading.frame, pair, 0, 0), opener.open(run, reading, pair)
        assert disagreement(opened, row) < 1e-5
        for side, query in (("forward", opened.forward), ("reverse", opened.reverse)):
            weights = query.weights[0][0]
            assert weights.sum() == pytest.approx(1.0, abs=1e-6) and len(weights) == len(query.tokens) == 4
            evidence = query.parts.index("evidence")
            assert weights[evidence] == pytest.approx(row[f"weight_{side}"], abs=1e-6)
            assert evidence - query.parts.index("target") == row[f"offset_{side}"]
            assert query.tokens[evidence].lower() == query.tokens[query.parts.index("target")] == row["fact"].lower()
    model, tokens = opener.held.model(run, 10, "raw"), opened.reverse.tokens
    ids = torch.tensor([[model.tokenizer.convert_tokens_to_ids(token) for token in tokens]])
    place = opened.reverse.parts.index("target")
    target = int(ids[0, place])
    ids[0, place] = model.mask_token_id
    with torch.no_grad():
        expected = model.module(ids).logits[0, place].softmax(-1)[target].item()
    assert opened.reverse.probability == pytest.approx(expected, rel=1e-5)
    assert not model.module.training and all(p.grad is None for p in model.module.parameters())


def test_a_pair_of_a_fine_tuning_opens_too_wherever_its_folder_stands(tmp_path: Path) -> None:
    """An adapter on the base that its run built, with a readout row before the target; the folder is moved after."""
    made.write_real_finetuning(tmp_path / "first" / "ft")
    (tmp_path / "first").rename(tmp_path / "moved")
    folder = RunsFolder(tmp_path / "moved")
    run = folder.run("ft")
    assert run.state == "finished" and run.axes["model"] == "tiny-dream" and run.steps == [0, 1, 2]
    reading = reading_at(folder, run, ATTENTION, -1, "raw")
    row, opened = pair_row(reading.frame, 2, 1, 1), PairOpener(folder).open(run, reading, 2)
    assert disagreement(opened, row) < 1e-5
    evidence = [place for place, part in enumerate(opened.reverse.parts) if part == "evidence"]
    assert opened.reverse.weights[1][1][evidence].sum() == pytest.approx(row["weight_reverse"], abs=1e-6)
    assert "<script>" in "".join(opened.forward.tokens), "the template is shown as it is, for React to escape"


def test_a_pair_whose_score_is_not_the_checkpoints_says_so(real: Path) -> None:
    folder = RunsFolder(real)
    run = folder.run("rope-s0")
    reading = reading_at(folder, run, ATTENTION, 10, "raw")
    opened = PairOpener(folder).open(run, reading, 3)
    row = pair_row(reading.frame, 3, 0, 0)
    assert "differ" not in str(opened_pair(opened, row))
    assert "differ from this run's by 0.5" in str(
        opened_pair(opened, row.replace({row["score_forward"]: row["score_forward"] + 0.5}))
    )


def test_a_pair_that_cannot_be_opened_says_why(real: Path, tmp_path: Path) -> None:
    """Other pairs than the reading's, no checkpoint, and an adapter whose base stands elsewhere."""
    shutil.copytree(real / "rope-s0", tmp_path / "run")
    folder = RunsFolder(tmp_path)
    run = folder.run("run")
    reading = reading_at(folder, run, ATTENTION, 10, "raw")
    other = Reading(reading.name, reading.frame, reading.meta | {"pairs": "another"})
    with pytest.raises(RevprobeError, match="not those of this reading"):
        PairOpener(folder).open(run, other, 0)
    with pytest.raises(RevprobeError, match="no pair 99999 in run"):
        PairOpener(folder).open(run, reading, 99_999)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000010"
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(real / "rope-s0")}))
    with pytest.raises(RevprobeError, match=r"holds an adapter .* and a whole model's weights"):
        PairOpener(folder).open(run, reading, 0)
    for file in (checkpoint / "config.json", *checkpoint.glob("*.safetensors")):
        file.unlink()
    with pytest.raises(RevprobeError, match="leads out of"):
        PairOpener(folder).open(run, reading, 0)
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/large"}))
    with pytest.raises(RevprobeError, match="'owner/large' is not inside"):
        PairOpener(folder).open(run, reading, 0)
    shutil.rmtree(checkpoint)
    with pytest.raises(RevprobeError, match="no checkpoint at step 10"):
        PairOpener(folder).open(run, reading, 0)


def test_markup_in_names_is_escaped_in_every_figure(tmp_path: Path) -> None:
    """plotly draws a subset of HTML, in titles, legends and hovers; the rest of the page is React's, which escapes."""
    evil = made.EVIL.replace("/", "")[:90]
    made.write_run(tmp_path / evil, 0, 5)
    folder = RunsFolder(tmp_path)
    run = folder.run(evil)
    figures = [curves(folder, [run], weights="ema", bands=bands)[0] for bands in ("facts", "seeds")]
    readings = {"scatter": ATTENTION, "heatmap": ATTENTION, "probability": "reverse_probability"}
    figures += [
        checkpoint_figure(reading_at(folder, run, name, 5, "raw"), kind, None, None) for kind, name in readings.items()
    ]
    for figure in figures:
        for trace in figure.data:
            texts = [trace.name, *(np.ravel(trace.hovertext) if trace.hovertext is not None else [])]
            assert not any("<script" in str(text) or "<img" in str(text) for text in texts), texts
        titles = [figure.layout.title.text, *(note.text for note in figure.layout.annotations)]
        assert not any("<script" in str(text) or "<img" in str(text) for text in titles), titles
    assert any("&lt;script" in str(trace.name) for trace in figures[0].data), "the name must still be shown"


@pytest.fixture
def client(tmp_path: Path) -> Any:
    made.write_run(tmp_path / "runs" / "a", 0)
    made.write_run(tmp_path / "secret", 0)
    return make_app(tmp_path / "runs").server.test_client()


def test_only_requests_to_this_machine_are_answered(client: Any) -> None:
    """A web page may give its own name this machine's address; a request to that name is refused."""
    for name in ("127.0.0.1:8050", "localhost:8050", "127.0.0.1", "[::1]:8050"):
        answer = client.get("/", headers={"Host": name})
        assert answer.status_code == 200, name
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "http" not in policy and "connect-src 'self'" in policy
    for name in ("evil.example", "evil.example:8050", "127.0.0.1.evil.example:8050"):
        assert client.get("/", headers={"Host": name}).status_code == 403, name


def test_a_request_for_a_run_outside_gets_a_reason_and_no_data(client: Any, tmp_path: Path) -> None:
    """What a page sends is a key, looked up in the list of the folder's runs."""
    for key, expected in {"a": "9 points", "../secret": "no run", str(tmp_path / "secret"): "no run"}.items():
        wanted = {"run": key, "step": 0, "stored": "raw", "figure": "scatter", "layer": None, "head": None}
        inputs = [
            {"id": "one-asked", "property": "data", "value": wanted},
            {"id": "theme", "property": "data", "value": "light"},
        ]
        outputs = {"id": "one", "property": "figure"}
        asked = {"output": "one.figure", "outputs": outputs, "inputs": inputs, "changedPropIds": []}
        told = {"Host": "localhost", TOKEN: client.application.config[TOKEN]}
        answer = client.post("/_dash-update-component", json=asked, headers=told)
        assert answer.status_code == 200 and expected in answer.get_data(as_text=True), answer.get_data(as_text=True)
    for path in ("/../secret/config.yaml", "/assets/../../secret/config.yaml", "/a/config.yaml"):
        assert b"alphabet" not in client.get(path, headers={"Host": "localhost"}).data, path


def test_it_listens_on_this_machine_alone_and_a_taken_port_is_named(tmp_path: Path) -> None:
    app = make_app(tmp_path).server
    server = make_dashboard_server(app, "127.0.0.1", 0)
    try:
        assert server.socket.getsockname()[0] == "127.0.0.1" and not app.debug
        with pytest.raises(RevprobeError, match=rf"cannot listen on 127.0.0.1:{server.port} .*choose another --port"):
            make_dashboard_server(app, "127.0.0.1", server.port)
    finally:
        server.server_close()


def test_the_command_says_what_is_missing_and_warns_of_an_open_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CliRunner()
    missing = runner.invoke(command_line, ["dashboard", str(tmp_path / "nowhere")])
    assert isinstance(missing.exception, RevprobeError) and "no folder at" in str(missing.exception)
    monkeypatch.setattr("werkzeug.serving.BaseWSGIServer.serve_forever", lambda self: None)
    shown = runner.invoke(command_line, ["dashboard", str(tmp_path), "--port", "0"])
    assert shown.exit_code == 0 and "http://127.0.0.1:" in shown.output and "warning" not in shown.output
    shown = runner.invoke(command_line, ["dashboard", str(tmp_path), "--port", "0", "--host", "0.0.0.0"])
    assert "warning: listening on 0.0.0.0: whoever can reach this machine can read these runs" in shown.output
    monkeypatch.setitem(sys.modules, "dash", None)
    without = runner.invoke(command_line, ["dashboard", str(tmp_path)])
    assert "pip install '.[dashboard]'" in str(without.exception)
