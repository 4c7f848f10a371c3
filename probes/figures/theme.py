"""How every figure of the package looks: one plotly template, colour-blind safe and readable in print.

`TEMPLATE` is set on each figure (never registered as plotly's default: importing a library must not change a
notebook's other plots). `plain` and `interval_text` write what comes from data: plotly draws a subset of HTML, so a run
called `<b>x</b>` would change the page if it went in unescaped.
"""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from ...errors import RevprobeError, did_you_mean

# Okabe and Ito 2008, "Color Universal Design": eight colours that stay apart for all common colour visions.
OKABE_ITO = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",
}
# An encoding keeps its colour in every figure and report, whatever else is drawn beside it.
COLOURS = {
    "rope": OKABE_ITO["blue"],
    "alibi": OKABE_ITO["green"],
    "absolute": OKABE_ITO["orange"],
    "none": OKABE_ITO["purple"],
    "ARM": OKABE_ITO["vermillion"],
}
SPARE_COLOURS = (OKABE_ITO["blue"], OKABE_ITO["vermillion"], OKABE_ITO["green"], OKABE_ITO["purple"], OKABE_ITO["sky"])
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon")
FORWARD, REVERSE = OKABE_ITO["blue"], OKABE_ITO["vermillion"]
CONTROL_GREY, UNDEFINED_GREY, GRID_GREY = "#6B6B6B", "#C8C8C8", "#E3E3E3"
# Both ends are Okabe-Ito colours of like lightness and the middle is white, so sign and size survive without hue; the
# blue is a shade lighter, since numbers are written on it.
MAP_BLUE = "#1B7FBE"
DIVERGING = ((0.0, OKABE_ITO["vermillion"]), (0.5, "#FFFFFF"), (1.0, MAP_BLUE))
# On a cell of a map, whatever the page's colour: at least 4.5 to 1 on every colour of the scale.
CELL_INK = "#000001"  # not black itself, which a dark page swaps
# plotly's active button is nearly white on every page; so all buttons are pale and their words dark.
BUTTONS = {"bgcolor": "#D3D9DF", "bordercolor": "#A7AFB7", "font": {"color": CELL_INK, "size": 12}}
# A legend along the foot of the figure, however high that is.
BELOW = {"orientation": "h", "x": 0, "y": 0.01, "yref": "container", "yanchor": "bottom"}
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
LABEL_LIMIT = 60
HEADING_LINE = 88  # letters of a title on one line: what a figure of 640 pixels holds
MESSAGE_LINE = 84  # letters of a message on one line: what a page of 800 pixels holds
PICTURE_WIDTH = 900  # of a figure that takes the width it is given, drawn into a file
# What ink and paper decide, light to dark; all other colours keep their meaning and stay legible on both.
DARK_PAPER = "#16191D"
IN_THE_DARK = {
    "white": DARK_PAPER,
    "#1A1A1A": "#E8E8E8",
    "#333333": "#CFCFCF",
    "#555": "#B5B5B5",
    OKABE_ITO["black"]: "#FFFFFF",
    OKABE_ITO["blue"]: "#4C9FD4",
    MAP_BLUE: "#4C9FD4",
    CONTROL_GREY: "#A0A0A0",
    UNDEFINED_GREY: "#5A5F66",
    GRID_GREY: "#33383E",
    "rgba(255,255,255,0.85)": "rgba(22,25,29,0.85)",
    "rgba(255,255,255,0.6)": "rgba(22,25,29,0.6)",
    "rgba(0,114,178,0.15)": "rgba(76,159,212,0.22)",
    "rgba(0,114,178,0.25)": "rgba(76,159,212,0.4)",
}
THEMES = ("light", "dark")
_SMALL = 0.001  # numbers below it are written with powers of ten
_NOISE = 1e-16  # what lies below it is a rounding error
_ONE_IN_A_MILLION = 1e-4  # in per cent: nearer to 0 or 100 no share of questions is


def _axis() -> dict[str, Any]:
    return {
        "showline": True,
        "linecolor": "#333333",
        "gridcolor": GRID_GREY,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": "#333333",
        "title": {"font": {"size": 13}, "standoff": 8},
        "automargin": True,
    }


# Room at its right for the modebar, which otherwise covers title and numbers.
COLOUR_BAR = {"xpad": 26}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": "#1A1A1A"},
        "title": {"font": {"size": 16}, "x": 0.0, "xref": "paper", "xanchor": "left", "yanchor": "top"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": list(OKABE_ITO.values()),
        "xaxis": _axis(),
        "yaxis": _axis(),
        "hoverlabel": {"bgcolor": "white", "font": {"size": 12}, "align": "left"},
        "legend": {"bgcolor": "rgba(255,255,255,0.85)", "font": {"size": 12}},
        "margin": {"l": 70, "r": 45, "t": 70, "b": 60},
        # Upright at the right edge, where it covers neither titles nor buttons.
        "modebar": {"orientation": "v", "bgcolor": "rgba(255,255,255,0.6)"},
        "updatemenudefaults": BUTTONS,
        "coloraxis": {"colorbar": COLOUR_BAR},
    },
    data={"heatmap": [go.Heatmap(colorbar=COLOUR_BAR)]},
)


def in_the_dark(value: Any) -> Any:
    """A figure's JSON with the colours of ink and paper swapped for a dark page; containers are copied."""
    if isinstance(value, str):
        return IN_THE_DARK.get(value, value)
    if isinstance(value, dict):
        return {key: in_the_dark(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [in_the_dark(inner) for inner in value]
    return value


def with_theme(figure: go.Figure, theme: str) -> go.Figure:
    """The figure for a light page (as every figure is drawn) or for a dark one.

    Raises: RevprobeError, for another theme.
    """
    if theme not in THEMES:
        raise RevprobeError(f"theme {theme!r}{did_you_mean(theme, THEMES)}")
    return figure if theme == "light" else go.Figure(in_the_dark(figure.to_plotly_json()))


def plain(text: object, *, limit: int | None = LABEL_LIMIT) -> str:
    """Text from data as plotly should show it: one line, shortened, with nothing left for plotly to interpret."""
    line = " ".join(str(text).split())
    if limit is not None and len(line) > limit:
        line = line[: limit - 1] + "…"
    return html.escape(line, quote=False)


def interval_text(
    value: float,
    low: float,
    high: float,
    control: float = math.nan,
    *,
    percent: bool = False,
    digits: int | None = None,
) -> str:
    """A value as people read it: `0.53 [0.41, 0.62] (control 0.02)`; an undefined one is called so.

    Where value and interval are below a thousandth, they are written with powers of ten: `3.1e-8 [1.0e-8, 8.2e-8]`.

    Args:
        percent: the numbers are fractions and are shown as percentages (without the sign). An end reads as 0 or 100
            only where it is that, to one in a million: `0.04 [0.01, 0.2]`.
        digits: behind the point, at least; 2, of percentages 1, when None.
    """
    if math.isnan(value):
        return "undefined"
    unit = 100 if percent else 1
    if _NOISE < unit * max(abs(one) for one in (value, low, high) if not math.isnan(one)) < _SMALL:
        return _small_text(unit * value, unit * low, unit * high, unit * control)
    # Ends that round to one number would read as an interval of no width: they get the digits that tell them apart.
    least = digits or (1 if percent else 2)
    told_apart = (n for n in range(least, 17) if rounded(low, n, percent) != rounded(high, n, percent))
    # None without an interval, or with one of no width, which would claim certainty.
    apart = next(told_apart, None) if low < high else None
    # A number by itself shows one digit that is not zero.
    finest = next((n for n in range(least, 17) if value == 0 or float(rounded(value, n, percent))), least)
    told = [rounded(one, apart or finest, percent) for one in (value, low, high, control)]
    if percent:
        told[:3] = _told_from_whole([100 * one for one in (value, low, high)], told[:3])
    ends = f" [{told[1]}, {told[2]}]" if apart else ""
    return f"{told[0]}{ends}" + ("" if math.isnan(control) else f" (control {told[3]})")


def _told_from_whole(numbers: Sequence[float], texts: Sequence[str]) -> list[str]:
    """Value, low and high in per cent; an end that would read as 0 or 100 and is not has the digits that say so."""
    exact = [_not_whole(number, text) for number, text in zip(numbers, texts, strict=True)]
    # The value keeps its digits but where it would read as lying outside of such an end, or has no interval.
    alone = not numbers[1] < numbers[2]
    return [exact[0] if alone or exact[1:] != list(texts[1:]) else texts[0], *exact[1:]]


def _not_whole(number: float, text: str) -> str:
    reads, places = abs(float(text)), range(1, 15)
    if min(abs(number), abs(100 - abs(number))) < _ONE_IN_A_MILLION:
        return text
    if reads == 0:
        return next(told for n in places if float(told := rounded(number, n)))
    if reads == 100 and abs(number) < 100:
        return next((told for n in places if abs(float(told := rounded(number, n))) < 100), text)
    return text


def _small_text(value: float, low: float, high: float, control: float) -> str:
    """The same of numbers that would be rows of zeros behind the point."""
    # As above: ends that differ do not print alike.
    told_apart = (n for n in range(1, 16) if _power_text(low, n) != _power_text(high, n))
    digits = next(told_apart, None) if low < high else None
    ends = "" if digits is None else f" [{_power_text(low, digits)}, {_power_text(high, digits)}]"
    beside = "" if math.isnan(control) else f" (control {_power_text(control, digits or 1)})"
    return f"{_power_text(value, digits or 1)}{ends}{beside}"


def _power_text(number: float, digits: int) -> str:
    """A number as `2.1e-9`; zero, and what is so only but for a rounding error, as `0`; a large one as elsewhere."""
    if abs(number) <= _NOISE:
        return "0"
    if abs(number) >= _SMALL:
        return rounded(number, 3 if abs(number) < 0.01 else 2)
    mantissa, _, power = f"{number:.{digits}e}".partition("e")
    return f"{mantissa}e{int(power)}"


def difference_text(value: float, low: float, high: float, control: float = math.nan) -> str:
    """A difference as people read it, with so many digits that no end but zero itself reads as zero.

    >>> difference_text(0.0046, -0.0008, 0.0149)
    '0.005 [-0.001, 0.015]'
    """
    ends = [end for end in (low, high) if end and not math.isnan(end)]
    digits = next((places for places in range(2, 7) if all(round(end, places) for end in ends)), 6)
    return interval_text(value, low, high, control, digits=digits)


def rounded(number: float, digits: int, percent: bool = False) -> str:
    """A number with so many digits behind the point; what rounds to zero has no sign."""
    text = f"{100 * number if percent else number:.{digits}f}"
    # A control just below zero would print as "-0.00", and its sign says nothing.
    return text.removeprefix("-") if float(text) == 0 else text


def undefined_text(undefined: Mapping[str, int]) -> str:
    """The reasons of a reading's undefined points, counted: `26 × constant scores; 3 × masked out`."""
    return "; ".join(f"{count:,} × {reason}" for reason, count in undefined.items() if count)


def counts_text(counts: Iterable[float]) -> str:
    """Sample sizes for an axis title: `n = 702` or `n = 702 to 2,106`."""
    return f"n = {_from_to(counts)[0]}"


def samples_text(pairs: Iterable[float], facts: Iterable[float]) -> str:
    """The same of pairs and of their facts, since intervals rest on these.

    >>> samples_text([702, 2106], [26, 26])
    'n = 702 to 2,106 pairs of 26 facts'
    """
    (n, many), (of, several) = _from_to(pairs), _from_to(facts)
    return f"n = {n} {'pairs' if many else 'pair'} of {of} {'facts' if several else 'fact'}"


def _from_to(counts: Iterable[float]) -> tuple[str, bool]:
    """The least and the greatest of some counts as text, and whether that is read as a plural."""
    found = sorted({int(count) for count in counts if not math.isnan(count)}) or [0]
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}", found != [1]


_WHOLE, _TIE = (
    re.compile(r"n = [\d,]+(?: to [\d,]+)? [a-z ]+ of [\d,]+ facts?|\[[^]]*\]|\([a-z ]*control[^)]*\)"),
    chr(0),
)


def heading(*lines: str, key: bool = False) -> dict[str, Any]:
    """A figure's title from its upper left corner down, so that neither wide labels nor the window's edge cut it.

    Args:
        lines: as plotly should show them; one that is longer than a narrow figure goes on below.
        key: small and grey: how a figure is to be read, not what it shows.
    """
    size = 12 if key else 14
    wrap = textwrap.TextWrapper(HEADING_LINE * 14 // size, break_long_words=False, break_on_hyphens=False)
    # An interval or a sample that is broken is read wrongly.
    tied = [_WHOLE.sub(lambda found: found[0].replace(" ", _TIE), line) for line in lines]
    shown = [part.replace(_TIE, " ") for line in tied for part in wrap.wrap(line)]
    # Of several lines plotly draws the first with its foot, not its head, at the edge.
    top = 10 if len(shown) < 2 else 10 + round(0.75 * size)
    font = {"size": size, "color": "#555"} if key else {"size": size}
    place = {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"}
    return {"text": "<br>".join(shown), "font": font, **place, "pad": {"t": top, "l": 14}}


def faded(colour: str, alpha: float) -> str:
    """A `#RRGGBB` colour with an opacity, as plotly takes it."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def reach(numbers: Iterable[float], least: float = 0.2) -> list[float]:
    """The limits of an axis of fractions, correlations or cosines: zero and all numbers, in tenths, and a little air.

    Args:
        least: what it spans at least; noise would fill a plot that spans less.

    >>> [round(end, 3) for end in reach([0.02, 0.31, math.nan])]
    [-0.016, 0.416]
    """
    known = [0.0, *(number for number in map(float, numbers) if not math.isnan(number))]
    # Less a rounding error, so that 0.3 stays 0.3.
    low, high = math.floor(min(known) * 10 + 1e-9) / 10, math.ceil(max(known) * 10 - 1e-9) / 10
    if high - low < least:
        low, high = (high - least, high) if -low > high else (low, low + least)
    air = 0.04 * (high - low)
    return [low - air, high + air]


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str, **options: Any) -> go.Scatter:
    """The area between two curves; it breaks where either is NaN, so an undefined stretch stays a gap."""
    outline_x: list[float | None] = []
    outline_y: list[float | None] = []
    for undefined, places in groupby(range(len(x)), lambda i: math.isnan(low[i]) or math.isnan(high[i])):
        if undefined:
            continue
        stretch = list(places)
        outline_x += [x[i] for i in stretch] + [x[i] for i in reversed(stretch)] + [None]
        outline_y += [low[i] for i in stretch] + [high[i] for i in reversed(stretch)] + [None]
    # The thin edge keeps the interval of a single point visible: its polygon has no width.
    line = {"width": 1, "color": faded(colour, 0.25)}
    fill = {"fill": "toself", "fillcolor": faded(colour, 0.15)}
    return go.Scatter(x=outline_x, y=outline_y, mode="lines", line=line, hoverinfo="skip", **fill, **options)


def dashed(x: Sequence[float], y: Sequence[float], colour: str, **options: Any) -> go.Scatter:
    """The dashed line of a control. A point between gaps, or the only one, is no line: it has a marker."""
    known = [False, *(math.isfinite(value) for value in y), False]
    alone = [here and not (before or after) for before, here, after in zip(known, known[1:], known[2:], strict=False)]
    line = {"color": colour, "width": 1.5, "dash": "dash"}
    trace = go.Scatter(x=x, y=y, mode="lines", line=line, **options)
    if any(alone):
        marker = {"color": colour, "symbol": "diamond-open", "size": 9, "opacity": [float(one) for one in alone]}
        trace.update(mode="lines+markers" if sum(known) > 1 else "markers", marker=marker)
    return trace


NO_TOOLS = ["zoom", "pan", "zoomin", "zoomout", "autoscale", "resetscale", "toimage", "select", "lasso"]


def message_figure(message: str) -> go.Figure:
    """A figure that says why there is nothing to draw."""
    lines = textwrap.wrap(" ".join(message.split()), MESSAGE_LINE)
    layout = {"template": TEMPLATE, "height": 140 + 20 * len(lines), "xaxis": {"visible": False}}
    figure = go.Figure(layout=layout | {"modebar": {"remove": NO_TOOLS}})
    # Drawn in place of a figure with a long legend, plotly would keep that one's margins and have no room left.
    figure.update_layout(margin={"autoexpand": False})
    figure.update_yaxes(visible=False)
    text = "<br>".join(plain(line, limit=None) for line in lines)
    return figure.add_annotation(text=text, align="left", showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")


@dataclass(frozen=True)
class StepScale:
    """Where a training step stands on the x axis; step 0 has its place also among log-spaced checkpoints."""

    ticks: tuple[int, ...]
    unit: float | None  # None: linear; else position = log10(1 + step / unit)

    @classmethod
    def over(cls, steps: Iterable[int]) -> StepScale:
        """Log-like for log-spaced checkpoints (the last gap dwarfs the first), linear for even ones."""
        found = sorted(set(steps))
        positive = [step for step in found if step > 0]
        if len(positive) < 3 or positive[-1] - positive[-2] <= 4 * (positive[1] - positive[0]):
            return cls(ticks=(), unit=None)
        scale = cls(ticks=(), unit=float(positive[0]))
        return cls(ticks=scale._spaced(found[0], found[-1]), unit=scale.unit)

    def position(self, step: float) -> float:
        """The x coordinate of a step."""
        return float(step) if self.unit is None else math.log10(1 + step / self.unit)

    def _spaced(self, first: int, last: int) -> tuple[int, ...]:
        """0 and round numbers, none so close to another that their labels would touch."""
        room = (self.position(last) - self.position(first)) / 5  # in a panel of 230 pixels: "20,000" with a gap
        decades = [10**power for power in range(12) if first < 10**power <= last]
        between = [head * 10**power for power in range(12) for head in (2, 5) if first < head * 10**power <= last]
        kept = [first]
        for tick in decades + between:
            if all(abs(self.position(tick) - self.position(other)) > room for other in kept):
                kept.append(tick)
        return tuple(sorted(kept))

    def axis(self) -> dict[str, Any]:
        """The plotly settings of an x axis on this scale."""
        if self.unit is None:
            return {"title": {"text": "training step"}, "rangemode": "tozero"}
        places = [self.position(tick) for tick in self.ticks]
        title = {"text": "training step (log scale, with 0)"}
        return {"title": title, "tickvals": places, "ticktext": [f"{tick:,}" for tick in self.ticks]}
