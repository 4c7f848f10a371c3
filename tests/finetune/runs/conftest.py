"""A fine-tuning that was stopped after step 2, to be taken up again."""

import shutil
from pathlib import Path

import pytest
from stopped_finetuning import TINY, config_of, facts_told, stop_at

import revprobe as rp


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with facts, a base, and a run on them that was stopped after step 2."""
    home = tmp_path_factory.mktemp("home")
    (home / "facts.csv").write_text(facts_told())
    first = rp.fine_tune(config_of(home, {"tiny": TINY}), home / "first", listener=False)
    shutil.copytree(first.path / "base", home / "base")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(4, patch)
        rp.fine_tune(config_of(home, {"name": str(home / "base")}), home / "ft", listener=False)
    assert rp.open_run(home / "ft").steps == [0, 2]
    return home


@pytest.fixture
def home(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change; the run's config names files relative to it."""
    shutil.copytree(stopped, tmp_path / "home")
    config = tmp_path / "home" / "ft" / "config.yaml"
    config.write_text(config.read_text().replace(str(stopped), str(tmp_path / "home")))
    return tmp_path / "home"
