"""Causal and denoising traces of one trained run of Section 6, into examples/results/section6_traces.parquet.

python examples/section6_traces.py runs/section6/mini-llada-parent-child-P2C-s0
python examples/collect_section6.py --page-only
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from collect_results import RESULTS

from revprobe.finetune.runs.finetuning import FinetuneRun
from revprobe.report.paper.section6.frames import Section6
from revprobe.report.paper.section6.traces import traced


def main() -> None:
    """Trace the run, and put it in the place of what was traced before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of a masked model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    run = FinetuneRun(asked.run)
    if not run.finished:
        raise SystemExit(f"{asked.run} is not finished; expected the folder of a finished run")
    found = replace(Section6.read(asked.out), traces=traced(run))
    found.write(asked.out)
    print(f"{len(found.traces)} rows")


if __name__ == "__main__":
    main()
