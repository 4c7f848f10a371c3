"""The attention probe's statistic for everything, each layer and each head at once, with intervals over facts.

`Reading.summary(by=["layer", "head"])` gives the same numbers one by one; a page over many checkpoints of a model with
a thousand heads needs them in one pass. The resamples are those of the readings themselves.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from .group_correlation import LEAST_FACTS, Layout, Moments
from .resampling import resampled_facts

NO_HEAD = -1


def head_correlations(frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Within-group correlation of forward and reverse scores, mean over heads, by layer, and by head.

    Groups of at least LEAST_FACTS facts give one correlation each; a head none of whose groups is that large has its
    deviations from group means pooled. A layer is the mean over its heads' groups, everything that over all.

    Args:
        frame: of an attention reading.
        seed: of the resamples; the reading's own.
    Returns: `layer, head, value, low, high`, first everything (layer and head missing), then layers (head missing),
        then heads; low and high are the 95 % interval by resampling facts, NaN where it or the value is undefined.
    """
    places, scores, facts, groups = score_table(frame.dropna(subset=["head"]))  # layers without softmax attention
    layout = Layout.of(facts, groups)
    draws = resampled_facts(layout.n_facts, seed=seed)
    forward, reverse = scores
    large = layout.defined_facts(forward, reverse) >= LEAST_FACTS
    heads = [_of_heads(moments, part, draws) for moments, part in layout.blocks(forward, reverse, large)]
    sums, counts, drawn, drawn_counts, small = (np.concatenate(part, axis=-1) for part in zip(*heads, strict=True))
    units = [np.ones(len(places), dtype=bool), *(places[:, 0] == layer for layer in np.unique(places[:, 0]))]
    # As in the reading: where some head has a large group, those that have none are left out of the mean.
    units = [unit & ~small if (unit & ~small).any() else unit for unit in units]
    rows = [_estimate(sums[u], counts[u], drawn[:, u], drawn_counts[:, u]) for u in units]
    with np.errstate(invalid="ignore", divide="ignore"):
        values, resampled = sums / counts, drawn / drawn_counts
    lows, highs = _edges(resampled, layout.n_facts)
    numbers = np.concatenate([np.array(rows), np.stack([values, lows, highs], axis=1)])
    layers = [pd.NA, *np.unique(places[:, 0]), *places[:, 0]]
    heads_of = [pd.NA] * len(rows) + list(places[:, 1])
    table = pd.DataFrame({"layer": layers, "head": heads_of}, dtype="Int64")
    return table.assign(value=numbers[:, 0], low=numbers[:, 1], high=numbers[:, 2])


def score_table(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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
    return places, scores, frame["fact"].to_numpy()[first].astype(str), frame["group"].to_numpy()[first]


def _of_heads(moments: Moments, large: np.ndarray, draws: np.ndarray) -> list[np.ndarray]:
    """Sum and number of each head's correlations, as measured and resampled, and whether the head was pooled.

    Shapes: `group head, draw fact -> head, head, draw head, draw head, head`.
    """
    found: list[list[np.ndarray]] = []
    for pooled in (False, True):
        of_kind = ~large.any(0) if pooled else large.any(0)
        measured = moments.correlations(large, pooled)
        keep = 1 if pooled else int(large.any(1).sum())
        drawn = np.empty((len(draws), 0, 0))
        if of_kind.any() and keep:
            drawn = moments.resampled(draws, large, pooled).reshape(len(draws), keep, -1)
        parts = []
        for values, axis in ((measured, 0), (drawn, 1)):
            if not values.size:
                shape = (large.shape[1],) if axis == 0 else (len(draws), large.shape[1])
                parts += [np.zeros(shape), np.zeros(shape)]
                continue
            defined = np.isfinite(values) & of_kind
            parts += [np.where(defined, values, 0.0).sum(axis), defined.sum(axis)]
        found.append(parts)
    return [*(whole + small for whole, small in zip(*found, strict=True)), ~large.any(0)]


def _estimate(
    sums: np.ndarray, counts: np.ndarray, drawn: np.ndarray, drawn_counts: np.ndarray
) -> tuple[float, float, float]:
    """One number over several heads with its interval."""
    if not counts.sum():
        return float("nan"), float("nan"), float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = drawn.sum(1) / drawn_counts.sum(1)
    low, high = _edges(resampled[:, None], 2)
    return float(sums.sum() / counts.sum()), float(low[0]), float(high[0])


def _edges(resampled: np.ndarray, facts: int) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of each column; one fact alone has none. Shapes: `draw unit -> unit, unit`."""
    if facts < 2:
        return np.full(resampled.shape[1], np.nan), np.full(resampled.shape[1], np.nan)
    if np.isfinite(resampled).all():  # the quick way of the common case
        low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
        return low, high
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN: an undefined head has no interval
        low, high = np.nanpercentile(resampled, [2.5, 97.5], axis=0)
    return low, high
