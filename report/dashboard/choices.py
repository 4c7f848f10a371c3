"""From what a visitor asks for to what the folder has: a view without wishes that cannot be met, and what is offered.

Names are looked up in the list of runs and never joined to a path.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from ...errors import RevprobeError
from .folder import RunsFolder
from .listed_runs import Listed
from .view import ALL, FILTERS, LAST, View
from .views import ATTENTION, fact_pairs, filter_values, filtered, reading_at

Options = list[dict[str, Any]]
RECENT = 2.0  # seconds for which a look at the folder answers what follows from it
_INTO_A_CHECKPOINT = ("checkpoint", "pair", "ask")


@dataclass(frozen=True)
class Settled:
    """A view that holds, and what can be chosen instead.

    Attributes:
        address: the view's address, without what a visitor of this folder would see anyway.
        shown: the chosen runs that the filters let through, in the order of the list.
        gone: chosen runs that the folder does not have (any more).
        offers: options by the name of what they are for.
    """

    view: View
    address: str
    shown: list[Listed]
    gone: list[str]
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
    if view.tab in _INTO_A_CHECKPOINT:
        view, more = _into_a_checkpoint(folder, view)
        offers |= more
    said = replace(view, runs=None if chosen == usual else chosen, run=None if view.run in inside[:1] else view.run)
    return Settled(view, said.address(), shown, [key for key in wanted if key not in chosen], offers)


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
    for name in ("layer", "head"):
        found = sorted(int(value) for value in frame[name].unique())
        kept = getattr(view, name)
        settled: dict[str, Any] = {name: kept if kept in found else ALL}
        view = replace(view, **settled)
        offers[name] = [{"label": "all", "value": ALL}, *({"label": str(one), "value": one} for one in found)]
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
    offers["stored"] = [{"label": "EMA" if kind == "ema" else kind, "value": kind} for kind in kinds]
    step = view.step if view.step in steps else LAST
    return replace(view, step=step, stored=view.stored if view.stored in kinds else kinds[0]), offers


def _pair(frame: pd.DataFrame, view: View) -> tuple[View, Options]:
    options = fact_pairs(frame, view.fact)
    values = [option["value"] for option in options]
    return replace(view, pair=view.pair if view.pair in values else next(iter(values), None)), options
