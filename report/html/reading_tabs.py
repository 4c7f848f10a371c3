"""The tabs of a report that show single readings as figures: what is stored, and what editing a route does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import Markup

from ...errors import RevprobeError, first_line
from ...finetune.runs.record import RunRecord
from ...probes.figures.route_edits import route_edit_figure
from ...probes.figures.storage import stored_evidence_figure
from ...probes.figures.theme import message_figure
from ...probes.figures.training_curves import series_words
from ...probes.readings.reading import Reading
from .page import gallery, paragraph, preformatted, section

MOST = 60  # figures in one gallery; beyond, each run keeps its last checkpoint
MANY_HEADS = 40  # edits of more single heads than this are a heat map
STORED, EDITED = "stored_evidence", "route_edit"
STORAGE = (
    "What the target's logit is made of, forward and reverse: the stored evidence routed to the readout row, and what "
    "reaches it otherwise; bars: 95 % intervals over facts."
)
EDITS = (
    "How the target's log-probability changes when attention from the readout rows to the evidence is edited, beside "
    "the same edit of other positions (control); bars: 95 % intervals over facts."
)


# What fills a tab that is empty, in a Python that was started in the folder that holds the report.
COMMAND = """import revprobe as rp

run = rp.open_run({run!r})
reading = rp.probe_{name}(run.load(), run.pairs())
weights = reading.meta["weights"]
reading.save(run.path / "readings" / f"step-{{run.steps[-1]:06d}}" / f"{name}.{{weights}}.parquet")
"""
FILLED = "Runs do not take it by themselves. In Python, from the folder that holds this report:"
AGAIN = "Then, in a terminal in the same folder:"


def storage_tab(runs: Sequence[RunRecord], folder: Path) -> list[Markup]:
    """Every stored-evidence reading as a figure, or the commands that take one; nothing where no run could be read."""
    nothing = "No run has a reading of stored evidence."
    return _tab("storage", "Stored evidence", runs, folder, STORED, STORAGE, nothing)


def edits_tab(runs: Sequence[RunRecord], folder: Path) -> list[Markup]:
    """Every route-edit reading as a figure, or the commands that take one; nothing where no run could be read."""
    return _tab("edits", "Edited routes", runs, folder, EDITED, EDITS, "No run has a reading of an edited route.")


def _commands(runs: Sequence[RunRecord], folder: Path, what: str) -> list[Markup]:
    """What takes a reading of the first run that can be asked for it: both probes are for masked models first."""
    read = [run for run in runs if len(run.readings)]
    masked = [run for run in read if run.axes.get("objective") != "causal"]
    if not read:
        return []
    name = (masked or read)[0].name
    where = name if (folder / name).is_dir() else "."  # a sweep's report lies over its runs, a run's own in its folder
    return [
        paragraph(FILLED),
        preformatted(COMMAND.format(run=where, name=what)),
        paragraph(AGAIN),
        preformatted("revprobe report ."),
    ]


def _tab(
    name: str, title: str, runs: Sequence[RunRecord], folder: Path, what: str, note: str, nothing: str
) -> list[Markup]:
    found = [(run.name, reading) for run in runs for reading in run.readings if reading.name == what]
    if not found:
        filled = _commands(runs, folder, what)
        return [section(name, title, paragraph(nothing), *filled)] if filled else []
    said = []
    if len(found) > MOST:
        last = {run.name: run.readings.steps[-1:] for run in runs}
        kept = [(run, reading) for run, reading in found if reading.meta.get("step") in (None, *last[run])]
        said.append(paragraph(f"{len(kept)} of {len(found)} readings: the last checkpoint of each run.", note=True))
        found = kept or found[-MOST:]
    figures = []
    for run, reading in found:
        step = reading.meta.get("step")
        at = "" if step is None else f", step {int(step):,}"
        edit = f", {reading.meta['edit']}" if "edit" in reading.meta else ""
        label = f"{run}{at} ({series_words(reading.meta.get('weights'), None)}{edit})"
        figures.append((label, _figure(reading)))
    return [section(name, title, gallery(name, "reading", figures), paragraph(note, note=True), *said)]


def _figure(reading: Reading) -> go.Figure:
    """One reading drawn; what cannot be drawn says why."""
    try:
        if reading.name == STORED:
            return stored_evidence_figure(reading)
        single = reading.frame.loc[reading.frame["scope"] == "head", ["layer", "head"]].drop_duplicates()
        return route_edit_figure(reading, kind="heatmap" if len(single) > MANY_HEADS else "intervals")
    except RevprobeError as error:
        return message_figure(first_line(error, with_type=False))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        return message_figure(f"This reading cannot be drawn: {first_line(error)}")
