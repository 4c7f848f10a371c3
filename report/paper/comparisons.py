"""A number held against a limit, wherever a verdict rests on it: one slack, and a third answer for what is NaN."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

# Shares of questions: the last digits of a float subtraction, and of a file's single precision (6e-8 of a share), must
# not decide. Shares of 26 letters or 5,000 questions lie much farther apart.
DUST = 1e-6
_SIGNS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def passes(value: float, sign: str, limit: float) -> bool | None:
    """Whether a value keeps to a bound; None where it is undefined. A value on a bound is on its closed side.

    >>> passes(0.35 - 0.15, ">=", 0.2), passes(0.2, ">", 0.2)
    (True, False)
    """
    if math.isnan(value):
        return None
    slack = DUST if sign in (">=", "<=") else -DUST
    return bool(_SIGNS[sign](value, limit - slack if sign[0] == ">" else limit + slack))


def all_pass(parts: Sequence[bool | None]) -> bool | None:
    """Of conditions that must all hold: one that does not decides, then one that cannot be told; None of none.

    >>> all_pass([True, None]), all_pass([True, None, False])
    (None, False)
    """
    if any(part is False for part in parts):
        return False
    return None if any(part is None for part in parts) or not parts else True
