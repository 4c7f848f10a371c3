"""From what a visitor asks for to what the folder has: a view without wishes that cannot be met, and what is offered.

Names are looked up in the list of runs and never joined to a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from ...errors import RevprobeError
from ...finetune.runs.kept_tables import TABLES
from ..html.instruments import EDITED, INSTRUMENTS
from .folder import RunsFolder
from .listed_runs import Listed, ReadingFile
from .view import ALL, FILTERS, LAST, View
from .views import ATTENTION, fact_pairs, filter_values, filtered, reading_at

Options = list[dict[str, Any]]
RECENT = 2.0  # seconds for which a look at the folder answers what follows from it
PLACES = ("step", "stored", "layer", "head")  # what an instrument's figure may not depend on
_INTO_A_CHECKPOINT = ("checkpoint", "pair", "ask")


@dataclass(frozen=True)
class Settled:
    """A view that holds, and what can be chosen instead.

    Attributes:
        address: the view's address, without what a visitor of this folder would see anyway.
        shown: the chosen runs that the filters let through, in the order of the list.
        gone: chosen runs that the folder does not have (any more).
        filled: the instruments that the run looked into has something of.
        offers: options by the name of what they are for.
    """

    view: View
    address: str
    shown: list[Listed]
    gone: list[str]
    filled: list[str] = field(default_factory=list)
    offers: dict[str, Any] = field(default_factory=dict)


def settle(folder: RunsFolder, asked: View) -> Settled:
    """What is shown of `asked`: choices that the folder does not have become the first or last that it has."""
    runs = folder.scan(within=RECENT)
    keys = [run.key for run in runs]
    usual = tuple(run.key for run in runs if run.files)[:1]
    wanted = usual if asked.runs is None else asked.runs
    chosen = tuple(key for key in wanted if key in set(keys))
    inside = [key for key in keys if key in chosen]
    view = replace(asked, runs=chosen, run=asked.run if asked.run in chosen else next(iter(inside), None))
    shown = [run for run in filtered(runs, view.only, view.search) if run.key in chosen]
    offers: dict[str, Any] = {axis: filter_values(runs, axis) for axis in FILTERS}
    offers["run"] = inside
    into = next((run for run in runs if run.key == view.run), None)
    if view.tab in _INTO_A_CHECKPOINT:
        view, more = _into_a_checkpoint(folder, view)
        offers |= more
    elif view.tab in INSTRUMENTS and into is not None:
        view, more = _into_an_instrument(folder, into, view)
        offers |= more
    said = replace(view, runs=None if chosen == usual else chosen, run=None if view.run in inside[:1] else view.run)
    if offers.get("drawing") and view.drawing == offers["drawing"][0]["value"]:
        said = replace(said, drawing="")
    filled = [] if into is None else [name for name in INSTRUMENTS if drawings_of(into, name)]
    return Settled(view, said.address(), shown, [key for key in wanted if key not in chosen], filled, offers)


def drawings_of(run: Listed, tab: str) -> list[str]:
    """What of an instrument's drawings the run has something for, by their names."""
    there = {file.name for file in run.files} | set(run.tables)
    return [name for name, one in INSTRUMENTS[tab].drawings.items() if one.source in there]


def unused(view: View) -> set[str]:
    """Which of PLACES the drawing of an instrument does not depend on."""
    if view.tab not in INSTRUMENTS:
        return set()
    drawing = INSTRUMENTS[view.tab].drawings.get(view.drawing)
    if drawing is None:
        return set(PLACES)
    if drawing.source in TABLES:
        return {"step", "layer", "head"} | ({"stored"} if drawing.source != "storage_curves" else set())
    return set() if drawing.source == EDITED else {"layer", "head"}


def _into_an_instrument(folder: RunsFolder, run: Listed, view: View) -> tuple[View, dict[str, Options]]:
    """What is drawn of what the run has, at a checkpoint that was asked; where it has nothing, all stays as it is."""
    drawings, there = INSTRUMENTS[view.tab].drawings, drawings_of(run, view.tab)
    offers = _kept(view) | {"drawing": [{"label": drawings[name].words, "value": name} for name in there]}
    if not there:
        return replace(view, drawing=""), offers
    view = replace(view, drawing=view.drawing if view.drawing in there else there[0])
    source = drawings[view.drawing].source
    try:
        if source in TABLES:
            kinds = sorted(folder.table(run, source).get("weights", pd.Series(dtype=str)).dropna().unique())
            offers["stored"] = [_weights(kind) for kind in kinds]
            stored = view.stored if view.stored in kinds or not kinds else kinds[0]
            return replace(view, stored=stored), offers
        files = tuple(file for file in run.files if file.name == source)
        view, more = _checkpoint(replace(run, files=files), view)
        offers |= more
        if source == EDITED:
            frame = folder.reading(run, source, at_step(files, view.step), view.stored or "raw").frame
            view, more = _places(frame, view)
            offers |= more
    except Exception:  # the figure says why
        return view, offers
    return view, offers


def _kept(view: View) -> dict[str, Options]:
    """What was chosen on other tabs, each the one choice that is offered: a list that lacks its value would drop it."""
    names = ("step", "stored", "layer", "head", "fact", "pair", "other")
    chosen = {name: getattr(view, name) for name in names}
    return {
        name: [] if value is None else [{"label": "all" if value == ALL else str(value), "value": value}]
        for name, value in chosen.items()
    }


def at_step(files: Sequence[ReadingFile], step: int | None) -> int:
    """The step that is meant: the last of these files where the view follows the run."""
    return max(file.step for file in files) if step in (None, LAST) else int(step or 0)


def _places(frame: pd.DataFrame, view: View) -> tuple[View, dict[str, Options]]:
    """Layers and heads that a reading has; one that it has not becomes all of them."""
    offers: dict[str, Options] = {}
    for name in ("layer", "head"):
        found = sorted(int(value) for value in frame[name].dropna().unique())
        kept = getattr(view, name)
        settled: dict[str, Any] = {name: kept if kept in found else ALL}
        view = replace(view, **settled)
        offers[name] = [{"label": "all", "value": ALL}, *({"label": str(one), "value": one} for one in found)]
    return view, offers


def _weights(kind: str) -> dict[str, Any]:
    return {"label": "EMA" if kind == "ema" else kind, "value": kind}


def _into_a_checkpoint(folder: RunsFolder, view: View) -> tuple[View, dict[str, Options]]:
    nothing: dict[str, Options] = {name: [] for name in ("step", "stored", "layer", "head", "fact", "pair", "other")}
    try:
        run = folder.run(str(view.run), within=RECENT)
    except RevprobeError:
        return view, nothing
    view, offers = _checkpoint(run, view)
    try:
        frame = reading_at(folder, run, ATTENTION, view.step, view.stored).frame
    except Exception:  # the figure says why
        return view, nothing | offers
    view, more = _places(frame, view)
    offers |= more
    facts = sorted(frame["fact"].astype(str).unique())
    view = replace(view, fact=view.fact if view.fact in facts else None)
    view, offers["pair"] = _pair(frame, view)
    others = [fact for fact in facts if fact != view.fact]
    usual = next(iter(others), None) if (view.tab, view.edit) == ("ask", "swap") else None
    view = replace(view, other=view.other if view.other in others else usual)
    offers["other"] = [{"label": fact, "value": fact} for fact in others]
    return view, nothing | offers | {"fact": [{"label": fact, "value": fact} for fact in facts]}


def _checkpoint(run: Listed, view: View) -> tuple[View, dict[str, Options]]:
    """Step and weights: a step that follows the run, and EMA where there is one."""
    steps = run.steps
    kinds = sorted({file.weights for file in run.files}) or ["raw"]
    last = [{"label": f"last (step {steps[-1]:,})", "value": LAST}] if steps else []
    offers = {"step": last + [{"label": f"step {one:,}", "value": one} for one in reversed(steps)]}
    offers["stored"] = [_weights(kind) for kind in kinds]
    step = view.step if view.step in steps else LAST
    return replace(view, step=step, stored=view.stored if view.stored in kinds else kinds[0]), offers


def _pair(frame: pd.DataFrame, view: View) -> tuple[View, Options]:
    options = fact_pairs(frame, view.fact)
    values = [option["value"] for option in options]
    return replace(view, pair=view.pair if view.pair in values else next(iter(values), None)), options
