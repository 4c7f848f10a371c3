"""How long the dashboard takes to list a folder of many runs, to look at it again, and to draw some of them.

python examples/benchmarks/many_runs.py                             # 100 runs of 20 checkpoints
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import revprobe as rp
from revprobe.finetune.config.loading import dump_config
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.models.checkpoints import step_name
from revprobe.report.dashboard.folder import RunsFolder
from revprobe.report.dashboard.views import curves

FACTS = [*"abcdefghijklmnopqrstuvwxyz"]


def reading(step: int) -> rp.Reading:
    """Scores of 26 facts, drawn at random."""
    rng = np.random.default_rng(step)
    columns: dict[str, Any] = {"pair": np.arange(len(FACTS)), "fact": FACTS, "group": 0, "layer": 0, "head": 0}
    columns |= {"kind": "same_target", "offset_forward": 1, "offset_reverse": -1, "reason": ""}
    columns |= {"distance_forward": 1, "distance_reverse": 1, "weight_forward": 0.5, "weight_reverse": 0.5}
    columns |= {f"score_{side}": rng.normal(size=len(FACTS)) for side in ("forward", "reverse")}
    about = {"model": "made", "step": step, "weights": "raw", "kind": "same_target", "objective": "masked"}
    return rp.Reading("attention_correlation", pd.DataFrame(columns), about)


def write_run(folder: Path, checkpoints: int) -> None:
    """A run that was interrupted after so many checkpoints of ten steps each."""
    training = {"steps": 10 * (checkpoints + 1), "warmup_steps": 0}
    config = RunConfig.model_validate({"name": folder.name, "training": training, "snapshots": {"every": 10}})
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    for step in range(0, 10 * checkpoints, 10):
        rp.Readings([reading(step)]).save(folder / "readings" / step_name(step))
        (folder / "checkpoints" / step_name(step)).mkdir(parents=True)
        (folder / "checkpoints" / step_name(step) / "COMPLETE").touch()


def seconds(call: Callable[[], Any], rounds: int = 1) -> float:
    """The median time of a call."""
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def main() -> None:
    """Make the folder, measure, print one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--drawn", type=int, default=10, help="runs drawn over each other")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_run(root / "run-000", asked.checkpoints)
        for number in range(1, asked.runs):
            shutil.copytree(root / "run-000", root / f"run-{number:03d}")
        folder = RunsFolder(root)
        found = {"first list": seconds(folder.scan), "each look after": seconds(folder.scan, rounds=9)}
        some = folder.scan()[: asked.drawn]
        how = {"weights": "ema", "bands": "facts"}
        found[f"{asked.drawn} runs drawn"] = seconds(lambda: curves(folder, some, **how))
        found[f"{asked.drawn} runs drawn again"] = seconds(lambda: curves(folder, some, **how), rounds=3)
    print(f"{asked.runs} runs of {asked.checkpoints} checkpoints")
    for name, took in found.items():
        print(f"{name:24} {took:8.3f} s")
    print(json.dumps({name: round(took, 4) for name, took in found.items()}))


if __name__ == "__main__":
    main()
