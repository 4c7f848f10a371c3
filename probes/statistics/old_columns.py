"""Tables that version 0.1 wrote, under the names their columns have now."""

from __future__ import annotations

import pandas as pd

# `ahead` was the prediction by AdamW's formula before the step, `came` the change that was observed.
_RENAMED = {"came": "observed", "ahead": "predicted_by_adamw"}


def current_columns(table: pd.DataFrame) -> pd.DataFrame:
    """The table with today's column names; one that has them already comes back as it is.

    >>> list(current_columns(pd.DataFrame(columns=["came_low", "predicted"])))
    ['observed_low', 'predicted']
    """

    def renamed(column: str) -> str:
        first, underscore, rest = str(column).partition("_")
        return f"{_RENAMED[first]}{underscore}{rest}" if first in _RENAMED else column

    table = table.rename(columns=renamed)
    if "n" in table and "statistics_version" not in table:  # of the first statistics, which did not count facts
        table = table.assign(facts=float("nan"), statistics_version=1)
    return table
