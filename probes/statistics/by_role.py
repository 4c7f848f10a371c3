"""The gradient probe's statistic by role, layer or both for a whole reading at once, with intervals over facts.

`Reading.summary(by=...)` gives the same numbers one by one; a page over many checkpoints needs them in one pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from .estimators import pair_cosines
from .intervals import COSINE, mean_intervals, two_way_intervals
from .resampling import Facts

# As a token passes through a model: the order of every table and figure by role.
NETWORK = ("embed", "position", "q", "k", "v", "qkv", "o", "mlp", "norm", "unembed", "other")
NOTHING = "none"  # the layer of a parameter that belongs to no layer: embeddings, the final norm


def in_network_order(values: pd.Series) -> pd.Series:
    """A sort key: roles as they follow in a model, unknown ones after them; anything else as it is."""
    if values.name != "role":
        return values
    place = {role: number for number, role in enumerate(NETWORK)}
    return values.map(lambda role: (place.get(role, len(place)), str(role)))


def cell_cosines(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean per-pair cosine of the forward and reverse gradient for each value of the columns `by`.

    Returns: `[*by, low, high, n, facts, value, control]`, the control being that of shuffled facts (NaN where the
        reading has none); low and high are the 95 % interval over facts. Roles stand in the network's order.
    """
    keys = list(by)
    labelled = frame.assign(**{key: frame[key].astype(object).where(frame[key].notna(), NOTHING) for key in keys})
    cells = labelled[keys].drop_duplicates(ignore_index=True)
    cell = labelled.groupby(keys, sort=False).ngroup().to_numpy() if keys else np.zeros(len(frame), dtype=np.int64)
    pair, pairs = pd.factorize(frame["pair"], sort=True)
    facts = Facts.of_pairs(frame)
    # Every pair of every cell stands as a pair of its own, so that one pass serves all cells.
    found = pair_cosines(labelled.assign(pair=cell * len(pairs) + pair))
    values, null = np.full((2, len(pairs), len(cells) if keys else 1), np.nan)
    at = found.index.to_numpy() % len(pairs), found.index.to_numpy() // len(pairs)
    values[at] = found["cosine"]
    null[at] = found.get("cosine_control", np.nan)
    defined, index = np.isfinite(values), np.unique(facts.unit, return_inverse=True)[1]
    there, label = np.unique(facts.label, return_inverse=True)
    of_fact = np.zeros((len(there), values.shape[1]), dtype=np.int64)
    np.add.at(of_fact, label, defined)
    sums, counts = np.zeros((2, index.max() + 1, values.shape[1]))
    np.add.at(sums, index, np.where(defined, values, 0.0))
    np.add.at(counts, index, defined)
    value, low, high = mean_intervals(sums, counts, bounds=COSINE)
    if (ways := facts.ways) is not None:
        value, low, high = two_way_intervals(values, ways, bounds=COSINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN has no control
        numbers = {"value": value, "control": np.nanmean(null, axis=0)}
    table = cells if keys else pd.DataFrame(index=range(1))
    table = table.assign(low=low, high=high, n=defined.sum(0), facts=(of_fact > 0).sum(0), **numbers)
    if "role" not in keys:
        return table
    return table.sort_values("role", key=in_network_order, kind="stable", ignore_index=True)
