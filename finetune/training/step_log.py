"""What every step of a one-layer run did: its loss, its gradient's norm before the clip, and the terms it left out.

The rows since the last checkpoint are written with the next one, before it is complete; a resumed run keeps those up
to its own step, so that the file ends as an uninterrupted run's.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ...atomic_files import written_whole
from ...errors import RevprobeError, first_line

STEPS = "steps.parquet"
COLUMNS = ["step", "loss", "gradient_norm", "clipped", "dropped", "dropped_weight"]


class StepLog:
    """The rows of `RUN/steps.parquet`: step, loss (in the run's own unit), gradient_norm, clipped, dropped (terms left
    out or weighted), dropped_weight (the sum of their 1/t).

    Args:
        path: the file.
        limit: the norm that gradients are clipped to; None when they are not.
    """

    def __init__(self, path: Path, limit: float | None) -> None:
        self.path, self.limit = path, limit
        self.rows: list[dict[str, float]] = []

    def add(self, step: int, loss: float, gradient_norm: float, dropped: int, dropped_weight: float) -> None:
        """The row of one step."""
        clipped = self.limit is not None and gradient_norm > self.limit
        values = (step, loss, gradient_norm, clipped, dropped, dropped_weight)
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))

    def resume(self, step: int) -> None:
        """Take up the rows up to `step` that are there. Raises: RevprobeError, for a damaged file."""
        self.rows = []
        if step and self.path.is_file():
            table = read_table(self.path)
            self.rows = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
            self.rows = [row for row in self.rows if row["step"] <= step]

    def save(self) -> None:
        """Write the rows so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as part:
            pd.DataFrame(self.rows, columns=COLUMNS).to_parquet(part, compression="zstd", index=False)


def read_table(path: Path) -> pd.DataFrame:
    """A table that a run writes beside its readings. Raises: RevprobeError, when it is missing or damaged."""
    if not path.is_file():
        raise RevprobeError(f"{path} does not exist; runs of earlier versions have none, train the run anew for one")
    try:
        return pd.read_parquet(path)
    except Exception as error:
        raise RevprobeError(f"{path} is damaged ({first_line(error)}); delete it to go on without its rows") from error
