"""A bundle: it holds what the runs hold, nothing in it names the machine, and it is there whole or not at all."""

import getpass
import json
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import revprobe as rp
from revprobe import Reading, Readings, RevprobeError
from revprobe.finetune.config.loading import dump_config
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.finetune.runs.record import RunRecord
from revprobe.report.bundle import bundle
from revprobe.report.bundle.bundle import about_size, file_names, write_bundle
from revprobe.report.bundle.private import Private
from revprobe.report.bundle.rows import write_rows
from revprobe.report.dashboard.folder import RunsFolder

USER, HOST, DOMAIN = "zaphodb", "magrathea7", "magrathea7.example.org"
TRAINING = {"steps": 6, "batch_size": 16, "warmup_steps": 1, "ema_decay": 0.8, "device": "cpu"}
TINY: dict[str, Any] = {"model": {"d_model": 16}, "training": TRAINING, "relation": {"length": 4, "alphabet": 9}}
TINY["snapshots"] = {"every": 3}
FILES = {"index.html", "report.html", "summary.csv", "readings.parquet", "versions.json"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a folder of runs: a sweep with a run done and one to come, and a run that failed."""
    home = tmp_path_factory.mktemp("home") / USER
    runs = home / "my runs"
    sweep = SweepConfig(name="grid", base=TINY, cells=[{"position_encoding": "rope"}, {"position_encoding": "alibi"}])
    done, _ = sweep.runs()
    rp.train(done, runs / "grid" / done.name, listener=False)
    (runs / "grid" / "sweep.yaml").write_text(dump_config(sweep), encoding="utf-8")
    failed = RunConfig(**{"name": f"of-{USER}", **TINY})
    rp.train(failed, runs / failed.name, listener=False)
    name = f"of-{USER}"
    why = f"OSError: [{DOMAIN}] {home}/scratch disk/x.bin: no space; see "
    why += f"'/mnt/big disk/{USER}/log.txt', /var/spool/{name}/a"
    (runs / name / "problem.txt").write_text(why + "\n", encoding="utf-8")
    last = runs / name / "checkpoints" / "step-000006"
    last.rename(last.with_name(".gone"))
    for file in (runs / name / "readings").rglob("*.parquet"):
        one = Reading.load(file)
        where = {"model": f"{home}/my models/llada-tiny", "versions": {"revprobe": "0.1.0", "host": DOMAIN}}
        frame = one.frame.assign(model=f"/data/{USER}/llada-tiny", source=f"{runs}/pairs.csv")
        Reading(one.name, frame, one.meta | where).save(file)
    return home


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """The user's and the machine's names, as the system would tell them."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(socket, "gethostname", lambda: DOMAIN)
    assert getpass.getuser() == USER and Path.home() == home, "what the tests stand on"


@pytest.fixture
def written(machine: None, home: Path, tmp_path: Path) -> Path:
    write_bundle(home / "my runs", tmp_path / "out", say=lambda text: None)
    return tmp_path / "out"


def everything(folder: Path) -> dict[str, str]:
    """What every file says: texts less plotly.js, of the table every cell, column and note of its header."""
    said = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
            cells = [str(one) for name in table for one in table[name].unique()]
            said[file.name] = "\n".join([*table.columns, *cells, file.read_bytes().decode("latin-1")])
        elif file.is_file():
            said[file.name] = file.read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    return said


def test_no_file_names_the_machine_its_user_or_where_the_runs_lie(written: Path, home: Path) -> None:
    """Each was planted in config, name, problem, meta and rows; without `Private` this is red in every file."""
    said = everything(written)
    assert set(said) >= FILES and len([name for name in said if name.endswith(".yaml")]) == 2
    for name, text in said.items():
        for word in (str(home), str(home.resolve()), "my runs/", USER, HOST, "/mnt/big", "/var/spool", "scratch disk"):
            assert word not in text, (name, word, text[max(0, text.find(word) - 80) :][:200])
    assert "OSError: [HOST] .../x.bin: no space" in said["index.html"], "what is left still says what failed"


def test_what_is_handed_on_is_what_the_runs_hold(written: Path, home: Path) -> None:
    run = rp.open_sweep(home / "my runs" / "grid").runs[0]
    name = f"grid/{run.path.name}"
    rows = pd.read_parquet(written / "readings.parquet")
    assert list(rows.columns[:5]) == ["run", "reading", "model", "step", "weights"]
    for reading in run.readings():
        where = {"run": name, "reading": reading.name, "step": reading.meta["step"], "weights": reading.meta["weights"]}
        own = rows[(rows[list(where)] == list(where.values())).all(axis=1)].reset_index(drop=True)
        for column in reading.frame:
            both = zip(own[column].tolist(), reading.frame[column].tolist(), strict=True)
            assert all(pd.isna(b) if pd.isna(a) else not pd.isna(b) and a == b for a, b in both), column
    summary = pd.read_csv(written / "summary.csv")
    expected = run.readings().measures()
    shown = summary[summary["run"] == name]
    assert sorted(shown["value"].dropna()) == pytest.approx(sorted(expected["value"].dropna()))
    config = yaml.safe_load((written / "configs" / f"{name.replace('/', '-')}.yaml").read_text(encoding="utf-8"))
    assert RunConfig(**config) == run.config
    told = json.loads((written / "versions.json").read_text(encoding="utf-8"))
    assert told["runs"][name]["started with"] == json.loads((run.path / "versions.json").read_text(encoding="utf-8"))


def test_the_index_tells_the_state_of_each_run(written: Path, home: Path) -> None:
    text = " ".join((written / "index.html").read_text(encoding="utf-8").split())
    finished = rp.open_sweep(home / "my runs" / "grid").runs[0].path.name
    row = text.partition(f"<td>grid/{finished}</td>")[2].partition("</tr>")[0]
    assert "<td>3 (0 to 6)</td><td>finished</td>" in row and f"configs/grid-{finished}.yaml" in row
    row = text.partition("<td>of-USER</td>")[2].partition("</tr>")[0]
    assert "failed: OSError" in row and "configs/of-USER.yaml" in row
    assert "reverse" in text.partition("<h1>")[2].partition("<h2>")[0], "the finding stands first"


def test_a_run_and_a_sweep_are_bundled_as_well(machine: None, home: Path, tmp_path: Path) -> None:
    sweep = rp.open_sweep(home / "my runs" / "grid")
    write_bundle(sweep.path, tmp_path / "sweep", say=lambda text: None)
    names = pd.read_csv(tmp_path / "sweep" / "summary.csv")["run"].unique().tolist()
    assert names == [sweep.runs[0].path.name]
    assert "not begun" in (tmp_path / "sweep" / "index.html").read_text(encoding="utf-8")
    write_bundle(sweep.runs[0].path, tmp_path / "run", say=lambda text: None)
    assert pd.read_csv(tmp_path / "run" / "summary.csv")["run"].unique().tolist() == names


def test_the_size_is_said_before_anything_is_written(machine: None, home: Path, tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []
    sizes = write_bundle(
        home / "my runs", tmp_path / "out", say=lambda text: told.append((text, (tmp_path / "out").exists()))
    )
    assert [there for _, there in told] == [False, True]
    assert told[0][0].startswith("bundle: up to about ") and told[0][0].endswith(f"written to {tmp_path / 'out'}")
    whole = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert sum(sizes.values()) == whole and set(sizes) >= FILES
    assert 0.8 * whole < about_size(home / "my runs") < 2 * whole, "as far as an estimate may be off"


def test_a_full_disk_is_told_before_anything_is_read(
    machine: None, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1_000_000

    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(
        RevprobeError, match=r"takes about .* MB and .* has 1\.0 MB left; choose a folder on another disk"
    ):
        write_bundle(home / "my runs", tmp_path / "out", say=lambda text: None)
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_replaced_and_anything_else_is_refused(written: Path, home: Path) -> None:
    sweep = home / "my runs" / "grid"
    write_bundle(sweep, written, say=lambda text: None)
    assert len(list((written / "configs").iterdir())) == 2, "of the sweep's two runs; those of the older one are gone"
    (written / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(RevprobeError, match=r"holds 'thesis\.tex', which would be lost"):
        write_bundle(sweep, written, say=lambda text: None)
    assert (written / "thesis.tex").read_text(encoding="utf-8") == "years of work"
    (written / "thesis.tex").unlink()
    (written / "versions.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RevprobeError, match="holds 'configs', which would be lost"):
        write_bundle(sweep, written, say=lambda text: None)
    with pytest.raises(RevprobeError, match=r"holds .*, which would be lost"):
        write_bundle(sweep, sweep, say=lambda text: None)
    assert rp.open_sweep(sweep).runs[0].finished


def test_what_fails_on_the_way_leaves_the_old_bundle_and_nothing_else(
    written: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(written)

    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "write_rows", full)
    with pytest.raises(RevprobeError, match=r"cannot write the bundle .*No space left on device"):
        write_bundle(home / "my runs", written, say=lambda text: None)
    assert everything(written) == before
    assert [one.name for one in written.parent.iterdir()] == [written.name]


def test_a_page_that_would_still_name_the_home_is_not_written(
    machine: None, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look holds also where a part of the page is made past `Private`."""
    monkeypatch.setattr(Private, "markup", lambda self, part: part)
    leak = Markup("<p>{}</p>").format(f"{home}/x")
    monkeypatch.setattr("revprobe.report.bundle.gathered.finetune_sections", lambda runs: [leak])
    with pytest.raises(RevprobeError, match=r"report\.html would name .*, so no bundle is written"):
        write_bundle(home / "my runs", tmp_path / "out", say=lambda text: None)
    assert not list(tmp_path.iterdir())


def test_sections_lose_the_paths_that_the_runs_name(machine: None, home: Path, tmp_path: Path) -> None:
    """A legend holds the model's name as JSON and a cell as HTML, and neither passes through the records."""
    private = Private(tmp_path)
    path = f"/data/a & b/{USER}/llada"
    record = RunRecord("r", {}, {"model": {"name": path}}, Readings([]), None)
    assert private.record(record).config == {"model": {"name": ".../llada"}}
    made = private.markup(Markup("<td>{}</td>").format(path) + Markup(f'<script>["{home}/x y"]</script>'))
    assert str(made) == '<td>.../llada</td><script>[".../x y"]</script>'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no file '/mnt/a b/c.yaml'; expected one", "no file '.../c.yaml'; expected one"),
        ("/srv/x/config.yaml is damaged (see /srv/y/log)", ".../config.yaml is damaged (see .../log)"),
        ("path:/srv/x/y and file:///srv/x/z", "path:.../y and .../z"),
        (r"C:\Users\me\runs\a.txt is gone", ".../a.txt is gone"),
        (
            "see https://example.org/a/b and GSAI-ML/LLaDA-8B-Base",
            "see https://example.org/a/b and GSAI-ML/LLaDA-8B-Base",
        ),
        ("and/or, 1/2, data/x.csv, 5 / 6", "and/or, 1/2, data/x.csv, 5 / 6"),
        (f"{USER}-rope on {HOST}, {USER.upper()}; {USER}x", f"USER-rope on HOST, USER; {USER}x"),
    ],
)
def test_prose_keeps_all_but_paths_and_names(machine: None, tmp_path: Path, text: str, told: str) -> None:
    assert Private(tmp_path).text(text) == told


def test_names_that_all_machines_share_are_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "root")
    assert Private(tmp_path).text("the root of raw readings") == "the root of raw readings"


def test_facts_that_are_called_as_the_user_stay_and_numbers_too(machine: None, home: Path, tmp_path: Path) -> None:
    run = rp.open_sweep(home / "my runs" / "grid").runs[0]
    reading = next(iter(run.readings()))
    named = Reading(reading.name, reading.frame.assign(fact=USER), reading.meta | {"model": f"/data/{USER}"})
    told = Private(tmp_path).reading(named)
    assert set(told.frame["fact"]) == {USER} and told.meta["model"] == ".../USER"
    assert told.meta["weights"] == reading.meta["weights"]
    whole = Reading.load(run.path / run.expected_readings[0].file)
    again = Private(tmp_path).reading(Reading(whole.name, whole.frame, whole.meta | {"model": USER}))
    assert again.measures().equals(whole.measures())


def test_file_names_are_safe_and_differ(tmp_path: Path) -> None:
    names = ["a", "A", "../../x", "con", "é/ü", "", ".", "x" * 300, "x" * 301, "<script>", "run con", "a b?#%"]
    given = file_names(names)
    assert len({one.lower() for one in given.values()}) == len(names) == len(given)
    for one in given.values():
        assert all(letter.isascii() and (letter.isalnum() or letter in "-_.") for letter in one), one
        assert one.endswith(".yaml") and one[0] not in ".-" and len(one) < 120 and one.lower() != "con.yaml"


def test_columns_of_two_kinds_and_many_groups_come_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revprobe.report.bundle.rows.GROUP", 3)
    frames = [
        pd.DataFrame({"x": [1, 2], "both": [1, 2], "kind": pd.Categorical(["a", "b"])}),
        pd.DataFrame({"x": [0.5, 1.5], "both": ["u", "v"], "own": [[1, 2], [3]]}),
        pd.DataFrame({"x": [7], "both": [None], "own": [None], "asked": ["reverse"]}),
    ]
    owned = [(f"r{at}", Reading("any", frame, {"step": at})) for at, frame in enumerate(frames)]
    assert write_rows(owned, tmp_path / "rows.parquet") == 5
    read = pd.read_parquet(tmp_path / "rows.parquet")
    assert read["run"].tolist() == ["r0", "r0", "r1", "r1", "r2"] and read["step"].tolist() == [0, 0, 1, 1, 2]
    assert read["x"].tolist() == [1, 2, 0.5, 1.5, 7] and read["both"].tolist()[:4] == ["1", "2", "u", "v"]
    assert read["kind"].tolist()[:2] == ["a", "b"] and list(read["own"][2]) == [1, 2]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RevprobeError, match=r"no run in .*empty"):
        write_bundle(tmp_path / "empty", tmp_path / "out", say=lambda text: None)
    with pytest.raises(RevprobeError, match=r"no folder at .*; expected that of a run"):
        write_bundle(tmp_path / "nowhere", tmp_path / "out", say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_link_that_leads_out_is_not_followed(machine: None, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    (folder / "grid").mkdir(parents=True)
    (folder / "grid" / "away").symlink_to(home / "my runs" / f"of-{USER}")
    assert [one.state for one in RunsFolder(folder).scan()] == ["damaged"]
    write_bundle(folder, tmp_path / "out", say=lambda text: None)
    assert not (tmp_path / "out" / "readings.parquet").exists()
    assert "a link that leads out" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
