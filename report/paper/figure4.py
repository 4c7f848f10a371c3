"""Fig. 4 of the paper over fine-tuning: attention scores' correlation, gradient cosines, probabilities, seeds pooled.

A line is one model trained on one dataset in one direction: its mean over seeds at the steps that all of them have
reached, with a band from the lowest to the highest seed, of a single seed its 95 % interval over facts. Masked and
causal models are asked different kinds of pairs, which the legend says; they are never pooled. Every measure has axes
of its own, so that a dash has one meaning: a line is a value, dashes are its control.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from ...probes.figures.controls import LOOKS
from ...probes.figures.theme import (
    CONTROL_GREY,
    OKABE_ITO,
    SPARE_COLOURS,
    SYMBOLS,
    TEMPLATE,
    StepScale,
    band,
    dashed,
    faded,
    heading,
    interval_text,
    message_figure,
    plain,
    reach,
)
from ...probes.figures.training_curves import (
    LEGEND,
    NARROW,
    SIDES,
    VIEWS,
    Panel,
    count_words,
    draw_key,
    fit_legend,
    titled,
)
from ..summary.families import Seed, variants_of

PANELS = (
    Panel("attention_correlation", "Routing: attention scores", "Pearson r of forward and reverse score", 1, 1),
    Panel("gradient_cosine", "Learning: gradients", "cosine over all parameters", 1, 2),
    Panel("forward_probability", "Answer: forward query", "target probability", 1, 3),
    Panel("lora_gradient_cosine", "Learning: adapter alone", "cosine over the adapter", 2, 2),
    Panel("reverse_probability", "Answer: reverse query", "target probability", 2, 3),
)
# Where they stand two in a row, as (column, row): what is alike stands in one column.
_TWO_IN_A_ROW = ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2))
# Seven that everybody tells apart, then seven of another palette, for the page that has so many models.
COLOURS = (
    *SPARE_COLOURS,
    OKABE_ITO["orange"],
    OKABE_ITO["black"],
    *(qualitative.Dark24[at] for at in (16, 14, 12, 19, 13, 7, 15)),
)
KEY = "line: mean over seeds · band: lowest to highest seed; of one seed, 95 % interval over facts · "
KEY += "dashed: control (shuffled facts) · ×: undefined"
NOTES = 4  # lines that are named above the panels; of more, how many there are
# What a line is of; "task" is the dataset and the direction that was trained.
LINE = ["model", "task", "variant", "kind"]


def with_axes(measures: pd.DataFrame, axes: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A table about fine-tunings with columns for what a line is of: model, task and variant ("" without).

    Seeds of a line are runs whose configs differ in nothing but the seed: others, and runs of one seed, are variants
    of their own (`variants_of`), whatever their labels say.

    Args:
        axes: of each run, by the names in the column `run`; with its `family` (`family_of`) among them where configs
            may differ in what no label tells.
    """
    of = {
        name: {key: "" if value is None else str(value) for key, value in about.items()} for name, about in axes.items()
    }
    variants = variants_of({name: _seed(about) for name, about in of.items()})
    models = [of[run].get("model", "") for run in measures["run"]]
    tasks = [f"{of[run]['dataset']} ({of[run]['direction']})" for run in measures["run"]]
    return measures.assign(model=models, variant=[variants[run] for run in measures["run"]], task=tasks)


def _seed(about: Mapping[str, str]) -> Seed:
    label = tuple(about.get(name, "") for name in ("model", "dataset", "direction"))
    return Seed(label, *(about.get(name, "") for name in ("variant", "family", "seed")))


def run_colours(measures: pd.DataFrame) -> dict[str, str]:
    """Each run's colour: one for a model in the whole page; where there is one model, one for a variant or task."""
    hue = next((name for name in ("model", "variant", "task") if measures[name].nunique() > 1), "model")
    places = {value: place for place, value in enumerate(measures[hue].unique())}
    runs = measures.drop_duplicates("run")
    return {run: COLOURS[places[value] % len(COLOURS)] for run, value in zip(runs["run"], runs[hue], strict=True)}


def pooled(measures: pd.DataFrame) -> pd.DataFrame:
    """Over seeds: mean, lowest and highest value, mean control, and how many seeds, for each line, measure and step.

    Of one seed, low and high are its 95 % interval over facts, NaN where it has none. Seeds whose value is undefined
    are left out of all, also of the control and the counts (`n` to `n_most`, `facts` to `facts_most`); `undefined` is
    their number and `reason` why. Where no seed is left, the mean is NaN, control and counts are of all seeds.
    """
    keys = [*LINE, "measure", "step"]
    grouped = measures.groupby(keys, sort=False, dropna=False)
    table = grouped["value"].agg(mean="mean", low="min", high="max", seeds="count")
    alone, defined = table["seeds"] == 1, measures["value"].notna()
    kept = measures[defined].groupby(keys, sort=False, dropna=False)
    for end in ("low", "high"):
        table[end] = table[end].where(~alone, kept[end].first().reindex(table.index))
    unsaid = measures.assign(reason=measures["reason"].where(~defined, "")).groupby(keys, sort=False, dropna=False)
    reasons = unsaid["reason"].agg(lambda found: next((one for one in found if isinstance(one, str) and one), ""))
    found = {"control": ("control", "mean")} | {name: (name, "min") for name in ("n", "facts")}
    found |= {f"{name}_most": (name, "max") for name in ("n", "facts")}
    over = {name: getattr(kept[of], how)().reindex(table.index) for name, (of, how) in found.items()}
    over = {name: part.fillna(getattr(grouped[found[name][0]], found[name][1])()) for name, part in over.items()}
    return table.assign(reason=reasons, undefined=grouped.size() - table["seeds"], **over).reset_index()


def reached_by_all(measures: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of the steps that all seeds of a line have reached, and a note for each line with others.

    A mean over changing seeds jumps where none of them does; a seed without a measure is none of its seeds.
    """
    keys = [*LINE, "measure"]
    seeds = measures.groupby(keys, dropna=False)["run"].transform("nunique")
    there = measures.groupby([*keys, "step"], dropna=False)["run"].transform("nunique")
    notes = []
    for key, rows in measures[there < seeds].groupby(LINE, sort=False, dropna=False):
        steps = ", ".join(f"{int(step):,}" for step in sorted(rows["step"].unique()))
        notes.append(f"{_named(*map(str, key))}: step {steps} left out, which not all {seeds[rows.index].max()} seeds ")
        notes[-1] += "have reached"
    return measures[there == seeds], notes


def _named(model: str, task: str, variant: str, kind: str) -> str:
    return plain(", ".join(filter(None, [f"{model} {task}", variant, kind.replace("_", " ")])))


@dataclass(frozen=True)
class _Line:
    """One line of every panel: its pooled rows, its name, how it is drawn, and what a page's choices show it by."""

    rows: pd.DataFrame
    name: str
    colour: str
    symbol: str
    tags: dict[str, Any]


def figure4(measures: pd.DataFrame, controls: pd.DataFrame | None = None) -> go.Figure:
    """The signatures over the steps of fine-tunings.

    Args:
        measures: as `signatures_figure` takes them, with the columns of `with_axes`.
        controls: further controls (`controls_frame`), with those columns too; their mean over seeds is drawn in each
            control's own dash and marker.
    """
    panels = [panel for panel in PANELS if (measures["measure"] == panel.measure).any()]
    if not panels:
        return message_figure("No readings: nothing was measured yet.")
    drawn = measures[measures["measure"].isin([panel.measure for panel in panels])]
    against = pd.DataFrame(columns=["control", "measure", "value"]) if controls is None else controls
    against = against[against["measure"].isin([panel.measure for panel in panels])]
    kept, notes = reached_by_all(drawn.assign(step=drawn["step"].astype(float).fillna(0.0)))
    if kept.empty:
        return message_figure("; ".join(notes))
    table = pooled(kept)
    scale = StepScale.over(int(step) for step in table["step"])
    against = _beside_values(against, table)
    figure = _empty_panels(panels, table, against, scale)
    for line in _lines(table, drawn):
        shown = True  # the legend lists a line once, at the first panel that holds it
        for panel in panels:
            rows = line.rows[line.rows["measure"] == panel.measure].sort_values("step")
            traces = _traces(figure, panel, rows, line, scale) + _beside(panel, line, against, scale)
            for trace in traces:
                trace.update(name=line.name, legendgroup=line.name)
                trace.update(showlegend=shown and trace.meta["part"] == "value")
                figure.add_trace(trace, row=panel.row, col=panel.column)
            shown = shown and rows.empty
    draw_key(figure, against, panels[0])
    fit_legend(figure)
    if notes:
        more = [f"and {len(notes) - NOTES} more lines"] * (len(notes) > NOTES)
        figure.update_layout(title=heading(KEY, *notes[:NOTES], *more, key=True))
        # Each line of the notes above the panels' titles, which stay where they are.
        added = 18 * (figure.layout.title.text.count("<br>") - heading(KEY, key=True)["text"].count("<br>"))
        figure.update_layout(margin={"t": figure.layout.margin.t + added})
    return figure


def _lines(table: pd.DataFrame, drawn: pd.DataFrame) -> list[_Line]:
    """All lines: colours are the runs', markers tell apart what shares a colour."""
    colours = run_colours(drawn)
    of_line = {tuple(row[:-1]): colours[row[-1]] for row in drawn[[*LINE, "run"]].astype(str).itertuples(index=False)}
    lines: list[_Line] = []
    for key, rows in table.groupby(LINE, sort=False, dropna=False):
        model, task, variant, kind = (str(one) for one in key)
        colour = of_line[model, task, variant, kind]
        alike = sum(line.colour == colour for line in lines)
        name = _named(model, task, variant, kind)
        tags = {"views": list(VIEWS), "model": model, "task": task, "variant": variant}
        lines.append(_Line(rows, name, colour, SYMBOLS[alike % len(SYMBOLS)], tags))
    return lines


def _empty_panels(panels: list[Panel], table: pd.DataFrame, against: pd.DataFrame, scale: StepScale) -> go.Figure:
    """Axes for each measure, as high as two where nothing stands below it."""
    below = {(panel.row, panel.column) for panel in panels}
    cell: list[list[dict[str, int] | None]] = [[None] * 3, [None] * 3]
    alone = {panel.column for panel in panels if panel.row == 1 and (2, panel.column) not in below}
    for panel in panels:
        cell[panel.row - 1][panel.column - 1] = {"rowspan": 2} if panel.column in alone else {}
    titles = [titled(panel, _sizes(table[table["measure"] == panel.measure])) for panel in panels]
    figure = make_subplots(2, 3, specs=cell, subplot_titles=titles, horizontal_spacing=0.11, vertical_spacing=0.2)
    for panel in panels:
        rows = table[table["measure"] == panel.measure]
        numbers = rows[["mean", "low", "high", "control"]].to_numpy(dtype=float).ravel().tolist()
        numbers += against.loc[against["measure"] == panel.measure, "value"].astype(float).tolist()
        figure.update_yaxes(title={"text": panel.unit}, range=reach(numbers), row=panel.row, col=panel.column)
        figure.update_xaxes(scale.axis(), row=panel.row, col=panel.column)
        if panel.row == 1 and panel.column not in alone:
            figure.update_xaxes(title=None, row=panel.row, col=panel.column)
    legend = {"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom", "x": 0}
    entries = table.groupby(LINE, dropna=False).ngroups + against["control"].nunique()
    room = LEGEND["axis"] + LEGEND["row"] * math.ceil(entries / LEGEND["columns"])
    size = {"height": LEGEND["panels"] + room, "margin": {"t": 96, "b": room, "r": 45}}
    meta = {"below": LEGEND, "narrow": _narrow(len(panels), scale)}
    return figure.update_layout(template=TEMPLATE, title=heading(KEY, key=True), legend=legend, meta=meta, **size)


def _narrow(panels: int, scale: StepScale) -> dict[str, Any]:
    """What a page with less room changes in the layout: two panels in a row, their titles with them."""
    rows = math.ceil(panels / 2)
    gap = 0.32 / rows
    height = (1 - gap * (rows - 1)) / rows
    layout: dict[str, Any] = {"annotations": []}
    for place, (column, row) in enumerate(_TWO_IN_A_ROW[:panels]):
        if panels == 4:
            column, row = place % 2, place // 2
        across, top = list(SIDES.values())[column], 1 - row * (height + gap)
        last = (column, row + 1) not in _TWO_IN_A_ROW[:panels]
        number = "" if place == 0 else str(place + 1)
        title = scale.axis()["title"]["text"] if last else None
        layout[f"xaxis{number}"] = {"domain": across, "title": {"text": title}}
        layout[f"yaxis{number}"] = {"domain": (max(0.0, top - height), top)}
        layout["annotations"].append({"x": sum(across) / 2, "y": top})
    return NARROW | {"panels": NARROW["panels"] * rows // 2, "layout": layout}


def _traces(figure: go.Figure, panel: Panel, rows: pd.DataFrame, line: _Line, scale: StepScale) -> list[go.Scatter]:
    """One measure of one line: its band, its control, its mean, and crosses where that is undefined."""
    if rows.empty:
        return []
    x = [scale.position(step) for step in rows["step"]]
    hover = [_hover(line.name, row) for row in rows.to_dict("records")]
    low_end, high_end = next(figure.select_yaxes(row=panel.row, col=panel.column)).range
    gaps = [place for place, mean in enumerate(rows["mean"]) if math.isnan(mean)]
    cross = {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": CONTROL_GREY}}
    parts = {
        "band": band(x, rows["low"].tolist(), rows["high"].tolist(), line.colour),
        "control": dashed(x, rows["control"].astype(float).tolist(), faded(line.colour, 0.75), hoverinfo="skip"),
        "value": go.Scatter(x=x, y=rows["mean"].tolist(), mode="lines+markers", hovertext=hover, hoverinfo="text"),
        "undefined": go.Scatter(
            x=[x[place] for place in gaps],
            y=[low_end + 0.03 * (high_end - low_end) for _ in gaps],
            mode="markers",
            marker=cross,
            hovertext=[hover[place] for place in gaps],
            hoverinfo="text",
        ),
    }
    parts["value"].line = {"color": line.colour, "width": 2}
    parts["value"].marker = {"symbol": line.symbol, "size": 7}
    return [trace.update(meta={"part": part, **line.tags}) for part, trace in parts.items() if trace.x]


def _beside(panel: Panel, line: _Line, against: pd.DataFrame, scale: StepScale) -> list[go.Scatter]:
    """A line's controls beside shuffled facts, their means over seeds; one without any number is in the key alone."""
    if against.empty:
        return []
    one = line.rows.iloc[0]
    own = against[(against["measure"] == panel.measure) & (against[LINE] == one[LINE]).all(axis=1)]
    traces = []
    for name, part in own.groupby("control", sort=False):
        means = part.assign(step=part["step"].astype(float).fillna(0.0)).groupby("step")["value"].mean().dropna()
        if means.empty:
            continue
        look = LOOKS[str(name)]
        trace = go.Scatter(x=[scale.position(step) for step in means.index], y=means.astype(float).tolist())
        trace.update(mode="lines+markers", line={"color": line.colour, "width": 1.2, "dash": look.dash}, opacity=0.8)
        trace.update(marker={"symbol": look.symbol, "size": 8}, hoverinfo="text")
        trace.update(hovertext=[f"<b>{line.name}</b><br>{look.words}: {value:.3f}" for value in means])
        traces.append(trace.update(meta={"part": "against", "against": name, **line.tags}))
    return traces


def _beside_values(against: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The controls at the steps of a line's own values."""
    if against.empty:
        return against
    keys = [*LINE, "measure", "step"]
    against = against.assign(step=against["step"].astype(float).fillna(0.0))
    values = pd.MultiIndex.from_frame(table[keys])
    return against[pd.MultiIndex.from_frame(against[keys]).isin(values)]


def _sizes(rows: pd.DataFrame) -> pd.DataFrame:
    """The counts of pooled rows, least and most below one another."""
    most = rows[["n_most", "facts_most"]].rename(columns={"n_most": "n", "facts_most": "facts"})
    return pd.concat([rows[["n", "facts"]], most], ignore_index=True)


def _hover(name: str, row: dict[Hashable, Any]) -> str:
    numbers = interval_text(*(float(row[key]) for key in ("mean", "low", "high", "control")))
    spread = "95 % over facts, 1 seed" if row["seeds"] == 1 else f"lowest to highest of {row['seeds']} seeds"
    lines = [f"<b>{name}</b>", f"step {int(row['step']):,}: {numbers}", spread if row["seeds"] else ""]
    lines.append(count_words(_sizes(pd.DataFrame([row]))))
    if row["undefined"]:
        of = f"{row['undefined']} of {row['undefined'] + row['seeds']} seeds " if row["seeds"] else ""
        lines.append(f"{of}undefined{': ' if row['reason'] else ''}{plain(row['reason'], limit=200)}")
    return "<br>".join(filter(None, lines))
