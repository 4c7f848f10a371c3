"""A fine-tuning's folder holds a copy of the facts it was trained on."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import revprobe as rp
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.runs import relation_copy
from revprobe.finetune.runs.relation_copy import keep_relation
from revprobe.report.dashboard import held_model

NAMES = zip("ABCDEFGHIJKL", "MNOPQRSTUVWX", strict=True)
FACTS = "\n".join(["parent,child", *(f"{one}nn {one}oss,{two}ed {two}ale" for one, two in NAMES)])


def config_of(facts: Path) -> FinetuneConfig:
    templates = {"P2C": "Fact: {parent} has the child {child}", "C2P": "Fact: {child} has the parent {parent}"}
    table = {"name": "table", "path": str(facts), "columns": ["parent", "child"], "templates": templates}
    tiny: dict[str, Any] = {"layout": "dream", "d_model": 16, "n_heads": 2}
    tiny["pretraining"] = {"facts": 10, "steps": 2, "batch_size": 4}
    return FinetuneConfig(
        name="ft",
        model={"tiny": tiny},
        relation=table | {"direction": "P2C"},
        training={"steps": 1, "batch_size": 4, "device": "cpu"},
        snapshots={"count": 1, "facts": 4},
        evaluation={"max_new_tokens": 2},
    )


def test_a_run_keeps_its_facts_and_its_other_files_are_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is the file, byte for byte; nothing else in the folder differs for it."""
    facts = tmp_path / "facts.csv"
    facts.write_text(FACTS)
    run = rp.fine_tune(config_of(facts), tmp_path / "with" / "ft", listener=False)
    copy = run.path / "relation" / "facts.csv"
    assert copy.read_bytes() == facts.read_bytes() and held_model.RELATION == relation_copy.RELATION
    monkeypatch.setattr(relation_copy, "MOST", 0)
    bare = rp.fine_tune(config_of(facts), tmp_path / "without" / "ft", listener=False)
    assert not (bare.path / "relation").exists(), "larger than what is copied"
    names = {file.relative_to(bare.path) for file in bare.path.rglob("*") if file.is_file()}
    assert {file.relative_to(run.path) for file in run.path.rglob("*") if file.is_file()} - names == {
        Path("relation/facts.csv")
    }
    for name in ("config.yaml", "resolved.json"):
        assert (run.path / name).read_bytes() == (bare.path / name).read_bytes()
    facts.write_text(FACTS.replace("Ann", "Eve"))
    assert rp.fine_tune(run.config, run.path, listener=False).path == run.path
    assert copy.read_text() == FACTS, "what it was trained on stays"


def test_a_folder_is_copied_and_what_is_no_plain_file_is_not(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    (data / "part").mkdir(parents=True)
    run.mkdir()
    (data / "part" / "p2c.jsonl").write_text("{}\n")
    copy = keep_relation(run, str(data))
    assert copy == run / "relation" / "data" and (copy / "part" / "p2c.jsonl").read_text() == "{}\n"
    assert keep_relation(run, str(data)) is None, "it is there"
    shutil.rmtree(run / "relation")
    (data / "link").symlink_to(tmp_path)
    for source in (str(data), str(tmp_path / "nothing"), "user/dataset", ".", "..", None):
        assert keep_relation(run, source) is None
    assert list(run.iterdir()) == []


def test_a_copy_that_fails_half_way_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tmp_path / "facts.csv"
    facts.write_text(FACTS)
    (tmp_path / "run").mkdir()

    def stops(source: Path, target: Path) -> None:
        Path(target).write_text(FACTS[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", stops)
    with pytest.raises(OSError, match="No space left"):
        keep_relation(tmp_path / "run", str(facts))
    assert list((tmp_path / "run" / "relation").iterdir()) == []
