"""Collect the sweeps about negative evidence, finished or not, into examples/results/, and draw the page from them.

    python examples/collect_negative_evidence.py runs/negative-evidence runs/one-layer-published --pressure

Of each sweep two tables: its answers over training, and one row for each run and its weights, with its axes,
statistics, price, log and readings; a run that is not finished stands there with its reason. Prices take seconds a run;
those of checkpoints that have not changed are kept, so the command can be stopped and given again while a sweep goes
on. With --pressure the pressure of the training terms on the reverse answer is read too, at every checkpoint of some
cells (about five seconds each).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
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
# The cells whose pressure is read, and from how many sets of masks a class.
PRESSED = {
    "negative-evidence": (
        "rope-l10",
        "rope-l10-drop-right",
        "rope-l10-then-drop-right",
        "rope-l10-drop-right-then-keep",
        "rope-l10-published",
        "rope-l10-published-drop-right",
    ),
    "one-layer-published": ("rope-l10", "absolute-l10"),
}
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


def collect_pressure(folders: dict[str, Path], file: Path) -> None:
    """Read the pressure at every checkpoint of the finished runs of PRESSED; runs that have not changed are kept."""
    keys = ["run", "sweep", "checkpoint"]
    before = pd.read_parquet(file) if file.is_file() else pd.DataFrame(columns=keys)
    parts = [own for sweep, own in before.groupby("sweep", sort=False) if sweep not in folders]
    for name, folder in folders.items():
        for config in load_config(name, SweepConfig).runs():
            axes, run = axes_of(config), OneLayerRun(folder / config.name)
            if axes["cell"] not in PRESSED[name] or status_of(run, config) != FINISHED:
                continue
            about = {"sweep": name, "checkpoint": checkpoint_digest(run, "raw"), "facts": config.relation.alphabet}
            about |= {key: axes[key] for key in ("run", "cell", "recipe", "seed")}
            same = (before[keys] == [about[key] for key in keys]).all(axis=1)
            parts.append(before[same] if same.any() else rp.pressure(run.path, draws=DRAWS).assign(**about))
            write_table(pd.concat(parts, ignore_index=True), file)
            print(f"pressure: {name} {config.name}", flush=True)


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
    parser.add_argument("sweeps", type=Path, nargs="+", help=f"folders of the sweeps {' and '.join(SWEEPS)}")
    parser.add_argument("--commit", help="the commit the runs were trained with; this checkout's is noted besides")
    parser.add_argument("--pressure", action="store_true", help="read the training terms' pressure too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / PROVENANCE
    noted = json.loads(file.read_text(encoding="utf-8"))["sweeps"] if file.is_file() else {}
    folders = {open_sweep(folder).config.name: folder for folder in asked.sweeps}
    for name, folder in folders.items():
        if name not in SWEEPS:
            raise SystemExit(f"{folder} holds the sweep {name!r}; expected {' or '.join(SWEEPS)}")
        finished, left_out = collect(folder, name, asked.out)
        noted[name] = provenance(name, folder, finished, left_out, asked.commit)
        noted[name] |= predictions_since(RESULTS.parent / f"{name.replace('-', '_')}.yaml")
        print(f"{name}: {len(finished)} runs finished, {len(left_out)} not")
    if asked.pressure:
        collect_pressure(folders, asked.out / "negative_evidence_pressure.parquet")
    collected = {"collected_at_commit": commit_of(), "collected": datetime.now(UTC).date().isoformat(), "sweeps": noted}
    write_text(file, json.dumps(collected, indent=2) + "\n")
    print(f"{write_readme(asked.out)}; README's own lines: python examples/results_table.py")


if __name__ == "__main__":
    main()
