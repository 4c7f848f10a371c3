"""What the dashboard draws of the runs it was asked for: figures, tables and choices, from the folder's state.

Every function returns something to show, whatever the files are like: what cannot be drawn comes back as its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from ...errors import RevprobeError, first_line
from ...finetune.runs.alerts import history_of
from ...finetune.runs.record import tidy_summary
from ...probes.figures.theme import message_figure
from ...probes.figures.training_curves import signatures_figure
from ...probes.readings.reading import Reading
from ..summary.alerts import judged_table
from ..summary.families import lines_of
from ..summary.seed_bands import SEEDS_KEY, pool_seeds
from ..summary.tables import final_table, format_final_table
from .folder import RunsFolder
from .listed_runs import Listed
from .view import LAST

ATTENTION = "attention_correlation"
READING_OF = {
    "heatmap": ATTENTION,
    "scatter": ATTENTION,
    "gradient": "gradient_cosine",
    "probability": "reverse_probability",
}


def axis_value(run: Listed, axis: str) -> str | None:
    """A run's value of one filter, as text; None where it has none."""
    value = getattr(run, axis) if axis in ("group", "state") else run.axes.get(axis)
    return None if value in (None, "") else str(value)


def filtered(runs: Sequence[Listed], wanted: Mapping[str, Sequence[str]], text: str = "") -> list[Listed]:
    """The runs that have one of the wanted values on every axis, and the text in their path."""
    asked = {axis: set(values) for axis, values in wanted.items() if values}
    return [
        run
        for run in runs
        if text.lower() in run.key.lower() and all(axis_value(run, axis) in values for axis, values in asked.items())
    ]


def filter_values(runs: Sequence[Listed], axis: str) -> list[str]:
    """What a filter offers: numbers by size, words by alphabet."""
    found = {value for run in runs if (value := axis_value(run, axis)) is not None}
    return sorted(found, key=lambda value: (not value.isdecimal(), int(value) if value.isdecimal() else 0, value))


def run_names(runs: Sequence[Listed]) -> dict[str, str]:
    """What each run is called in a figure: its name, or its path where two share one."""
    counts = Counter(run.name for run in runs)
    return {run.key: run.name if counts[run.name] == 1 else run.key for run in runs}


def curves(
    folder: RunsFolder, runs: Sequence[Listed], *, weights: str, bands: str, hidden: int = 0
) -> tuple[go.Figure, pd.DataFrame, list[str], list[str]]:
    """The signatures of some runs over each other.

    Args:
        weights: "ema" (raw where there is no average), "raw" or "both".
        bands: "facts", each run with its interval, or "seeds", runs that differ in their seed as one.
        hidden: chosen runs that the search and the filters leave out.
    Returns: the figure, the table of the last checkpoints, notes, and problems.
    """
    names = run_names(runs)
    measures, damaged = folder.measures(runs)
    problems = [f"{names[key]}: {reason}" for key, reasons in damaged.items() for reason in reasons]
    if measures.empty:
        left_out = f"Search and filters leave out the {hidden} chosen." if hidden else "Choose a run in the list."
        why = left_out if not runs else "None of these runs has a reading that can be drawn."
        return message_figure(why), pd.DataFrame(), [], problems
    try:
        drawn = chosen_weights(measures, weights)
        named = drawn.assign(run=drawn["run"].map(names))
        table = format_final_table(final_table(tidy_summary([named])))
        pooled, said = pool_seeds(drawn, names) if bands == "seeds" else (named, [])
        figure = signatures_figure(pooled, buttons=False).update_traces(visible=True)
        if bands == "seeds":
            figure.update_layout(title={"text": SEEDS_KEY})
        figure.update_layout(meta=dict(figure.layout.meta) | {"colours": run_colours(figure, drawn, names, bands)})
    except Exception as error:  # numbers of another version may lack what a figure needs; the page stays
        why = first_line(error, with_type=not isinstance(error, RevprobeError))
        return message_figure(f"cannot be drawn: {why}"), pd.DataFrame(), [], problems
    # Zoom and hidden series stay while checkpoints come in, and start anew with other runs.
    figure.update_layout(uirevision="|".join([weights, bands, *names]))
    return figure, table, said, problems


def alerts_judged(folder: RunsFolder, runs: Sequence[Listed]) -> pd.DataFrame:
    """The alerts of some runs at their last checkpoints, as the report's table has them; empty without rules."""
    ruled = [run for run in runs if run.alerts]
    if not ruled:
        return pd.DataFrame()
    measures, names = folder.measures(ruled)[0], run_names(runs)
    judged = []
    for run in ruled:
        own = measures[measures["run"] == run.key] if len(measures) else measures
        judged.append((names[run.key], run.alerts, history_of(run.alerts, own)))
    return judged_table(judged)


def run_colours(figure: go.Figure, drawn: pd.DataFrame, names: Mapping[str, str], bands: str) -> dict[str, str]:
    """The colour of each run's line, by its key; runs that one line stands for share its colour."""
    lines = {str(trace.meta["run"]): trace.line.color for trace in figure.data if trace.meta.get("part") == "value"}
    called = lines_of(drawn, names) if bands == "seeds" else drawn["run"].map(names)
    return {key: lines[label] for key, label in zip(drawn["run"], called, strict=True) if label in lines}


def chosen_weights(measures: pd.DataFrame, weights: str) -> pd.DataFrame:
    """The rows of one choice of weights: "ema" takes a run's raw ones where it keeps no average."""
    averaged = set(measures.loc[measures["weights"] == "ema", "run"])
    if weights == "both":
        return measures
    if weights == "raw":
        return measures[measures["weights"] != "ema"]
    return measures[(measures["weights"] == "ema") | ~measures["run"].isin(averaged)]


def reading_at(folder: RunsFolder, run: Listed, name: str, step: int | None, weights: str | None) -> Reading:
    """A run's reading at a step, or at its last. Raises: RevprobeError, when there is none or it is damaged."""
    if not run.steps:
        raise RevprobeError(f"{run.name} has no reading yet{f': {run.problem}' if run.problem else ''}")
    at = run.steps[-1] if step in (None, LAST) else int(step or 0)
    return folder.reading(run, name, at, weights or "raw")


def checkpoint_figure(reading: Reading, kind: str, layer: int | None, head: int | None) -> go.Figure:
    """One reading drawn as asked for."""
    if kind == "scatter":
        return reading.plot(layer=layer, head=head)
    if kind != "heatmap":
        return reading.plot()
    frame = reading.frame
    for column, wanted in (("layer", layer), ("head", head)):
        if wanted is not None:
            frame = frame[frame[column] == wanted].reset_index(drop=True)
    part = reading if len(frame) == len(reading.frame) else Reading(reading.name, frame, reading.meta)
    return part.plot(kind="heatmap")


def or_reason(draw: Callable[[], go.Figure]) -> go.Figure:
    """What `draw` draws, or why it cannot."""
    try:
        return draw()
    except RevprobeError as error:
        return message_figure(first_line(error, with_type=False))
    except Exception as error:  # a reading of another version may lack a column; the page stays
        return message_figure(f"cannot be drawn: {first_line(error)}")


def pair_row(frame: pd.DataFrame, pair: int, layer: int, head: int) -> pd.Series:
    """An attention reading's row of one pair at one layer and head. Raises: RevprobeError, when there is none."""
    rows = frame[(frame["pair"] == pair) & (frame["layer"] == layer) & (frame["head"] == head)]
    if rows.empty:
        raise RevprobeError(f"no pair {pair} at layer {layer}, head {head} in this reading; choose another")
    return rows.iloc[0]


def fact_pairs(frame: pd.DataFrame, fact: str | None) -> list[dict[str, Any]]:
    """The pairs of a fact, each told by its distances."""
    rows = frame[frame["fact"].astype(str) == str(fact)].drop_duplicates("pair")
    return [
        {"label": f"pair {pair}: distances {forward} / {reverse}", "value": int(pair)}
        for pair, forward, reverse in rows[["pair", "distance_forward", "distance_reverse"]].to_numpy().tolist()
    ]
