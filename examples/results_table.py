"""Draw examples/results/README.md, its figures, and the repository README's lines about them, from the numbers there.

python examples/results_table.py                 # rewrites the page, its figures, and README's lines
python examples/results_table.py --out draft.md  # writes the page alone, elsewhere
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from revprobe.atomic_files import write_text
from revprobe.probes.figures.theme import interval_text
from revprobe.report.paper.evidence_figures import pressure_figure, reverse_figure
from revprobe.report.paper.evidence_markdown import evidence_sections, published_sections
from revprobe.report.paper.evidence_sentences import Told
from revprobe.report.paper.markdown import folded, markdown_table, of_seeds, one_layer_markdown, spread_markdown
from revprobe.report.paper.pressure_markdown import (
    ABOUT_FORETELLING,
    ABOUT_PRESSURE,
    ABOUT_STORED,
    foretelling_table,
    pressure_table,
    stored_table,
)
from revprobe.report.paper.reproduce import NOT_RUN, OUTSIDE, compare, model_name, records

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = 3
# Their tables' names; where they come from; the figures; and the marks around README's lines.
SWEEPS, EVIDENCE = ("negative_evidence", "one_layer_published"), "negative_evidence.json"
OVER_TRAINING, PRESSURE = "reverse_over_training.svg", "pressure_by_class.svg"
PRESSURE_TABLES = {
    "pressure": ("Pressure of the training terms", ABOUT_PRESSURE, pressure_table),
    "foretelling": ("Does pressure foretell where the reverse answer goes?", ABOUT_FORETELLING, foretelling_table),
    "storage": ("What is stored for the answer and for the placeholder", ABOUT_STORED, stored_table),
}
FIGURES = {
    OVER_TRAINING: "Reverse accuracy and letters-only accuracy over training, by dial and encoding, and after switches",
    PRESSURE: "What presses on the reverse answer over training, by class of training terms",
}
BEGIN, END = "<!-- drawn by examples/results_table.py -->", "<!-- end -->"
BESIDE_OTHERS = (
    "## Beside other accounts\n\nRead from their abstracts, which is all that was at hand.\n\n- Kitouni et al. 2024, "
    "*The Factorization Curse* (arXiv 2406.05183): the reversal curse as a failure to learn the same joint "
    "distribution under different factorizations, inherent in next-token prediction, which factorization-agnostic "
    "objectives mitigate. Under keep our masked models have such an objective: every set of masks is priced. The "
    "joint distribution is known, and the reverse query lies outside of it, since no training sequence has the "
    "uppercase letter on the left. So the question here is another: what a model says where its objective is silent, "
    "and which of the terms that it prices elsewhere decide that.\n- Coda-Forno, Wang and Chaudhry 2026, *The "
    "Illusion of Latent Generalization* (arXiv 2604.04943): reversal accuracy requires a training signal that makes "
    "the source entity a prediction target, and representation distances and linear probes are consistent with "
    "forward and reverse stored as distinct entries. Here the lowercase letter is a prediction target in every "
    "masked run, which is their condition, and no reversed sequence is ever trained, so there is no second entry to "
    "learn. The causal runs lack it: there the lowercase letter is never predicted with the uppercase one in view. "
    "Where letters-only accuracy is high while accuracy is low, the fact reaches the reverse readout and "
    "loses to the placeholder; that is one layer and 26 letters, and says nothing of deep models or of text."
)
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
    """The page, from the tables in `folder`; what is not there is said."""
    told = Told(*(_table(folder, name) for sweep in SWEEPS for name in (f"{sweep}_runs", f"{sweep}_answers")))
    parts = ["# Why the reverse answer fades, and the paper's tables as they came out here", *told.four()]
    drawings = figures(folder)
    parts += [f"![{words}]({name})" for name, words in FIGURES.items() if name in drawings]
    if PRESSURE not in drawings:
        parts.append("Pressure by class over training: not run at four checkpoints of any cell (`rp.pressure`).")
    sections: dict[str, str] = {}
    if told.runs is not None and told.answers is not None:
        sections |= evidence_sections(told.runs, told.answers)
    if told.published_runs is not None and told.published_answers is not None:
        sections |= published_sections(told.published_runs, told.published_answers, told.runs)
    for name, (title, about, table) in PRESSURE_TABLES.items():
        if (found := _table(folder, f"{SWEEPS[0]}_{name}")) is not None:
            sections[title] = f"{about}\n\n{table(found)}"
    parts += [f"## {title}\n\n{text}" for title, text in sections.items()]
    parts.append(BESIDE_OTHERS)
    if (folder / EVIDENCE).is_file():
        parts.append(f"## Where the numbers come from\n\n{_about(json.loads((folder / EVIDENCE).read_text('utf-8')))}")
    if (folder / "one_layer.parquet").is_file():
        parts += decayed_rate(folder)
    return folded("\n\n".join(part.strip() for part in parts if part) + "\n")


def decayed_rate(folder: Path) -> list[str]:
    """Tables 1 and 2 under the older recipe, from one_layer.parquet, robustness.parquet and provenance.json."""
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    full = pd.read_parquet(folder / "one_layer.parquet")
    result = compare(full, seeds=SEEDS)
    counts = result.cells["status"].value_counts()
    verdicts = result.claims["verdict"].value_counts()
    parts = [
        "# Decayed rate: Tables 1 and 2 under the older recipe",
        "The recipe of every cell below is the decayed rate of `examples/one_layer.yaml`: N(0, 0.02), AdamW 1e-3 "
        "falling along a cosine over 20,000 steps, loss per token. Drawn from `one_layer.parquet`; every number and "
        "every checkpoint is in it. `revprobe reproduce one-layer` makes the same tables from runs of your own, "
        "`revprobe reproduce theory` Tables 3 to 5.",
        f"{len(result.cells)} cells (printed cell x accuracy or probability x weights): "
        f"{counts.get(OUTSIDE, 0)} outside their tolerance, {counts.get(NOT_RUN, 0)} not run. "
        f"{len(result.claims)} claims: {', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}.",
        _not_reproduced(result.cells),
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
    return parts


def _not_reproduced(cells: pd.DataFrame) -> str:
    """The printed reverse accuracies that lie outside their tolerance, on the weights that decide."""
    decide = (cells["weights"] == "ema") | (cells["objective"] == "causal")
    decide &= (cells["quantity"] == "accuracy") & (cells["direction"] == "reverse")
    outside = cells[decide & (cells["status"] == OUTSIDE)]
    told = dict.fromkeys(
        f"{model_name(row)}, L = {row['length']}: {100 * row['ours']:.0f} % (paper {100 * row['paper']:.1f})"
        for row in records(outside)
    )
    return f"**Not reproduced** under it, reverse accuracy on averaged weights: {'; '.join(told)}." if told else ""


def figures(folder: Path) -> dict[str, str]:
    """The page's figures that can be drawn, by file name, as SVG."""
    drawings = {}
    runs, answers = (_table(folder, f"{SWEEPS[0]}_{kind}") for kind in ("runs", "answers"))
    if runs is not None and answers is not None:
        drawings[OVER_TRAINING] = reverse_figure(runs, answers)
    pressure = _table(folder, f"{SWEEPS[0]}_pressure")
    if pressure is not None and (drawing := pressure_figure(pressure)) is not None:
        drawings[PRESSURE] = drawing
    return drawings


def _table(folder: Path, name: str) -> pd.DataFrame | None:
    file = folder / f"{name}.parquet"
    return pd.read_parquet(file) if file.is_file() else None


def checked_section(folder: Path) -> str:
    """README's lines about what came out, between its two marks."""
    told = Told(*(_table(folder, name) for sweep in SWEEPS for name in (f"{sweep}_runs", f"{sweep}_answers")))
    return section_of(told.short(), BEGIN)


def section_of(sentences: Sequence[str], begin: str) -> str:
    """Sentences as README's lines, between the mark that says what draws them and END."""
    lines = [textwrap.fill(f"- {line}", 120, subsequent_indent="  ", break_on_hyphens=False) for line in sentences]
    return "\n".join([begin, *lines, END])


def with_section(text: str, section: str) -> str:
    """A README with the section of the same first mark replaced. Raises: SystemExit, when it has no such marks."""
    mark = section.partition("\n")[0]
    before, begin, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has no lines between {mark} and {END}; put both where the section belongs")
    return f"{before}{section}{after}"


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
        if "unchanged_since" in sweep:
            lines.append(
                f"  Its YAML, with what was predicted or asked before the runs (sha256 {sweep['file_sha256'][:12]}), "
                f"is unchanged since {sweep['unchanged_since']}, commit {sweep['unchanged_since_commit']}."
            )
        if sweep["not_run"]:
            lines.append(f"  Not in the tables: {', '.join(sweep['not_run'])}.")
    return "\n".join(lines)


def write_readme(folder: Path, out: Path | None = None) -> Path:
    """Write the page and its figures beside its numbers, or the page alone to `out`."""
    if out is None:
        for name, drawing in figures(folder).items():
            write_text(folder / name, drawing)
        out = folder / "README.md"
    write_text(out, readme(folder))
    return out


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    print(write_readme(asked.results, asked.out))
    if asked.out is None and asked.results == RESULTS:
        page = RESULTS.parents[1] / "README.md"
        write_text(page, with_section(page.read_text(encoding="utf-8"), checked_section(RESULTS)))
        print(page)


if __name__ == "__main__":
    main()
