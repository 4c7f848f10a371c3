"""What `--on ray` adds to a run that `--on local` does, after start-up, and what starting up takes.

    python examples/benchmarks/ray_overhead.py                # a cluster of this machine; about five minutes
    python examples/benchmarks/ray_overhead.py --runs 3 --starts 1

Each start is a new process: Ray is imported, a cluster of this machine started, then one run is done, whose worker is
new. Then sweeps of some runs, one run at a time, on a cluster and here, in turn: a run's time is from the end of the
one before it to its own end, so that the first of a sweep, which finds no worker, is not among them. "empty" runs are
a process that prints revprobe's version: what differs between the engines is seen without the noise of training.
Rows are added to --out as they are measured, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from measuring import machine, show

from revprobe.engines.launcher import Display, Launcher, Work
from revprobe.engines.local import LocalLauncher
from revprobe.engines.ray import RayLauncher
from revprobe.engines.ray_cluster import connected
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.finetune.runs.sweeps import work_of

Row = dict[str, Any]
HERE = Path(__file__).resolve().parent
SWEEP = """
name: small
base:
  relation: {length: 4, alphabet: 8}
  model: {d_model: 16}
  training: {steps: 12, batch_size: 16, warmup_steps: 2, device: cpu}
  snapshots: {every: 12}
cells: [{objective: causal, seed: SEEDS}]
"""


def works(kind: str, runs: int) -> list[Work]:
    """So many runs of the kind, in folders of their own."""
    if kind == "empty":
        verb: Any = "--version"
        return [Work(f"empty-{n}", verb, "", 1, "cpu", 1) for n in range(runs)]
    config = parse_config(SWEEP.replace("SEEDS", str(list(range(runs)))), SweepConfig, "ray_overhead.py")
    return [work_of(run) for run in config.runs()]


def ends(launcher: Launcher, these: list[Work]) -> list[float]:
    """Seconds from the beginning to the end of each run. Raises: RuntimeError, when a run fails."""
    stamps: list[float] = []

    def say(line: str) -> None:
        if ": finished in " in line:
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        problems = launcher.run_all(these, Path(folder), Display(lambda work: lambda *news: None, say))
    if problems:
        raise RuntimeError(f"runs that failed: {problems}")
    return [stamp - began for stamp in stamps]


def start_up() -> Row:
    """In a new process: seconds until a cluster of this machine is there, and of its first run."""
    began = time.perf_counter()
    with connected(None):
        there = time.perf_counter() - began
        return {"cluster": there, "first run": ends(RayLauncher(jobs=1), works("empty", 1))[0]}


def start_ups(times: int) -> Row:
    """Each start alone; the first run of each is less what an empty run takes here."""
    told = [subprocess.check_output([sys.executable, __file__, "--start"], text=True) for _ in range(times)]
    starts = [json.loads(one.splitlines()[-1]) for one in told]
    alone = statistics.median([ends(LocalLauncher(), works("empty", 1))[0] for _ in range(times)])
    return {
        "what": "start-up",
        "cluster": spread([one["cluster"] for one in starts]),
        "first worker": spread([one["first run"] - alone for one in starts]),
    }


def sweeps(kind: str, runs: int) -> Row:
    """Seconds of a further run on each engine, of two sweeps each, and what Ray adds."""
    found: dict[str, list[float]] = {"local": [], "ray": []}
    with connected(None):
        for _ in range(2):
            for name, launcher in (("local", LocalLauncher()), ("ray", RayLauncher(jobs=1))):
                at = ends(launcher, works(kind, runs + 1))
                found[name] += [end - before for before, end in pairwise(at)]
    added = statistics.median(found["ray"]) - statistics.median(found["local"])
    return {"what": f"a further run, {kind}", **{name: spread(found[name]) for name in found}, "ray adds": added}


def spread(seconds: list[float]) -> Row:
    """Median, range and number."""
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds), "n": len(seconds)}


def main() -> None:
    """Measure what is not there yet, a line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5, help="further runs of each sweep")
    parser.add_argument("--out", type=Path, default=HERE / "ray_overhead.jsonl")
    parser.add_argument("--start", action="store_true", help="one start, in this process")
    asked = parser.parse_args()
    if asked.start:
        print(json.dumps(start_up()))
        return
    memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    on = {"machine": f"{machine()}, {os.cpu_count()} cores, {memory}", "version of ray": version("ray")}
    lines = asked.out.read_text(encoding="utf-8").splitlines() if asked.out.exists() else []
    there = {json.loads(line)["what"] for line in lines}
    measures = {"start-up": lambda: start_ups(asked.starts)}
    measures |= {
        f"a further run, {kind}": lambda kind=kind: sweeps(kind, asked.runs) for kind in ("empty", "one-layer")
    }
    for what, measure in measures.items():
        if what not in there:
            row = measure() | on
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    rows = [json.loads(line) for line in asked.out.read_text(encoding="utf-8").splitlines()]
    columns = ("cluster", "first worker", "local", "ray", "ray adds")
    show("ray overhead", [{"what": row["what"]} | {key: shown(row.get(key)) for key in columns} for row in rows])


def shown(value: Any) -> str:
    """Seconds: the median and its range, or one number."""
    if isinstance(value, dict):
        return f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g}; n = {value['n']})"
    return "" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
