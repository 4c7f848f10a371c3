"""The number of a logit lens: what the layers add to the log-probability of the target."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .estimators import Measured, reasons, with_control
from .partners import partners_of_pairs
from .resampling import Facts

# Of readings of before too, which read another fact's target from the pair's own states.
METHOD = "the target of one fact where another of the group is asked about"


def logit_lens(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Mean gain in log-probability (nats) from the embedding to the deepest layer in the frame, over pairs.

    Of heads and MLPs alone, the mean of what they add directly to the target's logit, summed over those in the frame.
    Reverse queries, unless the frame holds forward ones alone.
    """
    rows = frame[frame["direction"] == "reverse"] if (frame["direction"] == "reverse").any() else frame
    direction = rows["direction"].iloc[0]
    read = rows[rows["site"] == "residual"]
    if len(read):
        deepest = int(read["layer"].max())
        rows, columns = read[read["layer"] == deepest], ["gain", "gain_control"]
        until = "to the embedding itself" if deepest < 0 else f"to layer {deepest}"
        statistic = f"mean log-probability of the {direction} target gained from the embedding {until} (nats)"
    else:
        columns = ["logit", "logit_control"]
        sites = " and ".join(f"{site}s" for site in ("head", "mlp") if (rows["site"] == site).any())
        statistic = f"mean direct contribution to the {direction} target's logit, summed over {sites} (logits)"
    columns = [column for column in columns if column in rows]
    undefined = rows[columns].isna().groupby(rows["pair"], sort=True).any()
    table = rows.groupby("pair", sort=True)[columns].sum().mask(undefined)
    facts = Facts.of_pairs(rows)
    values = table[columns[0]].to_numpy(dtype=np.float64)
    counts = reasons(rows[rows["reason"] != ""].drop_duplicates("pair"))
    if len(columns) == 1:
        return with_control(values, None, facts, counts, statistic)
    alone = rows[(rows["reason"] == "") & (rows["reason_control"] != "")].drop_duplicates("pair")
    counts |= reasons(alone.assign(reason=alone["reason_control"]))
    null = table[columns[1]].to_numpy(dtype=np.float64)
    counted = np.zeros(len(table), dtype=bool)  # just now, by reason
    partners = partners_of_pairs(rows)
    return with_control(values, null, facts, counts, statistic, alone=counted, method=METHOD, partners=partners)
