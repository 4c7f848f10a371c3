"""`revprobe reproduce section6` from nothing to its page: the smallest cell, what is missing, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from revprobe import Reading, RevprobeError
from revprobe.cli.main import app
from revprobe.finetune.config.finetuning import FinetuneSweepConfig
from revprobe.finetune.config.loading import dump_config, merged
from revprobe.finetune.config.pretraining import PretrainSweepConfig
from revprobe.finetune.runs.pretraining import PretrainedModel
from revprobe.report.html.section6 import html
from revprobe.report.paper.section6 import miniature
from revprobe.report.paper.section6.collect import collect, without_folders
from revprobe.report.paper.section6.frames import Section6
from revprobe.report.paper.section6.miniature import Miniature
from revprobe.report.paper.section6.page import markdown
from revprobe.report.run_sweep import RunsFailed

RUN = "mini-llama-parent-child-P2C-s0"
QUICK = {name: getattr(miniature, name) for name in ("quick_models", "quick_sweep")}


@pytest.fixture(scope="module")
def smallest() -> Iterator[pytest.MonkeyPatch]:
    """The quick variant's plan, made smaller still: one model of one layer, one run of two steps."""
    models, sweep = QUICK.values()

    def small_models(full: PretrainSweepConfig) -> PretrainSweepConfig:
        own = {"d_model": 16, "n_layers": 1, "n_heads": 2, "training": {"steps": 2}, "check": {"facts": 1}}
        quick = models(full)
        return PretrainSweepConfig(
            name=quick.name, base=merged(quick.base, own), models={"mini-llama": quick.models["mini-llama"]}
        )

    def small_sweep(full: FinetuneSweepConfig) -> FinetuneSweepConfig:
        own: dict[str, Any] = {"training": {"steps": 2, "warmup_steps": 1}, "evaluation": {"facts": 2}}
        own |= {"snapshots": {"steps": [1], "facts": 8}}
        values = sweep(full).model_dump()
        values |= {"base": merged(values["base"], own), "overrides": {}}
        values["models"] = {"mini-llama": {"name": "runs/mini-models/mini-llama/model"}}
        return FinetuneSweepConfig(**values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "quick_models", small_models)
        patch.setattr(miniature, "quick_sweep", small_sweep)
        yield patch


COMMAND = ["reproduce", "section6", "--quick", "--only", "main"]


@pytest.fixture(scope="module")
def made(smallest: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the smallest cell and what the command said."""
    out = tmp_path_factory.mktemp("section6") / "out"
    done = CliRunner().invoke(app, [*COMMAND, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out, done.output


def test_the_smallest_cell_goes_from_look_alike_data_to_a_page(made: tuple[Path, str]) -> None:
    out, said = made
    assert "none of this is a result" in said and "section6 1 of 1" in said
    page = (out / "section6.md").read_text(encoding="utf-8")
    assert page.startswith("# Section 6 in miniature") and "(quick variant, no result)" in page.splitlines()[0]
    assert "**is no result**" in page
    found = Section6.read(out)
    assert found.runs["status"].tolist() == ["finished"] and found.runs["steps"].tolist() == [2]
    assert set(found.answers["asked"]) == {"forward", "reverse"} and set(found.answers["step"]) == {0, 1, 2}
    assert set(found.ranks["split"]) == {"train", "heldout"}
    assert (found.ranks["texts"] >= found.ranks["candidates"]).all() and (found.ranks["candidates"] > 0).all()
    for row in found.answers.to_dict("records"):
        (folder,) = out.glob(f"**/{row['run']}/answers/step-{row['step']:06d}")
        frame = Reading.load(folder / f"decoded_match.{row['asked']}.{row['split']}.parquet").frame
        assert row["begins"] == pytest.approx(frame["begins"].mean(), abs=1e-6)
        assert row["begins_low"] <= row["begins"] <= row["begins_high"]
    assert {"attention_correlation", "gradient_cosine", "reverse_probability"} <= set(found.signatures["measure"])
    assert page == markdown(found), "the page is drawn from the tables alone"
    assert (out / "section6.html").read_text(encoding="utf-8") == html(found)
    assert f"written: {out / 'section6.html'}" in said, "the page to open comes first"
    assert found.models["mini-llama"]["status"] == "finished"
    data = found.about["data"]
    assert list(data) == ["data/parent_child_pairs.csv"], "the plan's paths, not this machine's"
    assert data["data/parent_child_pairs.csv"]["look_alike"] is True


def test_a_run_says_which_weights_it_started_from_whatever_lies_in_the_models_folder_later(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    asked = Miniature.of(made[0], only=["main"], quick=True)
    weights = asked.models_folder / "mini-llama" / "model" / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (name,) = [run.name for run in asked.sweeps[0].runs()]
    resolved = json.loads((made[0] / "section6" / name / "resolved.json").read_text(encoding="utf-8"))
    assert resolved["base_sha256"] == digest
    assert Section6.read(made[0]).runs["weights"].tolist() == [digest]
    moved = tmp_path / "models"
    shutil.copytree(asked.models_folder, moved)
    record = moved / "mini-llama" / "pretraining.json"
    record.write_text(record.read_text(encoding="utf-8").replace(digest, "9" * 64), encoding="utf-8")
    folders = {sweep.name: (sweep, made[0] / sweep.name) for sweep in asked.sweeps}
    found = collect(folders, (asked.models, moved), asked.data)
    assert found.models["mini-llama"]["sha256"]["model.safetensors"] == "9" * 64
    assert found.runs["weights"].tolist() == [digest]


def test_a_second_call_trains_nothing_and_draws_the_same(made: tuple[Path, str]) -> None:
    out, _ = made
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    weights = (out / "mini-models" / "mini-llama" / "model" / "model.safetensors").stat().st_mtime_ns
    again = CliRunner().invoke(app, [*COMMAND, "--out", str(out)])
    assert again.exit_code == 0 and f"{RUN}: finished already, skipped" in again.output, again.output
    table = CliRunner().invoke(app, [*COMMAND, "--out", str(out), "--table-only"])
    assert table.exit_code == 0 and "skipped" not in table.output
    assert (out / "mini-models" / "mini-llama" / "model" / "model.safetensors").stat().st_mtime_ns == weights
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_run_in_progress_a_failed_one_and_one_of_another_config_are_told(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    """The planned run with a sibling seed that has only begun; then it has a problem; then its config is another."""
    asked = Miniature.of(made[0], only=["main"], quick=True)
    (sweep,) = asked.sweeps
    more = replace(asked, sweeps=(sweep.model_copy(update={"seeds": [0, 1]}),))
    (begun,) = [run for run in more.sweeps[0].runs() if run.training.seed == 1]

    def status() -> str:
        return {row["run"]: row["status"] for row in more.collect().runs.to_dict("records")}[begun.name]

    assert status() == "not run"
    folder = made[0] / sweep.name / begun.name
    folder.mkdir()
    try:
        assert status() == "not run", "an empty folder"
        (folder / "config.yaml").write_text(dump_config(begun))
        assert status() == "not finished"
        (folder / "problem.txt").write_text("ValueError: no luck\n")
        assert status() == "failed: ValueError: no luck"
        other = begun.model_copy(update={"training": begun.training.model_copy(update={"batch_size": 3})})
        (folder / "config.yaml").write_text(dump_config(other))
        assert status() == "a run of another config lies in its folder"
        page = markdown(more.collect())
        assert f"section6, a run of another config lies in its folder: {begun.name}" in page
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_a_model_of_another_config_is_not_taken_for_the_planned_one(made: tuple[Path, str]) -> None:
    asked = Miniature.of(made[0], only=["main"], quick=True)
    base = merged(asked.models.base, {"training": {"steps": 3}})
    other = replace(asked, models=asked.models.model_copy(update={"base": base}))
    assert asked.collect().models["mini-llama"]["status"] == "finished"
    assert other.collect().models["mini-llama"] == {"status": "a model of another config lies in its folder"}


def fails(*_: object, **__: object) -> None:
    raise RunsFailed("1 of 2 runs failed (x: no luck)")


def has_no_memory(*_: object, **__: object) -> None:
    raise MemoryError


def test_what_fails_is_named_after_the_page_of_the_rest_is_written(
    made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made[0]
    monkeypatch.setattr("revprobe.report.run_sweep.run_sweep", fails)
    (out / "section6.md").unlink()
    done = CliRunner().invoke(app, [*COMMAND, "--out", str(out)])
    assert isinstance(done.exception, RevprobeError)
    assert str(done.exception) == "section6: 1 of 2 runs failed (x: no luck)"
    assert (out / "section6.md").is_file()


def test_runs_of_a_model_that_could_not_be_made_are_not_started(
    made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would fail one by one, or, with a half-made model of the same name in place, start from that."""
    out, started = made[0], list[object]()
    monkeypatch.setattr("revprobe.report.run_sweep.run_sweep", lambda *asked, **_: started.append(asked))
    monkeypatch.setattr("revprobe.finetune.runs.pretraining.pretrain", has_no_memory)
    done = CliRunner().invoke(app, [*COMMAND, "--out", str(out)])
    assert isinstance(done.exception, RevprobeError) and str(done.exception) == "mini-llama: MemoryError"
    assert not started and "section6: 1 of 1 runs are not started, for want of their model" in done.output
    assert (out / "section6.md").is_file(), "what was made before makes a page"
    asked = Miniature.of(Path("x"), only=["ablations"])
    (sweep,) = asked.sweeps_to_run()
    able = asked.runs_without(sweep, ["mini-llada-absolute", "mini-llama-both", "mini-qwen2"])
    assert {run.name for run in sweep.runs()} - set(able) == {
        f"mini-llada-parent-child-P2C-{variant}-s{seed}"
        for variant in ("absolute", "llama-read-both")
        for seed in range(3)
    }


def test_a_failure_is_told_without_the_folders_of_a_machine(made: tuple[Path, str]) -> None:
    """In the tables, which are committed; the terminal of the machine names them in full."""
    out = made[0]
    folder, model = out / "section6" / RUN, out / "mini-models" / "mini-llama"
    asked = Miniature.of(out, only=["main"], quick=True)
    kept = {file: file.read_bytes() for file in (folder / "config.yaml", model / "config.yaml")}
    try:
        (folder / "config.yaml").write_text("name: [broken")
        (status,) = asked.collect().runs["status"]
        assert "config.yaml" in status and str(out) not in status and "…/config.yaml" in status
    finally:
        for file, text in kept.items():
            file.write_bytes(text)
    for told, expected in (
        ("no file '/home/me/my runs/x.csv' (see /tmp/log.txt)", "no file '…/x.csv' (see …/log.txt)"),
        (r"C:\Users\me\x.txt is gone, ~/a/b.csv too", "…/x.txt is gone, …/b.csv too"),
        ("1/2 of https://a.b/c, forward / reverse, runs/a/b", "1/2 of https://a.b/c, forward / reverse, runs/a/b"),
        ("at file:/opt/q.py:3", "at file:…/q.py:3"),
    ):
        assert without_folders(told) == expected


def test_a_stop_says_that_the_same_command_goes_on(made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("revprobe.report.run_sweep.run_sweep", stop)
    done = CliRunner().invoke(app, [*COMMAND, "--out", str(made[0])])
    assert done.exit_code == 130 and "run the same command again to go on" in done.output
    assert PretrainedModel(made[0] / "mini-models" / "mini-llama").finished


def test_the_command_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["--only", "ablation"], "--only 'ablation' is no part of Section 6; the closest is 'ablations'"),
        (["--table-only"], "no finished run in 'runs'; no page was written"),
        ([], "write look-alikes with `revprobe data data`"),
    ):
        done = CliRunner().invoke(app, ["reproduce", "section6", *arguments])
        assert words in str(done.exception), (arguments, done.output)
    assert not (tmp_path / "runs").exists()


def test_the_whole_plan_is_that_of_the_examples_and_its_models_lie_in_its_folder() -> None:
    """In the default folder nothing is rewritten: what `revprobe finetune section6` has begun goes on."""
    asked = Miniature.of(Path("runs"))
    assert tuple(asked.sweeps_to_run()) == asked.sweeps
    elsewhere = Miniature.of(Path("x"), only=["ablations"], device="cuda", data=Path("/d"))
    (sweep,) = elsewhere.sweeps_to_run()
    needed = [one.name for one in elsewhere.models_of(sweep)]
    assert needed == [
        "mini-llada",
        "mini-llada-absolute",
        "mini-llada-both",
        "mini-llada-forward",
        "mini-llama-both",
        "mini-llama-forward",
    ]
    assert {run.training.device for run in sweep.runs()} == {"cuda"}
    assert {run.model.name for run in sweep.runs()} == {f"x/mini-models/{name}/model" for name in needed}
    paths = [one.path for model in elsewhere.models_of(sweep) for one in model.corpus.datasets.values()]
    assert set(paths) == {"/d/parent_child_pairs.csv", "/d/person_description", "/d/trex"}
    parents = [one.name for one in asked.models_of(asked.sweeps[0])]
    assert parents.index("mini-qwen2") < parents.index("mini-dream")


def test_the_quick_variant_is_small_and_of_the_same_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, own in QUICK.items():
        monkeypatch.setattr(miniature, name, own)
    quick, full = Miniature.of(Path("q"), quick=True), Miniature.of(Path("runs"))
    assert [len(sweep.runs()) for sweep in quick.sweeps] == [5, 2, 1]
    assert set(quick.sweeps[0].models) == set(full.sweeps[0].models)
    for one in quick.models.runs():
        assert (one.d_model, one.n_layers, list(one.corpus.datasets)) == (64, 2, ["parent-child"])
    both = {one.name: one.corpus.told for one in quick.models.runs()}
    assert both["mini-llada-both"] == "both" and both["mini-llada"] == "once"
    rates = {one.name: one.training.rates for one in quick.models.runs()}
    assert rates["mini-mlm"] == [0.15, 0.15] and rates["mini-llada"] is None
    assert quick.sweeps[0].overrides["mini-mlm"] == {"objective": {"rates": [0.15, 0.15]}}
    assert json.loads(quick.sweeps[1].model_dump_json())["seeds"] == [0]


def test_no_interval_of_the_page_reads_as_one_of_no_width(made: tuple[Path, str]) -> None:
    """Probabilities of thousandths, whose ends would all be 0.00: each gets the digits that tell its ends apart."""
    found = Section6.read(made[0])
    assert (found.signatures.query("measure == 'reverse_probability'")["high"] < 0.005).any(), "nothing so small here"
    ends = re.findall(r"\[([+-]?[\d.]+(?:e[+-]?\d+)?), ([+-]?[\d.]+(?:e[+-]?\d+)?)\]", markdown(found))
    assert len(ends) > 5 and not [pair for pair in ends if float(pair[0]) == float(pair[1])]
