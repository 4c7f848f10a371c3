"""The live dashboard of a folder of runs: a Dash app, and the server it runs on.

One callback (`_settle`) turns what a visitor asks for, by the address of the page or by its controls, into a view that
the folder can show. From it follow the address, the choices on offer and what is drawn; whatever is drawn has one
input, so it is drawn anew when that changes and only then. The page asks every few seconds whether the folder changed,
which costs one `stat` per readings file. It works without a network (all scripts come from this server, and its policy
forbids others), answers requests to this machine's own names only unless it is told to listen elsewhere, and runs
without Dash's debugging tools.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, State, ctx, no_update
from dash.exceptions import PreventUpdate

from ...errors import RevprobeError, first_line
from ...probes.figures.theme import message_figure, with_theme
from ..html.instruments import INSTRUMENTS
from . import page
from .ask import Asker, add_ask, shown_parts, what_to_ask
from .choices import PLACES, RECENT, Settled, settle, unused
from .folder import RunsFolder
from .held_model import HeldModel
from .instrument_tab import add_instruments, what_to_draw
from .listed_runs import STATES, short_words
from .open_pair import PairOpener
from .pair_strips import opened_pair
from .run_list import chosen_states, runs_list
from .server import LOOPBACK, TOKEN, guard
from .view import ALL, FILTERS, View, positive, typed
from .views import (
    ATTENTION,
    READING_OF,
    alerts_judged,
    checkpoint_figure,
    curves,
    filtered,
    or_reason,
    pair_row,
    reading_at,
    run_names,
)


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
    token = secrets.token_urlsafe(32)
    app.server.config[TOKEN] = token  # for who posts without the page, as tests do
    app.index_string = page.index(token)
    app.layout = page.layout(str(folder.root), every)
    guard(app.server, host, token)
    held = HeldModel(folder)
    asker = Asker(folder, held)
    _in_the_browser(app)
    _watch(app, folder)
    _settle(app, folder, asker)
    _list(app, folder)
    _curves(app, folder)
    _checkpoint(app, folder)
    _pair(app, folder, held)
    add_instruments(app, folder)
    add_ask(app, asker)
    return app


def _in_the_browser(app: Dash) -> None:
    """What the page's script does by itself: the address, light and dark, tabs, and the dots of the list."""
    for name, output, inputs in (
        ("opened", "url", [Input("root", "id")]),
        ("addressed", "sent", [Input("address", "data")]),
        ("dressed", "theme", [Input("theme-choice", "value")]),
        ("shown", "dressed", [Input("view", "data"), Input("filled", "data")]),
        ("dotted", "dotted", [Input("curves", "figure"), Input("runs", "children"), Input("numbers", "children")]),
    ):
        app.clientside_callback(ClientsideFunction("revprobe", name), Output(output, "data"), *inputs)
    for graph in ("curves", "one", "instrument"):
        # After the figure, never with it: the old one has no room in a box that shrinks below its margins.
        sized = ClientsideFunction("revprobe", "sized")
        app.clientside_callback(sized, Output(graph, "style"), Input(graph, "figure"))


def _watch(app: Dash, folder: RunsFolder) -> None:
    @app.callback(
        Output("version", "data"),
        Output("told", "data"),
        Output("status", "children"),
        Input("poll", "n_intervals"),
        State("version", "data"),
        State("told", "data"),
    )
    def _look(_: int | None, known: str | None, told: str | None) -> tuple[Any, Any, str]:
        runs, now = folder.scan(), time.time()
        version = folder.version(runs)
        # How long ago the last checkpoint was changes without any file: the list is drawn anew, the figures are not.
        words = hashlib.sha256("|".join(short_words(run, now) for run in runs).encode()).hexdigest()[:16]
        if (version, words) == (known, told):
            raise PreventUpdate
        counts = Counter(run.state for run in runs)
        states = [f"{counts[state]} {state}" for state in STATES if counts[state]]
        status = f"{len(runs)} runs: {', '.join(states)}" if runs else "no runs yet"
        return no_update if version == known else version, words, status


def _settle(app: Dash, folder: RunsFolder, asker: Asker) -> None:
    outputs = {name: Output(name, "data") for name in ("view", "selected", "tab", "address")}
    outputs |= {f"{name}-asked": Output(f"{name}-asked", "data") for name in page.ASKED}
    outputs |= {f"{name}.value": Output(name, "value") for name in page.CONTROLS}
    outputs |= {f"{name}.options": Output(name, "options") for name in ("run", "step", "stored", "layer", "head")}
    outputs |= {f"{name}.options": Output(name, "options") for name in ("fact", "pair", "other", "start", "drawing")}
    outputs |= {f"{name}.hidden": Output(f"{name}-chooser", "hidden") for name in PLACES}
    outputs |= {"filled": Output("filled", "data"), "drawing.hidden": Output("drawing-box", "hidden")}
    outputs |= {f"{name}.shown": Output(name, "style") for name in shown_parts(View())}
    outputs["start.value"] = Output("start", "value")
    for axis in FILTERS:
        outputs |= {
            f"{axis}.only": Output(f"only-{axis}", "value"),
            f"{axis}.options": Output(f"only-{axis}", "options"),
        }
        outputs[f"{axis}.style"] = Output(f"only-{axis}-box", "style")
    inputs = {name: Input(name, "data") for name in ("url", "version", "selected", "tab")}
    inputs |= {name: Input(name, "value") for name in (*page.CONTROLS, "start")}
    inputs |= {f"only.{axis}": Input(f"only-{axis}", "value") for axis in FILTERS}
    known = {f"{name}-asked": State(f"{name}-asked", "data") for name in page.ASKED}

    @app.callback(output=outputs, inputs={"given": inputs, "known": known, "before": State("view", "data")})
    def _settled(given: dict[str, Any], known: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
        if given["url"] is None or given["version"] is None:
            raise PreventUpdate
        # Only the first look and the browser's own steps back and forth take the view from the address.
        from_address = before is None or "url" in {one["prop_id"].split(".")[0] for one in ctx.triggered}
        asked = View.from_address(str(given["url"]["search"])) if from_address else asked_by_controls(given)
        done = settle(folder, asked)
        started = asker.sentences(done.view.run or "") if done.view.tab == "ask" and done.view.about == "text" else {}
        if ctx.triggered_id == "start" and given["start"] in started:
            forward, reverse = started[given["start"]]
            done = settle(folder, replace(asked, forward=forward, reverse=reverse))
        answer = _control_updates(done, given, everything=from_address)
        answer["start.value"], answer["start.options"] = None, list(started)
        answer["view"] = no_update if asdict(done.view) == before else asdict(done.view)
        moved = not from_address and ctx.triggered_id not in ("version", "search", None)
        answer["address"] = {"search": done.address, "push": moved}
        for name, wanted in _what_to_draw(folder, done, given["version"]).items():
            answer[f"{name}-asked"] = no_update if wanted is None or wanted == known[f"{name}-asked"] else wanted
        return answer


def asked_by_controls(given: Mapping[str, Any]) -> View:
    """The view that the page's controls say; an empty one means the usual."""
    numbers: dict[str, Any] = {
        name: ALL if given[name] is None else int(given[name]) for name in ("step", "layer", "head")
    }
    kept = {name: given[name] for name in ("run", "stored", "fact", "pair", "weights", "bands", "figure", "tab")}
    kept |= {name: given[name] for name in ("about", "edit", "match", "at", "other")}
    kept |= {name: typed(given[name]) for name in ("forward", "reverse", "instead")}
    kept["drawing"] = given["drawing"] or View.drawing
    kept["factor"] = positive(given["factor"]) or View.factor
    only = {axis: tuple(given[f"only.{axis}"] or ()) for axis in FILTERS}
    only = {axis: values for axis, values in only.items() if values}
    return View(runs=tuple(given["selected"] or ()), search=given["search"] or "", only=only, **kept, **numbers)


def _control_updates(done: Settled, given: Mapping[str, Any], *, everything: bool) -> dict[str, Any]:
    """The controls that say something else than the view does; all of them when the view came from the address."""
    view, answer = done.view, {}

    def update(name: str, value: Any, now: Any) -> None:
        answer[name] = no_update if value == now and not everything else value

    update("selected", list(view.runs or ()), given["selected"])
    update("tab", view.tab, given["tab"])
    for name in page.CONTROLS:
        update(f"{name}.value", getattr(view, name), given[name])
    for name, style in shown_parts(view).items():
        answer[f"{name}.shown"] = style
    for name in ("run", "step", "stored", "layer", "head", "fact", "pair", "other", "drawing"):
        answer[f"{name}.options"] = done.offers.get(name, no_update)
    for name in PLACES:
        answer[f"{name}.hidden"] = name in unused(view)
    answer |= {"filled": done.filled, "drawing.hidden": len(done.offers.get("drawing", ())) < 2}
    for axis in FILTERS:
        update(f"{axis}.only", list(view.only.get(axis, ())), given[f"only.{axis}"] or [])
        answer[f"{axis}.options"] = done.offers[axis]
        offered = len(done.offers[axis]) > 1 or axis in view.only
        answer[f"{axis}.style"] = {} if offered else {"display": "none"}
    return answer


def _what_to_draw(folder: RunsFolder, done: Settled, version: str) -> dict[str, dict[str, Any] | None]:
    """What each part of the page depends on; None for what stands in a tab that is not open."""
    view = done.view
    wanted: dict[str, dict[str, Any] | None] = dict.fromkeys(page.ASKED)
    only = {axis: list(values) for axis, values in view.only.items()}
    wanted["list"] = {"chosen": list(view.runs or ()), "gone": done.gone, "search": view.search, "only": only}
    at = {name: getattr(view, name) for name in ("run", "step", "stored", "layer", "head")}
    at["files"] = folder.version([folder.run(view.run, within=RECENT)]) if view.run else ""
    if view.tab == "training":
        keys = [run.key for run in done.shown]
        how = {"weights": view.weights, "bands": view.bands, "hidden": len(view.runs or ()) - len(keys)}
        wanted["curves"] = {"runs": keys, "files": folder.version(done.shown), **how}
    elif view.tab == "checkpoint":
        wanted["one"] = at | {"figure": view.figure}
    elif view.tab == "pair":
        wanted["pair"] = at | {"fact": view.fact, "pair": view.pair}
    elif view.tab in INSTRUMENTS:
        wanted["instrument"] = at | what_to_draw(view)
    elif view.tab == "ask":
        wanted["ask"] = at | what_to_ask(view)
    return wanted


def _list(app: Dash, folder: RunsFolder) -> None:
    @app.callback(
        Output("runs", "children"),
        Output("states", "children"),
        Output("filters-summary", "children"),
        Input("list-asked", "data"),
        Input("told", "data"),
    )
    def _runs(asked: dict[str, Any] | None, _: str) -> tuple[Any, Any, str]:
        if asked is None:
            raise PreventUpdate
        runs, now = folder.scan(within=RECENT), time.time()
        chosen, only = set(asked["chosen"]), asked["only"]
        words = [f"{asked['search']!r}"] if asked["search"] else []
        words += [f"{axis.replace('_', ' ')} {' or '.join(values)}" for axis, values in only.items()]
        shown = filtered(runs, only, asked["search"])
        listed = runs_list(shown, chosen, now=now, narrowed=" with ".join(words))
        states = chosen_states([run for run in shown if run.key in chosen], asked["gone"], now=now)
        return listed, states, f"Filters ({len(only)} in use)" if only else "Filters"


def _curves(app: Dash, folder: RunsFolder) -> None:
    @app.callback(
        Output("curves", "figure"),
        Output("numbers", "children"),
        Output("notes", "children"),
        Output("alerts", "children"),
        Input("curves-asked", "data"),
        Input("theme", "data"),
    )
    def _draw(asked: dict[str, Any] | None, theme: str | None) -> tuple[Any, ...]:
        if asked is None:
            raise PreventUpdate
        wanted = set(asked["runs"])
        runs = [run for run in folder.scan(within=RECENT) if run.key in wanted]
        how = {name: asked[name] for name in ("weights", "bands", "hidden")}
        figure, table, said, problems = curves(folder, runs, **how)
        dots = {name: key for key, name in run_names(runs).items()}
        numbers = page.number_table(table, dots) if len(table) else page.notes(["No number yet."] if runs else ["-"])
        told = [*page.notes(said), *page.notes(problems, problem=True)]
        alerts = page.alerts_shown(alerts_judged(folder, runs))
        return with_theme(figure, theme or "light"), numbers, told, alerts


def _checkpoint(app: Dash, folder: RunsFolder) -> None:
    @app.callback(Output("one", "figure"), Input("one-asked", "data"), Input("theme", "data"))
    def _draw(asked: dict[str, Any] | None, theme: str | None) -> Any:
        if asked is None:
            raise PreventUpdate
        figure = message_figure("Choose a run in the list.")
        if asked["run"] is not None:
            name = READING_OF.get(asked["figure"], ATTENTION)
            at = [None if asked[place] in (None, ALL) else int(asked[place]) for place in ("layer", "head")]
            figure = or_reason(lambda: checkpoint_figure(_reading(folder, asked, name), asked["figure"], *at))
        return with_theme(figure, theme or "light")


def _pair(app: Dash, folder: RunsFolder, held: HeldModel) -> None:
    opener = PairOpener(folder, held)

    @app.callback(Output("opened", "children"), Input("pair-asked", "data"))
    def _open(asked: dict[str, Any] | None) -> Any:
        if asked is None or asked["pair"] is None or asked["run"] is None:
            return []

        def opened() -> Any:
            reading = _reading(folder, asked, ATTENTION)
            first = {name: int(reading.frame[name].min()) for name in ("layer", "head")}
            layer, head = (first[name] if asked[name] in (None, ALL) else int(asked[name]) for name in first)
            pair = opener.open(folder.run(asked["run"], within=RECENT), reading, int(asked["pair"]))
            return opened_pair(pair, pair_row(reading.frame, int(asked["pair"]), layer, head))

        return _or_note(opened)


def _reading(folder: RunsFolder, asked: Mapping[str, Any], name: str) -> Any:
    return reading_at(folder, folder.run(str(asked["run"]), within=RECENT), name, asked["step"], asked["stored"])


def _or_note(make: Callable[[], Any]) -> Any:
    """What `make` makes, or why it cannot, as a line."""
    try:
        return make()
    except RevprobeError as error:
        return page.notes([first_line(error, with_type=False)], problem=True)
    except Exception as error:  # weights that cannot be loaded raise what their library raises
        return page.notes([f"cannot be opened: {first_line(error)}"], problem=True)
