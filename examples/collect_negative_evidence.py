"""Collect the sweeps about negative evidence, finished or not, into examples/results/, and draw the page from them.

    python examples/collect_negative_evidence.py runs/negative-evidence runs/one-layer-published runs/pressure

Of the first two sweeps two tables each: its answers over training, and one row for each run and its weights, with its
axes, statistics, price, log and readings; a run that is not finished stands there with its reason. Prices take seconds
a run; those of checkpoints that have not changed are kept, so the command can be stopped and given again while a sweep
goes on. Of the sweep `pressure`, and with --pressure of some cells of the others, the pressure of the training terms
on the reverse answer at every checkpoint (about five seconds each); of `pressure` also what that foretells, and what
is stored for answer and placeholder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from collect_results import RESULTS, commit_of, provenance
from results_table import write_readme

import revprobe as rp
from revprobe.atomic_files import write_text
from revprobe.finetune.config.loading import load_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.finetune.runs.one_layer import OneLayerRun
from revprobe.finetune.runs.sweeps import open_sweep
from revprobe.probes.statistics.estimators import STATISTICS_VERSION
from revprobe.report.paper.evidence_runs import (
    FINISHED,
    axes_of,
    checkpoint_digest,
    collect_run,
    status_of,
    write_table,
)

SWEEPS = {"negative-evidence": "negative_evidence", "one-layer-published": "one_layer_published"}
PROVENANCE = "negative_evidence.json"
# The cells whose pressure is read, from so many sets of masks a class. `pressure` has a checkpoint every 200 steps.
PRESSURE = "pressure"
PRESSED = {
    PRESSURE: ("rope-l10", "rope-l10-drop-right", "absolute-l10"),
    "negative-evidence": ("rope-l10-then-drop-right", "rope-l10-drop-right-then-keep"),
    "one-layer-published": ("rope-l10", "absolute-l10"),
}
STORED_EVERY = 1000  # steps
DRAWS = 1024
AT_A_TIME = 10  # runs whose prices are kept if the command is stopped


def collect(folder: Path, name: str, out: Path) -> tuple[list[str], dict[str, str]]:
    """Write the tables of one sweep. Returns: the finished runs, and why each of the others is not."""
    files = [out / f"{SWEEPS[name]}_{kind}.parquet" for kind in ("answers", "runs")]
    kept = out / f".{SWEEPS[name]}_prices.parquet"
    before = [pd.read_parquet(file) for file in (files[1], kept) if file.is_file()]
    known: dict[str, dict[str, Any]] = {}
    for table in before:
        for row in table.to_dict("records"):
            known.setdefault(row["run"], {})[row["weights"]] = row
    answers, rows, finished, left_out = [], [], [], {}
    for config in load_config(name, SweepConfig).runs():
        own, found = collect_run(folder, config, known=known.get(config.name))
        rows += found
        if own is None:
            left_out[config.name] = found[0]["status"]
            continue
        answers.append(own)
        finished.append(config.name)
        if len(finished) % AT_A_TIME == 0:
            write_table(pd.DataFrame(rows), kept)
            print(f"{name}: {len(finished)} runs, the last {config.name}", flush=True)
    if not finished:
        raise SystemExit(f"no finished run of {name} in {str(folder)!r}; nothing was written")
    keys = ["run", "weights", "question", "extra", "step"]
    write_table(pd.concat(answers).sort_values(keys, ignore_index=True), files[0])
    write_table(pd.DataFrame(rows), files[1])
    kept.unlink(missing_ok=True)
    return finished, left_out


def collect_pressure(folders: dict[str, Path], out: Path) -> None:
    """Read the pressure at every checkpoint of the finished runs of PRESSED, and what goes with it.

    Runs that have not changed are kept, those of other sweeps too.
    """
    tables = {name: _Kept(out / f"negative_evidence_{name}.parquet", folders) for name in READERS}
    for sweep, folder in folders.items():
        for config in load_config(sweep, SweepConfig).runs():
            axes, run = axes_of(config), OneLayerRun(folder / config.name)
            if axes["cell"] not in PRESSED[sweep] or status_of(run, config) != FINISHED:
                continue
            about = {"sweep": sweep, "checkpoint": checkpoint_digest(run, "raw"), "facts": config.relation.alphabet}
            about |= {key: axes[key] for key in ("run", "cell", "recipe", "seed")}
            for name in READERS if sweep == PRESSURE else (PRESSURE,):
                tables[name].add(about, READERS[name], run, tables[PRESSURE])
            print(f"pressure: {sweep} {config.name}", flush=True)


class _Kept:
    """A table that grows by one run at a time; what it held of a run that has not changed stays."""

    KEYS = ("run", "sweep", "checkpoint")

    def __init__(self, file: Path, again: dict[str, Path]) -> None:
        self.file = file
        self.before = pd.read_parquet(file) if file.is_file() else pd.DataFrame(columns=list(self.KEYS))
        self.parts = [own for sweep, own in self.before.groupby("sweep", sort=False) if sweep not in again]

    def add(self, about: dict[str, Any], read: Reader, run: OneLayerRun, pressure: _Kept) -> None:
        """The rows of one run, read unless they are known, with `about` in every row."""
        same = (self.before[list(self.KEYS)] == [about[key] for key in self.KEYS]).all(axis=1)
        self.parts.append(self.before[same] if same.any() else read(run, pressure).assign(**about))
        write_table(pd.concat(self.parts, ignore_index=True), self.file)


def _foretold(run: OneLayerRun, pressure: _Kept) -> pd.DataFrame:
    return rp.foretelling(pressure.parts[-1], run.answers()).assign(statistics_version=STATISTICS_VERSION)


def _stored(run: OneLayerRun, _: _Kept) -> pd.DataFrame:
    steps = [step for step in run.steps if step and step % STORED_EVERY == 0]
    return rp.placeholder_storage(run, steps=steps, weights="raw")


# What is read of a run, in this order: the second from the first.
Reader = Callable[[OneLayerRun, _Kept], pd.DataFrame]
READERS: dict[str, Reader] = {
    PRESSURE: lambda run, _: rp.pressure(run.path, draws=DRAWS),
    "foretelling": _foretold,
    "storage": _stored,
}


def predictions_since(config: Path) -> dict[str, Any]:
    """The YAML's bytes, whose comments are the predictions, and the commit and time that it has been so since."""
    asked = ["git", "-C", str(config.parent), "log", "-1", "--format=%H %cI", "--", config.name]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    commit, _, since = done.stdout.strip().partition(" ")
    digest = hashlib.sha256(config.read_bytes()).hexdigest()
    return {"file_sha256": digest, "unchanged_since_commit": commit or None, "unchanged_since": since or None}


def main() -> None:
    """Collect what is there, then draw the page from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+", help=f"folders of the sweeps {', '.join(PRESSED)}")
    parser.add_argument("--commit", help="the commit the runs were trained with; this checkout's is noted besides")
    parser.add_argument("--pressure", action="store_true", help="read the terms' pressure in the others' cells too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / PROVENANCE
    noted = json.loads(file.read_text(encoding="utf-8"))["sweeps"] if file.is_file() else {}
    folders = {open_sweep(folder).config.name: folder for folder in asked.sweeps}
    for name, folder in folders.items():
        if name not in PRESSED:
            raise SystemExit(f"{folder} holds the sweep {name!r}; expected one of {', '.join(PRESSED)}")
        if name == PRESSURE:
            continue
        finished, left_out = collect(folder, name, asked.out)
        noted[name] = provenance(name, folder, finished, left_out, asked.commit)
        noted[name] |= predictions_since(RESULTS.parent / f"{name.replace('-', '_')}.yaml")
        print(f"{name}: {len(finished)} runs finished, {len(left_out)} not")
    pressed = {name: folder for name, folder in folders.items() if asked.pressure or name == PRESSURE}
    if pressed:
        collect_pressure(pressed, asked.out)
    collected = {"collected_at_commit": commit_of(), "collected": datetime.now(UTC).date().isoformat(), "sweeps": noted}
    write_text(file, json.dumps(collected, indent=2) + "\n")
    print(f"{write_readme(asked.out)}; README's own lines: python examples/results_table.py")


if __name__ == "__main__":
    main()
