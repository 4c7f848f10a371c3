"""From the frame of a denoising trace to its number, to its curve over steps, and to its map of attention.

The number is the probability of the target when it was written: at each target position, that which the model gave to
the target's token in the step that revealed the position; mean over the positions of a pair, then over pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .causal_trace import over_cells
from .estimators import Measured, with_control
from .intervals import FRACTION, mean_intervals
from .resampling import SHOWN_IN, Facts

# Of readings of before too, which priced another fact's target at the pair's own query.
CONTROL = "the target of one fact where another is asked about, at the same positions and steps"
NOT_WRITTEN = "nothing was written in these steps"


def denoising_trace(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Mean probability of the target when it was written; of rows of attention alone, the mean weight of the evidence.

    Reverse queries, unless the frame holds forward ones alone.
    """
    rows = frame[frame["direction"] == "reverse"] if (frame["direction"] == "reverse").any() else frame
    direction, answers = rows["direction"].iloc[0], rows[rows["part"] == "answer"]
    if answers.empty:
        statistic = f"mean attention weight of the evidence, {direction} queries, from what is still masked"
        return over_cells(rows, "weight", statistic, method="", cells="rows of attention", bounds=FRACTION)
    statistic = f"mean probability of the target when it was written, {direction} queries"
    written = answers[answers["token"].notna()]
    if written.empty:
        table = answers.drop_duplicates("pair")
        nothing = np.full(len(table), np.nan)
        return with_control(nothing, None, Facts.of_rows(table), {NOT_WRITTEN: len(table)}, statistic, bounds=FRACTION)
    return over_cells(written, "probability", statistic, method=CONTROL, cells="positions", bounds=FRACTION)


def steps_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The target's probability by direction and step, mean over pairs, with its interval over facts and its control.

    A position that has been written keeps the probability it was written with, so that every pair counts at every step
    and the last step is the reading's number; one whose block is not begun does not count yet.
    Columns: direction, step, n (pairs), facts, value, low, high, and with a control control, control_low, control_high.
    """
    answers = frame[frame["part"] == "answer"]
    parts = []
    for direction in ("forward", "reverse"):
        rows = answers[answers["direction"] == direction]
        if rows.empty:
            continue
        steps = np.arange(1, int(rows["step"].max()) + 1)
        part = pd.DataFrame({"direction": direction, "step": steps})
        for column, name in (("probability", "value"), ("probability_control", "control")):
            if column in rows:
                pairs = _carried(rows, column, steps)
                value, low, high = _means(pairs)
                names = (name, "low", "high") if name == "value" else (name, "control_low", "control_high")
                part = part.assign(**dict(zip(names, (value, low, high), strict=True)))
                part = part.assign(**_sizes(pairs)) if name == "value" else part
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def attention_table(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean attention weight of the evidence in each cell of the columns `by`, with its interval over facts.

    Columns: by..., n (pairs), facts, value, low, high. A pair's own mean over the cell's rows is taken first.
    """
    rows = frame[frame["part"] == "attention"]
    if SHOWN_IN["forward"] in rows and "direction" in by and rows["direction"].nunique() > 1:
        # Which facts share a prompt is another thing in each direction.
        sides = [attention_table(part, by) for _, part in frame.groupby("direction", observed=True)]
        return pd.concat(sides).sort_values([*by], kind="stable", ignore_index=True)
    keys = [*_of_pair(rows), *(rows[column].to_numpy() for column in by)]
    pairs = rows["weight"].groupby(keys, sort=True).mean()
    table = pairs.rename_axis(["pair", "fact", "unit", *by]).unstack(list(range(3, 3 + len(by))))
    value, low, high = _means(table)
    found = table.columns.to_frame(index=False)
    return found.assign(**_sizes(table), value=value, low=low, high=high)


def _carried(rows: pd.DataFrame, column: str, steps: np.ndarray) -> pd.DataFrame:
    """Pairs by step: each position's number, kept once it is written. Shapes: `(pair, fact, unit) step`."""
    place = [*_of_pair(rows), rows["position"].to_numpy(), rows["step"].to_numpy()]
    values = pd.Series(rows[column].to_numpy(dtype=float), pd.MultiIndex.from_arrays(place))
    table = values.unstack(level=4).reindex(columns=steps)
    return table.ffill(axis=1).groupby(level=[0, 1, 2], sort=True).mean()


def _means(pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each column over pairs, with its interval. Shapes: `(pair, fact, unit) cell -> cell, cell, cell`."""
    by_fact = pairs.groupby(level=2, sort=True)
    return mean_intervals(by_fact.sum().to_numpy(), by_fact.count().to_numpy().astype(float), bounds=FRACTION)


def _sizes(pairs: pd.DataFrame) -> dict[str, np.ndarray]:
    """Pairs and facts behind each column. Shapes: as `_means`."""
    there = pairs.notna()
    return {"n": there.sum().to_numpy(), "facts": there.groupby(level=1).any().sum().to_numpy()}


def _of_pair(rows: pd.DataFrame) -> list[np.ndarray]:
    """Of each row its pair, fact, and what is drawn with it."""
    facts = Facts.of_rows(rows)
    return [rows["pair"].to_numpy(), facts.label, facts.unit]
