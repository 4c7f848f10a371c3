"""The number of an assumption audit: how much of the keys' covariance crosses planes, beside what chance gives."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .coverage import caution
from .estimators import Control, Measured
from .intervals import Estimate

STATISTIC = "mean over heads and directions of the share of the keys' covariance (squared) that crosses planes"
METHOD = "each plane's facts permuted on their own"


def assumption_audit(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Mean cross-plane share over the frame's heads and directions, beside the mean of their nulls.

    The intervals are the means of the heads' own: right where all heads go together, else too wide, never too narrow.
    Undefined are heads, one for each direction.
    """
    heads = frame.drop_duplicates(["layer", "head", "direction"])
    lost = heads["reason"].astype(str)
    undefined = {str(why): int(count) for why, count in lost[lost != ""].value_counts().items()}
    known = heads[heads["cross_share"].notna()]
    if known.empty:
        return Measured(Estimate.undefined(), undefined=undefined, statistic=STATISTIC)
    value, low, high, null, *edges = (
        float(known[column].mean())
        for column in ("cross_share", "cross_low", "cross_high", "null", "null_low", "null_high")
    )
    pairs, facts = int(known["pairs"].min()), int(known["facts"].min())
    estimate, few = Estimate(value, low, high, pairs, facts), caution("mean", facts)
    if not control or np.isnan(null):
        return Measured(estimate, None, None, undefined, STATISTIC, few)
    beside = Control(null, (edges[0], edges[1]), pairs, METHOD, facts)
    excess = Estimate(value - null, low - null, high - null, pairs, facts)
    return Measured(estimate, beside, excess, undefined, STATISTIC, few)
