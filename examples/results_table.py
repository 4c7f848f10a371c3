"""Draw examples/results/README.md from the committed numbers beside it.

python examples/results_table.py                 # rewrites the README
python examples/results_table.py --out draft.md  # writes it elsewhere
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from revprobe.finetune.reproduce import NOT_RUN, OUTSIDE, compare
from revprobe.finetune.reproduction_text import one_layer_markdown, spread_markdown
from revprobe.whole_files import write_text

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = 3


def readme(folder: Path) -> str:
    """The page, from one_layer.parquet, robustness.parquet (where there is one) and provenance.json in `folder`."""
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    result = compare(pd.read_parquet(folder / "one_layer.parquet"), seeds=SEEDS)
    counts = result.cells["status"].value_counts()
    verdicts = result.claims["verdict"].value_counts()
    parts = [
        "# Tables 1 and 2 of the paper, as they came out here",
        "Drawn by `examples/results_table.py` from `one_layer.parquet`; every number and every checkpoint is in it. "
        "`revprobe reproduce one-layer` makes the same tables from runs of your own, `revprobe reproduce theory` "
        "Tables 3 to 5.",
        f"{len(result.cells)} cells (printed cell x accuracy or probability x weights): "
        f"{counts.get(OUTSIDE, 0)} outside their tolerance, {counts.get(NOT_RUN, 0)} not run. "
        f"{len(result.claims)} claims: {', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}.",
        _about(provenance),
        one_layer_markdown(result, seeds=SEEDS),
    ]
    if (folder / "robustness.parquet").is_file():
        parts.append(spread_markdown(pd.read_parquet(folder / "robustness.parquet")))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _about(provenance: dict[str, Any]) -> str:
    trained = f"trained at commit {provenance['trained_at_commit']}, " if provenance["trained_at_commit"] else ""
    collected = f"collected {provenance['collected']} at commit {provenance['collected_at_commit']}"
    lines = [f"{trained}{collected}.".capitalize()]
    for sweep in provenance["sweeps"].values():
        versions = "; ".join(", ".join(f"{name} {value}" for name, value in one.items()) for one in sweep["versions"])
        lines.append(
            f"- `{sweep['command']}` (`{sweep['config']}`, sha256 of its base {sweep['config_sha256'][:12]}): "
            f"{len(sweep['finished'])} runs finished, last reading {sweep['last_reading']}, {versions}."
        )
        if sweep["not_run"]:
            lines.append(f"  Not in the tables: {', '.join(sweep['not_run'])}.")
    return "\n".join(lines)


def write_readme(folder: Path, out: Path | None = None) -> Path:
    """Write the page beside its numbers, or to `out`."""
    out = folder / "README.md" if out is None else out
    write_text(out, readme(folder))
    return out


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    print(write_readme(asked.results, asked.out))


if __name__ == "__main__":
    main()
