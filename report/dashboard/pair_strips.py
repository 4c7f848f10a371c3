"""An opened pair as Dash components: its numbers, and its two queries as strips of tokens coloured by attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from dash import html

from ...probes.figures.theme import OKABE_ITO, interval_text
from ..asking.read_query import ReadQuery
from .open_pair import SAME, OpenedPair, disagreement
from .page import notes, number_table

_BRIGHT = 0.18  # the luminance from which black is read better than white; both reach 4.5 to 1 there


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
        of_evidence = [_number(float(row[f"{name}_{side}"])) for name in ("score", "weight")]
        places = [str(row[f"distance_{side}"]), str(row[f"offset_{side}"])]
        numbers.append([side, *places, *of_evidence, _number(query.probability)])
    # Of one token that is every P(target); of several, Ask and the readings reveal one after another.
    several = opened.hidden and any(query.parts.count("target") > 1 for query in (opened.forward, opened.reverse))
    columns = ["direction", "distance (tokens)", "offset (tokens)", "score (pre-softmax)", "weight on evidence"]
    shown = number_table(
        pd.DataFrame(numbers, columns=[*columns, f"probability of target{', all its tokens hidden' * several}"])
    )
    where = f"fact {row['fact']}, pair {row['pair']}, layer {layer}, head {head}"
    key = (
        "Colour and number: attention weight from the readout row, 0 (white) to 1 (blue). Dashed: target"
        f"{' (hidden from the model)' if opened.hidden else ' (the model reads before it)'}; solid: evidence."
    )
    return [html.H3(where), html.Div(shown, className="wide"), *said, *strips, *notes([key])]


def _number(value: float) -> str:
    return interval_text(value, math.nan, math.nan, digits=4)


def token_strip(query: ReadQuery, layer: int, head: int, *, hidden: bool) -> html.Div:
    """A query's tokens coloured by the readout row's attention; a layer without attention says so."""
    if layer not in query.weights:
        return html.Div(notes([f"layer {layer} has no softmax attention"]))
    strip = []
    for text, part, weight in zip(query.tokens, query.parts, query.weights[layer][head], strict=True):
        title = f"{part or 'context'} {text}: attention weight {weight:.4f}"
        shown, name = f"[{text}]" if part == "target" and hidden else text, f"token {part}".strip()
        strip.append(
            html.Span([shown, html.Small(f"{weight:.2f}")], className=name, style=shade(float(weight)), title=title)
        )
    return html.Div(strip, className="strip")


def shade(weight: float, colour: str = OKABE_ITO["blue"]) -> dict[str, str]:
    """A cell's colour from white (0) to a colour (1), and the ink that is read on it."""
    part, full = (
        float(np.clip(np.nan_to_num(weight), 0, 1)),
        (int(colour[start : start + 2], 16) for start in (1, 3, 5)),
    )
    red, green, blue = (round(255 + part * (one - 255)) for one in full)
    ink = "#000001" if luminance(red, green, blue) >= _BRIGHT else "#ffffff"
    return {"background": f"rgb({red},{green},{blue})", "color": ink}


def luminance(red: float, green: float, blue: float) -> float:
    """The relative luminance of a colour of 0 to 255, as WCAG 2 defines it."""
    linear = [
        one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in np.divide((red, green, blue), 255)
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
