"""What a report of fine-tunings shows in its own way: the signatures, Table 7, and one-step predictions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from ...finetune.runs.finetuning import FinetuneRun, finetuning_runs
from ...finetune.runs.record import RunRecord
from ...finetune.runs.run import Run
from ...finetune.training.prediction_callback import PREDICTIONS
from ...probes.statistics.measures import current_columns
from ..paper.figure4 import figure4, run_colours, with_axes
from ..paper.table7 import FACTS, NOTE, SIDES, match_frame, not_asked, table7, table7_figure
from .page import choice, controls, drawn_figure, figure_data, figure_place, folded, paragraph, scrolled, section, table

CHOOSABLE = {"model": "model", "task": "trained on", "variant": "variant"}
HEATED = 4  # rows from which colours tell more than the table itself

PREDICTED = (
    "The optimizer step after each snapshot, measured twice: by the gradient of the loss at the snapshot times the "
    "step that was made, and as the difference of the losses. 95 % intervals over facts; the control is the same for "
    "each target under another fact's query."
)


def finetune_sections(runs: Sequence[Run]) -> list[Markup]:
    """Table 7 and its floor, and the steps that the gradients foretold, each a section; none without a fine-tuning."""
    tuned = finetuning_runs(runs)
    if not tuned:
        return []
    parts = exact_matches(match_frame(tuned))
    if not parts and any(run.asks for run in tuned):
        parts = [paragraph("No run has been evaluated yet.")]
    notes = [NOTE] if parts else []
    if told := not_asked(tuned):
        notes.insert(0, told)
    if only := [run.name for run in tuned if run.config.objective.scope == "response_only"]:
        notes.append(
            f"Trained on the response only: {', '.join(only)}. There the first entity is never masked, so for masked "
            "models the probes' forward query is not what training asked."
        )
    parts += [paragraph(note, note=True) for note in notes]
    sections = [section("table7", "Exact match (Table 7)", *parts)]
    return sections + _predictions(tuned)


def tuned_signatures(
    runs: Sequence[RunRecord], measures: pd.DataFrame, held_against: pd.DataFrame
) -> tuple[Markup, dict[str, str]]:
    """The signatures of fine-tunings over their steps, seeds pooled, with the choices of what is shown; and the colours
    of its lines, by "model NAME" and "run NAME".

    Args:
        measures, held_against: the report's, a row of which names its run.
    """
    axes = {run.name: {**run.axes, "family": run.family} for run in runs}
    drawn = with_axes(measures, axes)
    against = with_axes(held_against, axes)
    selects = []
    for axis, words in CHOOSABLE.items():
        values = list(drawn[axis].unique())
        if len(values) > 1:
            # Datasets are different tasks: a sweep opens on the first, not on all of them over each other.
            first = values[0] if axis == "task" else "all"
            options = [("all", "all"), *((value, value or "none") for value in values)]
            selects.append(choice(f"choose-{axis}", words, options, chosen=first))
    parts = [controls(*selects), figure_place("signatures"), figure_data("signatures", figure4(drawn, against))]
    of = run_colours(drawn)
    colours = {f"run {name}": colour for name, colour in of.items()}
    models = {model: {of[run] for run in part["run"]} for model, part in drawn.groupby("model", sort=False)}
    colours |= {f"model {model!s}": next(iter(found)) for model, found in models.items() if len(found) == 1}
    one = "model" if drawn["model"].nunique() > 1 else "variant or dataset"
    note = (
        f"Colour: {one}, as in the tables; markers tell apart what shares it. A click on a legend entry hides its line."
    )
    shown = section("signatures", "The signatures while fine-tuning (Fig. 4)", *parts, paragraph(note, note=True))
    return shown, colours


def exact_matches(matches: pd.DataFrame) -> list[Markup]:
    """Table 7 of trained and of held-out facts; one of many rows once more as colours.

    Args:
        matches: what `match_frame` gives.
    """
    parts = []
    for split, facts in FACTS.items():
        if (matches["split"] == split).any():
            shown = table7(matches, split)
            of = {f"{model} {side}": model for model in matches["model"].unique() for side in SIDES.values()}
            cells = table(list(shown.columns), shown.to_numpy().tolist(), models=of)
            parts += [paragraph(f"{facts.capitalize()}:"), cells]
            if len(shown) >= HEATED:
                heated = drawn_figure(f"table7-{split}", table7_figure(matches, split))
                parts.append(scrolled(f"figure: exact match, {facts}", heated))
    return parts


def _predictions(runs: Sequence[FinetuneRun]) -> list[Markup]:
    """The change of each direction's loss over the step after each snapshot: predicted, and as observed."""
    rows = [
        [run.name, f"{row['step']:,}", row["direction"], *(_change(row, name) for name in ("predicted", "observed"))]
        for run in runs
        if (run.path / PREDICTIONS).is_file()
        for row in current_columns(pd.read_parquet(run.path / PREDICTIONS)).to_dict("records")
    ]
    if not rows:
        return []
    headings = ["run", "step", "loss", "predicted change (nats)", "observed change (nats)"]
    shown = folded(f"{len(rows)} rows", table(headings, rows))
    return [section("predictions", "What one step does to the losses", paragraph(PREDICTED, note=True), shown)]


def _change(row: dict[Hashable, Any], name: str) -> str:
    """A change with its interval and what the same step did to shuffled pairs; the reason where there is none."""
    value, low, high, control = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high", "_control"))
    if math.isnan(value):
        return str(row["reason"] or "undefined")
    interval = "(no interval)" if math.isnan(low) or math.isnan(high) else f"[{low:+.2e}, {high:+.2e}]"
    return f"{value:+.2e} {interval}" + ("" if math.isnan(control) else f" (control {control:+.2e})")
