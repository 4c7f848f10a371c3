"""A fine-tuning's folder holds a copy of the facts it was trained on."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import revprobe as rp
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.runs import relation_copy
from revprobe.finetune.runs.relation_copy import keep_relation

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
    assert copy.read_bytes() == facts.read_bytes()
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
    with pytest.warns(
        UserWarning, match=r"run: the facts at .*facts.csv' were not copied .*No space left.*; the run goes"
    ):
        assert keep_relation(tmp_path / "run", str(facts)) is None
    assert list((tmp_path / "run" / "relation").iterdir()) == []


@pytest.mark.parametrize("link", [False, True])
def test_a_run_inside_the_folder_of_its_facts_copies_nothing(link: bool, tmp_path: Path) -> None:
    """Nor where a link leads there: the copy would hold the run, whose copy would hold the run."""
    data, run = tmp_path / "data", tmp_path / "data" / "runs" / "ft"
    run.mkdir(parents=True)
    (data / "p2c.jsonl").write_text("{}\n")
    if link:
        (tmp_path / "way").symlink_to(run.parent)
        run = tmp_path / "way" / "ft"
    assert keep_relation(run, str(data)) is None and list(run.iterdir()) == []
    own = run / "relation"
    own.mkdir()
    (own / "p2c.jsonl").write_text("{}\n")
    assert keep_relation(run, str(own)) is None and [file.name for file in own.iterdir()] == ["p2c.jsonl"]


def test_a_folder_with_a_pipe_is_not_copied(tmp_path: Path) -> None:
    """It would be waited at for ever."""
    run, data = tmp_path / "run", tmp_path / "data"
    for folder in (run, data / "part"):
        folder.mkdir(parents=True)
    os.mkfifo(data / "part" / "pipe")
    assert keep_relation(run, str(data)) is None and list(run.iterdir()) == []


@pytest.mark.parametrize("secret", ["part", "part/p2c.jsonl"])
def test_a_folder_that_cannot_be_read_is_not_copied(secret: str, tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    for folder in (run, data / "part"):
        folder.mkdir(parents=True)
    (data / "part" / "p2c.jsonl").write_text("{}\n")
    (data / secret).chmod(0)
    with as_nobody(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing has failed
        assert keep_relation(run, str(data)) is None
    assert list(run.iterdir()) == []
    (data / secret).chmod(0o700)


@contextmanager
def as_nobody(home: Path) -> Iterator[None]:
    """What root may read, nobody may not: for a while the user is another, to whom the folders above are opened."""
    if os.geteuid() != 0:
        yield
        return
    modes = {folder: folder.stat().st_mode for folder in (home, *home.iterdir(), *home.parents) if folder.is_dir()}
    for folder, mode in modes.items():
        folder.chmod(mode | (0o777 if folder.is_relative_to(home) else 0o111))
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


def without_room(run: Path) -> None:
    (run / "relation").write_text("a file")


def read_only(run: Path) -> None:
    (run / "relation").mkdir()
    (run / "relation").chmod(0o555)


@pytest.mark.parametrize(
    ("name", "before", "words"),
    [
        ("n" * 245 + ".csv", lambda run: None, "File name too long"),
        ("facts.csv", without_room, "FileExistsError"),
        ("facts.csv", read_only, "Permission denied"),
    ],
    ids=["long", "file", "read-only"],
)
def test_a_copy_that_cannot_be_written_is_told_and_the_run_goes_on(
    name: str, before: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    facts, run = tmp_path / name, tmp_path / "run"
    run.mkdir()
    facts.write_text(FACTS)
    before(run)
    with as_nobody(tmp_path), pytest.warns(UserWarning, match=words) as told:
        assert keep_relation(run, str(facts)) is None
    assert len(told) == 1 and "\n" not in str(told[0].message)


def test_a_run_is_trained_where_its_facts_cannot_be_kept(tmp_path: Path) -> None:
    facts = tmp_path / ("n" * 245 + ".csv")
    facts.write_text(FACTS)
    with pytest.warns(UserWarning, match="were not copied"):
        run = rp.fine_tune(config_of(facts), tmp_path / "ft", listener=False)
    assert run.finished and not list((run.path / "relation").iterdir())


def test_what_a_killed_copy_left_is_deleted(tmp_path: Path) -> None:
    """A copy that is there and other hidden files stay."""
    facts, run = tmp_path / "facts.csv", tmp_path / "run"
    (run / "relation").mkdir(parents=True)
    facts.write_text(FACTS)
    for name in (".facts.csv.99.140001.part", ".facts.csv.part", ".hidden"):
        (run / "relation" / name).write_text("half")
    assert keep_relation(run, str(facts)) is not None
    assert {file.name for file in (run / "relation").iterdir()} == {"facts.csv", ".facts.csv.part", ".hidden"}
