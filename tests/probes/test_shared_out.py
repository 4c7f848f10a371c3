"""A probe shared out over workers is the probe of one process, whoever the workers are; here they are this process."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import revprobe as rp
from revprobe.engines import ray_workers
from tiny import gpt2


@dataclass
class Here:
    """Workers in this process: each question of each part is put to one model, in a wrong order, and counted."""

    size: int = 2
    device: str = "cpu"
    threads: int = torch.get_num_threads()
    load: Mapping[str, Any] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)

    @contextmanager
    def holding(self, make: Callable[[], Any]) -> Iterator["Here"]:
        self.held.append(make())
        yield self

    def ask(self, question: Callable[[Any, int], Any], parts: int, told: Any = None) -> list[Any]:
        self.asked.append(parts)
        found = {}
        for done, part in enumerate(reversed(range(parts)), start=1):
            found[part] = question(self.held[-1], part)
            told(done, parts)
        return [found[part] for part in range(parts)]


def assert_same(found: rp.Readings, alone: rp.Readings) -> None:
    for one, other in zip(found, alone, strict=True):
        assert (one.name, one.n, one.undefined, one.meta) == (other.name, other.n, other.undefined, other.meta)
        np.testing.assert_allclose((one.value, *one.interval), (other.value, *other.interval), rtol=0, atol=1e-6)
        pd.testing.assert_frame_equal(one.frame, other.frame, rtol=0, atol=1e-6)


def test_a_folder_is_loaded_by_the_workers_and_the_readings_are_those_of_one(tmp_path: Path) -> None:
    gpt2().module.save_pretrained(tmp_path / "model")
    model = rp.load_model(tmp_path / "model", dtype="float32")
    pairs = rp.letter_pairs(6, model=model)
    workers, heard = Here(load={"dtype": "float32"}), []
    found = rp.probe(tmp_path / "model", pairs, workers=workers, progress=lambda *told: heard.append(told))
    assert_same(found, rp.probe(model, pairs))
    assert len(workers.held) == 1, "loaded for each pass anew"
    assert len(workers.asked) > 0 and all(2 <= parts <= 8 for parts in workers.asked), (
        "a part of a few queries costs more"
    )
    assert heard and all(done <= total for done, total in heard) and heard[-1][0] == heard[-1][1]
    assert_same(rp.probe(tmp_path / "model", pairs), rp.probe(model, pairs))


def test_a_loaded_model_is_sent_and_options_for_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    pairs = rp.letter_pairs(5, model=model)[:9]
    assert_same(rp.probe(model, pairs, workers=Here()), rp.probe(model, pairs))
    with pytest.raises(rp.RevprobeError, match="dtype= does not apply to a model that is loaded already"):
        rp.probe(model, pairs, workers=Here(load={"dtype": "float32"}))
    monkeypatch.setattr(rp.ProbedModel, "device", torch.device("cuda:0"))
    with pytest.raises(rp.RevprobeError, match=r"is on cuda:0, and is sent to workers from the CPU; call module\.to"):
        rp.probe(model, pairs, workers=Here())


def test_a_registered_name_is_registered_with_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader is known to this process alone."""
    loaders: dict[str, Any] = {}
    monkeypatch.setattr("revprobe.models.registry._LOADERS", loaders)
    rp.register_model("mine", gpt2)
    model = gpt2()
    pairs = rp.letter_pairs(5, model=model)[:9]
    workers = Here()
    made: list[Any] = []

    @contextmanager
    def elsewhere(make: Callable[[], Any]) -> Iterator[Here]:
        loaders.clear()
        made.append(make)
        with Here.holding(workers, make) as team:
            yield team

    monkeypatch.setattr(workers, "holding", elsewhere)
    found = rp.probe("mine", pairs, workers=workers, only=["probability"])
    assert found[0].value == pytest.approx(rp.probe(model, pairs, only=["probability"])[0].value, abs=1e-6)
    assert made and "mine" in loaders


def test_the_work_is_divided_once(tmp_path: Path) -> None:
    model = gpt2()
    pairs = rp.letter_pairs(5, model=model)[:3]
    with pytest.raises(rp.RevprobeError, match="share= and workers= both divide the work; leave one of them out"):
        rp.probe(model, pairs, share=lambda work: work(0, 1), workers=Here())
    with pytest.raises(rp.RevprobeError, match=r"workers=4: expected Workers or None; make them with ray_workers\(4\)"):
        rp.probe(model, pairs, workers=4)  # type: ignore[arg-type]
    for wrong in ({"count": 0}, {"threads": 0}):
        with pytest.raises(rp.RevprobeError, match="=0: expected a whole number of at least 1"):
            rp.ray_workers(**wrong)  # type: ignore[arg-type]


def test_probe_on_a_cluster_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is asked for reaches the workers, and the files are those of a probe done here."""
    from revprobe.cli.main import main

    gpt2().module.save_pretrained(tmp_path / "model")
    rp.letter_pairs(5, model=gpt2())[:9].save(tmp_path / "pairs.jsonl")
    made: list[tuple[Any, Any]] = []
    here = Here()

    def workers(count: int | None, **asked: Any) -> Here:
        made.append((count, asked))
        here.load = {name: value for name, value in asked.items() if name in ("step", "weights", "dtype")}
        return here

    monkeypatch.setattr(ray_workers, "ray_workers", workers)
    monkeypatch.chdir(tmp_path)

    def run(*more: str) -> int:
        command = ["revprobe", "probe", "model", "--pairs", "pairs.jsonl", "--load", "dtype=float32", *more]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as end:
            main()
            raise SystemExit(0)
        return int(end.value.code or 0)

    cluster = ("--on", "ray", "--workers", "2", "--threads", "3", "--address", "auto", "--out", "there")
    assert run("--out", "here") == 0 and not made
    assert run(*cluster) == 0, capsys.readouterr().err
    assert made == [
        (2, {"address": "auto", "device": "cpu", "threads": 3, "step": -1, "weights": None, "dtype": "float32"})
    ]
    assert_same(rp.Readings.load(tmp_path / "there"), rp.Readings.load(tmp_path / "here"))
    assert here.asked, "the workers were not asked"
    assert run("--workers", "2") == 1
    assert "workers 2: local runs have none; add --on ray" in capsys.readouterr().err
