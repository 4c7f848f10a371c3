"""The gradient probe's statistic by role, layer or both for a whole reading at once, with intervals over facts.

`Reading.summary(by=...)` gives the same numbers one by one; a page over many checkpoints needs them in one pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from .estimates import pair_cosines
from .statistics import resampled_facts

NOTHING = "none"  # the layer of a parameter that belongs to no layer: embeddings, the final norm


def cell_cosines(frame: pd.DataFrame, by: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Mean per-pair cosine of the forward and reverse gradient for each value of the columns `by`.

    Returns: `[*by, value, low, high, n, control]`, the control being that of deranged facts (NaN where the reading has
        none); low and high are the 95 % interval by resampling facts.
    """
    keys = list(by)
    labelled = frame.assign(**{key: frame[key].astype(object).where(frame[key].notna(), NOTHING) for key in keys})
    parts = labelled.groupby(keys, sort=False) if keys else [((), labelled)]
    rows = []
    cosines: list[pd.DataFrame] = []
    for value, part in parts:
        rows.append(dict(zip(keys, value, strict=True)))
        cosines.append(pair_cosines(part))
    table = pd.DataFrame(rows, index=range(len(cosines)))
    facts = pd.concat([one["fact"] for one in cosines])
    facts = facts[~facts.index.duplicated()].sort_index()
    values = np.stack([one["cosine"].reindex(facts.index).to_numpy(dtype=float) for one in cosines], axis=1)
    low, high = _intervals(values, facts.to_numpy().astype(str), seed)
    nothing = pd.Series(np.nan, index=facts.index)
    null = [float(one.get("cosine_control", nothing).mean()) for one in cosines]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN is an undefined cell
        mean = np.nanmean(values, axis=0)
    return table.assign(value=mean, low=low, high=high, n=np.isfinite(values).sum(0), control=null)


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
