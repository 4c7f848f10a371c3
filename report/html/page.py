"""The HTML of a report: the document with its tabs, and the parts that stand in them.

Nothing is loaded from anywhere: plotly.js stands in the page once, figures are data for the page's script to draw, and
the page's own policy forbids requests. Each part is `Markup`; a plain string in its place is text and is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ...probes.figures.theme import (
    CELL_INK,
    CONTROL_GREY,
    FORWARD,
    IN_THE_DARK,
    REVERSE,
    TEMPLATE,
    UNDEFINED_GREY,
    faded,
    in_the_dark,
)
from ..summary.tables import cell_lines
from .templates import TEMPLATES, compact, file_text, macros

PARTS = macros("parts.html")
THEMES = (("system", "as the system"), ("light", "light"), ("dark", "dark"))


def page(
    title: str,
    about: str,
    tabs: Sequence[tuple[str, str, Sequence[Markup]]],
    *,
    chooser: Markup,
    colours: Mapping[str, str] | None = None,
) -> str:
    """The whole document.

    Args:
        about: what it shows, said over the tabs.
        tabs: (name, shown text, its parts); the first is open, one without parts is left out.
        chooser: the controls that several tabs share.
        colours: of the dots beside names in tables, by "run NAME" and "model NAME".
    """
    tabs = [tab for tab in tabs if tab[2]]
    own = {
        "style": file_text("page.css"),
        "script": file_text("explorer.js") + file_text("page.js"),
        "plotly": get_plotlyjs(),
    }
    # The templates and colours that the page's script draws with.
    template = TEMPLATE.to_plotly_json()
    look = {"light": template, "dark": in_the_dark(template), "swap": IN_THE_DARK, "band": faded(FORWARD, 0.15)}
    look |= {"forward": FORWARD, "reverse": REVERSE, "grey": CONTROL_GREY, "gone": UNDEFINED_GREY}
    look |= {"ink": "#1A1A1A", "cell": CELL_INK}
    shown = {"title": title, "about": about, "tabs": tabs, "chooser": chooser, "look": data_block("look", look)}
    shown["colours"] = data_block("colours", dict(colours or {}))
    shown["themes"] = THEMES
    return TEMPLATES.get_template("page.html").render(own | shown)


def section(name: str, title: str, *parts: Markup) -> Markup:
    """A heading with what stands under it; `name` is its address in the page (`report.html#section-NAME`)."""
    return PARTS.section(name, title, parts)


def paragraph(text: str, *, note: bool = False) -> Markup:
    """Plain text as a paragraph; `note` sets it small and grey."""
    return PARTS.paragraph(text, note)


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    problems: Iterable[int] = (),
    models: Mapping[str, str] | None = None,
) -> Markup:
    """A table of texts; an interval goes under its value in small type, rows in `problems` are marked.

    Args:
        models: of which model a column is, by its heading: it has the dot of that model's colour.
    """
    lines = [[cell_lines(str(value)) for value in row] for row in rows]
    return PARTS.table(headings, lines, set(problems), dict(models or {}))


def choice(name: str, label: str, options: Sequence[tuple[str, str]], *, chosen: str | None = None) -> Markup:
    """A labelled select; `options` are (value, shown text), `chosen` the value to start with (else the first)."""
    return PARTS.choice(name, label, options, chosen)


def controls(*choices: Markup) -> Markup:
    """Selects side by side above a figure."""
    return PARTS.controls(choices)


def details(summary: str, text: str) -> Markup:
    """Preformatted text that opens on a click."""
    return folded(summary, preformatted(text))


def preformatted(text: str) -> Markup:
    """Text line by line as it is: code, a config."""
    return PARTS.preformatted(text)


def folded(summary: str, *parts: Markup) -> Markup:
    """Parts that open on a click."""
    return PARTS.folded(summary, parts)


def figure_place(name: str) -> Markup:
    """An empty element for the script to draw in."""
    return PARTS.place(name)


def figure_data(name: str, figure: go.Figure) -> Markup:
    """A figure as data in the page, for the script to draw with the page's own template."""
    shown = figure.to_plotly_json()
    shown["layout"].pop("template", None)
    return data_block(name, shown)


def data_block(name: str, value: Any) -> Markup:
    """JSON in the page, under a name."""
    return PARTS.data_block(name, compact(value))


def gallery(name: str, label: str, figures: Sequence[tuple[str, go.Figure]]) -> Markup:
    """Several figures in one place with a choice among them, by their labels; the last is shown first."""
    options = [(f"{name}-{at}", text) for at, (text, _) in enumerate(figures)]
    data = [figure_data(one, figure) for (one, _), (_, figure) in zip(options, figures, strict=True)]
    return PARTS.gallery(name, label, options, data)


def drawn_figure(name: str, figure: go.Figure) -> Markup:
    """A figure that is drawn where it stands."""
    return PARTS.drawn(name, figure_data(name, figure))


def scrolled(label: str, part: Markup) -> Markup:
    """A part that may be wider than the page, in a place that is scrolled; `label` is what a screen reader says."""
    return PARTS.scrolled(label, part)
