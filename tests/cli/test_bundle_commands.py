"""`report --bundle` and `dashboard --export`: the same folder to hand on, its size said before."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import revprobe as rp
from revprobe.finetune.config.one_layer import RunConfig

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one tiny run."""
    folder = tmp_path_factory.mktemp("shared") / "runs"
    training = {"steps": 4, "batch_size": 8, "warmup_steps": 0, "ema_decay": None, "device": "cpu"}
    about = {"model": {"d_model": 8}, "relation": {"length": 4, "alphabet": 9}, "snapshots": {"every": 4}}
    rp.train(RunConfig(name="one", training=training, **about), folder / "one", listener=False)
    return folder


def test_both_commands_write_the_same_bundle_and_say_the_size_first(cli: Cli, runs: Path, tmp_path: Path) -> None:
    """The dashboard's starts no server: it comes back."""
    for command, option, folder in (("report", "--bundle", "shared"), ("dashboard", "--export", "exported")):
        code, said, err = cli(command, runs, option, folder)
        assert (code, err) == (0, ""), said + err
        first, last = (line for line in said.splitlines() if line.startswith("bundle: "))
        assert first.startswith("bundle: up to about ") and first.endswith(f" will be written to {folder}")
        assert " files, " in last and last.endswith(f"open {folder}/index.html")
    written = [{one.relative_to(tmp_path / of) for one in (tmp_path / of).rglob("*")} for of in ("shared", "exported")]
    assert written[0] == written[1]
    assert pd.read_csv("shared/summary.csv").equals(pd.read_csv("exported/summary.csv"))
    assert not (runs / "report.html").exists(), "the runs are only read"


def test_a_folder_of_anything_else_is_refused_in_one_line(cli: Cli, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work", encoding="utf-8")
    code, _, err = cli("report", runs, "--bundle", "thesis")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and "chapter.tex" in err, err
    assert [one.name for one in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
