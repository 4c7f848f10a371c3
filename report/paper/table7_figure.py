"""Table 7 as a heat table: exact match by what was trained on, model and direction asked."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

from ...errors import RevprobeError, did_you_mean
from ...probes.figures.theme import FORWARD, TEMPLATE, plain, with_theme
from .table7 import FACTS, SIDES, table7


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
    columns, rows = list(words.columns[1:]), [plain(name) for name in words.get("trained on", [])]
    values = _means(matches[matches["split"] == split], list(words.columns[1:]))
    text = [[plain(cell, limit=None) for cell in line] for line in words[columns].to_numpy().tolist()] if rows else []
    shades = [[0, "#FFFFFF"], [1, FORWARD]]
    cells = go.Heatmap(z=values, x=[plain(name) for name in columns], y=rows, text=text, texttemplate="%{text}")
    cells.update(zmin=0, zmax=100, colorscale=shades, xgap=2, ygap=2, colorbar={"title": {"text": "exact match (%)"}})
    cells.update(hovertemplate="trained on %{y}<br>%{x}: %{text} %<extra></extra>", hoverongaps=False)
    figure = go.Figure(cells).update_layout(template=TEMPLATE, title={"text": f"Exact match (%), {FACTS[split]}"})
    figure.update_xaxes(type="category", side="top", showgrid=False, showline=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, showline=False)
    size = {"width": 330 + 150 * len(columns), "height": 170 + 44 * max(len(rows), 1), "margin": {"t": 110}}
    return with_theme(figure.update_layout(**size), theme)


def _means(chosen: pd.DataFrame, columns: list[str]) -> list[list[float | None]]:
    """Each cell's mean over seeds in per cent, in the order of `table7`; None where there is none."""
    lines: list[list[float | None]] = []
    for _, part in chosen.groupby(["dataset", "direction"], sort=False):
        found = {
            f"{model} {short}": part.loc[(part["model"] == model) & (part["asked"] == asked), "value"].mean()
            for model in dict.fromkeys(part["model"])
            for asked, short in SIDES.items()
        }
        means = [100 * float(found.get(column, math.nan)) for column in columns]
        lines.append([None if math.isnan(mean) else mean for mean in means])
    return lines
