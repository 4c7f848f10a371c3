"""The page that a bundle opens on: what came out, the runs with their state, and what the files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import pandas as pd

from ...finetune.runs.record import AXES
from ...finetune.runs.run import software
from ..html.templates import TEMPLATES, file_text
from ..summary.finding import finding
from ..summary.tables import final_table
from .gathered import Gathered


def index(
    title: str,
    runs: Sequence[Gathered],
    summary: pd.DataFrame,
    *,
    configs: Mapping[str, str],
    parts: Sequence[tuple[str, str, int]],
    rows: int,
) -> str:
    """The page.

    Args:
        summary: the numbers of all runs, as in `summary.csv`.
        configs: the file of each run's config, by the run's name.
        parts: address, what it holds, and bytes of each part of the bundle.
        rows: of readings.parquet.
    """
    axes = [axis for axis in _axes(runs) if any(one.record.axes.get(axis) is not None for one in runs)]
    probes = [reading.name for one in runs for reading in one.record.readings]
    template = TEMPLATES.from_string(files(__package__).joinpath("index.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        style=file_text("page.css"),
        finding=finding(final_table(summary)) if len(summary) else [],
        headings=[axis.replace("_", " ") for axis in axes],
        runs=[_line(one, axes, configs[one.name]) for one in runs],
        files=[{"name": name, "what": what, "size": size_text(size)} for name, what, size in parts],
        rows=f"{rows:,}" if rows else "",
        example=probes[0] if probes else "",
        version=software()["revprobe"],
    )


def size_text(size: float) -> str:
    """Bytes in the unit that people read.

    >>> size_text(900), size_text(5_300_000)
    ('1 kB', '5.3 MB')
    """
    for unit, of in (("GB", 1e9), ("MB", 1e6)):
        if size >= of:
            return f"{size / of:.1f} {unit}"
    return f"{max(1, round(size / 1e3))} kB"


def _axes(runs: Sequence[Gathered]) -> list[str]:
    """What the runs differ in, the report's own first."""
    return list(dict.fromkeys([*AXES, *(axis for one in runs for axis in one.record.axes)]))


def _line(run: Gathered, axes: Sequence[str], config: str) -> dict[str, Any]:
    steps, values = run.record.readings.steps, [run.record.axes.get(axis) for axis in axes]
    return {
        "name": run.name,
        "cells": ["-" if value is None else str(value) for value in values],
        "checkpoints": f"{len(steps)} ({steps[0]:,} to {steps[-1]:,})" if steps else "0",
        "state": run.state,
        "problem": run.record.problem is not None,
        "config": config,
    }
