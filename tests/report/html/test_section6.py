"""Section 6's page as HTML: all that the Markdown page says, in its order, from data that may hold anything."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_section6 import made

from revprobe.report.html.section6 import html, marked, write_html
from revprobe.report.paper.markdown import MOST_ROWS, row_count
from revprobe.report.paper.section6.blocks import Figure, Items, Table, Text
from revprobe.report.paper.section6.figures import figures
from revprobe.report.paper.section6.frames import Section6
from revprobe.report.paper.section6.page import sections, title


class Shown(HTMLParser):
    """The document's tags with their attributes, and its text apart from styles, scripts and drawings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._silent = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("style", "script", "svg"):
            self._silent = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._silent:
            self._silent = ""

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text += data


def letters(text: str) -> str:
    """Without Markdown's marks, blanks, and the "; " that a cell has as lines."""
    return re.sub(r"[*`;\s]", "", text)


def told(found: Section6) -> str:
    """All that the blocks say, one after the other."""
    parts = []
    for section in sections(found):
        parts.append(section.title)
        for block in section.blocks:
            match block:
                case Text():
                    parts.append(f"{block.lead}. {block.text}" if block.lead else block.text)
                case Items():
                    parts += block.items
                case Figure():
                    parts.append(block.words)
                case Table() if not block.rows:
                    parts.append(block.empty)
                case Table():
                    closed = len(block.rows) > MOST_ROWS
                    parts += [row_count(len(block.rows), list(block.rows[0]))] if closed else []
                    parts += [
                        str(cell)
                        for row in [block.rows[0].keys(), *(row.values() for row in block.rows)]
                        for cell in row
                    ]
    return " ".join(parts)


@pytest.mark.parametrize("found", [Section6(), made(0)], ids=["nothing", "made"])
def test_the_document_says_what_the_blocks_say_to_the_letter(found: Section6) -> None:
    """A text, a cell or a row that the template forgets, or sets in another place, is a difference."""
    document = html(found)
    assert letters(Shown(document).text).endswith(letters(told(found)))
    assert all(svg in document for _, svg in figures(found).values())
    assert document.count("<svg") == (0 if found.runs.empty else 3)


def test_text_from_data_is_text_and_nothing_is_asked_of_anyone(tmp_path: Path) -> None:
    bad = '<script>alert(1)</script> <img src="https://x.org/y"> & **"bold"**'
    found = made(0)
    runs = found.runs.assign(status=found.runs["status"].replace({"stopped at step 100 of 3000": f"failed: {bad}"}))
    found = replace(found, runs=runs, models={bad: {"status": bad}}, about={"quick": bad})
    document = write_html(found, tmp_path).read_text(encoding="utf-8")
    shown = Shown(document)
    tags = [tag for tag, _ in shown.tags]
    assert tags.count("script") == 1 and not {"img", "link", "iframe"} & set(tags)
    assert not [attrs for _, attrs in shown.tags if "src" in attrs or "//" in str(attrs.get("href", ""))]
    (policy,) = [attrs["content"] for _, attrs in shown.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
    assert "<script>alert(1)</script>" in shown.text, "as words"
    assert title(found).endswith("(quick variant, no result)") and title(found) in document


def test_marks_become_tags_and_all_else_is_escaped() -> None:
    said = marked("**fails** *in* `a*b*c` & <b>, 2 * 3 * 4, x*y*z")
    assert said == "<b>fails</b> <i>in</i> <code>a*b*c</code> &amp; &lt;b&gt;, 2 * 3 * 4, x*y*z"


def test_the_drawings_inks_have_a_colour_in_the_dark() -> None:
    """Figures are drawn for white paper; an ink without a rule would be black on black."""
    document = html(made(0))
    for ink in ("#1A1A1A", "#6B6B6B", "#E3E3E3", "#ffffff"):
        assert f'"{ink}"' in "".join(svg for _, svg in figures(made(0)).values()), f"{ink} is no longer drawn with"
        assert f'.dark figure [fill="{ink}"]' in document and f'.dark figure [stroke="{ink}"]' in document
