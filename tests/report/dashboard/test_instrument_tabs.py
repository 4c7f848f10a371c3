"""What a run's folder holds beside the three probes: drawn on the dashboard as in the report, or what takes it."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from dash import html

import revprobe as rp
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.finetune.runs.kept_tables import TABLES
from revprobe.report.dashboard import folder as dashboard_data
from revprobe.report.dashboard.app import asked_by_controls
from revprobe.report.dashboard.choices import drawings_of, settle, unused
from revprobe.report.dashboard.folder import RunsFolder
from revprobe.report.dashboard.instrument_tab import instrument_shown
from revprobe.report.dashboard.view import ALL, LAST, View
from revprobe.report.html.instruments import INSTRUMENTS, SOURCES, at_place, command, drawn, numbers_said
from revprobe.report.html.page import figure_data
from revprobe.report.html.report import write_report
from tiny import module_at

made = module_at(Path(__file__).with_name("dashboard_runs.py"))
MASKED, CAUSAL = "rope", "arm"


def config(name: str, **model: Any) -> RunConfig:
    training = {"steps": 4, "batch_size": 8, "warmup_steps": 0, "device": "cpu", "ema_decay": None}
    size = {"d_model": 8, "n_layers": 2, "n_heads": 2} | model
    return RunConfig(
        name=name, training=training, model=size, relation={"length": 4, "alphabet": 9}, snapshots={"every": 2}
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained runs, of which nobody has asked anything yet."""
    home = tmp_path_factory.mktemp("instruments")
    for one in (config(MASKED), config(CAUSAL, family="gpt2", position_encoding="absolute")):
        rp.train(one, home / "runs" / one.name, listener=False)
    return home


@pytest.fixture(scope="module")
def shown_before(home: Path) -> dict[tuple[str, str], list[Any]]:
    """What each tab of each run says while there is nothing to draw, the runs then filled by the commands it names."""
    folder, said = RunsFolder(home / "runs"), {}
    for run in (MASKED, CAUSAL):
        for tab in INSTRUMENTS:
            figure, said[run, tab] = instrument_shown(folder, asked(run, tab, ""))
            assert figure is None, "a figure of nothing"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for run, tab in said:
            for code in commands(said[run, tab]):
                exec(code.replace(str(home) + "/", ""), {})
    return said


@pytest.fixture
def filled(home: Path, shown_before: Any) -> RunsFolder:
    return RunsFolder(home / "runs")


def asked(run: str, tab: str, drawing: str, **more: Any) -> dict[str, Any]:
    return (
        {"run": run, "step": LAST, "stored": None, "layer": ALL, "head": ALL} | {"tab": tab, "drawing": drawing} | more
    )


def components(parts: Any) -> Iterator[Any]:
    for part in parts if isinstance(parts, list | tuple) else [parts]:
        yield part
        if getattr(part, "children", None) is not None and not isinstance(part.children, str):
            yield from components(part.children)


def commands(said: list[Any]) -> list[str]:
    return [str(part.children) for part in components(said) if isinstance(part, html.Pre)]


def texts(said: list[Any]) -> str:
    return "\n".join(str(part.children) for part in components(said) if isinstance(getattr(part, "children", 0), str))


def every_drawing(run: str) -> list[tuple[str, str]]:
    """Each drawing that a run of this kind can have something for."""
    found = [(tab, name, one.source) for tab, tool in INSTRUMENTS.items() for name, one in tool.drawings.items()]
    masked = [(tab, name) for tab, name, source in found if source != "predictions"]
    return masked if run == MASKED else [(t, n) for t, n, s in found if (t, n) in masked and not SOURCES[s].masked]


@pytest.mark.parametrize("run", [MASKED, CAUSAL])
def test_the_commands_in_an_empty_tab_fill_it(run: str, filled: RunsFolder, shown_before: Any) -> None:
    """Each command was run as it stands; what it left is drawn, and says its value, control, pairs and facts."""
    one = filled.run(run)
    there = [(tab, name) for tab in INSTRUMENTS for name in drawings_of(one, tab)]
    assert there == every_drawing(run), "a tab's commands leave it empty"
    for tab, name in there:
        figure, said = instrument_shown(filled, asked(run, tab, name))
        assert figure is not None
        words = " ".join(str(note.text) for note in figure.layout.annotations)
        if name not in ("matrix", "share"):  # taken with cross=True; shares of an effect that is near 0
            assert figure.data, f"{tab}, {name}: {words}"
            assert re.search(r"n = [\d,]+ (to [\d,]+ )?(pairs|reverse queries|facts)", texts(said)), texts(said)
        source = INSTRUMENTS[tab].drawings[name].source
        if source not in TABLES and source != "head_ranking":  # one head a layer has none beside it
            told = texts(said) + str(figure.layout.title.text)
            assert "(control " in told, (tab, name, told)


def test_what_a_causal_run_cannot_be_asked_has_a_reason_and_no_command(shown_before: Any) -> None:
    for tab in ("denoising", "terms"):
        assert not commands(shown_before[CAUSAL, tab])
        assert "of masked models alone: this run's model is causal" in texts(shown_before[CAUSAL, tab])
    assert [len(commands(shown_before[MASKED, tab])) for tab in INSTRUMENTS] == [3, 2, 1, 1, 1, 1, 2]


def test_the_dashboard_draws_the_reports_own_figures(home: Path, filled: RunsFolder) -> None:
    """Figure for figure the same data as on the page of the report, which has a tab for each instrument now."""
    runs = [rp.open_run(home / "runs" / name).record() for name in (MASKED, CAUSAL)]
    page = write_report(runs, home / "report.html").read_text()
    tabs = re.findall(r'data-tab="([^"]+)"', page)
    assert [tab for tab in tabs if tab in INSTRUMENTS] == list(INSTRUMENTS)
    for run in (MASKED, CAUSAL):
        for tab, name in every_drawing(run):
            if INSTRUMENTS[tab].drawings[name].usual:
                figure, _ = instrument_shown(filled, asked(run, tab, name))
                shown = str(figure_data("x", figure)).partition(">")[2]
                assert shown in page, f"{run}: {tab}, {name} is drawn otherwise in the report"


def test_training_curves_open_none_of_its_files(filled: RunsFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    real = rp.Reading.load
    monkeypatch.setattr(
        dashboard_data.Reading, "load", lambda path: loaded.append(path.name.partition(".")[0]) or real(path)
    )
    numbers, problems = filled.measures([filled.run(MASKED)])
    assert len(numbers) and not problems
    assert set(loaded) == {"attention_correlation", "gradient_cosine", "reverse_probability"}


def test_a_tabs_view_stays_in_the_address(filled: RunsFolder) -> None:
    """Drawing, step, layer, head, fact and pair come out of the address; the tab keeps what it does not show."""
    search = f"?chosen={MASKED}&tab=lens&drawing=heads&step=4&stored=raw&layer=1&head=0&fact=b&pair=3"
    done = settle(filled, View.from_address(search))
    view = done.view
    assert (view.tab, view.drawing, view.step, view.layer, view.head, view.fact, view.pair) == (
        *("lens", "heads", 4, 1, 0, "b", 3),
    )
    assert View.from_address(done.address) == View.from_address(search), done.address
    assert unused(view) == {"layer", "head"}
    for name in ("layer", "head", "fact", "pair"):  # a list that lacks its value drops it
        assert [one["value"] for one in done.offers[name]] == [getattr(view, name)]
    # By the controls, as the page sends them.
    given = asdict(view) | {"selected": [MASKED], "search": ""} | {f"only.{axis}": () for axis in made_axes()}
    assert asked_by_controls(given).drawing == "heads"
    # Back on a tab that has them, layer and head are as they were.
    edits = settle(filled, View.from_address(done.address.replace("tab=lens", "tab=edits"))).view
    assert (edits.layer, edits.head, edits.drawing) == (1, 0, "reverse") and unused(edits) == set()
    # What the folder does not have: the usual figure, the last checkpoint that was asked.
    other = settle(filled, View.from_address(f"?chosen={MASKED}&tab=lens&drawing=share&step=2&layer=7"))
    assert (other.view.drawing, other.view.step) == ("layers", LAST)
    assert "drawing" not in other.address and "layer=7" in other.address
    assert [one["value"] for one in other.offers["step"]] == [LAST, 4]
    assert View.from_address("?tab=lens&drawing=%3Cb%3E").drawing == ""


def made_axes() -> tuple[str, ...]:
    from revprobe.report.dashboard.view import FILTERS

    return FILTERS


def test_tables_need_no_checkpoint_and_have_their_own_weights(filled: RunsFolder) -> None:
    done = settle(filled, View(tab="storage", runs=(MASKED,), drawing="curves"))
    assert unused(done.view) == {"step", "layer", "head"}
    assert done.view.stored == "raw" and [one["value"] for one in done.offers["stored"]] == ["raw"]
    assert unused(settle(filled, View(tab="one-step", runs=(MASKED,))).view) == {"step", "stored", "layer", "head"}
    assert done.filled == list(INSTRUMENTS)
    assert "denoising" not in settle(filled, View(runs=(CAUSAL,))).filled


def test_edits_are_drawn_at_a_layer_and_a_head(filled: RunsFolder) -> None:
    reading = filled.reading(filled.run(MASKED), "route_edit", 4, "raw")
    whole, _ = instrument_shown(filled, asked(MASKED, "edits", "reverse"))
    one, _ = instrument_shown(filled, asked(MASKED, "edits", "reverse", layer=1))
    assert whole is not None and one is not None
    assert [label.partition("<br>")[0] for label in one.data[-1].y] == [
        *("layer 1, head 1", "layer 1, head 0", "layer 1", "all at once")
    ]
    assert set(one.data[-1].x) < set(whole.data[-1].x), "numbers of their own"
    assert at_place(reading, None, None) is reading
    assert set(at_place(reading, 0, 1).frame["layer"].dropna()) == {0}


@pytest.mark.parametrize("file", ["pressure.parquet", "readings/step-000004/logit_lens.raw.parquet"])
def test_a_damaged_file_is_named_and_the_others_are_drawn(
    file: str, home: Path, filled: RunsFolder, tmp_path: Path
) -> None:
    shutil.copytree(home / "runs" / MASKED, tmp_path / MASKED)
    place = tmp_path / MASKED / file
    place.write_bytes(place.read_bytes()[:-50])
    folder = RunsFolder(tmp_path)
    for tab, name in every_drawing(MASKED):
        figure, said = instrument_shown(folder, asked(MASKED, tab, name))
        assert figure is not None
        broken = INSTRUMENTS[tab].drawings[name].source == place.name.partition(".")[0]
        words = " ".join(str(note.text) for note in figure.layout.annotations)
        assert bool(re.search(r"parquet.*(damaged|cannot be read)", words.replace("<br>", " "))) == broken, words
        assert bool(said) != broken
    problem = rp.open_run(tmp_path / MASKED).record().problem
    assert problem and place.name in problem, "the report's list of runs names it"


def test_a_fine_tunings_predictions_are_drawn_without_a_command(tmp_path: Path) -> None:
    run = made.write_real_finetuning(tmp_path / "ft")
    folder = RunsFolder(tmp_path)
    listed = folder.run("ft")
    assert listed.tuned and drawings_of(listed, "one-step") == ["foretold"]
    figure, said = instrument_shown(folder, asked("ft", "one-step", "foretold"))
    table = pd.read_parquet(run / "predictions.parquet")
    assert figure is not None
    lines = {(t.name, t.xaxis): list(t.y) for t in figure.data if t.mode == "lines+markers"}
    for panel, direction in (("x", "forward"), ("x2", "reverse")):
        rows = table[table["direction"] == direction].sort_values("step")
        for name in ("observed", "predicted"):
            drawn_, kept = pd.Series(lines[name, panel], dtype=float), rows[name].astype(float).reset_index(drop=True)
            pd.testing.assert_series_equal(drawn_, kept, check_names=False)
    assert "control" in {trace.name for trace in figure.data}
    assert len(figure.layout.annotations) == 2, "a panel of what a fine-tuning does not follow"
    assert "not of fine-tunings" in texts(instrument_shown(folder, asked("ft", "one-step", "step"))[1])
    assert "pairs of" in texts(said)
    assert command("predictions", "ft", tuned=True) == "" == command("pressure", "ft", tuned=True)
    assert "pairs=run.pairs()" in command("storage_curves", "ft", tuned=True)


def test_one_denoising_step_shows_its_control(filled: RunsFolder) -> None:
    """A line of one point is invisible."""
    reading = filled.reading(filled.run(MASKED), "denoising_trace", 4, "raw")
    one = reading.part(reading.frame[reading.frame["step"] == 1])
    figure = drawn(one, INSTRUMENTS["denoising"].drawings["steps"])
    controls = [trace for trace in figure.data if "facts shuffled" in str(trace.name)]
    assert len(controls) == 2 and {trace.mode for trace in controls} == {"markers"}


def test_what_is_said_under_a_figure_is_of_its_direction_and_counts_what_is_undefined(filled: RunsFolder) -> None:
    """A reading's own numbers are of the reverse queries: under a figure of forward ones they would be misread."""
    edits = INSTRUMENTS["edits"].drawings
    reading = filled.reading(filled.run(MASKED), "route_edit", 4, "raw")
    assert numbers_said(reading, edits["forward"]) == [f"asked: n = {reading.n} pairs of {reading.facts} facts"]
    (said,) = numbers_said(reading, edits["reverse"])
    assert said.startswith("route edit ") and " pairs of " in said
    gone = reading.frame.assign(reason="none of 3 heads; 2 are cut")
    for column in gone.columns[gone.columns.str.startswith(("effect", "change"))]:
        gone[column] = float("nan")
    (said,) = numbers_said(reading.part(gone), edits["reverse"])
    assert re.search(r"undefined: \d+ × none of 3 heads; 2 are cut", said), said


def test_a_table_says_pairs_and_facts() -> None:
    curves = INSTRUMENTS["storage"].drawings["curves"]
    both = pd.DataFrame({"n": [54.0, 27.0, float("nan")], "facts": [9.0, 9.0, float("nan")]})
    assert numbers_said(both, curves) == ["n = 27 to 54 pairs of 9 facts"]
    assert numbers_said(both[["n"]].head(1), curves) == ["n = 54 facts"], "where n counts facts"
    assert numbers_said(pd.DataFrame({"step": [1]}), curves) == ["n is not in the table"]


def test_every_source_can_be_drawn_and_says_what_takes_it() -> None:
    drawn_of = {one.source for tool in INSTRUMENTS.values() for one in tool.drawings.values()}
    assert drawn_of == set(SOURCES) and set(TABLES) <= drawn_of
    assert json.dumps([tool.note for tool in INSTRUMENTS.values()]).count("control") >= 4
