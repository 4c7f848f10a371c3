"""A column that a frame has of its own is not lost to one of that name before it, in any table of many readings."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import revprobe as rp
import tiny
from revprobe import Reading, Readings
from revprobe.report.bundle.rows import write_rows

KEYS = ["pair", "direction", "part", "position", "layer", "head"]


@pytest.fixture(scope="module")
def trace() -> Reading:
    """A denoising trace of three steps, of a model at training step 500."""
    draw, pairs = torch.Generator().manual_seed(1), []
    for fact in range(6):
        ids = torch.randperm(50, generator=draw)[:8].tolist()
        forward, reverse = rp.Query(ids, [4, 5, 6], [1]), rp.Query(ids[2:7] + ids[:2], [2, 3, 4], [6])
        pairs.append(rp.ReversalPair(forward, reverse, fact=str(fact)))
    found = rp.trace_denoising(tiny.radd(), rp.ReversalPairs.from_pairs(pairs), steps=3, progress=False)
    return _at(found, 500)


def _at(reading: Reading, step: int) -> Reading:
    return Reading(reading.name, reading.frame, reading.meta | {"step": step})


def test_the_denoising_step_stands_beside_the_training_step(trace: Reading, tmp_path: Path) -> None:
    """All steps of a trace had the training step: its rows no longer told apart what they are of."""
    write_rows([("a run", trace)], tmp_path / "rows.parquet")
    for frame in (Readings([trace, trace]).select(step=500)[:1].frame, pd.read_parquet(tmp_path / "rows.parquet")):
        assert set(frame["step"]) == {500} and frame["own_step"].tolist() == trace.frame["step"].tolist()
        assert not frame.duplicated([*KEYS, "own_step"]).any()
        assert frame.columns.is_unique and set(trace.frame) - {"step"} <= set(frame)


def test_a_summary_by_the_denoising_step_has_both_steps(trace: Reading) -> None:
    """It raised pandas' "cannot insert step, already exists"."""
    alone = trace.summary(by="step")
    both = Readings([trace, _at(trace, 600)]).summary(by="step")
    assert both["step"].tolist() == [500] * len(alone) + [600] * len(alone)
    assert both["own_step"].tolist() == 2 * alone["step"].tolist()
    assert both["value"].tolist() == 2 * alone["value"].tolist()
    assert "own_step" in Readings([trace]).summary(by="step", compact=True)


@pytest.mark.parametrize("name", ["reading", "model", "step", "weights", "run"])
def test_no_name_in_front_takes_a_column_away(name: str, tmp_path: Path) -> None:
    """Whatever a user adds to a frame: it is in the rows, under a name of its own."""
    about = {"model": "m", "step": 3, "weights": "raw", "kind": "same_target", "objective": "masked"}
    reading = tiny.made_probabilities(0, "abcdefghij", about)
    added = reading.with_columns(**{name: range(len(reading.frame))})
    write_rows([("r", added), ("s", reading)], tmp_path / "rows.parquet")
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    assert rows[f"own_{name}"].dropna().tolist() == list(range(len(reading.frame)))
    assert rows["run"].unique().tolist() == ["r", "s"] and set(rows["step"]) == {3}
    if name != "run":
        frame = Readings([added]).frame
        assert frame[f"own_{name}"].tolist() == list(range(len(frame))) and set(frame["model"]) == {"m"}
