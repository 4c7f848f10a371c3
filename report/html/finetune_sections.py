"""What a report of fine-tunings shows besides a report's own sections: Table 7, Fig. 4, and one-step predictions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from ...finetune.runs.finetuning import FinetuneRun, finetuning_runs
from ...finetune.runs.run import Run
from ...finetune.training.prediction_callback import PREDICTIONS
from ...probes.statistics.old_columns import current_columns
from ..paper.figure4 import figure4, has_figure4
from ..paper.table7 import FACTS, NOTE, match_frame, not_asked, table7, table7_figure
from .page import drawn_figure, folded, paragraph, scrolled, section, table

HEATED = 4  # rows from which colours tell more than the table itself

PREDICTED = (
    "The optimizer step after each snapshot, measured twice: by the gradient of the loss at the snapshot times the "
    "step that was made, and as the difference of the losses. 95 % intervals over facts; the control is the same for "
    "each target under another fact's query."
)


def finetune_sections(runs: Sequence[Run]) -> list[Markup]:
    """Table 7 and its floor, Fig. 4, and the steps that the gradients foretold, each a section; none without a
    fine-tuning.
    """
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
    if has_figure4(tuned):
        about = paragraph("Mean over seeds, the band from the lowest to the highest; dotted: the control.", note=True)
        sections.append(
            section("figure4", "Signatures while fine-tuning (Fig. 4)", drawn_figure("fig4", figure4(tuned)), about)
        )
    return sections + _predictions(tuned)


def exact_matches(matches: pd.DataFrame) -> list[Markup]:
    """Table 7 of trained and of held-out facts; one of many rows once more as colours.

    Args:
        matches: what `match_frame` gives.
    """
    parts = []
    for split, facts in FACTS.items():
        if (matches["split"] == split).any():
            shown = table7(matches, split)
            parts += [paragraph(f"{facts.capitalize()}:"), table(list(shown.columns), shown.to_numpy().tolist())]
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
    return f"{value:+.2e} [{low:+.2e}, {high:+.2e}] (control {control:+.2e})"
