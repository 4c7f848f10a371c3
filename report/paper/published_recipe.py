"""The paper's reverse accuracies among those of the published recipe: a distribution over checkpoints and seeds.

One number of a quantity that wanders says little; where it lies among all that could have been printed says more, and
a distribution so wide that it would hold almost any number is "not informative".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from .comparisons import DUST, all_pass, passes
from .evidence_runs import FINISHED, second_half
from .printed_values import TABLE_1, TABLE_2
from .reproduce import records
from .rules import CANNOT, FAILS, FORWARD, HOLDS, NOT_RUN

SECOND, TRAINED = "second half", "all with forward at least 0.97"
SCOPES = (SECOND, TRAINED)
WIDEST = 40.0  # points
INSIDE, OUTSIDE, BLIND = "inside", "outside", "not informative"
# Points: a printed value has two decimals of a per cent at most, and the files have digits of their own.
_ROUNDING = 0.005 + 100 * DUST
# Its sets of runs at the recipe's own rate and width; the others are variants of it.
PLAIN = {"d_model": 64, "learning_rate": 3e-4}


def places(runs: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Where each printed reverse accuracy lies among ours, in per cent.

    Returns: objective, position_encoding, length, paper, weights, scope (which checkpoints), seeds (those with such a
        checkpoint), planned, n (checkpoints of them all), lowest, highest, width, percentile (share of ours below it,
        half of what equals it), reads ("inside", "outside", "not informative" where wider than 40 points, "not run").
    """
    rows = []
    printed = {**TABLE_2, **{model: {**TABLE_2.get(model, {}), **cells} for model, cells in TABLE_1.items()}}
    for (objective, encoding), by_length in printed.items():
        for length, (_, paper) in by_length.items():
            own = plain(runs, objective, encoding, length)
            for weights in ("ema", "raw") if objective == "masked" else ("raw",):
                for scope in SCOPES:
                    row = {"objective": objective, "position_encoding": encoding, "length": length, "paper": paper}
                    row |= {"weights": weights, "scope": scope}
                    rows.append(row | _place(own[own["weights"] == weights], answers, paper, scope))
    return pd.DataFrame(rows)


def plain(runs: pd.DataFrame, objective: str, encoding: str, length: int) -> pd.DataFrame:
    """The rows of a model at a length under the recipe as it is."""
    chosen = (runs["objective"] == objective) & (runs["position_encoding"] == encoding) & (runs["length"] == length)
    for axis, value in PLAIN.items():
        chosen &= np.isclose(runs[axis].astype(float), value)
    return runs[chosen]


def _place(rows: pd.DataFrame, answers: pd.DataFrame, paper: float, scope: str) -> dict[str, Any]:
    finished = rows[rows["status"] == FINISHED]
    found = [_accuracies(answers, row, scope) for row in records(finished)]
    values = 100 * np.concatenate(found) if found else np.array([])
    if not len(values):
        nothing = dict.fromkeys(("lowest", "highest", "width", "percentile"), np.nan)
        return {"seeds": 0, "planned": len(rows), "n": 0} | nothing | {"reads": NOT_RUN}
    low, high = float(values.min()), float(values.max())
    alike = np.abs(values - paper) <= _ROUNDING
    percentile = 100 * float(((values < paper) & ~alike).mean() + alike.mean() / 2)
    inside = low - _ROUNDING <= paper <= high + _ROUNDING
    reads = BLIND if passes((high - low) / 100, ">", WIDEST / 100) else INSIDE if inside else OUTSIDE
    # A seed without a checkpoint in the scope has no part in the numbers.
    own = {"seeds": sum(len(one) > 0 for one in found), "planned": len(rows), "n": len(values)}
    return own | {"lowest": low, "highest": high, "width": high - low, "percentile": percentile, "reads": reads}


def _accuracies(answers: pd.DataFrame, row: dict[str, Any], scope: str) -> np.ndarray:
    """A run's reverse accuracies at the checkpoints of a scope, the untrained one left out."""
    own = answers[(answers["run"] == row["run"]) & (answers["weights"] == row["weights"]) & (answers["extra"] == 0)]
    table = own[own["step"] > 0].pivot_table(index="step", columns="question", values="accuracy")
    if scope == TRAINED:
        table = table[[passes(value, ">=", FORWARD) is True for value in table["forward"]]]
    else:
        table = second_half(table.reset_index(), int(row["steps"]))
    return table["reverse"].to_numpy(float)


def joint_test(runs: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """RoPE's four values all inside, and RoPE above the absolute encoding in every seed of both lengths.

    Returns: a row for each kind of weights and scope: verdict, inside (of 4), not_informative (of 4), above (seeds),
        pairs (seeds of both), numbers. It holds where all four are inside and every pair is ordered; one value outside
        or one pair the other way round fails it; else, as with a distribution that would hold anything, "cannot tell".
    """
    rows = []
    for weights in ("ema", "raw"):
        pairs = paired_by_seed(runs[runs["weights"] == weights])
        above = [passes(row["rope"] - row["absolute"], ">", 0.0) for row in records(pairs)]
        told = ", ".join(
            f"L = {r['length']} s{r['seed']} {r['rope']:.3f} / {r['absolute']:.3f}" for r in records(pairs)
        )
        for scope in SCOPES:
            four = (found["position_encoding"] == "rope") & (found["weights"] == weights) & (found["scope"] == scope)
            reads = list(found[four]["reads"])
            if all(word == NOT_RUN for word in reads) and not above:
                verdict = NOT_RUN
            elif OUTSIDE in reads or False in above:
                verdict = FAILS
            else:
                complete = len(above) == pairs.attrs["planned"]
                verdict = HOLDS if reads == [INSIDE] * 4 and all_pass(above) and complete else CANNOT
            row = {"weights": weights, "scope": scope, "verdict": verdict, "inside": reads.count(INSIDE)}
            row |= {"not_informative": reads.count(BLIND), "not_run": reads.count(NOT_RUN)}
            rows.append(row | {"above": above.count(True), "pairs": len(above), "numbers": f"RoPE / absolute: {told}"})
    return pd.DataFrame(rows)


def paired_by_seed(runs: pd.DataFrame) -> pd.DataFrame:
    """RoPE's and the absolute encoding's mean reverse accuracy (second half) by length and seed, where both were run.

    `attrs["planned"]` is how many pairs there are to be.
    """
    rows, planned = [], 0
    for length in sorted(TABLE_2["masked", "absolute"]):
        both = [plain(runs, "masked", name, length).set_index("seed") for name in ("rope", "absolute")]
        for seed in sorted(set(both[0].index) & set(both[1].index)):
            planned += 1
            if all(one.loc[seed, "status"] == FINISHED for one in both):
                values = [float(one.loc[seed, "reverse"]) for one in both]
                rows.append({"length": length, "seed": seed, "rope": values[0], "absolute": values[1]})
    table = pd.DataFrame(rows, columns=["length", "seed", "rope", "absolute"])
    table.attrs["planned"] = planned
    return table


def wandering(runs: pd.DataFrame) -> pd.DataFrame:
    """How far reverse accuracy wanders after half of the training, by rate and width.

    Returns: a row for each cell and kind of weights: recipe, learning_rate, d_model, length, seeds, planned; reverse
        (mean over seeds of each run's mean), spread (mean over seeds of the standard deviation over checkpoints), range
        (the largest lowest-to-highest of any seed), in fractions; NaN where not run.
    """
    rows = []
    masked = runs[runs["objective"] == "masked"]
    # Two sweeps have cells of one name under different recipes.
    for (_, cell, weights), own in masked.groupby(["recipe", "cell", "weights"], sort=False):
        done = own[own["status"] == FINISHED]
        first = own.iloc[0]
        row = {name: first[name] for name in ("recipe", "position_encoding", "learning_rate", "d_model", "length")}
        row |= {"cell": cell, "weights": weights, "seeds": len(done), "planned": len(own)}
        columns = ("reverse", "reverse_spread", "reverse_highest", "reverse_lowest")
        reverse, spread, high, low = (done.get(name, pd.Series(dtype=float)).astype(float) for name in columns)
        rows.append(row | {"reverse": reverse.mean(), "spread": spread.mean(), "range": (high - low).max()})
    return pd.DataFrame(rows)
