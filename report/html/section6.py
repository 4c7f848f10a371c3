"""Section 6 in miniature as one HTML file: the blocks of its Markdown page, in the same order, figures within.

Nothing is loaded from anywhere. All that comes from tables is text and is escaped; of Markdown's marks only bold,
italics and code are read, after that.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from ...atomic_files import write_text
from ...probes.figures.theme import DARK_PAPER, IN_THE_DARK
from ..paper.markdown import MOST_ROWS, row_count
from ..paper.section6.blocks import Block, Figure, Items, Table, Text
from ..paper.section6.frames import Section6
from ..paper.section6.page import sections, title
from ..paper.section6.verdicts import FAILS
from .templates import TEMPLATES, file_text

HTML_PAGE = "section6.html"
_MARKS = re.compile(r"\*\*(?P<b>[^*]+)\*\*|(?<![\w*])\*(?P<i>\w[^*]*)\*(?![\w*])|`(?P<code>[^`]+)`")
# A value, its interval, and what is said of both; a word in bold, and what decides it.
_INTERVAL = re.compile(r"(?P<value>[^\[(]+?) (?P<rest>\[[^\]]*\].*)", re.DOTALL)
_BOLD = re.compile(r"(?P<value>\*\*[^*]+\*\*) (?P<rest>\(.*\))", re.DOTALL)


def html(found: Section6) -> str:
    """The whole document, from the tables alone."""
    shown = [
        {"name": f"{at}", "title": one.title, "blocks": [_prepared(block) for block in one.blocks]}
        for at, one in enumerate(sections(found))
    ]
    style = file_text("page.css") + file_text("section6.css")
    swap = [(light, dark) for light, dark in IN_THE_DARK.items() if light.startswith("#")] + [("#ffffff", DARK_PAPER)]
    return TEMPLATES.get_template("section6.html").render(
        title=title(found), sections=shown, style=style, script=file_text("section6.js"), swap=swap
    )


def write_html(found: Section6, folder: Path) -> Path:
    """The document in `folder`, whole or not at all; returns its path."""
    write_text(folder / HTML_PAGE, html(found))
    return folder / HTML_PAGE


def _prepared(block: Block) -> dict[str, Any]:
    """A block as the template lays it out: its kind, and its texts as HTML."""
    match block:
        case Text():
            return {"kind": "text", "lead": block.lead, "text": marked(block.text)}
        case Items():
            return {"kind": "items", "texts": [marked(item) for item in block.items]}
        case Figure():
            return {"kind": "figure", "words": block.words, "svg": Markup(block.svg)}  # drawn here, its texts escaped
        case Table():
            return _table(block)


def _table(block: Table) -> dict[str, Any]:
    if not block.rows:
        return {"kind": "text", "lead": "", "text": marked(block.empty)}
    headings = list(block.rows[0])
    rows = [[str(row[name]) for name in headings] for row in block.rows]
    closed = row_count(len(rows), headings) if len(rows) > MOST_ROWS else ""
    told = [
        {"cells": [_lines(text) for text in row], "problem": any(text.startswith(f"**{FAILS}**") for text in row)}
        for row in rows
    ]
    return {"kind": "table", "headings": headings, "rows": told, "closed": closed}


def _lines(text: str) -> list[tuple[Markup, Markup]]:
    """A cell's parts, one below the other: each a value and what is set small under it.

    Verdicts stay whole, whatever stands in the brackets after them.
    """
    if whole := _BOLD.fullmatch(text):
        return [(marked(whole["value"]), marked(whole["rest"]))]
    found = []
    for part in text.split("; "):
        apart = _INTERVAL.fullmatch(part)
        found.append((marked(apart["value"]), marked(apart["rest"])) if apart else (marked(part), Markup("")))
    return found


def marked(text: str) -> Markup:
    """Text with Markdown's bold, italics and code as HTML, everything else escaped.

    >>> marked("**fails** (a < b), see `x*y*z`")
    Markup('<b>fails</b> (a &lt; b), see <code>x*y*z</code>')
    """
    parts, end = list[str](), 0
    for match in _MARKS.finditer(text):
        tag = str(match.lastgroup)
        parts += [str(escape(text[end : match.start()])), f"<{tag}>{escape(match[tag])}</{tag}>"]
        end = match.end()
    return Markup("".join([*parts, str(escape(text[end:]))]))
