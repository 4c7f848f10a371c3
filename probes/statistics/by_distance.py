"""The attention probe's statistic by (forward distance, reverse distance), aggregated for drawing.

`Reading.summary(by=[...])` gives the same values with an interval each; a page over many checkpoints needs the values
alone, so everything here is one pass of grouped sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import numpy as np
import pandas as pd

from .by_head import NO_HEAD, score_table
from .group_correlation import LEAST_FACTS, Layout, deviations, facts_of_groups

DISTANCES = ["distance_forward", "distance_reverse"]
OFFSETS = ["offset_forward", "offset_reverse"]
SUMS = ["forward", "reverse", "both"]


def unit_correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Pearson r of forward and reverse score per group, layer and head of an attention reading's frame.

    Returns: one row per unit, `[*DISTANCES, group, layer, head, *OFFSETS, forward, reverse, both, n, pairs, facts,
        value, reason]`: the sums of squares and products about the group's mean, how many scores and facts they rest
        on, which pairs of the group these are (a number whose n-th bit is the n-th pair), and r, which is NaN with a
        reason where fewer than 3 scores are defined or all are equal.
    """
    places, (forward, reverse), facts, groups = score_table(frame)
    layout = Layout.of(facts.unit, groups)
    sums = layout.moments(forward, reverse).groups.reshape(6, -1)
    codes, first = np.unique(groups, return_index=True)
    pair = frame.drop_duplicates("pair").sort_values("pair", ignore_index=True)
    units = pair.loc[np.repeat(first, len(places)), [*DISTANCES, "group"]].reset_index(drop=True)
    units["layer"], units["head"] = np.tile(places, (len(codes), 1)).T
    units["head"] = units["head"].astype("Int64").mask(units["head"] == NO_HEAD)
    units = units.astype(frame.dtypes[["layer", "head"]].to_dict())
    units[OFFSETS] = pair.loc[np.repeat(first, len(places)), OFFSETS].to_numpy()
    units["forward"], units["reverse"], units["both"] = deviations(sums)
    members = _members(np.isfinite(forward) & np.isfinite(reverse), layout.group)
    units["n"], units["pairs"] = sums[0].astype(int), pd.Series(members, dtype=object)
    units["facts"] = facts_of_groups(facts, groups, forward, reverse).reshape(-1)
    few, flat = units["n"] < 2, ~((units["forward"] > 0) & (units["reverse"] > 0))
    two = units["n"] == 2
    units["value"] = _ratio(units).mask(few | flat | two)
    reasons = [
        "fewer than 2 defined scores",
        "constant scores",
        "2 defined scores, whose r is 1 or -1 whatever they are",
    ]
    units["reason"] = np.select([few, flat, two], reasons, default="")
    return units


def _members(defined: np.ndarray, group: np.ndarray) -> list[int]:
    """The pairs of each group that are defined in each head, as bits. Shapes: `pair head, pair -> (group head)`."""
    found = []
    for one in range(int(group.max()) + 1):
        bits = np.packbits(defined[group == one], axis=0, bitorder="little")
        found += [int.from_bytes(column.tobytes(), "little") for column in bits.T]
    return found


def _ratio(sums: pd.DataFrame) -> pd.Series:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums["both"] / np.sqrt(sums["forward"] * sums["reverse"])).clip(-1, 1)


def distance_correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """The correlation by distance pair: the mean over groups of at least LEAST_FACTS facts, else pooled within groups.

    Returns: one row per cell, `[*DISTANCES, value, n, groups, heads, offsets, reason]`; n counts pairs once, however
        many heads; value is NaN and reason says why where no group gives a number.
    """
    return cell_correlations(unit_correlations(frame))


def cell_correlations(units: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """`distance_correlations` of units that are at hand, also for each layer or each head.

    Args:
        units: what `unit_correlations` gives.
        by: (), ("layer",) or ("layer", "head"); these columns come first in the result.
    """
    keys = [*by, *DISTANCES]
    large = units["facts"] >= LEAST_FACTS
    pooled = ~large.groupby([units[name] for name in keys]).transform("any")
    used = units[large | pooled]
    heads = [name for name in ("layer", "head") if name not in by]
    small = units[pooled].assign(free=(units["n"] - 1).clip(lower=0))
    sums = small.groupby([*keys, *heads])[[*SUMS, "free"]].sum()
    by_head = _ratio(sums).replace([np.inf, -np.inf], np.nan).mask(sums["free"] < 2)
    averaged = used[used["facts"] >= LEAST_FACTS].groupby(keys)["value"].mean()
    values = pd.concat([averaged, by_head.groupby(keys).mean()])
    # Those of a group without variance have no part in the value, nor have those of a head without one.
    valued = by_head.reindex(pd.MultiIndex.from_frame(used[[*keys, *heads]])).notna().to_numpy()
    varies = ((used["forward"] > 0) | (used["reverse"] > 0)) & valued
    counting = used[np.where(pooled[used.index], varies, used["value"].notna())]
    asked, pairs = (_pairs_of_any_head(part, keys) for part in (used, counting))
    pairs = pairs.reindex(asked.index).where(values.reindex(asked.index).notna(), asked)
    return _described(used, keys).assign(value=values, n=pairs).astype({"n": int}).reset_index()


def _pairs_of_any_head(units: pd.DataFrame, keys: list[str]) -> pd.Series:
    """How many pairs each cell's units rest on: once each, however many heads they are defined in."""
    of_group = [*keys, "group"]
    distinct = units.drop_duplicates([*of_group, "pairs"])  # as a rule every head sees the same pairs
    several = distinct.duplicated(of_group, keep=False)
    joined = distinct[several].groupby(of_group)["pairs"].agg(lambda some: reduce(or_, some).bit_count())
    counts = pd.concat([distinct[~several].set_index(of_group)["n"], joined])
    return counts.astype(np.int64).groupby(level=keys).sum()


def _described(units: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """How many groups and heads each cell has, its first four offsets, and why some of its units have no value."""
    cells = units.groupby(keys).agg(groups=("group", "nunique"), n_units=("group", "size"))
    offsets: dict[tuple[int, int], list[str]] = {}
    for *place, forward, reverse in units[DISTANCES + OFFSETS].drop_duplicates().astype(int).itertuples(index=False):
        offsets.setdefault(tuple(place), []).append(f"({forward:+d}, {reverse:+d})")
    shown = {place: ", ".join(some[:4]) + (", …" if len(some) > 4 else "") for place, some in offsets.items()}
    reasons = {
        cell: "; ".join(f"{why} ({count} groups x heads)" for why, count in part.value_counts().items())
        for cell, part in units[units["reason"] != ""].groupby(keys)["reason"]
    }
    cells["heads"] = cells.pop("n_units") // cells["groups"]
    cells["offsets"] = [shown[cell[-2:]] for cell in cells.index]
    cells["reason"] = [reasons.get(cell, "") for cell in cells.index]
    return cells
