"""Section 6's committed page and its collector: the page is what the tables draw, whatever has been collected."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from made_section6 import made

from revprobe.finetune.config.finetuning import FinetuneSweepConfig
from revprobe.finetune.config.loading import dump_config, load_config
from revprobe.finetune.config.pretraining import PretrainSweepConfig
from revprobe.report.html.section6 import html
from revprobe.report.paper.line_panels import HEIGHT
from revprobe.report.paper.section6.figures import AGAINST, figures
from revprobe.report.paper.section6.frames import FINISHED, TABLES, Section6
from revprobe.report.paper.section6.page import PAGE, markdown, write_markdown


@pytest.fixture(scope="module")
def script(root: Path) -> Iterator[ModuleType]:
    """`collect_section6`, imported as a script imports those beside it."""
    sys.path.insert(0, str(root / "examples"))
    try:
        import collect_section6

        yield collect_section6
    finally:
        sys.path.remove(str(root / "examples"))
        for name in ("collect_section6", "collect_negative_evidence", "collect_results", "results_table"):
            sys.modules.pop(name, None)


def test_the_committed_page_is_drawn_from_the_committed_tables(root: Path) -> None:
    """`python examples/collect_section6.py --page-only` draws it anew; without tables it says that there are none."""
    results = root / "examples" / "results"
    found = Section6.read(results)
    assert markdown(found) == (results / PAGE).read_text(encoding="utf-8")
    drawn = {file: svg for file, (_, svg) in figures(found).items()}
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in results.glob("section6_*.svg")}


def test_readme_says_what_the_committed_tables_say(root: Path, script: ModuleType) -> None:
    """A number changed by hand on either side turns this red; `--page-only` draws README's lines anew too."""
    text = (root / "README.md").read_text(encoding="utf-8")
    section = script.checked_section(Section6.read(root / "examples" / "results"))
    assert script.with_section(text, section) == text
    own = text.split("## Section 6 in miniature\n")[1].split("\n## ")[0]
    assert "collect_section6.py runs" in own and section in own and "159 planned runs are in" in section


def test_a_commit_is_that_of_what_was_found_alone(script: ModuleType, tmp_path: Path) -> None:
    """Nothing lies in the folders, so that no run and no model was trained with it."""
    folders = {name: tmp_path / name for name in (*script.DROP_ORDER, script.MODELS)}
    about = script.collected(folders, tmp_path, script.commits_of(["a" * 40])).about
    assert [about[name]["trained_at_commit"] for name in folders] == [None] * len(folders)
    told = script.commits_of(["a" * 40, f"mini-models={'b' * 40}"])
    assert told == dict.fromkeys(script.DROP_ORDER, "a" * 40) | {"mini-models": "b" * 40}
    with pytest.raises(SystemExit, match="--commit section7=c: expected a commit, or one of section6, "):
        script.commits_of(["section7=c"])


def test_a_collection_that_would_lose_runs_is_refused(
    root: Path, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a newer statistics none of the committed runs is kept: they were gone without a word."""
    out, runs = tmp_path / "out", tmp_path / "runs" / "section6"
    shutil.copytree(
        root / "examples" / "results", out, ignore=lambda _, names: [n for n in names if "section6" not in n]
    )
    runs.mkdir(parents=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = int(Section6.read(out).runs["status"].eq("finished").sum())
    asked = ["collect", str(tmp_path / "runs"), "--data", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(script, "with_kept", lambda found, kept: found)
    monkeypatch.setattr("sys.argv", asked)
    with pytest.raises(SystemExit, match=f"{done} runs that were collected before would be lost"):
        script.main()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.setattr("sys.argv", [*asked, "--drop"])
    script.main()
    assert not Section6.read(out).runs["status"].eq("finished").any()


def test_readmes_lines_are_right_with_none_few_and_all_runs(script: ModuleType) -> None:
    """How many of the planned runs are in comes first; without any there is no other line."""
    whole = made(9, gaps=False)
    few = set(whole.runs["run"].unique()[:2])

    def only(table: pd.DataFrame) -> pd.DataFrame:
        return table[table["run"].isin(few)].reset_index(drop=True)

    runs = whole.runs.assign(status=whole.runs["status"].where(whole.runs["run"].isin(few), "not run"))
    begun = Section6(runs=runs, **{name: only(getattr(whole, name)) for name in TABLES if name != "runs"})
    none = Section6(runs=runs.assign(status="not run"))
    for found, finished, least in ((Section6(), 0, 1), (none, 0, 1), (begun, 2, 5), (whole, 159, 5)):
        section = script.checked_section(found)
        lines = section.splitlines()[1:-1]
        assert lines[0].startswith(f"- {finished} of 159 planned runs are in"), lines
        assert least <= len(lines) <= 3 * least and all(len(line) <= 120 for line in lines), "a few lines of README"
        assert sum(line.startswith("- ") for line in lines) == least
        assert ("not run" in section) == (found is begun), "of all runs, and of none, nothing else is said"
        assert "nan" not in section.split() and "in not run" not in section, section


def test_every_planned_run_is_in_the_committed_tables_or_none_is(root: Path) -> None:
    found = Section6.read(root / "examples" / "results")
    planned = {
        (name, run.name)
        for name in ("section6", "section6-ablations", "section6-methods")
        for run in load_config(name, FinetuneSweepConfig).runs()
    }
    assert set(zip(found.runs["sweep"], found.runs["run"], strict=True)) in (planned, set())
    finished = set(found.runs.loc[found.runs["status"] == FINISHED, "run"])
    for name in ("answers", "signatures"):
        assert set(getattr(found, name)["run"]) == finished, f"{name}: of every finished run, and of no other"
    if found.about:
        assert len(found.about["collected_at_commit"]) == 40
        assert all(len(found.about[name]["file_sha256"]) == 64 for name in ("section6", "mini-models"))


@pytest.mark.parametrize("draw", [0, 1])
def test_tables_that_are_written_and_read_draw_the_same_page(draw: int, tmp_path: Path) -> None:
    """Types, order and empty cells survive the files: else the committed page could not be held to them."""
    found = made(draw)
    found.write(tmp_path)
    write_markdown(found, tmp_path)
    again = Section6.read(tmp_path)
    assert markdown(again) == (tmp_path / PAGE).read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.glob("*.svg")} == set(figures(again)) != set()
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))


def test_a_partial_collection_says_what_is_not_finished(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs and a model have begun; their folders are as they were, and no path of this machine is written."""
    runs, out = tmp_path / "runs", tmp_path / "results"
    first, second, *_ = load_config("section6", FinetuneSweepConfig).runs()
    model = load_config("mini-models", PretrainSweepConfig).runs()[0]
    for folder, config in (
        (runs / "section6" / first.name, first),
        (runs / "section6" / second.name, second),
        (tmp_path / "models" / model.name, model),
    ):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(config))
    (runs / "section6" / second.name / "problem.txt").write_text("RuntimeError: no luck\n")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "parent_child_pairs.csv").write_text("child,parent\n")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    asked = [str(runs), "--models", str(tmp_path / "models"), "--data", str(tmp_path / "files"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["collect_section6.py", *asked])
    script.main()
    assert "0 runs finished, 159 not" in capsys.readouterr().out
    assert (
        sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if out not in (path, *path.parents)) == before
    )
    page, found = (out / PAGE).read_text(encoding="utf-8"), Section6.read(out)
    status = dict(zip(found.runs["run"], found.runs["status"], strict=True))
    assert status[first.name] == "not finished" and status[second.name] == "failed: RuntimeError: no luck"
    assert found.models[model.name] == {"status": "not finished"}
    assert f"section6, not finished: {first.name}" in page and "section6-methods, not run: all 36 runs" in page
    assert (out / "section6.html").read_text(encoding="utf-8") == html(found)
    assert "unchanged since" in page and "data/trex: not at hand when this was collected" in page
    texts = [path.read_text(encoding="utf-8") for path in out.iterdir() if path.suffix in (".json", ".md", ".html")]
    assert not [text for text in texts if str(tmp_path) in text]
    data = json.loads((out / "section6.json").read_text())["data"]
    assert data["data/parent_child_pairs.csv"]["look_alike"] is False

    monkeypatch.setattr(sys, "argv", ["collect_section6.py", "--page-only", "--out", str(out)])
    (out / PAGE).unlink()
    script.main()
    assert (out / PAGE).read_text(encoding="utf-8") == page
    monkeypatch.setattr(sys, "argv", ["collect_section6.py", str(tmp_path / "nowhere"), "--out", str(out)])
    with pytest.raises(SystemExit, match="give the folder of the sweeps"):
        script.main()


def test_the_page_tells_ranks_beside_those_of_facts_never_trained(root: Path) -> None:
    """From the committed rows by pandas alone: a right answer that ranks first says nothing without its floor."""
    ranks = pd.read_parquet(root / "examples/results/section6_ranks.parquet")
    asked = ranks[(ranks["sweep"] == "section6") & (ranks["asked"] == "reverse") & (ranks["variant"] == "")]
    last = asked[asked["step"] == asked.groupby("run")["step"].transform("max")]
    answers = pd.read_parquet(root / "examples/results/section6_answers.parquet")
    answers = answers[
        (answers["sweep"] == "section6") & (answers["asked"] == "forward") & (answers["split"] == "train")
    ]
    ends = answers[answers["step"] == answers.groupby("run")["step"].transform("max")]
    forward = ends.groupby(["model", "dataset", "direction"])["value"].mean()
    learned = forward[forward >= 0.9].index
    cells = last.groupby(["split", "model", "dataset", "direction"])["value"].mean() * 100
    page = (root / "examples/results/section6.md").read_text(encoding="utf-8").replace("\n", " ")
    for models, words in (
        ({"mini-llada", "mini-dream", "mini-mlm"}, "masked"),
        ({"mini-llama", "mini-qwen2"}, "causal"),
    ):
        found = cells["train"].loc[learned]
        found = found[found.index.get_level_values("model").isin(models)]
        assert f"{words} {span(found)} % ({len(found)} cell" in page
    assert f"facts never trained {span(cells['heldout'].loc[learned])} %" in page
    chances = last[last["split"] == "train"].groupby(["model", "dataset", "direction"])["chance"].mean() * 100
    assert f"; chance {span(chances.loc[learned])} %" in page


def span(values: pd.Series) -> str:
    low, high = f"{values.min():.1f}", f"{values.max():.1f}"
    return low if low == high else f"{low} to {high}"


def test_the_path_of_reverse_answers_uses_the_height_of_its_panels(root: Path) -> None:
    """Of the committed runs none answers a tenth backwards: on an axis to 1 every line would lie on the ground."""
    drawing = figures(Section6.read(root / "examples" / "results"))[AGAINST][1]
    lines = re.findall(r'<path d="([^"]+)" fill="none" stroke="[^"]+" stroke-width="1.7"', drawing)
    heights = [[float(y) for y in re.findall(r"[-\d.]+[ ,]([-\d.]+)", line)] for line in lines]
    assert max(max(ys) - min(ys) for ys in heights) > 0.8 * HEIGHT, "the highest path of all reaches high"
