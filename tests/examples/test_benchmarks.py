"""The benchmarks of large models and many pairs, at tiny sizes: each runs through, and its numbers make sense."""

import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tiny import ROOT

BENCHMARKS = ROOT / "examples" / "benchmarks"
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux' /proc")


@pytest.fixture
def script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a benchmark by its name; what they share is beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@linux
def test_many_pairs_have_one_number_in_both_ways(script: Callable[[str], ModuleType]) -> None:
    """And parts leave more on disk, the more there are."""
    many, asked = script("many_pairs"), Namespace(threads=1, tokens=8, size=50, probes=["attention"])
    parts, whole, more = (many.measure(*at, asked) for at in (("in parts", 60), ("all at once", 60), ("in parts", 120)))
    assert abs(parts["value"] - whole["value"]) < 1e-6 and parts["value"] != more["value"]
    assert more["MB on disk"] > parts["MB on disk"] > 0 == whole["MB on disk"]
    assert all(0 < row["seconds"] < 60 and row["resident MB before"] > 100 for row in (parts, whole, more))
    assert 0 < more["end told at half, of the true"] < 3 and whole["end told at half, of the true"] != parts["seconds"]


def test_gradients_of_long_queries_take_more_than_a_forward_pass(script: Callable[[str], ModuleType]) -> None:
    short, long = (
        {row["way"]: row for row in script("many_pairs").long_query(tokens, Namespace(rounds=1))}
        for tokens in (32, 128)
    )
    assert short["plain forward"]["of a forward"] == 1.0
    for table in (short, long):
        assert table["gradient cosine"]["peak extra MB"] > table["plain forward"]["peak extra MB"] > 0
    assert long["attention, one row"]["peak extra MB"] > 2 * short["attention, one row"]["peak extra MB"]


@linux
def test_a_checkpoint_of_the_published_layout_is_loaded_and_its_memory_seen(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """Written in shards under the published names; the weights are those of the shape, and reading them costs less."""
    loading = script("large_loading")
    config = loading.config_for("GSAI-ML/LLaDA-8B-Base", None, True)
    total = loading.write_checkpoint(tmp_path, config, torch.bfloat16, 10_000_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) == 3 and total < sum(path.stat().st_size for path in shards) < 1.01 * total
    loaded, read = (loading.measure(way, tmp_path, "warm", 16, 1) for way in ("load", "read"))
    assert loaded["weights"] == total and loaded["seconds"] >= loaded["load"] > 0 < loaded["first forward"]
    assert loaded["resident beyond"] > total / 2 and read["resident beyond"] < loaded["resident beyond"]


def test_without_room_on_disk_nothing_is_written(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = script("large_loading")
    asked = Namespace(shape="GSAI-ML/LLaDA-8B-Base", tiny=False, scratch=tmp_path)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: Namespace(free=39 * loading.GB))
    with pytest.raises(SystemExit, match=r"39\.0 GB free; expected 40\.1 GB"):
        loading.checkpoint_rows(None, torch.bfloat16, asked)
    assert not list(tmp_path.iterdir())
