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

from revprobe.atomic_files import write_text
from revprobe.probes.figures.theme import interval_text
from revprobe.report.paper.markdown import markdown_table, of_seeds, one_layer_markdown, spread_markdown
from revprobe.report.paper.reproduce import NOT_RUN, OUTSIDE, compare

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = 3
ABOUT_INTERVALS = (
    "Intervals: these runs were read under the first statistics (`statistics_version` 1), whose intervals resampled "
    "letters, and whose control of the correlation was not centred (about -r / 25). Where all letters said the same, "
    "such intervals had no width; in the files those are replaced by today's (26 facts), and ends that were rounded to "
    "one number stand apart by that rounding. The others stand as they were read, somewhat too narrow."
)
ROUTE_EDITS, STORAGE_CURVES, ONE_STEP = "route_edits.csv", "storage_curves.csv", "one_step.csv"
ABOUT_CURVES = (
    "Made by `python examples/storage_over_training.py RUNS --out examples/results`: raw weights, mean over seeds ± "
    "standard deviation between seeds at each checkpoint; intervals over letters are in the file. Stored is S[v, u] "
    "under the reverse query in logits, its control the same target on the evidence of another fact; attention is the "
    "weight of the readout row on the evidence."
)
ABOUT_STEPS = (
    "Made by the same command: the change by the run's own next optimizer step, which trains the forward direction "
    "alone. Mean over seeds, in brackets the lowest and the highest bound of any seed's 95 % interval over letters; "
    "then the same change for shuffled facts; in how many seeds the interval lies on the side that the theory expects "
    "(S[v, u] rises, the losses fall), with the 95 % interval of that share of seeds; and the slope of the change on "
    "its first-order prediction over pairs (1: no curvature) with Pearson's r. A checkpoint that no longer has its "
    "optimizer takes a step from a fresh one, longer than the run's own."
)
ABOUT_ROUTES = (
    "Made by `python examples/route_edits.py RUNS --out examples/results`, whose text says what is measured and how "
    "much of it is algebra. Mirrored placements, the last checkpoint, the weights that a run is loaded with by default "
    "(the average). Mean over seeds, in brackets the lowest and the highest bound of any seed's 95 % interval over "
    "letters. Probabilities and shares are fractions, the rest nats; n is the number of pairs of each seed, about 26 "
    "facts (letters). NaN: "
    "without a gap between the two directions there is no share of it."
)


def readme(folder: Path) -> str:
    """The page, from one_layer.parquet, robustness.parquet (where there is one) and provenance.json in `folder`."""
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    full = pd.read_parquet(folder / "one_layer.parquet")
    result = compare(full, seeds=SEEDS)
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
        ABOUT_INTERVALS if (full["statistics_version"] == 1).any() else "",
        one_layer_markdown(result, seeds=SEEDS),
    ]
    if (folder / "robustness.parquet").is_file():
        variants = pd.read_parquet(folder / "robustness.parquet")
        seeds = full[full["run"].str.startswith("rope-l10-s") & ~full["run"].isin(variants["run"])]
        parts.append(spread_markdown(pd.concat([seeds, variants], ignore_index=True)))
    else:
        parts.append("## Spread over configurations\n\nnot run (`revprobe sweep robustness`)")
    parts.append(_storage_curves(folder / STORAGE_CURVES))
    parts.append(_one_step(folder / ONE_STEP))
    parts.append(_route_edits(folder / ROUTE_EDITS))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _by_model(path: Path) -> pd.DataFrame:
    return pd.read_csv(path).assign(model=lambda frame: frame["run"].str.rsplit("-s", n=1).str[0])


def _storage_curves(path: Path) -> str:
    """Storage and routing as curves: one row per model and quantity, one column per checkpoint."""
    title = "## Storage and routing over training"
    if not path.is_file():
        return f"{title}\n\nnot run (`python examples/storage_over_training.py`)"
    table, rows = _by_model(path), []
    shown = {"stored": ("stored", "reverse", "value"), "stored, control": ("stored", "reverse", "control")}
    shown |= {f"attention, {side}": ("weight", side, "value") for side in ("forward", "reverse")}
    for model, part in table.groupby("model", sort=False):
        for name, (curve, direction, column) in shown.items():
            own = part[(part["curve"] == curve) & (part["direction"] == direction)]
            seeds = own["run"].nunique()
            cells = {f"{step}": _mean_and_spread(values, seeds) for step, values in own.groupby("step")[column]}
            rows.append({"model": f"{model} ({seeds} seeds)", "curve": name} | cells)
    return f"{title}\n\n{ABOUT_CURVES}\n\n{markdown_table(rows)}"


def _mean_and_spread(values: pd.Series, seeds: int) -> str:
    """Mean ± standard deviation of the seeds in which there is a number; how many, where not all."""
    defined = values.dropna()
    if defined.empty:
        return "NaN"
    spread = f" ± {defined.std():.2f}" if len(defined) > 1 else ""
    return f"{defined.mean():.2f}{spread}" + ("" if len(defined) == seeds else f" ({len(defined)} of {seeds})")


def _one_step(path: Path) -> str:
    """What one real optimizer step does, one row per model, checkpoint and quantity."""
    title = "## One optimizer step"
    if not path.is_file():
        return f"{title}\n\nnot run (`python examples/storage_over_training.py`)"
    expected = {"stored": 1, "reverse_loss": -1, "forward_loss": -1}
    rows = []
    for key, part in _by_model(path).groupby(["model", "step", "optimizer", "quantity"], sort=False):
        row = dict(zip(("model", "step", "optimizer", "quantity"), key, strict=True))
        sign, part = expected[str(row["quantity"])], part.dropna(subset=["observed_low"])
        clear = ((part["observed_low"] if sign > 0 else -part["observed_high"]) > 0).sum()
        change = _with_interval(part, "observed", digits=3)
        numbers = {"change": change, "shuffled facts": f"{part['observed_control'].mean():.3f}"}
        numbers |= {"as expected in": of_seeds(int(clear), len(part)), "slope": f"{part['slope'].mean():.2f}"}
        numbers |= {"r": f"{part['correlation'].mean():.2f}"}
        rows.append(row | numbers | {"n": part["n"].min()})
    return f"{title}\n\n{ABOUT_STEPS}\n\n{markdown_table(rows)}"


def _route_edits(path: Path) -> str:
    """What cutting, moving and replacing the route does, one column per model: mean over seeds and widest interval."""
    title = "## Causal edits of the route"
    if not path.is_file():
        return f"{title}\n\nnot run (`python examples/route_edits.py`)"
    table = _by_model(path)
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
    return _with_interval(part, "", digits=4)


def _with_interval(part: pd.DataFrame, name: str, *, digits: int) -> str:
    """The mean over seeds, with the lowest and the highest bound of any."""
    value, low, high = (f"{name}_{end}".strip("_") for end in ("" if name else "value", "low", "high"))
    return interval_text(part[value].mean(), part[low].min(), part[high].max(), digits=digits)


def _about(provenance: dict[str, Any]) -> str:
    lines = [f"Collected {provenance['collected']} at commit {provenance['collected_at_commit']}."]
    for sweep in provenance["sweeps"].values():
        versions = "; ".join(", ".join(f"{name} {value}" for name, value in one.items()) for one in sweep["versions"])
        lines.append(
            f"- `{sweep['command']}` (`{sweep['config']}`, sha256 of its base {sweep['config_sha256'][:12]}): "
            f"{len(sweep['finished'])} runs finished on {', '.join(sweep['devices'])}"
            f"{' at commit ' + sweep['trained_at_commit'] if sweep['trained_at_commit'] else ''}, last reading "
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
