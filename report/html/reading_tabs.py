"""The tabs of a report that show single readings and tables as figures: what is stored, what an edit does, and more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from ...finetune.runs.record import RunRecord
from ...probes.figures.training_curves import series_words
from ...probes.readings.reading import Reading
from .instruments import INSTRUMENTS, Drawing, Instrument, command, drawn
from .page import gallery, paragraph, preformatted, section

MOST = 60  # figures in one gallery; beyond, each run keeps its last checkpoint
ASKED_FOR = ("storage", "edits")  # tabs that say the commands that fill them; others are left out while they are empty
FILLED = "Runs do not take it by themselves. In Python, from the folder that holds this report:"
AGAIN = "Then, in a terminal in the same folder:"


def reading_tabs(runs: Sequence[RunRecord], folder: Path) -> list[tuple[str, str, list[Markup]]]:
    """A tab for each instrument that some run was asked by, as (name, shown text, parts).

    Args:
        folder: where the report will lie: commands name the runs from there.
    """
    tabs = [(one, _tab(one, runs, folder)) for one in INSTRUMENTS.values()]
    return [(one.name, one.words.lower(), parts) for one, parts in tabs]


def _tab(instrument: Instrument, runs: Sequence[RunRecord], folder: Path) -> list[Markup]:
    name, title = instrument.name, instrument.title
    usual = [one for one in instrument.drawings.values() if one.usual]
    found = [(run, one, drawing) for drawing in usual for run in runs for one in _found(run, drawing)]
    if not found:
        filled = _commands(instrument, runs, folder) if name in ASKED_FOR else []
        return [section(name, title, paragraph(instrument.nothing), *filled)] if filled else []
    said = []
    if len(found) > MOST:
        kept = [one for one in found if _is_last(*one[:2])]
        said.append(paragraph(f"{len(kept)} of {len(found)} readings: the last checkpoint of each run.", note=True))
        found = kept or found[-MOST:]
    notes = dict.fromkeys(instrument.note_of(drawing.source) for *_, drawing in found)
    said = [*(paragraph(text, note=True) for text in notes), *said]
    figures = [(_label(run.name, one, drawing, instrument), drawn(one, drawing)) for run, one, drawing in found]
    return [section(name, title, gallery(name, "reading", figures), *said)]


def _found(run: RunRecord, drawing: Drawing) -> list[Reading | pd.DataFrame]:
    """What a run has to be drawn so: its readings of that name, or its table."""
    readings: list[Reading | pd.DataFrame] = [one for one in run.readings if one.name == drawing.source]
    return readings + [table for name, table in run.tables.items() if name == drawing.source]


def _is_last(run: RunRecord, found: Reading | pd.DataFrame) -> bool:
    return isinstance(found, pd.DataFrame) or found.meta.get("step") in (None, *run.readings.steps[-1:])


def _label(run: str, found: Reading | pd.DataFrame, drawing: Drawing, instrument: Instrument) -> str:
    """What a figure is called in the choice: run, step and weights, and what it shows where that is not the usual."""
    first = next(iter(instrument.drawings.values())).source
    more = "" if drawing.source == first else f", {drawing.words}"
    if isinstance(found, pd.DataFrame):
        return f"{run}{more}"
    step = found.meta.get("step")
    at = "" if step is None else f", step {int(step):,}"
    edit = f", {found.meta['edit']}" if "edit" in found.meta else ""
    return f"{run}{at} ({series_words(found.meta.get('weights'), None)}{edit}){more}"


def _commands(instrument: Instrument, runs: Sequence[RunRecord], folder: Path) -> list[Markup]:
    """What takes a reading of the first run that can be asked for it: both probes are for masked models first."""
    read = [run for run in runs if len(run.readings)]
    masked = [run for run in read if run.axes.get("objective") != "causal"]
    if not read:
        return []
    name = (masked or read)[0].name
    where = name if (folder / name).is_dir() else "."  # a sweep's report lies over its runs, a run's own in its folder
    return [
        paragraph(FILLED),
        preformatted(command(instrument.sources[0], where)),
        paragraph(AGAIN),
        preformatted("revprobe report ."),
    ]
