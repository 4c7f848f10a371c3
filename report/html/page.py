"""The HTML of a report: tabs, escaped tables, and figures embedded as data for the page's script to draw.

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

from ...probes.figures.theme import (
    CONTROL_GREY,
    FORWARD,
    IN_THE_DARK,
    REVERSE,
    TEMPLATE,
    UNDEFINED_GREY,
    faded,
    in_the_dark,
)
from .page_script import SCRIPT, STYLE

DIGITS = 5  # significant digits of numbers in figures: finer than any screen, and half the size of full floats

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(title: str, tabs: Sequence[tuple[str, str, Sequence[str]]], *, above: str = "", chooser: str = "") -> str:
    """The whole document.

    Args:
        tabs: (name, shown text, its parts as HTML); the first is open.
        above: HTML over the tabs.
        chooser: HTML of the controls that several tabs share.
    """
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script></head>\n<body>\n"
    )
    buttons = "".join(
        f'<button role="tab" data-tab="{name}" aria-selected="false">{html.escape(text)}</button>'
        for name, text, _ in tabs
    )
    theme = '<button id="choose-theme" title="light or dark"></button>'
    bar = f'<nav class="tabs"><div role="tablist">{buttons}{theme}</div>{chooser}</nav>'
    panels = (f'<div role="tabpanel" id="tab-{name}" hidden>' + "\n".join(parts) + "</div>" for name, _, parts in tabs)
    body = "\n".join([above, bar, *panels, data_block("look", _look())])
    return f"{head}{body}\n<script>{SCRIPT}</script>\n</body></html>\n"


def _look() -> dict[str, Any]:
    """The colours and templates that the page's script draws with."""
    template = TEMPLATE.to_plotly_json()
    colours = {"forward": FORWARD, "reverse": REVERSE, "grey": CONTROL_GREY, "gone": UNDEFINED_GREY, "ink": "#1A1A1A"}
    look = {"light": template, "dark": in_the_dark(template), "swap": IN_THE_DARK, "band": faded(FORWARD, 0.15)}
    return look | colours


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
    """A figure as data in the page, for the script to draw with the page's own template."""
    shown = figure.to_plotly_json()
    shown["layout"].pop("template", None)
    return data_block(name, shown)


def data_block(name: str, value: Any) -> str:
    """JSON in the page, under a name."""
    return f'<script type="application/json" id="{name}-data">{script_safe_json(compact(value))}</script>'


def gallery(name: str, label: str, figures: Sequence[tuple[str, go.Figure]]) -> str:
    """Several figures in one place with a choice among them, by their labels; the last is shown first."""
    ids = [f"{name}-{place}" for place in range(len(figures))]
    options = [(one, text) for one, (text, _) in zip(ids, figures, strict=True)]
    select = controls(choice(f"choose-{name}", label, options, chosen=ids[-1]))
    data = "".join(figure_data(one, figure) for one, (_, figure) in zip(ids, figures, strict=True))
    return f'{select}<div class="gallery" id="gallery-{name}" data-choice="choose-{name}"></div>{data}'


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
