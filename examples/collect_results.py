"""Collect a finished (or half-finished) sweep of the tables into examples/results/: numbers, provenance, README.

    python examples/collect_results.py runs/one-layer --robustness runs/robustness

Finished runs go into one_layer.parquet with every checkpoint; unfinished ones are left out and listed in
provenance.json as not run. The README is drawn from what was written, by results_table.py.
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
from results_table import write_readme

from revprobe.atomic_files import write_text, written_whole
from revprobe.finetune.config.loading import load_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.finetune.runs.open import open_run
from revprobe.finetune.runs.run import VERSIONS
from revprobe.report.paper.reproduce import collect_measures

RESULTS = Path(__file__).resolve().parent / "results"
SWEEPS = {"one-layer": "one_layer.parquet", "robustness": "robustness.parquet"}


def collect(name: str, folder: Path, out: Path, commit: str | None) -> dict[str, Any]:
    """Write one sweep's measures and say where they come from."""
    config = load_config(name, SweepConfig)
    measures, left_out = collect_measures(folder, config.runs())
    if measures.empty:
        raise SystemExit(f"no finished run of {name} in {str(folder)!r}; nothing was written")
    with written_whole(out / SWEEPS[name]) as part:
        # Significant digits, so that the ends of an interval stay apart; the rest is noise and would triple the file.
        fractions = measures.select_dtypes("float").columns
        short = measures.assign(**{name: measures[name].map(lambda x: float(f"{x:.7g}")) for name in fractions})
        short.to_parquet(part, index=False, compression="zstd")
    return provenance(name, folder, list(pd.unique(measures["run"])), left_out, commit)


def provenance(
    name: str, folder: Path, finished: list[str], left_out: dict[str, str], commit: str | None
) -> dict[str, Any]:
    """Where a sweep's numbers come from: config, commit, software, what is in them and what is not."""
    config = load_config(name, SweepConfig)
    return {
        "command": f"revprobe sweep {name}",
        "trained_at_commit": commit,
        "config": f"examples/{name.replace('-', '_')}.yaml",
        "config_sha256": base_digest(config),
        "devices": sorted({open_run(folder / run).config.training.device for run in finished}),
        "versions": _versions(folder / run for run in finished),
        "last_reading": _last_reading(folder, finished),
        "finished": finished,
        "not_run": left_out,
    }


def base_digest(config: SweepConfig) -> str:
    """Of what a sweep's base sets: keys that configs have got since, at their defaults, do not move it."""
    text = json.dumps(config.base.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _versions(runs: Any) -> list[dict[str, str]]:
    """The software the runs were started with; one entry when it was the same for all."""
    texts = {(run / VERSIONS).read_text(encoding="utf-8") for run in runs}
    return [json.loads(text) for text in sorted(texts)]


def _last_reading(folder: Path, runs: list[str]) -> str | None:
    times = [path.stat().st_mtime for run in runs for path in (folder / run / "readings").iterdir()]
    return datetime.fromtimestamp(max(times), UTC).date().isoformat() if times else None


def commit_of() -> str | None:
    """The checkout's commit; None outside of one."""
    asked = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def main() -> None:
    """Collect what is there, then draw the README from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS_DIR", help="the sweep's folder, e.g. runs/one-layer")
    parser.add_argument("--robustness", type=Path, default=None, help="the folder of the robustness sweep")
    parser.add_argument("--commit", help="the commit the runs were trained with; this checkout's is noted besides")
    parser.add_argument("--robustness-commit", help="the same for the robustness sweep")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    sweeps = {"one-layer": collect("one-layer", asked.runs, asked.out, asked.commit)}
    if asked.robustness is not None:
        sweeps["robustness"] = collect("robustness", asked.robustness, asked.out, asked.robustness_commit)
    collected = {
        "collected_at_commit": commit_of(),
        "collected": datetime.now(UTC).date().isoformat(),
        "sweeps": sweeps,
    }
    write_text(asked.out / "provenance.json", json.dumps(collected, indent=2) + "\n")
    counts = ", ".join(f"{name} {len(sweep['finished'])} runs" for name, sweep in sweeps.items())
    print(f"{write_readme(asked.out)}: {counts}")


if __name__ == "__main__":
    main()
