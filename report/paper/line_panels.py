"""Small panels of lines as an SVG, drawn from numbers alone: the same bytes on every machine, without a browser.

Plotly draws everything that is looked at live; a figure on a page that a test compares must not depend on Chromium.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ...probes.figures.theme import CONTROL_GREY, FONT, GRID_GREY

WIDTH, HEIGHT, LEFT, TOP, GAP = 240, 165, 46, 26, 38
LEGEND, FOOT = 22, 34
_INK = "#1A1A1A"
_DASHES = {"solid": "", "dashed": ' stroke-dasharray="5 3"', "dotted": ' stroke-dasharray="1.5 3"'}


@dataclass(frozen=True)
class Line:
    """A curve, with the lowest and the highest of what it is the mean of as its band. Shapes: `point` each."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    dash: str = "solid"
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """One frame; without lines it says why it is empty."""

    title: str
    lines: Sequence[Line] = ()
    empty: str = "not run"
    y: tuple[float, float] | None = None


def drawn(rows: Sequence[Sequence[Panel]], legend: Sequence[Line], *, x_title: str, y_title: str) -> str:
    """The panels in rows, and a legend above them. Lines of one name and look are told once.

    Raises: ValueError, for a line with unequal numbers of x and y.
    """
    columns = max(len(row) for row in rows)
    width = LEFT + columns * (WIDTH + GAP)
    keys, legend_height = _legend(legend, width)
    height = legend_height + len(rows) * (TOP + HEIGHT + GAP) + FOOT - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="{escape(FONT, quote=True)}" font-size="11" fill="{_INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *keys,
    ]
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            x, y = LEFT + j * (WIDTH + GAP), legend_height + TOP + i * (TOP + HEIGHT + GAP)
            parts += _panel(panel, x, y)
    middle = legend_height + (height - legend_height - FOOT) / 2
    parts += [
        f'<text x="{width / 2:.0f}" y="{height - 4}" text-anchor="middle">{escape(x_title)}</text>',
        f'<text transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>',
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(lines: Sequence[Line], width: float) -> tuple[list[str], int]:
    """Its keys one after another, in as many rows as they need; and its height."""
    parts, x, y = [], LEFT, 0
    for line in lines:
        reach = 42 + round(5.9 * len(line.name))
        if x > LEFT and x + reach > width:
            x, y = LEFT, y + LEGEND - 4
        parts.append(
            f'<path d="M{x} {y + 12}h22" stroke="{line.colour}" stroke-width="2"{_DASHES[line.dash]}/>'
            f'<text x="{x + 27}" y="{y + 16}">{escape(line.name)}</text>'
        )
        x += reach
    return parts, y + LEGEND


def _panel(panel: Panel, left: float, top: float) -> list[str]:
    parts = [f'<text x="{left}" y="{top - 8}" font-weight="bold">{escape(panel.title)}</text>']
    frame = f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#9a9a9a"/>'
    if not panel.lines:
        at = f'x="{left + WIDTH / 2:.0f}" y="{top + HEIGHT / 2:.0f}"'
        return [*parts, frame, f'<text {at} text-anchor="middle" fill="#6B6B6B">{escape(panel.empty)}</text>']
    for line in panel.lines:
        if len(line.x) != len(line.y):
            raise ValueError(f"line {line.name!r} of {panel.title!r}: {len(line.x)} x and {len(line.y)} y")
    every = np.concatenate([line.x for line in panel.lines])
    x_range = (float(every.min()), float(every.max()))
    y_range = panel.y or _reach(panel.lines)
    scale = _Scale(left, top, x_range, y_range)
    for value in _ticks(*y_range):
        y = scale.y(value)
        zero = value == 0 and y_range[0] < 0
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="{CONTROL_GREY if zero else GRID_GREY}"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end" font-size="10">{value:g}</text>')
    for value in _ticks(*x_range, most=4):
        at = f'x="{scale.x(value):.1f}" y="{top + HEIGHT + 15}"'
        parts.append(f'<text {at} text-anchor="middle" font-size="10">{value:,g}</text>')
    for line in panel.lines:
        parts += _line(line, scale)
    return [*parts, frame]


@dataclass(frozen=True)
class _Scale:
    left: float
    top: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + WIDTH * (value - low) / ((high - low) or 1.0)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + HEIGHT * (1 - (min(max(value, low), high) - low) / ((high - low) or 1.0))


def _line(line: Line, scale: _Scale) -> list[str]:
    parts = []
    if line.low is not None and line.high is not None:
        there = np.concatenate([line.x, line.x[::-1]]), np.concatenate([line.high, line.low[::-1]])
        parts.append(f'<path d="{_path(*there, scale)}z" fill="{line.colour}" opacity="0.15"/>')
    parts.append(
        f'<path d="{_path(line.x, line.y, scale)}" fill="none" stroke="{line.colour}" stroke-width="1.7"'
        f"{_DASHES[line.dash]}/>"
    )
    return parts


def _path(x: np.ndarray, y: np.ndarray, scale: _Scale) -> str:
    """Points joined; where one is undefined the line is broken."""
    parts, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if not np.isfinite(b):
            pen = "M"
            continue
        parts.append(f"{pen}{scale.x(float(a)):.1f} {scale.y(float(b)):.1f}")
        pen = "L"
    return "".join(parts)


def _reach(lines: Sequence[Line]) -> tuple[float, float]:
    """The lowest and highest value of all lines and bands, with zero among them."""
    values = [np.asarray(part, float) for line in lines for part in (line.y, line.low, line.high) if part is not None]
    defined = np.concatenate(values)
    defined = defined[np.isfinite(defined)]
    if not len(defined):
        return 0.0, 1.0
    return min(0.0, float(defined.min())), max(0.0, float(defined.max()))


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two, a handful of them.

    >>> _ticks(0, 1, most=4)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= rough)
    first = np.ceil(low / step)
    found = [float(round((first + i) * step, 10)) for i in range(most + 2)]
    return [value for value in found if value <= high + step * 1e-6]
