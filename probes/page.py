"""The HTML of a report: escaped tables, figures embedded as data, and the few lines of script that draw them.

Nothing is loaded from anywhere: plotly.js stands in the page once, and the page's own policy forbids requests. Text
from data reaches the page in three ways and is made harmless in each: as HTML (`html.escape`), as plotly's pseudo-HTML
(`theme.plain`) and inside a script element (`script_safe_json`).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

DIGITS = 5  # significant digits of numbers in figures: finer than any screen, and half the size of full floats

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

STYLE = """
body { font: 15px/1.5 Helvetica, Arial, "DejaVu Sans", sans-serif; color: #1a1a1a; margin: 0 auto; max-width: 1200px;
  padding: 8px 20px 40px; background: white; }
h1 { font-size: 26px; margin: 16px 0 4px; overflow-wrap: anywhere; } h2 { font-size: 19px; margin: 34px 0 6px;
  border-bottom: 1px solid #ccc; padding-bottom: 3px; }
p { margin: 6px 0; max-width: 1000px; } .note { color: #555; font-size: 13px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: 8px 0; }
th { text-align: left; vertical-align: bottom; border-bottom: 2px solid #333; padding: 4px 14px 4px 0; }
td { border-bottom: 1px solid #e3e3e3; padding: 4px 14px 4px 0; vertical-align: top;
  font-variant-numeric: tabular-nums; }
td { overflow-wrap: break-word; } td:nth-child(-n+4) { white-space: nowrap; } td:first-child { min-width: 115px; }
td small { display: block; color: #555; white-space: nowrap; }
tr.problem td { background: #fdf1e7; }
label { margin-right: 18px; font-size: 14px; } select { font: inherit; padding: 2px 4px; max-width: 420px; }
pre { background: #f6f6f6; padding: 10px; font-size: 12px; overflow-x: auto; }
summary { cursor: pointer; padding: 3px 0; }
.controls { margin: 8px 0; }
@media print { body { max-width: none; } .controls, .modebar { display: none; } h2 { break-after: avoid; } }
"""

# Figures stand in the page as JSON and are drawn from it; a heat map only when its run is chosen, since a sweep
# has dozens. Choosing another run keeps the checkpoint, so that runs are compared at the same step.
SCRIPT = """
const CONFIG = {displaylogo: false, displayModeBar: "hover", responsive: true,
  modeBarButtonsToRemove: ["select2d", "lasso2d"]};
const byId = (id) => document.getElementById(id);
const figure = (id) => JSON.parse(byId(id + "-data").textContent);
const chosen = (id) => byId(id) ? byId(id).value : "all";
let checkpoint = null;

function showSeries() {
  const [view, length, run] = ["choose-weights", "choose-length", "choose-run"].map(chosen);
  const agrees = (tags) => (view === "all" || tags.views.includes(view)) && (length === "all" || tags.length === length)
    && (run === "all" || tags.run === run);
  const traces = byId("signatures").data, below = byId("signatures").layout.meta.below;
  const rows = Math.ceil(traces.filter((trace) => trace.showlegend && agrees(trace.meta)).length / below.columns);
  const bottom = below.axis + below.row * rows;
  Plotly.update("signatures", {visible: traces.map((trace) => agrees(trace.meta))},
    {"margin.b": bottom, height: below.panels + bottom});
}

async function showMap() {
  const drawn = figure(chosen("choose-map"));
  const slider = (drawn.layout.sliders || [])[0];
  const wanted = slider ? slider.steps.findIndex((step) => step.label === checkpoint) : -1;
  Plotly.purge("heatmap");
  const plot = await Plotly.newPlot("heatmap", drawn.data, drawn.layout, CONFIG);
  plot.on("plotly_sliderchange", (change) => { checkpoint = change.step.label; });
  if (wanted >= 0) {
    const [traces, layout] = slider.steps[wanted].args;
    await Plotly.update(plot, traces, {...layout, "sliders[0].active": wanted});
  }
}

async function start() {
  for (const place of document.querySelectorAll("div.drawn"))
    await Plotly.newPlot(place.id, figure(place.id).data, figure(place.id).layout, CONFIG);
  if (byId("signatures")) {
    const drawn = figure("signatures");
    await Plotly.newPlot("signatures", drawn.data, drawn.layout, CONFIG);
    for (const id of ["choose-weights", "choose-length", "choose-run"])
      if (byId(id)) byId(id).addEventListener("change", showSeries);
    if (byId("signatures").data[0].meta) showSeries();
  }
  if (byId("heatmap")) {
    byId("choose-map").addEventListener("change", showMap);
    await showMap();
  }
  document.body.dataset.drawn = "yes";
}
start();
"""


def page(title: str, sections: Iterable[str]) -> str:
    """The whole document."""
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script></head>\n<body>\n"
    )
    return head + "\n".join(sections) + f"\n<script>{SCRIPT}</script>\n</body></html>\n"


def section(name: str, title: str, *parts: str) -> str:
    """A heading with what stands under it; `name` is its address in the page (`report.html#section-NAME`)."""
    heading = f'<section id="section-{name}"><h2>{html.escape(title)}</h2>'
    return "\n".join([heading, *parts, "</section>"])


def paragraph(text: str, *, note: bool = False) -> str:
    """Plain text as a paragraph; `note` sets it small and grey."""
    return f'<p class="note">{html.escape(text)}</p>' if note else f"<p>{html.escape(text)}</p>"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, problems: Iterable[int] = ()) -> str:
    """A table of escaped cells; an interval goes under its value in small type, rows in `problems` are marked."""
    marked = set(problems)
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = []
    for place, row in enumerate(rows):
        cells = "".join(f"<td>{_cell(str(value))}</td>" for value in row)
        body.append(f'<tr class="problem">{cells}</tr>' if place in marked else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _cell(text: str) -> str:
    value, bracket, rest = text.partition(" [")
    if not bracket or not rest.replace(")", "").endswith(tuple("0123456789]")):
        value, bracket, rest = text, "", ""
    low_high, _, control = rest.partition("] ")
    lines = [f"[{low_high.rstrip(']')}]", control.strip("()")] if bracket else []
    return html.escape(value) + "".join(f"<small>{html.escape(line)}</small>" for line in lines if line)


def choice(name: str, label: str, options: Sequence[tuple[str, str]], *, chosen: str | None = None) -> str:
    """A labelled select; `options` are (value, shown text), `chosen` the value to start with (else the first)."""
    listed = ""
    for value, text in options:
        selected = " selected" if value == chosen else ""
        listed += f'<option value="{html.escape(value)}"{selected}>{html.escape(text)}</option>'
    return f'<label>{html.escape(label)} <select id="{name}">{listed}</select></label>'


def controls(*choices: str) -> str:
    """Selects side by side above a figure."""
    return f'<div class="controls">{"".join(choices)}</div>'


def details(summary: str, text: str) -> str:
    """Preformatted text that opens on a click."""
    return folded(summary, f"<pre>{html.escape(text)}</pre>")


def folded(summary: str, *parts: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(parts)}</details>"


def figure_data(name: str, figure: go.Figure) -> str:
    """A figure as data in the page, for the script to draw."""
    text = script_safe_json(compact(figure.to_plotly_json()))
    return f'<script type="application/json" id="{name}-data">{text}</script>'


def drawn_figure(name: str, figure: go.Figure) -> str:
    """A figure that is drawn where it stands."""
    return f'<div class="drawn" id="{name}"></div>{figure_data(name, figure)}'


def script_safe_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever the strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def compact(value: Any) -> Any:
    """Numbers rounded to DIGITS significant ones, NaN as null, whole floats as integers; containers copied."""
    if isinstance(value, dict):
        return {key: compact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [compact(inner) for inner in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() else float(f"{value:.{DIGITS}g}")
    return value
