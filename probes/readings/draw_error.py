"""How far a reading rests on the random tokens that were drawn for it, from the readings without each of the draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..passes.draws import standard_error
from .reading import Reading


def with_draw_error(reading: Reading, fewer: Sequence[Reading]) -> Reading:
    """The reading with the draws' standard error of each of its measures, in `meta["draw_errors"]`.

    Of probabilities also by row, in the column `probability_error`.
    Args:
        fewer: the readings without each draw; none of a model that draws nothing, or only once.
    """
    if not fewer:
        return reading
    # Without the shuffles of a control, which the value does not need.
    alone = [Reading(one.name, one.frame, one.meta | {"control": False}).measures() for one in fewer]
    errors = standard_error(np.stack([one["value"].to_numpy(dtype=np.float64) for one in alone]))
    reading.meta["draw_errors"] = dict(zip(alone[0]["measure"], errors.tolist(), strict=True))
    if reading.name == "reverse_probability":
        by_row = standard_error(np.stack([one.frame["probability"].to_numpy() for one in fewer]))
        reading.frame.insert(list(reading.frame).index("probability") + 1, "probability_error", by_row)
    return reading
