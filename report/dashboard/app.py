"""The live dashboard of a folder of runs: a Dash app, and the server it runs on.

The page asks every few seconds whether the folder changed, which costs one `stat` per readings file; only then is
anything drawn again. It works without a network (all scripts come from this server, and its policy forbids others),
answers requests to this machine's own names only unless it is told to listen elsewhere, and runs without Dash's
debugging tools.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dash import ALL, Dash, Input, Output, State, no_update
from dash.exceptions import PreventUpdate

from ...errors import RevprobeError, first_line
from ...probes.figures.theme import message_figure
from . import page
from .folder import RunsFolder
from .listed_runs import Listed
from .open_pair import PairOpener
from .server import LOOPBACK, guard
from .views import (
    ATTENTION,
    READING_OF,
    checkpoint_choices,
    checkpoint_figure,
    curves,
    fact_pairs,
    filter_values,
    filtered,
    or_reason,
    pair_row,
    reading_at,
)

# What several callbacks take.
FILTERED = (Input({"type": "filter", "axis": ALL}, "value"), Input("search", "value"))
CHECKPOINT = (Input("one-run", "value"), Input("one-step", "value"), Input("one-which", "value"))


def make_app(root: str | Path, *, every: float = 2.0, host: str = LOOPBACK[0]) -> Dash:
    """The dashboard of a folder, to be served.

    Args:
        every: seconds between two looks at the folder.
        host: where it will listen: the names a request may be addressed to follow from it.
    Raises: RevprobeError, when there is no such folder.
    """
    folder = RunsFolder(root)
    app = Dash(
        __name__,
        title=f"revprobe: {folder.root.name}",
        update_title="",  # the title stays while something is worked out
        serve_locally=True,
        include_assets_files=False,
        suppress_callback_exceptions=True,
        add_log_handler=False,
        enable_mcp=False,
    )
    app.index_string = page.index()
    # Worked out for each opening of the page, which shows the first run with readings.
    app.layout = lambda: page.layout(str(folder.root), every, [run.key for run in folder.scan() if run.files][:1])
    guard(app.server, host)
    _watch(app, folder)
    _lists(app, folder)
    _curves(app, folder)
    _checkpoint(app, folder)
    _layers_heads_and_facts(app, folder)
    _pair(app, folder)
    return app


def _watch(app: Dash, folder: RunsFolder) -> None:
    @app.callback(
        Output("version", "data"), Output("status", "children"), Input("poll", "n_intervals"), State("version", "data")
    )
    def _look(_: int | None, known: str | None) -> tuple[str, str]:
        runs = folder.scan()
        version = folder.version(runs)
        if version == known:
            raise PreventUpdate
        counts = Counter(run.state for run in runs)
        states = [f"{counts[state]} {text}" for state, text in page.STATES.items() if counts[state]]
        return version, f"{len(runs)} runs: {', '.join(states)}" if runs else "no runs yet"


def _shown(folder: RunsFolder, values: Sequence[Sequence[str] | None], text: str | None) -> list[Listed]:
    wanted = dict(zip(page.FILTERS, (value or [] for value in values), strict=True))
    return filtered(folder.scan(), wanted, text or "")


def _lists(app: Dash, folder: RunsFolder) -> None:
    @app.callback(
        Output("runs", "children"),
        Output({"type": "filter", "axis": ALL}, "options"),
        Output({"type": "filter-box", "axis": ALL}, "style"),
        Input("version", "data"),
        *FILTERED,
        State("selected", "data"),
    )
    def _runs(_: str, values: Any, text: str | None, selected: list[str]) -> tuple[Any, Any, Any]:
        offered = [filter_values(folder.scan(), axis) for axis in page.FILTERS]
        styles = [{} if len(found) > 1 else {"display": "none"} for found in offered]
        return page.runs_list(_shown(folder, values, text), selected), offered, styles

    @app.callback(
        Output("selected", "data"),
        Input({"type": "pick", "group": ALL}, "value"),
        State({"type": "pick", "group": ALL}, "options"),
        State("selected", "data"),
    )
    def _pick(values: list[list[str]], options: list[list[dict[str, Any]]], selected: list[str]) -> Any:
        listed = {option["value"] for group in options for option in group}
        # What a filter hides stays chosen, and is drawn again when it is let through.
        chosen = [key for key in selected if key not in listed] + [key for group in values for key in group or []]
        return no_update if sorted(chosen) == sorted(selected) else chosen


def _curves(app: Dash, folder: RunsFolder) -> None:
    @app.callback(
        Output("curves", "figure"),
        Output("curves", "style"),
        Output("numbers", "children"),
        Output("notes", "children"),
        Input("version", "data"),
        Input("selected", "data"),
        *FILTERED,
        Input("weights", "value"),
        Input("bands", "value"),
    )
    def _draw(_: str, selected: list[str], values: Any, text: str | None, weights: str, bands: str) -> tuple[Any, ...]:
        runs = [run for run in _shown(folder, values, text) if run.key in selected]
        figure, table, said, problems = curves(folder, runs, weights=weights, bands=bands)
        numbers = page.number_table(table) if len(table) else page.notes(["No number yet."])
        return figure, page.graph_style(figure), numbers, [*page.notes(said), *page.notes(problems, problem=True)]

    @app.callback(
        Output("one-run", "options"),
        Output("one-run", "value"),
        Input("version", "data"),
        Input("selected", "data"),
        State("one-run", "value"),
    )
    def _choose_run(_: str, selected: list[str], chosen: str | None) -> tuple[Any, Any]:
        keys = [run.key for run in folder.scan() if run.key in selected]
        return keys, chosen if chosen in keys else next(iter(keys), None)


def _checkpoint(app: Dash, folder: RunsFolder) -> None:
    @app.callback(
        Output("one-step", "options"),
        Output("one-step", "value"),
        Output("one-which", "options"),
        Output("one-which", "value"),
        Input("version", "data"),
        Input("one-run", "value"),
        State("one-step", "value"),
        State("one-which", "value"),
    )
    def _choose(_: str, key: str | None, step: int | None, weights: str | None) -> tuple[Any, ...]:
        try:
            choices = checkpoint_choices(folder.run(str(key)), step, weights)
        except RevprobeError:
            return [], None, [], None
        return choices["steps"], choices["step"], choices["weights"], choices["which"]

    @app.callback(
        Output("one", "figure"),
        Output("one", "style"),
        *CHECKPOINT,
        Input("one-kind", "value"),
        Input("one-layer", "value"),
        Input("one-head", "value"),
        Input("version", "data"),
    )
    def _draw(
        key: str | None, step: int | None, weights: str | None, kind: str, layer: int | None, head: int | None, _: str
    ) -> tuple[Any, Any]:
        at = [None if place in (None, -1) else place for place in (layer, head)]
        name = READING_OF.get(kind, ATTENTION)
        if key is None:
            figure = message_figure("Choose a run at the left.")
            return figure, page.graph_style(figure)
        figure = or_reason(
            lambda: checkpoint_figure(reading_at(folder, folder.run(key), name, step, weights), kind, *at)
        )
        return figure, page.graph_style(figure)


def _layers_heads_and_facts(app: Dash, folder: RunsFolder) -> None:
    @app.callback(
        Output("one-layer", "options"),
        Output("one-head", "options"),
        Output("fact", "options"),
        Output("fact", "value"),
        Output("pair-layer", "options"),
        Output("pair-head", "options"),
        Output("pair-layer", "value"),
        Output("pair-head", "value"),
        *CHECKPOINT,
        State("fact", "value"),
        State("pair-layer", "value"),
        State("pair-head", "value"),
    )
    def _offer(
        key: str | None, step: int | None, weights: str | None, fact: str | None, layer: Any, head: Any
    ) -> tuple[Any, ...]:
        try:
            frame = reading_at(folder, folder.run(str(key)), ATTENTION, step, weights).frame
        except RevprobeError:
            return [], [], [], None, [], [], None, None
        layers, heads = (sorted(int(value) for value in frame[name].unique()) for name in ("layer", "head"))
        facts = sorted(frame["fact"].astype(str).unique())
        everything = [{"label": "all", "value": -1}]
        offered = [everything + [{"label": str(one), "value": one} for one in found] for found in (layers, heads)]
        kept = [one if one in found else found[0] for one, found in ((layer, layers), (head, heads))]
        return (*offered, facts, fact if fact in facts else None, layers, heads, *kept)


def _pair(app: Dash, folder: RunsFolder) -> None:
    opener = PairOpener(folder)

    @app.callback(
        Output("pair", "options"), Output("pair", "value"), Input("fact", "value"), *CHECKPOINT, State("pair", "value")
    )
    def _choose(fact: str | None, key: str | None, step: int | None, weights: str | None, pair: int | None) -> Any:
        try:
            frame = reading_at(folder, folder.run(str(key)), ATTENTION, step, weights).frame
        except RevprobeError:
            return [], None
        options = fact_pairs(frame, fact)
        values = [option["value"] for option in options]
        return options, pair if pair in values else next(iter(values), None)

    @app.callback(
        Output("opened", "children"),
        Input("pair", "value"),
        Input("pair-layer", "value"),
        Input("pair-head", "value"),
        *CHECKPOINT,
    )
    def _open(
        pair: int | None, layer: int | None, head: int | None, key: str | None, step: int | None, weights: str | None
    ) -> Any:
        if pair is None or key is None or layer is None or head is None:
            return []

        def opened() -> Any:
            run = folder.run(key)
            reading = reading_at(folder, run, ATTENTION, step, weights)
            return page.opened_pair(opener.open(run, reading, pair), pair_row(reading.frame, pair, layer, head))

        return _or_note(opened)


def _or_note(make: Callable[[], Any]) -> Any:
    """What `make` makes, or why it cannot, as a line."""
    try:
        return make()
    except RevprobeError as error:
        return page.notes([first_line(error, with_type=False)], problem=True)
    except Exception as error:  # weights that cannot be loaded raise what their library raises
        return page.notes([f"cannot be opened: {first_line(error)}"], problem=True)
