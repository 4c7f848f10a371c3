"""The attention probe's statistic for everything, each layer and each head at once, with intervals over facts.

`Reading.summary(by=["layer", "head"])` gives the same numbers one by one; a page over many checkpoints of a model with
a thousand heads needs them in one pass.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from .group_correlation import LEAST_FACTS, Layout, Moments, facts_of_groups, jackknife_intervals
from .resampling import Facts

NO_HEAD = -1


def head_correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Within-group correlation of forward and reverse scores, mean over heads, by layer, and by head.

    Groups of at least LEAST_FACTS facts give one correlation each; a head none of whose groups is that large has its
    deviations from group means pooled. A layer is the mean over its heads' groups, everything that over all.

    Args:
        frame: of an attention reading.
    Returns: `layer, head, value, low, high`, first everything (layer and head missing), then layers (head missing),
        then heads; low and high are the 95 % interval over facts, NaN where it or the value is undefined.
    """
    places, scores, facts, groups = score_table(frame.dropna(subset=["head"]))  # layers without softmax attention
    forward, reverse = scores
    large = facts_of_groups(facts, groups, forward, reverse) >= LEAST_FACTS
    # Where facts share prompts in chains, there are several ways to leave some out.
    found = [_left_out(Layout.of(way, groups), forward, reverse, large) for way in facts.ways or (facts.unit,)]
    sums, counts, small = found[0][:3]
    units = [np.ones(len(places), dtype=bool), *(places[:, 0] == layer for layer in np.unique(places[:, 0]))]
    # As in the reading: where some head has a large group, those that have none are left out of the mean.
    units = [unit & ~small if (unit & ~small).any() else unit for unit in units]
    units += list(np.eye(len(places), dtype=bool))
    member = np.stack(units, axis=1).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (sums @ member) / (counts @ member)
        jackknives = [((rest @ member) / (number @ member), (there @ member) > 0) for *_, rest, number, there in found]
    lows, highs = jackknife_intervals(values, *jackknives[0], further=jackknives[1:])
    layers = [pd.NA, *np.unique(places[:, 0]), *places[:, 0]]
    heads_of = [pd.NA] * (len(units) - len(places)) + list(places[:, 1])
    table = pd.DataFrame({"layer": layers, "head": heads_of}, dtype="Int64")
    return table.assign(value=values, low=lows, high=highs)


def _left_out(layout: Layout, forward: np.ndarray, reverse: np.ndarray, large: np.ndarray) -> list[np.ndarray]:
    """Sum and number of each head's correlations, whether it was pooled, both without each fact, and what it rests on.

    Shapes: `-> head, head, head, fact head, fact head, fact head`.
    """
    heads = [_of_heads(moments, part) for moments, part in layout.blocks(forward, reverse, large)]
    sums, counts, rest, rest_counts, counting, small = (
        np.concatenate(part, axis=-1) for part in zip(*heads, strict=True)
    )
    used = np.isfinite(forward) & np.isfinite(reverse) & counting[layout.group]
    present = np.stack([np.bincount(layout.fact, head, layout.n_facts) > 0 for head in used.T.astype(float)], axis=1)
    return [sums, counts, small, rest, rest_counts, present]


def score_table(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, Facts, np.ndarray]:
    """Layer and head of a frame's heads, its scores as one array, and each pair's fact and group.

    Shapes: `-> head 2, 2 pair head, pair, pair`; pairs and heads in ascending order. A layer without softmax attention
    has one head, NO_HEAD.
    """
    numbered = frame[["layer", "head"]].fillna({"head": NO_HEAD}).astype(np.int64)
    head = numbered.groupby(["layer", "head"], sort=True).ngroup().to_numpy()
    places = numbered.to_numpy()[np.unique(head, return_index=True)[1]]
    pair, pairs = pd.factorize(frame["pair"], sort=True)
    scores = np.full((2, len(pairs), len(places)), np.nan)
    for place, column in enumerate(("score_forward", "score_reverse")):
        scores[place, pair, head] = frame[column].to_numpy(dtype=np.float64)
    scores[~np.isfinite(scores)] = np.nan
    first = np.unique(pair, return_index=True)[1]
    return places, scores, Facts.of_pairs(frame), frame["group"].to_numpy()[first]


def _of_heads(moments: Moments, large: np.ndarray) -> list[np.ndarray]:
    """Sum and number of each head's correlations, whole and without each fact; the groups that have a part in them; and
    whether the head was pooled.

    Shapes: `group head -> head, head, fact head, fact head, group head, head`.
    """
    found: list[list[np.ndarray]] = []
    for pooled in (False, True):
        of_kind = ~large.any(0) if pooled else large.any(0)
        parts: list[np.ndarray] = []
        for values, axis in ((moments.correlations(large, pooled), 0), (moments.left_out(large, pooled), 1)):
            defined = np.isfinite(values) & of_kind
            parts += [np.where(defined, values, 0.0).sum(axis), defined.sum(axis)]
        found.append([*parts, (moments.counting(large, pooled) & of_kind).astype(int)])
    *sums, counting = (whole + small for whole, small in zip(*found, strict=True))
    return [*sums, counting > 0, ~large.any(0)]
