"""From the rows of a causal trace, or of a ranking of heads, to numbers: the reading's own, and one for each place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .estimators import Measured, with_control
from .intervals import mean_intervals


def causal_trace(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Mean effect (nats) over pairs of a state put back, each pair's mean over the places that the frame has.

    Reverse queries, unless the frame holds forward ones alone.
    """
    rows = frame[frame["direction"] == "reverse"] if (frame["direction"] == "reverse").any() else frame
    statistic = f"mean effect of a clean state on the corrupted {rows['direction'].iloc[0]} query (nats)"
    method = "the state of a third fact at the same place"
    return _over_pairs(rows, "effect", "effect_control", statistic, method)


def head_ranking(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Mean effect (nats) over held-out pairs of editing single top heads, each pair's mean over those in the frame."""
    statistic = "mean effect of single top heads on facts that they were not ranked by (nats)"
    return _over_pairs(frame, "effect", "effect_control", statistic, "random heads of the same layers, same facts")


def _over_pairs(rows: pd.DataFrame, value: str, null: str, statistic: str, method: str) -> Measured:
    """Each pair's mean of a column beside that of its control, and over facts; what is undefined, in pairs."""
    columns = [column for column in (value, null) if column in rows]
    table = rows.groupby("pair", sort=True)[columns].mean().join(rows.drop_duplicates("pair").set_index("pair")["fact"])
    own, facts = table[value].to_numpy(dtype=np.float64), table["fact"].to_numpy().astype(str)
    undefined = _pairs_by_reason(rows, "reason")
    if null not in rows:
        return with_control(own, None, facts, undefined, statistic)
    undefined |= _pairs_by_reason(rows[rows["reason"] == ""], "reason_control")
    counted = np.zeros(len(table), dtype=bool)  # just now, by reason
    beside = table[null].to_numpy(dtype=np.float64)
    return with_control(own, beside, facts, undefined, statistic, alone=counted, method=method)


def _pairs_by_reason(rows: pd.DataFrame, column: str) -> dict[str, int]:
    """Pairs that have a row with each reason."""
    some = rows.loc[rows[column] != "", ["pair", column]].drop_duplicates()
    return {str(reason): int(count) for reason, count in some[column].astype(str).value_counts().items()}


def place_means(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """The mean of a column over facts for each combination of `by`, with its 95 % interval, all in one pass.

    A pair counts by its mean over the rows of a combination; undefined rows are left out.
    Returns: by..., value, low, high, n (pairs), facts.
    """
    rows = frame.dropna(subset=[value])
    if rows.empty:
        return pd.DataFrame(columns=[*by, "value", "low", "high", "n", "facts"])
    keys = rows.groupby([*by], sort=True, dropna=False, observed=True)
    cell, places = keys.ngroup().to_numpy(), keys.size().index.to_frame(index=False)
    pair, fact = pd.factorize(rows["pair"])[0], pd.factorize(rows["fact"])[0]
    shape = pair.max() + 1, len(places)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (pair, cell), rows[value].to_numpy(dtype=np.float64))
    np.add.at(counts, (pair, cell), 1.0)
    means, there = np.divide(sums, counts, out=np.zeros(shape), where=counts > 0), (counts > 0).astype(float)
    fact_of = np.zeros(shape[0], dtype=int)
    fact_of[pair] = fact
    by_fact = np.zeros((2, fact.max() + 1, len(places)))
    np.add.at(by_fact[0], fact_of, means)
    np.add.at(by_fact[1], fact_of, there)
    with np.errstate(invalid="ignore", divide="ignore"):
        found, low, high = mean_intervals(*by_fact)
    sizes = {"n": there.sum(0).astype(int), "facts": (by_fact[1] > 0).sum(0)}
    return places.assign(value=found, low=low, high=high, **sizes)
