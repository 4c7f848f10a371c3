"""Storage and routing over training, and what one optimizer step does to both and to the reverse loss.

    python examples/storage_over_training.py runs/one-layer/rope-l10-s0 runs/one-layer/rope-l10-s1 --out findings

For every masked letters run: stored evidence S[v, u] and the attention on the evidence at each checkpoint, forward and
reverse (storage_curves.csv), and from some checkpoints the run's own next step (one_step.csv): does S[v, u] rise, does
the reverse loss fall although only the forward direction is trained, and how well is it foretold to first order?

Raw weights. All numbers are means over mirrored placements with 95 % intervals over letters, beside the same
numbers for shuffled facts. Checkpoints without a saved optimizer take the step from a fresh one, which moves every
weight by about the learning rate: a longer step than the run's own; the column `optimizer` says which it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import revprobe as rp
from revprobe.atomic_files import write_text

CURVES, STEPS = "storage_curves.csv", "one_step.csv"
# From checkpoints spread over training; the last before the end still has its optimizer.
ONE_STEP_AT = (0.02, 0.05, 0.16, 0.54, 1.0)


def nearest(steps: Sequence[int], shares: Sequence[float], last: int) -> list[int]:
    """The checkpoints nearest to these shares of the training, the untrained and the last one left out."""
    between = [step for step in steps if 0 < step < last]
    return sorted({min(between, key=lambda step: abs(step - share * last)) for share in shares})


def findings(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The curves of one run, and its single steps."""
    run = rp.open_run(path)
    curves = rp.storage_curves(run, weights="raw")
    steps = rp.one_step_curves(rp.one_step(run, steps=nearest(run.steps, ONE_STEP_AT, run.config.training.steps)))
    return curves.assign(run=path.name), steps.assign(run=path.name)


def verdicts(steps: pd.DataFrame) -> list[str]:
    """What came of each step, in words."""
    lines = []
    for step, part in steps.groupby("step"):
        by = part.set_index("quantity")
        said = []
        for quantity, name in (("stored", "S[v, u]"), ("reverse_loss", "reverse loss")):
            row = by.loc[quantity]
            moved = (
                "rises" if row.observed_low > 0 else "falls" if row.observed_high < 0 else "moves by nothing certain"
            )
            said.append(
                f"{name} {moved}: {row.observed:+.4f} [{row.observed_low:+.4f}, {row.observed_high:+.4f}] "
                f"(shuffled facts {row.observed_control:+.4f}), slope on its prediction {row.slope:.2f}, "
                f"r {row.correlation:.2f}"
            )
        lines.append(f"step {step} ({part['optimizer'].iloc[0]} optimizer): {'; '.join(said)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of the letters relation, masked models")
    parser.add_argument("--out", type=Path, help=f"a folder for {CURVES} and {STEPS}")
    arguments = parser.parse_args()
    found = []
    for path in arguments.runs:
        found.append(findings(path))
        print("\n".join([f"\n{path.name}", *verdicts(found[-1][1])]), flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, tables in zip((CURVES, STEPS), zip(*found, strict=True), strict=True):
            # Significant digits: the ends of an interval stay apart.
            text = pd.concat(tables, ignore_index=True).to_csv(index=False, lineterminator="\n", float_format="%.7g")
            write_text(arguments.out / name, text)


if __name__ == "__main__":
    main()
