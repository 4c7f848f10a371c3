"""From rows of edits (route edits, causal traces, rankings of heads) to numbers: the whole reading's, and each place's.

A pair counts by its mean over its cells (layers, heads, places), beside its control over the same cells. Where some
cells have a value and no control, the mean of the values less the mean of the controls would be a difference of cells.
So a pair's excess is the mean of value less control over the cells that have both, and so is the control beside it;
where that is not all that the value rests on, the caution says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from .estimators import NO_PARTNER, NOT_FINITE, Measured, with_control
from .intervals import Bounds, mean_intervals
from .partners import partners_of_pairs
from .resampling import SHOWN_IN, Facts

EDITED = {"all": "all chosen layers and heads at once", "layer": "single layers", "head": "single heads"}
CELLS = {"all": "edits", "layer": "layers", "head": "heads"}


def route_edit(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Mean change of log-probability (nats) under the widest edit in the frame, over pairs.

    Reverse queries, unless the frame holds forward ones alone; with several layers or heads, their mean per pair.
    """
    rows = frame[frame["direction"] == "reverse"] if (frame["direction"] == "reverse").any() else frame
    widest = next(scope for scope in EDITED if (rows["scope"] == scope).any())
    statistic = f"mean change of {rows['direction'].iloc[0]} log-probability, {EDITED[widest]} (nats)"
    method = "the same change of other positions' scores, drawn at random"
    return over_cells(rows[rows["scope"] == widest], "change", statistic, method=method, cells=CELLS[widest])


def causal_trace(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Mean effect (nats) over pairs of a state put back, each pair's mean over the places that the frame has.

    Reverse queries, unless the frame holds forward ones alone.
    """
    rows = frame[frame["direction"] == "reverse"] if (frame["direction"] == "reverse").any() else frame
    statistic = f"mean effect of a clean state on the corrupted {rows['direction'].iloc[0]} query (nats)"
    method = "the state of a third fact at the same place"
    return over_cells(rows, "effect", statistic, method=method, cells="places")


def head_ranking(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Mean effect (nats) over held-out pairs of editing single top heads, each pair's mean over those in the frame."""
    statistic = "mean effect of single top heads on facts that they were not ranked by (nats)"
    return over_cells(frame, "effect", statistic, method="random heads of the same layers, same facts", cells="heads")


def over_cells(
    rows: pd.DataFrame, value: str, statistic: str, *, method: str, cells: str, bounds: Bounds | None = None
) -> Measured:
    """Mean over pairs of a column, each pair's own mean over its rows; its control is the column `<value>_control`.

    A pair counts as undefined only where none of its rows has a value; then once, with all its reasons. The same holds
    for the controls of pairs that have a value. Pairs that lack some of their rows alone are told in the caution.
    Args:
        cells: what a row of a pair is, as people call several of them: "heads".
    """
    null = f"{value}_control"
    table = rows.groupby("pair", sort=True).agg({value: "mean"})
    own, facts = table[value].to_numpy(dtype=np.float64), Facts.of_pairs(rows)
    undefined = _whole_pairs(rows, rows[value].notna(), "reason", NOT_FINITE)
    told = [_some_cells(rows, rows[value].notna(), "reason", "the value", cells)]
    if null not in rows:
        found = with_control(own, None, facts, undefined, statistic, bounds=bounds)
    else:
        valued = rows[rows[value].notna()]
        there = valued[null].notna()
        both = valued[there].groupby("pair", sort=True)[[value, null]].mean().reindex(table.index)
        undefined = dict(Counter(undefined) + Counter(_whole_pairs(valued, there, "reason_control", NO_PARTNER)))
        told.append(_some_cells(valued, there, "reason_control", "control and excess", cells))
        counted = np.zeros(len(table), dtype=bool)  # just now, by reason
        compared, beside = (both[column].to_numpy(dtype=np.float64) for column in (value, null))
        of_pairs = own, beside, facts, undefined, statistic
        kind: dict[str, Any] = {"bounds": bounds, "method": method, "partners": partners_of_pairs(rows)}
        found = with_control(*of_pairs, alone=counted, compared=compared, **kind)
    return replace(found, caution="; ".join(filter(None, [found.caution, *told])))


def _whole_pairs(rows: pd.DataFrame, there: pd.Series, column: str, unnamed: str) -> dict[str, int]:
    """Pairs of which no row is there, each once, by the reasons of its rows."""
    lacking = rows[~there.groupby(rows["pair"]).transform("any")]
    if lacking.empty:
        return {}
    why = _reasons(lacking, column).groupby(lacking["pair"]).agg(lambda some: " / ".join(sorted({*some} - {""})))
    return {str(reason) or unnamed: int(count) for reason, count in why.value_counts().items()}


def _some_cells(rows: pd.DataFrame, there: pd.Series, column: str, what: str, cells: str) -> str:
    """Which pairs have some of their rows alone, how many of them, and why; empty where none has."""
    if there.all():
        return ""
    by_pair = there.groupby(rows["pair"])
    partial = by_pair.transform("any") & ~by_pair.transform("all")
    if not partial.any():
        return ""
    lost, pairs = rows[partial & ~there], rows.loc[partial, "pair"].nunique()
    counts = _reasons(lost, column).value_counts()
    why = ", ".join(str(reason) for reason in counts.index if reason)
    left = f"{what} of {pairs:,} {'pair leaves' if pairs == 1 else 'pairs leave'} out"
    return f"{left} {len(lost):,} of {int(partial.sum()):,} {cells}" + (f" ({why})" if why else "")


def _reasons(rows: pd.DataFrame, column: str) -> pd.Series:
    """As plain texts: of categories, those that do not occur would be counted too."""
    if column not in rows:
        return pd.Series("", index=rows.index, dtype=object)
    return rows[column].astype(object).fillna("").astype(str)


def place_means(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """The mean of a column over facts for each combination of `by`, with its 95 % interval, all in one pass.

    A pair counts by its mean over the rows of a combination; undefined rows are left out.
    Returns: by..., value, low, high, n (pairs), facts.
    """
    rows = frame.dropna(subset=[value])
    if SHOWN_IN["forward"] in rows and "direction" in by and rows["direction"].nunique() > 1:
        # Which facts share a prompt is another thing in each direction.
        sides = [place_means(part, by, value) for _, part in rows.groupby("direction", observed=True)]
        return pd.concat(sides).sort_values([*by], kind="stable", ignore_index=True)
    if rows.empty:
        return pd.DataFrame(columns=[*by, "value", "low", "high", "n", "facts"])
    keys = rows.groupby([*by], sort=True, dropna=False, observed=True)
    cell, places = keys.ngroup().to_numpy(), keys.size().index.to_frame(index=False)
    pair, facts = pd.factorize(rows["pair"], sort=True)[0], Facts.of_pairs(rows)
    shape = pair.max() + 1, len(places)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (pair, cell), rows[value].to_numpy(dtype=np.float64))
    np.add.at(counts, (pair, cell), 1.0)
    means, there = np.divide(sums, counts, out=np.zeros(shape), where=counts > 0), (counts > 0).astype(float)
    unit, label = (np.unique(part, return_inverse=True)[1] for part in (facts.unit, facts.label))
    drawn, counted = np.zeros((2, unit.max() + 1, len(places))), np.zeros((label.max() + 1, len(places)))
    np.add.at(drawn[0], unit, means)
    np.add.at(drawn[1], unit, there)
    np.add.at(counted, label, there)
    with np.errstate(invalid="ignore", divide="ignore"):
        found, low, high = mean_intervals(*drawn)
    sizes = {"n": there.sum(0).astype(int), "facts": (counted > 0).sum(0)}
    return places.assign(value=found, low=low, high=high, **sizes)
