"""A reproduction as Markdown and CSV: what lies outside its tolerance is marked, what was not run is said."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...atomic_files import write_text
from ...probes.figures.theme import interval_text
from ...probes.statistics.intervals import proportion
from .printed_values import TOLERANCES
from .reproduce import MODEL, NOT_RUN, OUTSIDE, SIGNATURES, UNDEFINED, Reproduction, model_name, records

MARK = "✗"
HOW_TO_READ = (
    "Per cent. Ours is the mean over seeds ± the standard deviation between seeds (none with one seed), its 95 % "
    "interval over seeds (three seeds alike at 100 % are three, not certain; never narrower than theirs over facts; of "
    "one seed over facts), then the "
    f"difference to the paper. {MARK} marks a cell outside its tolerance. The paper's text does not say whether its "
    "numbers are accuracies or mean probabilities, nor on which weights: all four are shown. n is the number of "
    "questions per seed. A masked model is asked every placement of every letter in both directions: the lowercase "
    "letter, given the uppercase one. The ARM can only continue, so it is asked another question: what stands at the "
    "last position, the uppercase letter given the lowercase one forward, the roles exchanged in reverse. All "
    "placements weigh equally. The lengths of Table 2's rows are not in our text of the paper; they are inferred from "
    "RoPE's reverse values, which are those of Table 1."
)
ABOUT_CLAIMS = (
    "A claim holds when it holds in every seed asked for, so far while some of them have not been run, and does not "
    "hold when one seed is against it; a seed whose numbers are undefined is neither for nor against it, and is left "
    "out of the count. In brackets the 95 % interval of the share of seeds (Clopper-Pearson): of three seeds, three "
    "say little about the next."
)
ABOUT_SEEDS = "Value and 95 % interval over facts, at the last checkpoint of each run. Accuracies in per cent."
ABOUT_SIGNATURES = (
    "Means over seeds, at the last checkpoint. The control is the same measurement with the facts shuffled; the excess "
    'is value minus control, and "untrained" the same models\' excess at step 0: what stands there no training made. '
    "For ALiBi a correlation of 1, a cosine of 1 and a reverse answer equal to the forward one are identities of its "
    "symmetric bias in one layer, not findings, as is the half RoPE < ALiBi of the ordering. The ARM's "
    "pairs are of another kind (swapped roles), and the paper claims nothing about them."
)
ABOUT_CURVES = (
    "Per cent, mean over seeds ± standard deviation between seeds, at every checkpoint. The tables above take the last "
    "column and no other: the step, like the rest of the configuration, was fixed before."
)
ABOUT_SPREAD = (
    "RoPE at length 10, seed 0, one number of the configuration changed at a time; a run without a variant in its name "
    "is the unchanged configuration, and its other seeds show what the seed alone does. Per cent, except "
    "probabilities. The curve is the reverse accuracy at each checkpoint from step 0 to the last, from ▁ (0 %) to █ "
    "(100 %), blank where it is undefined. An average is warmed up by (1 + n) / (10 + n), which is below 0.9995 until "
    "step 18,000, so a longer one changes nothing before."
)
_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = [("accuracy", "raw"), ("accuracy", "ema"), ("probability", "raw"), ("probability", "ema")]
_ANSWERS = ("forward_accuracy", "reverse_accuracy", "forward_probability", "reverse_probability")


def one_layer_markdown(result: Reproduction, *, seeds: int) -> str:
    """Cells, claims, signatures and single seeds, as sections of a Markdown page."""
    sections = {
        "Tables 1 and 2": (f"{HOW_TO_READ} {TOLERANCES}", _cells(result.cells, seeds)),
        "Claims under test": (ABOUT_CLAIMS, _claims(result.claims)),
        "Signatures (Figure 3)": (ABOUT_SIGNATURES, _signatures(result.signatures)),
        "Reverse accuracy over training": (ABOUT_CURVES, _curves(result.curves, "reverse_accuracy")),
        "Reverse probability over training": ("As above.", _curves(result.curves, "reverse_probability")),
        "Single seeds": (ABOUT_SEEDS, _seeds(result.seeds)),
    }
    return "\n".join(f"## {title}\n\n{about}\n\n{table}" for title, (about, table) in sections.items())


def theory_markdown(cells: pd.DataFrame) -> str:
    """Tables 3, 4 and 5 of `probes.theory.tables.theory_tables`, as a Markdown page."""
    rows = [
        {
            "table": row["table"],
            "cell": f"{row['row']}, {row['column']}",
            "paper": f"{row['paper']:.3f}",
            "ours": f"{row['ours']:.3f}",
            "difference": f"{row['difference']:+.4f}{'' if row['within'] else f' {MARK}'}",
            "note": row["note"],
        }
        for row in records(cells)
    ]
    outside = int((~cells["within"].astype(bool)).sum())
    about = (
        f"{len(cells)} cells, {outside} outside their tolerance (marked {MARK}): half a unit of the last printed digit."
    )
    return f"## Tables 3, 4 and 5\n\n{about}\n\n{markdown_table(rows)}"


def write_reproduction(folder: Path, frames: Mapping[str, pd.DataFrame], text: str, title: str) -> list[Path]:
    """Write `<name>.csv` for each frame and the page as `reproduction.md`, each whole or not at all; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, frame in frames.items():
        written.append(folder / f"{name}.csv")
        write_text(written[-1], frame.to_csv(index=False, lineterminator="\n"))
    write_text(folder / "reproduction.md", f"# {title}\n\n{text}")
    return [*written, folder / "reproduction.md"]


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table; "(none)" without rows."""
    if not rows:
        return "(none)\n"
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    """One line that ends no row, closes no cell and opens no tag: names of runs and models are anybody's."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(str(value).splitlines())).replace("|", "\\|")


MOST_ROWS = 24  # of a table that stands open


def row_count(rows: int, columns: Sequence[str]) -> str:
    """What a closed table says of itself: how many rows, and of what."""
    return f"{rows} rows: {' · '.join(columns[:8])}{' · ...' if len(columns) > 8 else ''}"


def folded(page: str, most: int = MOST_ROWS) -> str:
    """A page whose tables of more than so many rows are closed until one opens them; a line says what is in each."""
    parts, table = [], list[str]()
    for line in [*page.split("\n"), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        rows = len(table) - 2  # without head and rule
        if rows > most:
            columns = [name.strip() for name in table[0].strip("|").split("|")]
            table = [
                f"<details><summary>{escape(row_count(rows, columns), quote=False)}</summary>",
                "",
                *table,
                "",
                "</details>",
            ]
        parts += [*table, line]
        table = []
    return "\n".join(parts[:-1])


def of_seeds(held: int, seeds: int) -> str:
    """In how many seeds something holds, with the 95 % interval of that share in per cent.

    >>> of_seeds(3, 3)
    '3 of 3 [29, 100] %'
    """
    share = proportion(np.repeat([1.0, 0.0], [held, seeds - held]))
    return f"{held} of {seeds} [{100 * share.low:.0f}, {100 * share.high:.0f}] %"


def _cells(cells: pd.DataFrame, seeds: int) -> str:
    rows = []
    for key, part in cells.groupby(["table", *MODEL, "direction"], sort=False):
        cell = dict(zip(["table", *MODEL, "direction"], key, strict=True))
        by = {(row["quantity"], row["weights"]): row for row in records(part)}
        name = f"{model_name(cell)}, L = {cell['length']}"
        row = {"table": cell["table"], "cell": name, "direction": cell["direction"]}
        row |= {"paper": _percent(part["paper"].iloc[0], 1 if cell["table"] == 2 else 2)}
        row |= {f"{quantity}, {weights}": _ours(by.get((quantity, weights))) for quantity, weights in _COLUMNS}
        rows.append(
            row
            | {
                "seeds": f"{part['seeds'].max()} of {seeds}",
                "n": part["n"].max() or "-",
                "facts": part["facts"].max() or "-",
            }
        )
    return markdown_table(rows)


def _ours(row: Mapping[str, Any] | None) -> str:
    """`43.1 ± 5.0 (-0.0)`, marked when outside; "-" where there are no such weights."""
    if row is None:
        return "-"
    if row["status"] in (NOT_RUN, UNDEFINED):
        return str(row["status"])
    spread = "" if math.isnan(row["spread"]) else f" ± {_percent(row['spread'])}"
    mean, _, ends = interval_text(row["ours"], row["low"], row["high"], percent=True).partition(" ")
    text = f"{mean}{spread} {ends} ({100 * row['difference']:+.1f})"
    return f"{text} {MARK}" if row["status"] == OUTSIDE else text


def _claims(claims: pd.DataFrame) -> str:
    rows = [
        {
            "claim": row["claim"],
            "L": row["length"],
            "weights": row["weights"],
            "verdict": row["verdict"],
            "seeds": of_seeds(row["holds_in"], row["seeds"]) if row["seeds"] else "-",
            "numbers": row["detail"],
        }
        for row in records(claims)
    ]
    return markdown_table(rows)


def _signatures(signatures: pd.DataFrame) -> str:
    rows = [
        {
            "model": f"{model_name(row)}, L = {row['length']}",
            "weights": row["weights"],
            "signature": row["measure"].replace("_", " "),
            "value": f"{row['value']:.3f}" + ("" if pd.isna(row["spread"]) else f" ± {row['spread']:.3f}"),
            "control": f"{row['control']:.3f}",
            "excess (lowest bound of any seed)": f"{row['excess']:.3f} ({row['excess_low']:.3f})",
            "untrained": f"{row['excess_untrained']:.3f}",
            "seeds above control": of_seeds(row["above_control"], row["decided"]) if row["decided"] else "-",
        }
        for row in records(signatures)
    ]
    return markdown_table(rows)


def _seeds(seeds: pd.DataFrame) -> str:
    rows = []
    for (run, weights), part in seeds.groupby(["run", "weights"], sort=False):
        row = {"run": run, "weights": weights, "step": part["step"].iloc[0]}
        numbers = {one["measure"]: one for one in records(part)}
        for measure in (*_ANSWERS, *SIGNATURES):
            one, percent = numbers[measure], measure.endswith("accuracy")
            shown = interval_text(one["value"], one["low"], one["high"], percent=percent)
            row[measure.replace("_", " ")] = f"{shown}, n = {one['n']}, {one['facts']} facts"
        rows.append(row)
    return markdown_table(rows)


def _curves(curves: pd.DataFrame, measure: str) -> str:
    own = curves[curves["measure"] == measure]
    steps = sorted(own["step"].unique())
    rows = []
    for key, part in own.groupby([*MODEL, "weights"], sort=False):
        model = dict(zip([*MODEL, "weights"], key, strict=True))
        row = {"model": f"{model_name(model)}, L = {model['length']}", "weights": model["weights"]}
        row |= {f"{step}": "-" for step in steps}
        for one in records(part):
            spread = "" if math.isnan(one["spread"]) else f" ± {100 * one['spread']:.0f}"
            undefined = math.isnan(one["value"])
            row[f"{one['step']}"] = UNDEFINED if undefined else f"{100 * one['value']:.0f}{spread}"
        rows.append(row)
    return markdown_table(rows)


def spread_markdown(measures: pd.DataFrame) -> str:
    """One-at-a-time variants of a configuration, from the measures of their runs, as a section of a Markdown page."""
    rows = []
    for (run, weights), part in measures.groupby(["run", "weights"], sort=False):
        last, reverse = part["step"].max(), part[part["measure"] == "reverse_accuracy"].sort_values("step")
        at_end = {row["measure"]: row for row in records(part[part["step"] == last])}
        late, curve = reverse[reverse["step"] >= last / 2]["value"], reverse["value"]
        best = records(reverse.loc[[reverse["value"].fillna(-1.0).idxmax()]])[0]
        answer, probability = at_end["reverse_accuracy"], at_end["reverse_probability"]
        rows.append(
            {
                "run": run,
                "weights": weights,
                "steps": last,
                "forward accuracy": _percent(at_end["forward_accuracy"]["value"]),
                "reverse accuracy": interval_text(answer["value"], answer["low"], answer["high"], percent=True),
                "reverse probability": interval_text(probability["value"], probability["low"], probability["high"]),
                "over the last half": f"{_percent(late.min())} to {_percent(late.max())}",
                "highest (step)": f"{_percent(best['value'])} ({best['step']})",
                "curve": "".join(" " if math.isnan(value) else _BARS[min(7, int(8 * value))] for value in curve),
            }
        )
    return f"## Spread over configurations\n\n{ABOUT_SPREAD}\n\n{markdown_table(rows)}"


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"
