"""Section 6's second control: what the same configuration with its initial weights reads on a run's pairs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ....finetune.runs.finetuning import FinetuneRun
from ....finetune.training.probe_callback import take_readings
from ....probes.passes.untrained import untrained_twin
from ..reproduce import records
from .frames import Section6, tidy


def twin_readings(run: FinetuneRun, axes: dict[str, Any]) -> pd.DataFrame:
    """The three probes on an untrained twin of the run's model, drawn with the run's seed, over the run's own pairs.

    Adapters are left out, so an adapter's gradient has no twin. One row for each measure, as of signatures.

    Raises: RevprobeError, as `untrained_twin` and the probes.
    """
    model = run.load()
    readings = take_readings(untrained_twin(model, axes["seed"]), run.pairs(model))
    rows = [
        axes | row | {"kind": reading.meta.get("kind")} for reading in readings for row in records(reading.measures())
    ]
    return tidy("twins", rows)


def with_twins(found: Section6, *read: pd.DataFrame) -> pd.DataFrame:
    """The twins known so far and those read now, which take the place of older ones of the same run."""
    now = [row for table in read for row in records(table)]
    runs = {(row["sweep"], row["run"]) for row in now}
    kept = [row for row in records(found.twins) if (row["sweep"], row["run"]) not in runs]
    return tidy("twins", kept + now)
