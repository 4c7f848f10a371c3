"""The gradient probe's statistic by role, layer or both for a whole reading at once, with intervals over facts.

`Reading.summary(by=...)` gives the same numbers one by one; a page over many checkpoints needs them in one pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from .estimators import pair_cosines
from .resampling import resampled_facts

NOTHING = "none"  # the layer of a parameter that belongs to no layer: embeddings, the final norm


def cell_cosines(frame: pd.DataFrame, by: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Mean per-pair cosine of the forward and reverse gradient for each value of the columns `by`.

    Returns: `[*by, low, high, n, value, control]`, the control being that of shuffled facts (NaN where the reading has
        none); low and high are the 95 % interval by resampling facts.
    """
    keys = list(by)
    labelled = frame.assign(**{key: frame[key].astype(object).where(frame[key].notna(), NOTHING) for key in keys})
    cells = labelled[keys].drop_duplicates(ignore_index=True)
    cell = labelled.groupby(keys, sort=False).ngroup().to_numpy() if keys else np.zeros(len(frame), dtype=np.int64)
    pair, pairs = pd.factorize(frame["pair"], sort=True)
    facts = frame["fact"].to_numpy()[np.unique(pair, return_index=True)[1]].astype(str)
    # Every pair of every cell stands as a pair of its own, so that one pass serves all cells.
    found = pair_cosines(labelled.assign(pair=cell * len(pairs) + pair))
    values, null = np.full((2, len(pairs), len(cells) if keys else 1), np.nan)
    at = found.index.to_numpy() % len(pairs), found.index.to_numpy() // len(pairs)
    values[at] = found["cosine"]
    null[at] = found.get("cosine_control", np.nan)
    low, high = _intervals(values, facts, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN is an undefined cell, or has no control
        numbers = {"value": np.nanmean(values, axis=0), "control": np.nanmean(null, axis=0)}
    table = cells if keys else pd.DataFrame(index=range(1))
    return table.assign(low=low, high=high, n=np.isfinite(values).sum(0), **numbers)


def _intervals(values: np.ndarray, facts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of each column's mean over defined rows. Shapes: `pair cell, pair -> cell, cell`."""
    low, high = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    defined = np.isfinite(values)
    # Columns with the same pairs defined resample the same facts, so each such set of columns is one product.
    patterns, of_pattern = np.unique(defined, axis=1, return_inverse=True)
    for place, rows in enumerate(patterns.T):
        index = np.unique(facts[rows], return_inverse=True)[1]
        if not len(index) or index.max() < 1:
            continue
        columns = np.flatnonzero(of_pattern.reshape(-1) == place)
        sums = np.zeros((index.max() + 1, len(columns)))
        np.add.at(sums, index, values[rows][:, columns])
        draws = resampled_facts(len(sums), seed=seed)
        drawn = (draws @ sums) / (draws @ np.bincount(index))[:, None]
        low[columns], high[columns] = np.percentile(drawn, [2.5, 97.5], axis=0)
    return low, high
