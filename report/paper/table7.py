"""Table 7 of the paper from the evaluations of finished runs: exact match forward and reverse, its spread over seeds,
as a table and as a heat table.

One row per dataset and direction, two columns per model, each cell the mean over seeds, in per cent, with the sample
standard deviation, its 95 % interval and the number of seeds; a single seed has its 95 % interval over facts
instead. The floor, the same questions about held-out facts, stands beside it in a table of its own.
Source: paper Sec. 6, App. D.2, Table 7.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from rich.console import Console

from ...errors import RevprobeError, did_you_mean
from ...finetune.runs.finetuning import FinetuneRun
from ...finetune.runs.record import family_of
from ...probes.figures.theme import CELL_INK, MAP_BLUE, TEMPLATE, interval_text, plain, with_theme
from ...probes.statistics.coverage import FEWEST
from ...probes.statistics.intervals import at_least_over_facts, proportion
from ..summary.families import Seed, short_names, variants_of
from ..summary.terminal import text_table

SIDES = {"forward": "Fwd.", "reverse": "Rev."}
FACTS = {"train": "trained facts", "heldout": "held-out facts (the floor)"}
COLUMNS = ["run", "objective", "model", "dataset", "direction", "variant", "seed", "asked", "split", "templates"]
# What the seeds of a cell have in common, the model beside it.
CELL = ["dataset", "direction", "variant"]
NUMBERS = ["value", "low", "high", "n", "facts", "control"]
LETTER = 7  # pixels of one in a cell, at most on average
NOTE = (
    "Exact match in per cent after lower-casing and stripping blanks, decoded greedily; any of a fact's answers "
    "counts. Mean over seeds, ± their sample standard deviation, with its 95 % interval over seeds (three seeds "
    "alike at 100 % are three, not certain), which is never narrower than theirs over facts, as all are asked "
    "about the same; with one seed the 95 % interval over facts. Where seeds have more than thirty questions each, "
    f"intervals over them were seen to hold the truth 90 % of the time only from {FEWEST['proportion'][math.inf]} "
    "seeds on. n counts questions. Reverse is asked about trained facts, of which training read the forward "
    "statements alone; held-out facts were never read, in any direction."
)


def match_frame(runs: Sequence[FinetuneRun]) -> pd.DataFrame:
    """Every exact match of the runs that have been evaluated, tidy.

    Returns: run (with its folder where its name is another's too), objective, model, dataset, direction (trained),
        variant (as `variants_of` tells configs apart that share their labels), seed, asked ("forward", "reverse"),
        split ("train", "heldout"), templates (whose wordings), and value, low, high, n, facts, control, fractions; NaN
        is undefined.
    """
    rows: list[dict[str, Any]] = []
    own = {str(run.path.resolve()): run for run in runs}  # a run that is given twice counts once
    variants = variants_of({path: _seed(run) for path, run in own.items()})
    names = short_names(own)
    for path, run in own.items():
        if not (run.finished and run.asks):
            continue
        for reading in run.evaluation():
            about = {name: reading.meta[name] for name in ("asked", "split", "templates")}
            low, high = reading.interval
            numbers = {"value": reading.value, "low": low, "high": high, "n": reading.n, "facts": reading.facts}
            control = math.nan if reading.control is None else reading.control.value
            told = {"run": names[path], "variant": variants[path]}
            rows.append(run.axes | told | about | numbers | {"control": control})
    return pd.DataFrame(rows, columns=[*COLUMNS, *NUMBERS])


def _seed(run: FinetuneRun) -> Seed:
    axes = {name: str(value) for name, value in run.axes.items()}
    label = tuple(axes[name] for name in ("model", "dataset", "direction"))
    return Seed(label, axes.get("variant", ""), family_of(run.config.model_dump(mode="json")), axes["seed"])


def table7(matches: pd.DataFrame, split: str = "train") -> pd.DataFrame:
    """The layout of Table 7 as text: a row per dataset and direction, "<model> Fwd." and "<model> Rev." per model.

    Args:
        matches: what `match_frame` gives.
        split: "train", or "heldout" for the floor.
    """
    chosen = _of_split(matches, split)
    rows = []
    for (dataset, direction, variant), part in chosen.groupby(CELL, sort=False):
        row = {"trained on": f"{dataset} ({direction}){f', {variant}' if variant else ''}"}
        for model in dict.fromkeys(chosen["model"]):
            for asked, short in SIDES.items():
                row[f"{model} {short}"] = cell_text(part[(part["model"] == model) & (part["asked"] == asked)])
        rows.append(row)
    return pd.DataFrame(rows)


def cell_text(part: pd.DataFrame) -> str:
    """One cell: mean and spread over seeds, one seed's interval over facts, or why there is neither."""
    values = part["value"].dropna()
    if part.empty:
        return "not run"
    if values.empty:
        return "undefined"
    lost = f", {len(part) - len(values)} undefined" if len(values) < len(part) else ""
    if len(values) == 1:
        one = part.loc[values.index[0]]
        counted = f"{f'1 seed{lost}, ' if lost else ''}n = {int(one['n']):,}, {int(one['facts']):,} facts"
        return f"{interval_text(one['value'], one['low'], one['high'], percent=True)} ({counted})"
    spread = f" ± {100 * values.std(ddof=1):.1f}"
    counts = part.loc[values.index, "n"].to_numpy(dtype=float)
    asked = round(counts.sum())  # the sum itself: their mean, which the interval takes, need not be whole
    rates, low, high = part.loc[values.index, ["value", "low", "high"]].to_numpy(dtype=float).T
    found = at_least_over_facts(proportion(rates, np.full(len(rates), counts.mean())), (rates, low, high))
    mean, _, interval = interval_text(values.mean(), found.low, found.high, percent=True).partition(" ")
    facts = int(part.loc[values.index, "facts"].max())
    return f"{mean}{spread} {interval} ({len(values)} seeds{lost}, n = {asked:,}, {facts:,} facts)"


def _of_split(matches: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of one side, runs of one seed apart; frames from before there were variants have none."""
    chosen = matches[matches["split"] == split]
    chosen = chosen if "variant" in chosen else chosen.assign(variant="")
    if "run" not in chosen:
        return chosen
    runs = chosen.drop_duplicates("run").set_index("run")
    labels = runs[["model", "dataset", "direction"]].astype(str).itertuples(index=False, name=None)
    told = zip(runs.index, labels, runs["variant"], runs["seed"].astype(str), strict=True)
    variants = variants_of({run: Seed(label, variant or "", "", seed) for run, label, variant, seed in told})
    return chosen.assign(variant=chosen["run"].map(variants))


def print_table7(runs: Sequence[FinetuneRun], console: Console) -> None:
    """Both tables in the terminal, and which runs were asked nothing; nothing where no run has been evaluated yet."""
    matches = match_frame(runs)
    for split, facts in FACTS.items():
        if (matches["split"] == split).any():
            console.print(text_table(table7(matches, split), f"exact match (%), {facts}"))
    if told := not_asked(runs):
        console.print(told)


def not_asked(runs: Sequence[FinetuneRun]) -> str | None:
    """The runs whose config leaves decoding out, in one sentence; None where there are none."""
    silent = [run.name for run in runs if not run.asks]
    told = f"No fact was asked of {', '.join(silent)} (evaluation.facts: 0): no exact match was taken."
    return told if silent else None


def table7_figure(matches: pd.DataFrame, split: str = "train", *, theme: str = "light") -> go.Figure:
    """Draw `table7` with cells shaded by their mean over seeds, 0 to 100 %.

    Args:
        matches: what `match_frame` gives.
        split: "train", or "heldout" for the floor.
        theme: "light" or "dark".
    Raises: RevprobeError, for another split.
    """
    if split not in FACTS:
        raise RevprobeError(f"split {split!r}{did_you_mean(split, FACTS)}")
    words = table7(matches, split)
    columns, rows = list(words.columns[1:]), [_named(name) for name in words.get("trained on", [])]
    values = _means(_of_split(matches, split), list(words.columns[1:]))
    text = [[_in_lines(cell) for cell in line] for line in words[columns].to_numpy().tolist()] if rows else []
    shades = [[0, "#FFFFFF"], [1, MAP_BLUE]]
    cells = go.Heatmap(z=values, x=[_named(name) for name in columns], y=rows, text=text, texttemplate="%{text}")
    cells.update(textfont={"color": CELL_INK})
    cells.update(zmin=0, zmax=100, colorscale=shades, xgap=2, ygap=2, colorbar={"title": {"text": "exact match (%)"}})
    cells.update(hovertemplate="trained on %{y}<br>%{x}: %{text} %<extra></extra>", hoverongaps=False)
    figure = go.Figure(cells).update_layout(template=TEMPLATE, title={"text": f"Exact match (%), {FACTS[split]}"})
    figure.update_xaxes(type="category", side="top", showgrid=False, showline=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, showline=False)
    shown = [html.unescape(part) for line in [*text, columns] for cell in line for part in cell.split("<br>")]
    width = max(150, LETTER * max(map(len, shown), default=0) + 20)  # of a column: no words reach into the next
    beside = 150 + LETTER * max((len(html.unescape(row)) for row in rows), default=0)
    size = {
        "width": max(beside, 330) + width * len(columns),
        "height": 170 + 64 * max(len(rows), 1),
        "margin": {"t": 110},
    }
    return with_theme(figure.update_layout(**size), theme)


def _named(name: str) -> str:
    """A row's or column's name, never shortened: two that then were alike would be drawn over each other."""
    return plain(name, limit=None)


def _in_lines(cell: str) -> str:
    """A cell's value, its interval and its counts on a line each."""
    return plain(cell, limit=None).replace(" [", "<br>[").replace(" (", "<br>(")


def _means(chosen: pd.DataFrame, columns: list[str]) -> list[list[float | None]]:
    """Each cell's mean over seeds in per cent, in the order of `table7`; None where there is none."""
    lines: list[list[float | None]] = []
    for _, part in chosen.groupby(CELL, sort=False):
        found = {
            f"{model} {short}": part.loc[(part["model"] == model) & (part["asked"] == asked), "value"].mean()
            for model in dict.fromkeys(part["model"])
            for asked, short in SIDES.items()
        }
        means = [100 * float(found.get(column, math.nan)) for column in columns]
        lines.append([None if math.isnan(mean) else mean for mean in means])
    return lines
