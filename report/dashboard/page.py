"""The dashboard's page: its frame, the list of runs, tables, and a pair's tokens, as Dash components.

Text from data is only ever a component's child or attribute, which React escapes; figures escape theirs with
`theme.plain`. Nothing here is Markdown or raw HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from dash import dcc, html

from ...probes.figures.theme import OKABE_ITO
from .listed_runs import Listed
from .open_pair import SAME, OpenedPair, ReadQuery, disagreement

FILTERS = (
    "group",
    "state",
    "objective",
    "position_encoding",
    "length",
    "model",
    "dataset",
    "variant",
    "direction",
    "seed",
)
STATES = {
    "complete": "complete",
    "open": "open",
    "stopped": "stopped by an error",
    "broken": "broken",
    "empty": "empty",
    "waiting": "not begun",
}
WEIGHTS = {"ema": "EMA (raw where there is none)", "raw": "raw", "both": "both"}
BANDS = {"facts": "each run, band: interval over facts", "seeds": "seeds together, band: their range"}
KINDS = {
    "heatmap": "correlation by distance",
    "scatter": "forward against reverse score",
    "gradient": "gradient cosine by role",
    "probability": "probability of the target",
}
# plotly's "Share chart" button would send a figure's data to plotly's servers.
GRAPH: Any = {"displaylogo": False, "showSendToCloud": False, "plotlyServerURL": "", "responsive": True}
GRAPH["modeBarButtonsToRemove"] = ["select2d", "lasso2d", "sendChartToCloud"]
_BLUE = tuple(int(OKABE_ITO["blue"][start : start + 2], 16) for start in (1, 3, 5))


def index() -> str:
    """The document around the page: Dash puts its own parts where it finds their names, we our style."""
    here = files(__package__)
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    return here.joinpath("index.html").read_text(encoding="utf-8").replace("{%style%}", style)


def layout(root: str, every: float, chosen: Sequence[str]) -> html.Div:
    """The empty page; the callbacks fill it."""
    stores = [
        dcc.Interval(id="poll", interval=int(1000 * every)),
        dcc.Store(id="version"),
        dcc.Store(id="selected", data=list(chosen)),
    ]
    header = html.Header(
        [html.H1("revprobe"), html.Span(f"  {Path(root).name}", title=root), html.Div(id="status", className="note")]
    )
    filters = [
        html.Div(
            [html.Small(axis.replace("_", " ")), dcc.Dropdown(id={"type": "filter", "axis": axis}, multi=True)],
            id={"type": "filter-box", "axis": axis},
            style={"display": "none"},
        )
        for axis in FILTERS
    ]
    search = dcc.Input(id="search", placeholder="part of a name", debounce=True)
    side = html.Aside([html.H2("Runs"), search, *filters, html.Div(id="runs")], id="side")
    return html.Div([*stores, header, html.Div([side, _main()], id="page")])


def _main() -> html.Main:
    curves = [
        html.H2("The three signatures over training"),
        html.Div([_radio("weights", WEIGHTS, "ema"), _radio("bands", BANDS, "facts")], className="controls"),
        dcc.Graph(id="curves", config=GRAPH),
        html.Div(id="notes"),
        html.H2("Last checkpoint"),
        html.Div(id="numbers", className="wide"),
    ]
    names = {"run": "run", "step": "checkpoint", "which": "weights", "kind": "figure", "layer": "layer", "head": "head"}
    chosen = {"kind": "heatmap"}
    choices = [_choice(f"one-{name}", label, chosen.get(name)) for name, label in names.items()]
    one = [html.H2("One checkpoint"), html.Div(choices, className="controls"), dcc.Graph(id="one", config=GRAPH)]
    parts = {"fact": "fact", "pair": "pair", "pair-layer": "layer", "pair-head": "head"}
    pair = [
        html.H2("One pair, down to its tokens"),
        html.P("Choose a fact: the checkpoint above is run on the pair's two queries.", className="note"),
        html.Div([_choice(name, label) for name, label in parts.items()], className="controls"),
        dcc.Loading(html.Div(id="opened")),
    ]
    return html.Main([*curves, *one, *pair], id="main")


def _radio(name: str, options: Mapping[str, str], chosen: str) -> html.Div:
    listed = [{"label": text, "value": value} for value, text in options.items()]
    return html.Div(dcc.RadioItems(id=name, options=listed, value=chosen, inline=True))


def _choice(name: str, label: str, value: str | None = None) -> html.Div:
    options = [{"label": text, "value": kind} for kind, text in KINDS.items()] if name == "one-kind" else []
    empty = "all" if name in ("one-layer", "one-head") else "choose"
    dropdown = dcc.Dropdown(id=name, options=options, value=value, clearable=False, placeholder=empty)
    return html.Div([html.Small(label), dropdown])


def runs_list(runs: Sequence[Listed], selected: Sequence[str]) -> list[Any]:
    """The runs to pick from, under the folder each stands in; those that cannot be drawn say why."""
    shown: list[Any] = []
    for group, members in groupby(runs, key=lambda one: one.group):
        listed = list(members)
        begun = [one for one in listed if one.state != "waiting"]
        options = [{"label": _run_line(one), "value": one.key, "disabled": not one.files} for one in begun]
        picked = [one.key for one in begun if one.key in selected and one.files]
        shown.append(html.H3(f"{group or 'runs'} ({len(listed)})"))
        shown.append(
            dcc.Checklist(id={"type": "pick", "group": group}, options=options, value=picked, className="picks")
        )
        waiting = [html.Div(one.name, className="why") for one in listed if one.state == "waiting"]
        if waiting:
            shown.append(html.Details([html.Summary(f"{len(waiting)} not begun", className="note"), *waiting]))
    return shown or [html.P("There are no runs in this folder yet; they appear here when they begin.")]


def _run_line(run: Listed) -> html.Span:
    steps = run.steps
    of = f" of {run.total:,}" if run.total else ""
    told = [html.B(run.name), html.Span(f"  {STATES[run.state]}", className="note")]
    if steps:
        told.append(html.Span(f", {len(steps)} checkpoints, step {steps[-1]:,}{of}", className="note"))
    if run.problem:
        told.append(html.Span(run.problem, className="why problem" if run.state in ("broken", "stopped") else "why"))
    return html.Span(told, className="run")


def graph_style(figure: go.Figure) -> dict[str, str]:
    """The size of a figure's element: as high as the figure asks for, and as wide where it says so."""
    sizes = {"height": figure.layout.height or 450, "width": figure.layout.width}
    return {side: f"{pixels:.0f}px" for side, pixels in sizes.items() if pixels}


def number_table(table: pd.DataFrame) -> html.Table:
    """A frame of texts as a table."""
    head = html.Thead(html.Tr([html.Th(str(name)) for name in table.columns]))
    rows = [html.Tr([html.Td(str(value)) for value in row]) for row in table.itertuples(index=False)]
    return html.Table([head, html.Tbody(rows)])


def notes(texts: Sequence[str], *, problem: bool = False) -> list[html.P]:
    """Lines under a figure."""
    return [html.P(text, className="note problem" if problem else "note") for text in texts]


def opened_pair(opened: OpenedPair, row: pd.Series) -> list[Any]:
    """Both queries as token strips, with what the reading and this run say of the pair at one layer and head."""
    layer, head = int(row["layer"]), int(row["head"])
    gap = disagreement(opened, row) if not row["reason"] else 0.0
    said = [] if gap <= SAME else notes([f"The reading's scores differ from this run's by {gap:.3g}."], problem=True)
    if row["reason"]:
        said = notes([f"Undefined in the reading: {row['reason']}"], problem=True)
    strips: list[Any] = []
    numbers = []
    for side in ("forward", "reverse"):
        query: ReadQuery = getattr(opened, side)
        strips += [html.H3(f"{side} query"), token_strip(query, layer, head, hidden=opened.hidden)]
        of_evidence = [f"{float(row[f'{name}_{side}']):.4f}" for name in ("score", "weight")]
        places = [str(row[f"distance_{side}"]), str(row[f"offset_{side}"])]
        numbers.append([side, *places, *of_evidence, f"{query.probability:.4f}"])
    columns = ["direction", "distance (tokens)", "offset (tokens)", "score (pre-softmax)", "weight on evidence"]
    shown = number_table(pd.DataFrame(numbers, columns=[*columns, "probability of target"]))
    where = f"fact {row['fact']}, pair {row['pair']}, layer {layer}, head {head}"
    key = (
        "Colour and number: attention weight from the readout row, 0 (white) to 1 (blue). Dashed: target"
        f"{' (hidden from the model)' if opened.hidden else ' (the model reads before it)'}; solid: evidence."
    )
    return [html.H3(where), shown, *said, *strips, *notes([key])]


def token_strip(query: ReadQuery, layer: int, head: int, *, hidden: bool) -> html.Div:
    """A query's tokens coloured by the readout row's attention; a layer without attention says so."""
    if layer not in query.weights:
        return html.Div(notes([f"layer {layer} has no softmax attention"]))
    strip = []
    red, green, blue = _BLUE
    for text, part, weight in zip(query.tokens, query.parts, query.weights[layer][head], strict=True):
        colour = {"background": f"rgba({red},{green},{blue},{float(np.clip(weight, 0, 1)):.3f})"}
        colour["color"] = "white" if weight > 0.6 else "#1a1a1a"
        title = f"{part or 'context'} {text}: attention weight {weight:.4f}"
        shown, name = f"[{text}]" if part == "target" and hidden else text, f"token {part}".strip()
        strip.append(html.Span([shown, html.Small(f"{weight:.2f}")], className=name, style=colour, title=title))
    return html.Div(strip, className="strip")
