"""What untrained twins read on the pairs of Section 6's runs, into examples/results/section6_twins.parquet.

    python examples/section6_twins.py runs
    python examples/collect_section6.py --page-only

RUNS has the folder section6, collected before (`collect_section6.py RUNS`). Every finished run that has no twin yet
gets one. Tables are written after each, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from collect_results import RESULTS

from revprobe.finetune.runs.finetuning import FinetuneRun
from revprobe.finetune.runs.run import is_run
from revprobe.report.paper.reproduce import records
from revprobe.report.paper.section6.frames import AXES, FINISHED, Section6
from revprobe.report.paper.section6.twins import twin_readings, with_twins

SWEEP = "section6"


def main() -> None:
    """Read the twin of each run that lacks one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the sweeps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    known = set(Section6.read(asked.out).twins["run"])
    for row in records(Section6.read(asked.out).runs):
        folder = asked.runs / SWEEP / row["run"]
        if row["sweep"] != SWEEP or row["status"] != FINISHED or row["run"] in known or not is_run(folder):
            continue
        axes = {key: row[key] for key in (*AXES, "run", "config")}
        read = twin_readings(FinetuneRun(folder), axes)
        found = Section6.read(asked.out)
        replace(found, twins=with_twins(found, read)).write(asked.out)
        print(f"{row['run']}: {len(read)} readings", flush=True)


if __name__ == "__main__":
    main()
