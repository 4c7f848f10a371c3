"""An answer as Dash components: the edit's numbers with their control, and both queries beside each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from dash import html

from ...probes.figures.theme import OKABE_ITO, interval_text
from ..asking.answer import Answer, AnsweredQuery
from ..asking.edits import EDITS, ROUTE
from ..asking.read_query import ReadQuery
from .page import attributes, notes, number_table
from .pair_strips import shade

NO_CHOICE = {"mask": "Choose a token below: it is masked, and the model asked again.", "swap": "Choose other evidence."}
NAMES = {"forward": "forward query", "reverse": "reverse query", "query": "the sentence"}


def answered(found: Answer, *, layer: int | None, head: int | None) -> list[Any]:
    """Everything that is shown of one answer; the strips are of a layer and head, of their mean where None."""
    where = "mean over layers" if layer is None else f"layer {layer}"
    where += ", mean over heads" if head is None else f", head {head}"
    sides = [html.Section(_side(found, one, layer, head), className="side") for one in found.queries]
    reads = "hidden from the model" if found.hidden else "the model reads before it"
    key = [
        f"Colour and number of a token: attention weight from the readout row ({where}), 0 (white) to 1 (blue). "
        f"Dashed: the target ({reads}); solid: the evidence."
    ]
    if found.edit.name == "mask":
        key.append("Masked alone: change of the target's log-probability, nats; orange falls, blue rises.")
    if found.maskable:
        key.append("A token can be chosen, by click or key: it is masked, and the model asked again.")
    return [html.H3(f"fact {found.fact}"), *_numbers(found), html.Div(sides, className="sides"), *notes(key)]


def _numbers(found: Answer) -> list[Any]:
    """The edit's change of the log-probability, with its control, a row for each direction."""
    edit = found.edit
    if edit.name == "none":
        return []
    title = EDITS[edit.name] + (f", {edit.where}" if edit.name in ROUTE else "")
    title += f", odds x {edit.factor:g}" if edit.name == "scale" else ""
    title += f": {edit.called}" if edit.name == "swap" and edit.called else ""
    title += f": {_masked_token(found)}" if edit.name == "mask" and len(found.numbers) else ""
    if not len(found.numbers):
        return [html.H3(f"Edit: {title}"), *notes([NO_CHOICE[edit.name]])]
    columns = ["query", "log P(target), nats", "after the edit", "change", "control's change", "change less control's"]
    rows, told = [], []
    for row in found.numbers.to_dict("records"):
        values = [row[name] for name in ("log_probability", "log_probability_edited", "change", "change_control")]
        shown = [*values, row["change"] - row["change_control"]]
        rows.append([NAMES[row["direction"]], *(_number(value) for value in shown)])
        told += [f"{NAMES[row['direction']]}: {row[name]}" for name in ("reason", "reason_control") if row[name]]
    controls = list(dict.fromkeys(row for row in found.numbers["control"] if row))
    said = [f"Control: {'; '.join(controls)}. One pair: a change without an interval."] if controls else []
    table = number_table(pd.DataFrame(rows, columns=columns))
    label = attributes(aria_label="what the edit changes")
    shown_table = html.Div(table, className="wide", id="changes", tabIndex="0", role="region", **label)
    return [html.H3(f"Edit: {title}"), shown_table, *notes(said), *notes(list(dict.fromkeys(told)), problem=True)]


def _masked_token(found: Answer) -> str:
    place = found.edit.place
    assert place is not None, "a token was masked"
    return next(one.read.tokens[place[1]] for one in found.queries if one.direction == place[0])


def _side(found: Answer, one: AnsweredQuery, layer: int | None, head: int | None) -> list[Any]:
    place = found.edit.at if found.edit.name == "mask" else None
    # A pair that is opened says the other number of such a target: all its tokens hidden together.
    chain = ", one token revealed after another," if found.hidden and one.read.parts.count("target") > 1 else ""
    number = interval_text(float(np.exp(one.log_probability)), np.nan, np.nan, digits=4)
    probability = f"P(target){chain} {number} (log {_number(one.log_probability)} nats), rank {one.rank:g}"
    shown: list[Any] = [html.H3(NAMES[one.direction]), *notes([probability])]
    shown.append(
        _strip(one.read, one.direction, layer, head, hidden=found.hidden, maskable=found.maskable, place=place)
    )
    if one.by_token is not None:
        shown += [*notes(["masked alone"]), _changes(one)]
    if one.edited is not None:
        shown += [*notes(["after the edit"]), _strip(one.edited, one.direction, layer, head, hidden=found.hidden)]
    return [*shown, _tops(one), *notes([f"After the edit: {one.unshown}."] if one.unshown else [])]


def _strip(
    read: ReadQuery,
    direction: str,
    layer: int | None,
    head: int | None,
    *,
    hidden: bool,
    maskable: bool = False,
    place: str | None = None,
) -> html.Div:
    """A query's tokens coloured by attention; those that can be masked are buttons."""
    weights = read.weights_at(layer, head)
    strip: list[Any] = []
    for at, (text, part) in enumerate(zip(read.tokens, read.parts, strict=True)):
        weight = float("nan") if weights is None else float(weights[at])
        shown = f"[{text}]" if part == "target" and hidden else text
        told: dict[str, Any] = {"className": f"token {part}".strip(), "style": shade(weight)}
        told["title"] = f"{part or 'context'} {text}: attention weight {weight:.4f}"
        inside: list[Any] = [shown, html.Small("-" if np.isnan(weight) else f"{weight:.2f}")]
        name = f"{direction}-{at}"
        if maskable and part != "target":
            told["className"] += " chosen" if name == place else ""
            pressed = attributes(data_at=name, aria_pressed=str(name == place).lower())
            strip.append(html.Button(inside, **told, **pressed))
        else:
            strip.append(html.Span(inside, **told))
    return html.Div(strip, className="strip")


def _changes(one: AnsweredQuery) -> html.Div:
    """What masking each token alone does to the log-probability."""
    assert one.by_token is not None, "there is an edit that masks"
    largest = float(np.nanmax(np.abs(one.by_token), initial=1e-9))
    strip: list[Any] = []
    for text, part, change in zip(one.read.tokens, one.read.parts, one.by_token, strict=True):
        colour = OKABE_ITO["blue" if change > 0 else "orange"]
        look = shade(0.0 if np.isnan(change) else abs(float(change)) / largest, colour)
        label = "" if np.isnan(change) else f"{change:+.2f}"
        title = f"{text} masked alone: {change:+.4f} nats" if label else f"{text}: not masked alone"
        inside: list[Any] = [text, html.Small(label or "-")]
        strip.append(html.Span(inside, className=f"token {part}".strip(), style=look, title=title))
    return html.Div(strip, className="strip changes")


def _tops(one: AnsweredQuery) -> html.Div:
    """The likeliest tokens of each hidden place, before and after the edit; the right one in bold."""
    sides = {"as it is" if one.top_edited is not None else "likeliest": one.top}
    sides |= {} if one.top_edited is None else {"after the edit": one.top_edited}
    # After an edit the same place may have another number.
    ranked: dict[str, list[Any]] = {
        name: [part.to_dict("records") for _, part in top.groupby("position")] for name, top in sides.items()
    }
    tables = []
    count = len(next(iter(ranked.values())))
    for number in range(count):
        rows = {name: places[number] for name, places in ranked.items()}
        of = f", hidden token {number + 1} of {count}" if count > 1 else ""
        names = [f"{name}{of if place == 0 else ''}" for place, name in enumerate(rows)]
        head = [html.Th(text, scope="col") for name in names for text in ("rank", name, "P")]
        body = [
            html.Tr([cell for part in rows.values() for cell in _prediction(part[at] if at < len(part) else None)])
            for at in range(max(map(len, rows.values())))
        ]
        tables.append(html.Table([html.Thead(html.Tr(head)), html.Tbody(body)], className="top"))
    label = attributes(aria_label=f"likeliest tokens, {NAMES[one.direction]}")
    return html.Div(tables, className="wide tops", tabIndex="0", role="region", **label)


def _prediction(row: dict[str, Any] | None) -> list[Any]:
    if row is None:
        return [html.Td(""), html.Td(""), html.Td("")]
    name = "right" if row["is_target"] else ""
    token = [row["text"], html.Span(" (the target)", className="label")] if row["is_target"] else row["text"]
    return [html.Td(text, className=name) for text in (f"{row['rank']:,}", token, _probability(row["probability"]))]


def _probability(value: float) -> str:
    """Four decimals, and a power of ten for what they would call 0."""
    return f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def _number(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.4f}"
