"""Tables over a run's checkpoints that lie beside its config: a fine-tuning's predictions, and analyses that were kept.

rp.one_step_curves(rp.one_step(run)).to_parquet(run.path / "one_step.parquet")
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ...errors import RevprobeError, first_line
from ..training.prediction_callback import PREDICTIONS

# By what each holds: that of `storage_curves`, `one_step_curves`, `pressure`, and what `FirstOrderPrediction` wrote.
TABLES = {"storage_curves": "storage_curves.parquet", "one_step": "one_step.parquet", "pressure": "pressure.parquet"}
TABLES |= {"predictions": PREDICTIONS}


def kept_table(file: Path) -> pd.DataFrame:
    """One of the tables. Raises: RevprobeError, when the file is missing or cannot be read."""
    try:
        return pd.read_parquet(file)
    except Exception as error:  # a damaged file raises what pyarrow raises
        raise RevprobeError(
            f"{file.name} of {file.parent.name} cannot be read ({first_line(error)}); delete it, and take it anew"
        ) from error


def kept_tables(folder: Path) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The tables of a run's folder by what they hold, and what is wrong with those that cannot be read."""
    found, problems = {}, []
    for name, file in TABLES.items():
        if not (folder / file).is_file():
            continue
        try:
            found[name] = kept_table(folder / file)
        except RevprobeError as error:
            problems.append(first_line(error, with_type=False))
    return found, problems
