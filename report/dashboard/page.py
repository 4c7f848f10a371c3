"""The dashboard's page: its frame, tabs, controls and tables, as Dash components.

Text from data is only ever a component's child or attribute, which React escapes; figures escape theirs with
`theme.plain`. Nothing here is Markdown or raw HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from dash import dcc, html

from ...finetune.runs.alerts import CROSSED, UNDEFINED
from ..asking.edits import EDITS, MATCHES
from ..asking.sentences import LONGEST
from ..html.instruments import INSTRUMENTS
from ..summary.tables import cell_lines
from .view import ABOUT, BANDS, FIGURES, FILTERS, TABS, WEIGHTS, View

THEMES = {"system": "as the system", "light": "light", "dark": "dark"}
# plotly's "Share chart" button would send a figure's data to plotly's servers.
GRAPH: Any = {"displaylogo": False, "showSendToCloud": False, "plotlyServerURL": "", "responsive": True}
GRAPH |= {"displayModeBar": "hover", "modeBarButtonsToRemove": ["select2d", "lasso2d", "sendChartToCloud"]}
# What stands where a figure will: on paper of either colour.
_BARE = {"visible": False}
_WAITING: Any = {"data": [], "layout": {"xaxis": _BARE, "yaxis": _BARE, "height": 160}}
_WAITING["layout"] |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": "#7a7a7a"}}
_WAITING["layout"]["annotations"] = [{"text": "Reading the folder ...", "showarrow": False, "x": 0.5, "y": 0.5}]
_WAITING["layout"]["annotations"][0] |= {"xref": "paper", "yref": "paper"}
# Stores by name: what the page's script and the callbacks tell each other (see app.py).
_OF_THE_SCRIPT = ("url", "address", "sent", "selected", "tab", "theme", "dressed", "dotted", "page-name", "cancel")
ASKED = ("list", "curves", "one", "pair", "instrument", "ask")
_OF_THE_SERVER = ("version", "told", "view", "filled", "fresh", "cancelled", "answered")
STORES = (*_OF_THE_SERVER, *_OF_THE_SCRIPT, *(f"{name}-asked" for name in ASKED))
_OF_RUNS = ("weights", "bands", "search", "run", "step", "stored", "figure", "layer", "head", "fact", "pair")
CONTROLS = (*_OF_RUNS, "drawing", "about", "forward", "reverse", "edit", "match", "factor", "at", "other", "instead")


def index(token: str = "") -> str:
    """The document around the page: Dash puts its parts where it finds their names, we our style, script and token."""
    here = files(__package__)
    read = {name: here.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    document = here.joinpath("index.html").read_text(encoding="utf-8")
    document = document.replace("{%token%}", token)
    return document.replace("{%style%}", read["css"]).replace("{%script%}", read["js"])


def layout(root: str, every: float) -> html.Div:
    """The empty page; the callbacks fill it."""
    stores = [dcc.Interval(id="poll", interval=int(1000 * every)), *(dcc.Store(id=name) for name in STORES)]
    name = Path(root).name
    header = html.Header(
        [
            html.Div([html.H1("revprobe"), html.Span(name, title=root), html.Div(id="status", className="note")]),
            _radio("theme-choice", "Theme", THEMES, "system"),
        ]
    )
    return html.Div([*stores, header, html.Div([_side(), _main()], id="page")], id="root")


def _side() -> html.Aside:
    filters = [
        html.Div(
            [
                html.Label(axis.replace("_", " "), htmlFor=f"only-{axis}", id=f"only-{axis}-label"),
                dcc.Dropdown(id=f"only-{axis}", multi=True, placeholder="any"),
            ],
            id=f"only-{axis}-box",
            style={"display": "none"},
        )
        for axis in FILTERS
    ]
    search = dcc.Input(id="search", type="search", placeholder="part of a name", debounce=0.2, value="")
    found = [html.Label("Search", htmlFor="search", className="unseen"), search]
    folded = html.Details([html.Summary("Filters", id="filters-summary"), *filters], id="filters")
    listed = html.Div(html.P("Reading the folder ...", className="note"), id="runs")
    return html.Aside([html.H2("Runs"), *found, folded, listed], id="side")


def _main() -> html.Main:
    tabs = [
        html.Button(text, id=f"tab-{name}", role="tab", **attributes(data_tab=name, aria_controls=panel_of(name)))
        for name, text in TABS.items()
    ]
    usual = View()
    into = {"run": "run", "step": "checkpoint", "stored": "weights", "layer": "layer", "head": "head"}
    chooser = html.Div([_choice(name, label) for name, label in into.items()], className="controls", id="chooser")
    facts = [_choice("fact", "fact"), _choice("pair", "pair")]
    chosen = html.Div(facts, className="controls", id="facts", style={"display": "none"})
    panels = {
        "training": [
            html.Div(
                [
                    _radio("weights", "Weights", WEIGHTS, usual.weights),
                    _radio("bands", "Lines", BANDS, usual.bands),
                ],
                className="controls",
            ),
            html.Div(id="states"),
            _graph("curves"),
            html.Div(id="notes"),
            html.H2("Last checkpoint"),
            html.Div(id="numbers", className="wide"),
            html.Div(id="alerts"),
        ],
        "checkpoint": [
            html.Div(_choice("figure", "figure", FIGURES, usual.figure), className="controls"),
            _graph("one"),
        ],
        "pair": [
            html.P("The checkpoint is run on both queries of the fact that is chosen here.", className="note"),
            loading(html.Div(id="opened"), "Running the checkpoint ..."),
        ],
        "instrument": _instrument(),
        "ask": _ask(usual),
    }
    shown = [html.Div(parts, id=f"panel-{name}", role="tabpanel", hidden=True) for name, parts in panels.items()]
    return html.Main(
        [html.Div(tabs, role="tablist", id="tabs", **attributes(aria_label="Views")), chooser, chosen, *shown],
        id="main",
    )


def _instrument() -> list[Any]:
    # A figure may be wider than its place, which is then scrolled, also by keys.
    place: dict[str, Any] = {"className": "wide", "role": "group", "tabIndex": 0, "aria-label": "figure"}
    return [
        html.Div(_choice("drawing", "figure"), className="controls", id="drawing-box"),
        html.Div(_graph("instrument"), id="instrument-figure", **place),
        html.Div(id="instrument-said"),
    ]


def panel_of(tab: str) -> str:
    """The panel that a tab opens; the instruments share one."""
    return "panel-instrument" if tab in INSTRUMENTS else f"panel-{tab}"


def _ask(usual: View) -> list[Any]:
    marks = "The hidden name in [brackets], the evidence in {braces}: Fact: [Ann Lee]'s child is {Bob Lee}"
    sentences = [
        html.Div(_choice("start", "start from a question that the run was asked"), id="start-box"),
        _typed("forward", "forward sentence"),
        _typed("reverse", "reverse sentence (may be left out)"),
        html.P(marks, className="note"),
    ]
    factor = dcc.Input(id="factor", type="number", min=0, step="any", value=usual.factor, debounce=True)
    boxes = {
        "match": _choice("match", "set the route to", MATCHES, usual.match),
        "factor": html.Div([html.Label("times the odds", htmlFor="factor", id="factor-label"), factor]),
        "at": html.P("Choose a token of a query below.", className="note"),
        "other": _choice("other", "evidence of"),
        "instead": _typed("instead", "other evidence"),
    }
    edits = [html.Div(box, id=f"{name}-box", style={"display": "none"}) for name, box in boxes.items()]
    buttons = html.Button("Ask again", id="ask-again", className="act")
    waiting = [html.Span("Asking the model ... "), html.Button("Cancel", className="act", **attributes(data_cancel=""))]
    return [
        html.Div(_radio("about", "Ask about", ABOUT, usual.about), className="controls"),
        html.Div(sentences, id="sentences", style={"display": "none"}),
        html.Div([_choice("edit", "edit", EDITS, usual.edit), *edits, buttons], className="controls", id="edits"),
        dcc.Input(id="at", type="hidden"),
        loading(html.Div(id="answer"), waiting),
    ]


def _typed(name: str, label: str) -> html.Div:
    field = dcc.Input(id=name, type="text", debounce=True, maxLength=LONGEST, value="", className="typed")
    return html.Div([html.Label(label, htmlFor=name, id=f"{name}-label"), field], className="typed-box")


def attributes(**named: str) -> dict[str, Any]:
    """Attributes such as `aria-controls`, whose names Python cannot write.

    >>> attributes(data_tab="pair")
    {'data-tab': 'pair'}
    """
    return {name.replace("_", "-"): value for name, value in named.items()}


def _graph(name: str) -> dcc.Loading:
    return loading(dcc.Graph(id=name, figure=_WAITING, config=GRAPH), "Drawing ...")


def loading(child: Any, words: Any) -> dcc.Loading:
    """What is being worked out stays, paler, under a word that says so; a short wait shows nothing."""
    look = {"visibility": "visible", "opacity": 0.45}
    spinner = html.Div(words, className="working", role="status")
    return dcc.Loading(child, custom_spinner=spinner, overlay_style=look, delay_show=350)


def _radio(name: str, label: str, options: Mapping[str, str], chosen: str) -> html.Div:
    listed = [{"label": text, "value": value} for value, text in options.items()]
    title = html.Span(label, className="label", id=f"{name}-label")
    group = dcc.RadioItems(id=name, options=listed, value=chosen, inline=True)
    return html.Div([title, group], className="radio", role="group", **attributes(aria_labelledby=f"{name}-label"))


def _choice(name: str, label: str, options: Mapping[str, str] | None = None, value: str | None = None) -> html.Div:
    listed = [{"label": text, "value": one} for one, text in (options or {}).items()]
    dropdown = dcc.Dropdown(id=name, options=listed, value=value, clearable=False, placeholder="choose")
    return html.Div([html.Label(label, htmlFor=name, id=f"{name}-label"), dropdown], id=f"{name}-chooser")


def number_table(table: pd.DataFrame, dots: Mapping[str, str] | None = None) -> html.Table:
    """A frame of texts as a table; interval and control stand in small type under their value.

    Args:
        dots: a run's key by what the first column calls it: its line begins with a dot in its curve's colour.
    """
    head = html.Thead(html.Tr([html.Th(str(name), scope="col") for name in table.columns]))
    rows = []
    for first, *others in ([str(one) for one in row] for row in table.itertuples(index=False)):
        key = (dots or {}).get(first, "")
        dotted = html.Td([html.Span(className="dot", **attributes(data_dot=key)), first])
        rows.append(html.Tr([dotted if key else _cell(first), *map(_cell, others)]))
    return html.Table([head, html.Tbody(rows)])


def _cell(text: str) -> html.Td:
    value, *under = cell_lines(text)
    return html.Td([value, *(html.Small(line) for line in under)] if under else value)


def alerts_shown(table: pd.DataFrame) -> list[Any]:
    """Under a heading, every rule of the chosen runs; nothing where there is none."""
    if table.empty:
        return []
    crossed = [state in (CROSSED, UNDEFINED) for state in table["state"]]
    said = f"{sum(crossed)} of {len(table)} alerts are crossed, or undefined, at the last checkpoints."
    return [html.H2("Alerts"), *notes([said], problem=any(crossed)), html.Div(number_table(table), className="wide")]


def notes(texts: Sequence[str], *, problem: bool = False) -> list[html.P]:
    """Lines under a figure."""
    return [html.P(text, className="note problem" if problem else "note") for text in texts]
