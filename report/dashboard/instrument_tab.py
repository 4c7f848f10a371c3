"""The tabs of what a run's folder holds beside the three probes, drawn as the report draws it (`html.instruments`).

They share one panel: which of them is open says what it shows. A tab that the run has nothing of says what takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from dash import ClientsideFunction, Dash, Input, Output, html
from dash.exceptions import PreventUpdate

from ...errors import RevprobeError, first_line
from ...finetune.runs.kept_tables import TABLES
from ...probes.figures.theme import message_figure, with_theme
from ...probes.readings.reading import Reading
from ..html.instruments import EDITED, INSTRUMENTS, Instrument, at_place, command, drawn, numbers_said, why_not
from .choices import RECENT, at_step, drawings_of
from .folder import RunsFolder
from .listed_runs import Listed
from .page import attributes, notes
from .view import ALL, View

TAKE = "Runs do not take it by themselves. In Python, from the folder that the dashboard was started in:"
SHOWN_THEN = "It appears here by itself."


def what_to_draw(view: View) -> dict[str, Any]:
    """What the figure depends on, beside run and checkpoint."""
    return {"tab": view.tab, "drawing": view.drawing}


def instrument_shown(folder: RunsFolder, asked: Mapping[str, Any]) -> tuple[go.Figure | None, list[Any]]:
    """The figure of a tab with what is said under it; no figure, and what takes one, where the run has nothing."""
    instrument = INSTRUMENTS[asked["tab"]]
    if asked["run"] is None:
        return message_figure("Choose a run in the list."), []
    try:
        run = folder.run(str(asked["run"]), within=RECENT)
        if asked["drawing"] not in drawings_of(run, instrument.name):
            return None, _nothing(instrument, run)
        found, more = _found(folder, run, asked)
        drawing = instrument.drawings[asked["drawing"]]
        figure = drawn(found, drawing, **more)
        said = numbers_said(found, drawing)
    except RevprobeError as error:
        return message_figure(first_line(error, with_type=False)), []
    except Exception as error:  # a reading of another version may lack a column; the page stays
        return message_figure(f"cannot be drawn: {first_line(error)}"), []
    note = instrument.note_of(drawing.source)
    return figure, [*notes([*said, note]), *_further(instrument, run)]


def _found(folder: RunsFolder, run: Listed, asked: Mapping[str, Any]) -> tuple[Reading | pd.DataFrame, dict[str, Any]]:
    """What is drawn, and the options that the page's choices give."""
    source = INSTRUMENTS[asked["tab"]].drawings[asked["drawing"]].source
    if source in TABLES:
        weights = {"weights": asked["stored"]} if source == "storage_curves" and asked["stored"] else {}
        return folder.table(run, source), weights
    files = [file for file in run.files if file.name == source]
    reading = folder.reading(run, source, at_step(files, asked["step"]), asked["stored"] or "raw")
    if source != EDITED:
        return reading, {}
    layer, head = (None if asked[name] in (None, ALL) else int(asked[name]) for name in ("layer", "head"))
    return at_place(reading, layer, head), {}


def _nothing(instrument: Instrument, run: Listed) -> list[Any]:
    """Why the tab is empty, and the commands that fill it."""
    said: list[Any] = [html.P(f"{run.name} has nothing of it: {instrument.title.lower()}.", role="status")]
    taken = _commands(instrument, run, instrument.sources)
    if any(isinstance(part, html.Pre) for part in taken):
        return [*said, *notes([instrument.note, TAKE]), *taken, *notes([SHOWN_THEN])]
    return [*said, *taken]


def _further(instrument: Instrument, run: Listed) -> list[Any]:
    """What the tab would show besides, folded."""
    there = {instrument.drawings[name].source for name in drawings_of(run, instrument.name)}
    taken = _commands(instrument, run, [one for one in instrument.sources if one not in there])
    if not any(isinstance(part, html.Pre) for part in taken):
        return []
    return [html.Details([html.Summary("What else this tab can show", className="note"), *notes([TAKE]), *taken])]


def _commands(instrument: Instrument, run: Listed, sources: list[str]) -> list[Any]:
    parts: list[Any] = []
    for source in sources:
        words = next(one.words for one in instrument.drawings.values() if one.source == source)
        if why := why_not(source, objective=run.axes.get("objective"), tuned=run.tuned):
            parts.append(html.P(f"{words}: {why}.", className="note"))
        elif text := command(source, run.opened, tuned=run.tuned):
            parts += [html.P(f"{words}:", className="note"), html.Pre(text, tabIndex=0, className="command")]
        else:
            parts.append(html.P(f"{words}: kept by the run itself at its snapshots.", className="note"))
    return parts


def add_instruments(app: Dash, folder: RunsFolder) -> None:
    """The callbacks of the tabs."""

    @app.callback(
        Output("instrument", "figure"),
        Output("instrument-figure", "hidden"),
        Output("instrument-said", "children"),
        Input("instrument-asked", "data"),
        Input("theme", "data"),
    )
    def _draw(asked: dict[str, Any] | None, theme: str | None) -> Any:
        if asked is None:
            raise PreventUpdate
        figure, said = instrument_shown(folder, asked)
        shown = message_figure("") if figure is None else figure
        # Whose figure it is: until it stands there, the page shows that of no other tab.
        told = html.Div(said, **attributes(data_for=asked["tab"]))
        return with_theme(shown, theme or "light"), figure is None, told

    fresh = ClientsideFunction("revprobe", "fresh")
    app.clientside_callback(fresh, Output("fresh", "data"), Input("instrument-said", "children"))
