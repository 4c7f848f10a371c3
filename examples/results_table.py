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
from revprobe.finetune.reproduction_text import markdown_table, one_layer_markdown, spread_markdown
from revprobe.whole_files import write_text

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = 3
ROUTE_EDITS = "route_edits.csv"
ABOUT_ROUTES = (
    "Made by `python examples/route_edits.py RUNS --out examples/results`, whose text says what is measured and how "
    "much of it is algebra. Mirrored placements, the last checkpoint, the weights that a run is loaded with by default "
    "(the average). Mean over seeds, in brackets the lowest and the highest bound of any seed's 95 % interval over "
    "letters. Probabilities and shares are fractions, the rest nats; n is the number of pairs of each seed. NaN: "
    "without a gap between the two directions there is no share of it."
)


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
        variants, full = pd.read_parquet(folder / "robustness.parquet"), pd.read_parquet(folder / "one_layer.parquet")
        seeds = full[full["run"].str.startswith("rope-l10-s") & ~full["run"].isin(variants["run"])]
        parts.append(spread_markdown(pd.concat([seeds, variants], ignore_index=True)))
    else:
        parts.append("## Spread over configurations\n\nnot run (`revprobe sweep robustness`)")
    parts.append(_route_edits(folder / ROUTE_EDITS))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _route_edits(path: Path) -> str:
    """What cutting, moving and replacing the route does, one column per model: mean over seeds and widest interval."""
    title = "## Causal edits of the route"
    if not path.is_file():
        return f"{title}\n\nnot run (`python examples/route_edits.py`)"
    table = pd.read_csv(path).assign(model=lambda frame: frame["run"].str.rsplit("-s", n=1).str[0])
    models = list(dict.fromkeys(table["model"]))
    rows = []
    for measure, part in table.groupby("measure", sort=False):
        by = dict(iter(part.groupby("model")))
        rows.append({"measure": measure} | {model: _over_seeds(by.get(model)) for model in models})
    counts = ", ".join(
        f"{model} {len(set(part['run']))} seeds, n = {part['n'].max()}"
        for model, part in table.groupby("model", sort=False)
    )
    return f"{title}\n\n{ABOUT_ROUTES} {counts}.\n\n{markdown_table(rows)}"


def _over_seeds(part: pd.DataFrame | None) -> str:
    if part is None:
        return "-"
    if part["value"].isna().any():
        return "NaN"
    return f"{part['value'].mean():.4f} [{part['low'].min():.4f}, {part['high'].max():.4f}]"


def _about(provenance: dict[str, Any]) -> str:
    trained = f"trained at commit {provenance['trained_at_commit']}, " if provenance["trained_at_commit"] else ""
    collected = f"collected {provenance['collected']} at commit {provenance['collected_at_commit']}"
    lines = [f"{trained}{collected}.".capitalize()]
    for sweep in provenance["sweeps"].values():
        versions = "; ".join(", ".join(f"{name} {value}" for name, value in one.items()) for one in sweep["versions"])
        lines.append(
            f"- `{sweep['command']}` (`{sweep['config']}`, sha256 of its base {sweep['config_sha256'][:12]}): "
            f"{len(sweep['finished'])} runs finished on {', '.join(sweep['devices'])}, last reading "
            f"{sweep['last_reading']}, {versions}."
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
