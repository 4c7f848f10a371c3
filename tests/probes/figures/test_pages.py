"""Figures on a page: words and cells stay readable on a light and on a dark one, and nothing is wider than the page."""

import re
from itertools import product
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from headless import chromium, needs_chromium, open_figure

import revprobe as rp
from revprobe.probes.figures.theme import (
    CELL_INK,
    DIVERGING,
    HEADING_LINE,
    IN_THE_DARK,
    MESSAGE_LINE,
    TEMPLATE,
    heading,
    message_figure,
    with_theme,
)
from revprobe.probes.figures.training_curves import signatures_figure
from tiny import FIXTURES, pairs_at
from tiny import radd as tiny_radd

ACTIVE_BUTTON = "#F4FAFF"  # plotly's own, whatever a figure says
NARROW = 800
EDGES = """
const [title, whole] = [".gtitle", ".svg-container"].map((one) => document.querySelector(one).getBoundingClientRect());
return [title.left - whole.left, title.top - whole.top, whole.right - title.right];
"""

# Top and bottom of all buttons, and of the key and each panel's title.
AROUND = """
const at = (one) => { const {top, bottom} = one.getBoundingClientRect(); return [top, bottom]; };
const buttons = [...document.querySelectorAll(".updatemenu-button")].map(at);
const words = [...document.querySelectorAll(".gtitle, .annotation text")].map(at);
return [[Math.min(...buttons.map(([top]) => top)), Math.max(...buttons.map(([, bottom]) => bottom))], words];
"""
MEASURED = ("attention_correlation", "gradient_cosine", "forward_probability", "reverse_probability")


def luminance(colour: str) -> float:
    """Of `#RRGGBB`, as the Web Content Accessibility Guidelines 2.2 define it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_guidelines() -> None:
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert contrast("#767676", "#FFFFFF") == pytest.approx(4.54, abs=0.01)  # their example of the least that passes


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_button_is_readable_chosen_or_not(theme: str) -> None:
    """The chosen one is nearly white on every page: ink that is pale in the dark would vanish on it."""
    figure = with_theme(message_figure("x"), theme)
    buttons = figure.layout.template.layout.updatemenudefaults
    for ground in (ACTIVE_BUTTON, buttons.bgcolor):
        assert contrast(buttons.font.color, ground) > 4.5, f"{buttons.font.color} on {ground}, {theme}"


def test_words_on_cells_are_readable_on_every_colour_of_the_scale() -> None:
    shades = [IN_THE_DARK.get(shade, shade) for _, shade in DIVERGING] + [shade for _, shade in DIVERGING]
    assert CELL_INK not in IN_THE_DARK, "cells keep their colours, so must what is written on them"
    for shade in shades:
        assert contrast(CELL_INK, shade) >= 4, f"{CELL_INK} on {shade}"


def test_a_long_message_is_broken_into_lines() -> None:
    """A reason is a sentence; in one line its end lay outside the page."""
    (note,) = message_figure("No defined effect: " + "no other fact of the group " * 6).layout.annotations
    lines = note.text.split("<br>")
    assert len(lines) > 1 and max(map(len, lines)) <= MESSAGE_LINE, lines
    assert " ".join(lines).count("no other fact") == 6, "no word is lost"


def test_no_figure_of_the_deep_instruments_is_wider_than_a_narrow_page() -> None:
    """Without a width a figure takes the page's; all have a height, or they would take the page's as well."""
    model = rp.load_model(FIXTURES / "llada-tiny")
    pairs = pairs_at((1, 4), (4, 1), count=10)
    attention = rp.probe_attention_correlation(model, pairs, controls="all")
    trace, edit = rp.trace_denoising(model, pairs), rp.probe_route_edit(model, pairs, scope="head")
    contributions = rp.probe_logit_lens(model, pairs, contributions=True)
    audit = rp.audit_assumptions(model, pairs, permutations=40)
    figures = [trace.plot(kind=kind) for kind in ("steps", "layers", "heads")]
    figures += [attention.plot(kind=kind) for kind in ("controls", "heads")]
    figures += [contributions.plot(), contributions.plot(kind="heads"), edit.plot(), edit.plot(kind="heatmap")]
    figures += [audit.plot(), audit.plot(kind="planes"), rp.probe_stored_once(model, pairs).plot()]
    figures += [rp.probe_causal_trace(model, pairs, site=site).plot() for site in ("residual", "head")]
    figures += [rp.rank_heads(model, pairs, top=1).plot()]
    for figure in figures:
        title = figure.layout.title.text
        assert title, f"no heading, but {[note.text for note in figure.layout.annotations]}"
        lines, title_place = title.split("<br>"), figure.layout.title
        assert (title_place.xref, title_place.yref) == ("container", "container"), f"{title}: wide labels would cut it"
        assert title_place.pad.t > 15 * (len(lines) > 1) and title_place.pad.l > 0, f"{title} touches the edge"
        assert max(map(len, lines)) <= HEADING_LINE, f"{title} runs out of a narrow figure"
        assert figure.layout.height and (figure.layout.width or 0) <= NARROW, f"{title}: {figure.layout.width}"


def test_a_line_without_a_number_is_called_undefined_in_the_legend() -> None:
    """One pair has no other fact to be held against: the legend promised lines that were not there."""
    model = tiny_radd("rope", n_layers=2, n_heads=2)
    pairs = pairs_at((1, 4), (4, 1), count=1)
    for figure in (rp.trace_denoising(model, pairs).plot(), rp.probe_logit_lens(model, pairs).plot()):
        for line in (line for line in figure.data if line.name and "facts shuffled" in line.name):
            assert line.name.endswith(" (undefined)"), line.name
        assert not re.search("undefined", next(one.name for one in figure.data if one.name == "reverse"))


def test_an_audit_without_verdicts_says_why() -> None:
    """The map of verdicts was grey all over, with the reason on the hover alone."""
    one_side = pairs_at((1, 4), (2, 6), count=10)
    figure = rp.audit_assumptions(rp.load_model(FIXTURES / "llada-tiny"), one_side, permutations=40).plot()
    (label,) = [one.name for one in figure.data if one.name and one.name.startswith("no verdict")]
    assert re.fullmatch(r"no verdict: 8 \(.{10,}\)", label), label


def test_a_colour_bar_leaves_room_for_the_tools() -> None:
    assert TEMPLATE.data.heatmap[0].colorbar.xpad == TEMPLATE.layout.coloraxis.colorbar.xpad >= 24


@needs_chromium
def test_no_edge_of_a_figure_cuts_its_title(tmp_path: Path) -> None:
    """Of one line, of several, and of one too long for a narrow figure; plotly lifts a title of several lines."""
    said = [["<b>one</b>"], ["<b>small</b>, step 600", "numbers"], ["<b>small</b>", "forward and reverse queries " * 6]]
    with chromium(tmp_path / "profile", "900,700") as browser:
        for lines in said:
            figure = go.Figure(go.Bar(y=["a label as wide as a third of the figure " * 2], x=[1], orientation="h"))
            figure.update_layout(template=TEMPLATE, title=heading(*lines), width=640, height=300, margin={"t": 110})
            open_figure(browser, figure, tmp_path / "figure.html", config={"displayModeBar": False})
            inside = browser.execute_script(EDGES)
            assert min(inside) >= 5, f"{lines}: left, top and right edge are {inside} pixels away"


@needs_chromium
def test_the_buttons_of_weights_cover_neither_key_nor_panel_titles(tmp_path: Path) -> None:
    """Titles of two lines reached under the buttons."""
    rows = [
        {"run": "a", "objective": "masked", "position_encoding": "rope", "kind": "same_target", "step": step, **numbers}
        | {"weights": weights, "measure": measure}
        for step, weights, measure in product((0, 10), ("raw", "ema"), MEASURED)
        for numbers in [{"value": 0.5, "low": 0.4, "high": 0.6, "control": 0.0, "n": 2106, "facts": 26}]
    ]
    figure = signatures_figure(pd.DataFrame(rows).assign(undefined=0, reason="", caution=""))
    with chromium(tmp_path / "profile", "1000,900") as browser:
        for width in (900, 720):
            open_figure(browser, figure.update_layout(width=width), tmp_path / "figure.html")
            buttons, words = browser.execute_script(AROUND)
            assert len(words) == 5 and min(bottom - top for top, bottom in [buttons, *words]) > 5
            covered = [(top, bottom) for top, bottom in words if top < buttons[1] and buttons[0] < bottom]
            assert not covered, f"{covered} of {words} under {buttons}, {width} wide"
