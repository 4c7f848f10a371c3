"""The panels as SVG: what is drawn stands where its numbers say, and the same numbers give the same bytes."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from revprobe.report.paper.line_panels import HEIGHT, LEFT, LEGEND, TOP, WIDTH, Line, Panel, drawn

X = np.array([0.0, 50.0, 100.0])
LINE = Line("a", X, np.array([0.0, 0.5, 1.0]), "#0072B2")


def svg(*panels: Panel) -> str:
    return drawn([panels], [LINE], x_title="step", y_title="share")


def points(text: str, colour: str) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'<path d="([^"]+)" fill="none" stroke="{colour}"', text)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_points_stand_where_their_numbers_say() -> None:
    """The first at the lower left corner of the frame, the last at the upper right one."""
    found = points(svg(Panel("one", [LINE], y=(0, 1))), "#0072B2")
    top = LEGEND + TOP
    assert found == [(LEFT, top + HEIGHT), (LEFT + WIDTH / 2, top + HEIGHT / 2), (LEFT + WIDTH, top)]


def test_an_undefined_point_breaks_the_line() -> None:
    broken = Line("a", np.arange(4.0), np.array([0, np.nan, 1, 1]), "#0072B2")
    (path,) = re.findall(r'<path d="([^"]+)" fill="none" stroke="#0072B2"', svg(Panel("one", [broken])))
    assert (path.count("M"), path.count("L")) == (2, 1)


def test_a_panel_without_lines_says_why_and_text_is_escaped() -> None:
    text = svg(Panel("a < b", empty="not run"), Panel("two", [LINE]))
    assert "not run" in text and "a &lt; b" in text
    ElementTree.fromstring(text)
    assert text == svg(Panel("a < b", empty="not run"), Panel("two", [LINE]))


def test_a_band_is_drawn_and_unequal_lengths_are_refused() -> None:
    banded = Line("a", X, LINE.y, "#0072B2", low=LINE.y - 0.1, high=LINE.y + 0.1)
    assert 'opacity="0.15"' in svg(Panel("one", [banded])) and 'opacity="0.15"' not in svg(Panel("one", [LINE]))
    with pytest.raises(ValueError, match="line 'a' of 'one': 3 x and 2 y"):
        svg(Panel("one", [Line("a", X, np.array([0.0, 1.0]), "#0072B2")]))


def test_a_legend_that_is_too_long_goes_on_in_the_next_row_and_moves_the_panels_down() -> None:
    keys = [Line("a name of some length, number", X, X, "#000000")] * 3
    one, two = (drawn([[Panel("one", [LINE])]], keys[:n], x_title="", y_title="") for n in (1, 3))
    tops = [min(int(y) for y in re.findall(rf'<rect x="{LEFT}" y="(\d+)"', text)) for text in (one, two)]
    assert tops[0] == LEGEND + TOP < tops[1]
    rows = {int(y) for y in re.findall(r'<text x="\d+" y="(\d+)">a name', two)}
    assert len(rows) == 3, "each in its own row of a narrow figure"
