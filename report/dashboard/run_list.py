"""The list of runs: one line each, under the sweep it belongs to, with a dot in the colour of its curve.

A line is a check box as a button: the page's script keeps what is chosen, so that a list drawn anew cannot undo a
click. Text from data is only ever a child or an attribute, which React escapes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from dash import html

from .listed_runs import Listed, alert_words, short_words, state_words
from .page import attributes


def runs_list(runs: Sequence[Listed], chosen: Collection[str], *, now: float, narrowed: str = "") -> list[Any]:
    """The runs to choose from, by the folder each stands in.

    Args:
        narrowed: what the list was narrowed by, in words; for a list that nothing is left of.
        now: seconds since the epoch, for "2 min ago".
    """
    if not runs:
        none = f"No run matches {narrowed}." if narrowed else ""
        return [
            html.P(none or "There are no runs in this folder yet; they appear here when they begin.", role="status")
        ]
    sections = []
    groups: dict[str, list[Listed]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    for group, listed in groups.items():
        begun = [one for one in listed if one.state != "not begun"]
        waiting = [html.Div(one.name, className="waits") for one in listed if one.state == "not begun"]
        parts = [_heading(group, len(listed), bool(begun)), *(_line(one, one.key in chosen, now) for one in begun)]
        if waiting:
            parts.append(html.Details([html.Summary(f"{len(waiting)} not begun", className="note"), *waiting]))
        sections.append(html.Section(parts, className="sweep"))
    return sections


def chosen_states(runs: Sequence[Listed], gone: Sequence[str], *, now: float) -> list[html.P]:
    """How far the chosen runs are, why they failed, and how to go on; nothing of finished ones."""
    told = [
        html.P([html.B(run.name), f": {state_words(run, now)}"], className=f"note {_look(run)}")
        for run in runs
        if run.state != "finished"
    ]
    return told + [html.P(f"no run {key!r} in this folder (any more)", className="note problem") for key in gone]


def _heading(group: str, count: int, pickable: bool) -> html.Div:
    name = group or "runs"
    every = [
        html.Button(word, className="quiet", title=tip, **attributes(data_every=word, aria_label=tip))
        for word, tip in (("all", f"choose every run of {name}"), ("none", f"choose no run of {name}"))
    ]
    return html.Div([html.H3(f"{name} ({count})"), *(every if pickable else [])], className="sweep-head")


def _line(run: Listed, chosen: bool, now: float) -> html.Button:
    parts = [
        html.Span(className="tick"),
        html.Span(className="dot", **attributes(data_dot=run.key)),
        html.Span(run.name, className="name"),
        html.Span(short_words(run, now), className=f"state {_look(run)}"),
    ]
    said = "; ".join(filter(None, [state_words(run, now), alert_words(run)]))
    told: dict[str, Any] = {"role": "checkbox", "aria-checked": str(chosen).lower(), "data-run": run.key}
    return html.Button(parts, className="run", title=f"{run.key}: {said}", **told)


def _look(run: Listed) -> str:
    return "problem" if run.state in ("failed", "damaged") or run.alerted else run.state.replace(" ", "-")
