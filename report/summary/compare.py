"""Runs over each other: models, encodings and seeds in one figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from ...finetune.runs.open import open_run
from ...finetune.runs.record import family_of
from ...finetune.runs.run import Run
from ...finetune.runs.sweeps import Sweep, is_sweep, open_sweep
from ...probes.figures.theme import heading, plain, with_theme
from ...probes.figures.training_curves import measures_with_reasons, signatures_figure
from ...probes.readings.readings import Readings
from ...progress import Progress, counted, shows_progress
from .seed_bands import SEEDS_KEY, pool_seeds

BANDS, WEIGHTS = ("seeds", "facts"), ("ema", "raw", "both")


@checked
@shows_progress("runs")
def compare(
    runs: Run | Sweep | str | Path | Iterable[Run | Sweep | str | Path],
    *,
    bands: str = "seeds",
    weights: str = "ema",
    theme: str = "light",
    progress: Progress | bool | None = None,
) -> go.Figure:
    """Draw the signatures of several runs over training: attention correlation, gradient cosine, probabilities.

    compare(["runs/one-layer-quick"]).show()

    Args:
        runs: runs or sweeps, or their folders; a sweep stands for its runs.
        bands: "seeds": runs that differ in nothing but their seed are one line, the mean, with a band from the lowest
            to the highest seed; steps that not all seeds have reached are left out and named under the figure.
            "facts": each run is a line with its 95 % interval over facts.
        weights: "ema" (raw where a run keeps no average), "raw" or "both".
        theme: "light" or "dark".
        progress: called with (runs done, runs in all); None shows a bar, False nothing.
    Raises: RevprobeError, when a folder is no run, two runs share a folder, a file is damaged, no run has a reading,
        or an option is not known.
    """
    for what, value, known in (("bands", bands, BANDS), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise RevprobeError(f"{what}={value!r}{did_you_mean(value, known)}")
    opened = _opened([runs] if isinstance(runs, Run | Sweep | str | Path) else runs)
    counts = Counter(run.path.name for run in opened)
    names = {str(run.path): run.path.name if counts[run.path.name] == 1 else str(run.path) for run in opened}
    parts = [
        measures_with_reasons(_chosen(run.readings(), weights)).assign(
            run=str(run.path), family=family_of(run.config.model_dump(mode="json")), **run.axes
        )
        for run in counted(opened, progress)
    ]
    rows = pd.concat(parts, ignore_index=True)
    notes: list[str] = []
    if bands == "seeds":
        rows, notes = pool_seeds(rows, names)
    else:
        rows = rows.assign(run=rows["run"].map(names))
    figure = signatures_figure(rows, buttons=False).update_traces(visible=True)
    if bands == "seeds":
        title = heading(SEEDS_KEY, *(plain(note, limit=None) for note in notes), key=True)
        figure.update_layout(title=title, margin={"t": 80 + 18 * title["text"].count("<br>")})
    return with_theme(figure, theme)


def _opened(runs: Iterable[Run | Sweep | str | Path]) -> list[Run]:
    found: list[Run] = []
    for one in runs:
        known = one if isinstance(one, Run | Sweep) else open_sweep(one) if is_sweep(one) else open_run(one)
        found += known.runs if isinstance(known, Sweep) else [known]
    twice = [path for path, count in Counter(run.path.resolve() for run in found).items() if count > 1]
    if twice:
        raise RevprobeError(f"{str(twice[0])!r} is asked for twice: expected each run once (a sweep holds its runs)")
    with_readings = [run for run in found if (run.path / "readings").is_dir()]
    if not with_readings:
        raise RevprobeError(f"none of {len(found)} runs has a reading to compare; train them first")
    return with_readings


def _chosen(readings: Readings, weights: str) -> list[Any]:
    averaged = {reading.name for reading in readings if reading.meta.get("weights") == "ema"}
    if weights == "both":
        return list(readings)
    if weights == "raw":
        return [reading for reading in readings if reading.meta.get("weights") != "ema"]
    return [one for one in readings if one.meta.get("weights") == "ema" or one.name not in averaged]
