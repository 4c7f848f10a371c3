"""The committed results: the page is drawn from the numbers beside it, and the numbers say where they come from."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from revprobe.finetune.config import SweepConfig, dump_config, load_config, parse_config
from revprobe.finetune.reproduce import COLUMNS
from revprobe.finetune.runs import train

SWEEPS = {"one-layer": "one_layer.parquet", "robustness": "robustness.parquet"}


@pytest.fixture(scope="module")
def results(root: Path) -> Path:
    return root / "examples" / "results"


@pytest.fixture(scope="module")
def scripts(root: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """`collect_results` and `results_table`, imported as the scripts import each other."""
    sys.path.insert(0, str(root / "examples"))
    try:
        import collect_results
        import results_table

        yield collect_results, results_table
    finally:
        sys.path.remove(str(root / "examples"))
        for name in ("collect_results", "results_table"):
            sys.modules.pop(name, None)


def test_the_committed_page_is_drawn_from_the_committed_numbers(
    results: Path, scripts: tuple[ModuleType, ModuleType]
) -> None:
    """A number changed by hand on either side turns this red; `python examples/results_table.py` draws it anew."""
    assert scripts[1].readme(results) == (results / "README.md").read_text(encoding="utf-8")


def test_every_run_is_either_in_the_numbers_or_listed_as_not_run(results: Path) -> None:
    provenance = json.loads((results / "provenance.json").read_text())
    for name, sweep in provenance["sweeps"].items():
        frame, config = pd.read_parquet(results / SWEEPS[name]), load_config(name, SweepConfig)
        assert list(frame.columns) == COLUMNS
        finished = {run.name for run in config.runs()} - set(sweep["not_run"])
        assert finished == set(sweep["finished"]) == set(frame["run"]), name
        assert sweep["config_sha256"] == hashlib.sha256(dump_config(config.base).encode()).hexdigest()
        assert sweep["versions"] and {"torch", "revprobe"} <= set(sweep["versions"][0])
        assert (results / SWEEPS[name]).stat().st_size < 3_000_000
    assert len(provenance["trained_at_commit"]) == len(provenance["collected_at_commit"]) == 40


def test_every_committed_run_has_every_number_with_its_interval_at_every_checkpoint(results: Path) -> None:
    """Six measures, raw and EMA (ARM: raw), at each snapshot of its config."""
    for name, file in SWEEPS.items():
        if not (results / file).is_file():
            continue
        frame = pd.read_parquet(results / file)
        for run in load_config(name, SweepConfig).runs():
            own = frame[frame["run"] == run.name]
            if own.empty:
                continue
            kinds = ["raw", "ema"] if run.model.objective == "masked" else ["raw"]
            assert len(own) == len(run.snapshot_steps) * len(kinds) * 6, run.name
            assert not own.duplicated(["step", "weights", "measure"]).any()
            defined = own[own["value"].notna()]
            assert (defined["low"] <= defined["value"] + 1e-6).all() and (
                defined["value"] <= defined["high"] + 1e-6
            ).all()
            assert (defined["n"] > 0).all()
            assert own[own["step"] == run.training.steps]["value"].notna().all(), f"{run.name} ends undefined"


def test_a_folder_without_runs_leaves_the_collected_numbers_alone(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_layer.parquet").write_bytes(b"numbers")
    monkeypatch.setattr(sys, "argv", ["collect", str(tmp_path / "mistyped"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no finished run of one-layer in '.*mistyped'; nothing was written"):
        scripts[0].main()
    assert [path.name for path in tmp_path.iterdir()] == ["one_layer.parquet"]
    assert (tmp_path / "one_layer.parquet").read_bytes() == b"numbers"


def test_collecting_leaves_unfinished_runs_out_and_says_so(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run finished, one stopped, one never started: the first is in the page, the others are named."""
    text = (
        "name: one-layer\nbase:\n  relation: {length: 10, alphabet: 2}\n  model: {d_model: 8}\n"
        "  training: {steps: 2, batch_size: 4, device: cpu}\n  snapshots: {steps: [0]}\n"
        "cells: [{position_encoding: rope, seed: [0, 1, 2]}]\n"
    )
    sweep = parse_config(text, SweepConfig, "tiny")
    collect, page = scripts
    monkeypatch.setattr(collect, "load_config", lambda name, kind: sweep)
    done, stopped, _ = sweep.runs()
    finished = train(done, tmp_path / "runs" / done.name)

    def stop(step: int, steps: int, loss: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path / "runs" / stopped.name, listener=stop)
    monkeypatch.setattr(sys, "argv", ["collect", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    collect.main()
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())["sweeps"]["one-layer"]
    assert provenance["finished"] == ["rope-l10-s0"]
    assert provenance["not_run"]["rope-l10-s2"] == "not run"
    assert "stopped at step 0 of 2" in provenance["not_run"]["rope-l10-s1"]
    frame = pd.read_parquet(tmp_path / "out" / "one_layer.parquet")
    expected = finished.readings().measures()
    pd.testing.assert_series_equal(frame["value"], expected["value"].astype(float), check_names=False, atol=1e-6)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text == page.readme(tmp_path / "out")
    assert "1 runs finished on cpu" in text
    assert "## Spread over configurations\n\nnot run" in text and "## Causal edits of the route\n\nnot run" in text
    assert "| 1 of 3 | 90 |" in text and "Not in the tables: rope-l10-s1, rope-l10-s2." in text
