"""The example of storage over training runs on run folders, and its words are those of its numbers."""

import runpy
import sys

import pandas as pd
import pytest

import revprobe as rp
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig

CONFIG = """
name: masked
relation: {length: 4, alphabet: 6}
model: {d_model: 16}
training: {steps: 20, batch_size: 16, warmup_steps: 1, ema_decay: 0.9, seed: 0, device: cpu}
snapshots: {every: 5}
"""


@pytest.fixture(scope="module")
def example(root):
    return runpy.run_path(str(root / "examples" / "storage_over_training.py"))


def test_the_checkpoints_of_single_steps_are_spread_over_training(example):
    assert example["nearest"]([0, 5, 10, 15, 20], (0.02, 0.5, 0.9), 20) == [5, 10, 15]


def test_curves_and_steps_of_a_run_are_printed_and_saved(example, tmp_path, monkeypatch, capsys):
    path = tmp_path / "masked"
    rp.train(parse_config(CONFIG, RunConfig, "masked"), path)
    monkeypatch.setattr(sys, "argv", ["storage_over_training.py", str(path), "--out", str(tmp_path / "out")])
    example["main"]()
    steps, curves = (pd.read_csv(tmp_path / "out" / name) for name in ("one_step.csv", "storage_curves.csv"))
    assert set(curves["step"]) == {0, 5, 10, 15, 20} and set(curves["weights"]) == {"raw"}
    assert set(steps["step"]) == {5, 10, 15} and set(steps["run"]) == {"masked"}
    expected = rp.one_step_curves(rp.one_step(path, steps=[10]))
    row = expected[expected["quantity"] == "stored"].iloc[0]
    saved = steps[(steps["step"] == 10) & (steps["quantity"] == "stored")].iloc[0]
    assert saved["observed"] == pytest.approx(row["observed"], abs=1e-6)
    moved = "rises" if row["observed_low"] > 0 else "falls" if row["observed_high"] < 0 else "moves by nothing certain"
    assert f"step 10 (fresh optimizer): S[v, u] {moved}: {row['observed']:+.4f} [" in capsys.readouterr().out
