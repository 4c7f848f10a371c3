"""Storage and routing as two curves over a run's checkpoints: what is stored on the evidence, and what of it arrives.

curves = rp.storage_curves("runs/one-layer-quick/rope-l10-s0")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...arguments import checked
from ...errors import RevprobeError
from ...models.checkpoints import CHECKPOINTS, EMA, checkpoint_folder, step_name
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.passes.asked import NEEDS_ONE_ENTRY
from ...probes.readings.reading import Reading
from ...probes.statistics.by_part import evidence_by_pair
from ...probes.statistics.coverage import missing_interval
from ...probes.statistics.estimators import STATISTICS_VERSION
from ...probes.statistics.intervals import mean_over_facts
from ...probes.statistics.resampling import Facts
from ...probes.storage import probe_stored_evidence
from ...progress import Progress, counted, shows_progress
from ...relations.catalog import letters
from ..runs.one_layer import OneLayerRun
from ..runs.open import open_run
from ..runs.run import Run

# Per pair, summed over layers and heads; attention is averaged over them.
CURVES = ("stored", "weight", "contribution", "margin", "rank", "logit")
COLUMNS = ["model", "step", "weights", "kind", "curve", "direction", "value", "n", "facts", "low", "high"]
COLUMNS += ["control", "control_n", "control_low", "control_high", "reason", "statistics_version"]


@checked
@shows_progress("checkpoints")
def storage_curves(
    run: Run | str | Path,
    *,
    pairs: ReversalPairs | None = None,
    steps: Iterable[int] | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> pd.DataFrame:
    """Stored evidence S[v, u] and the route a_ij at every checkpoint of a run.

    Args:
        pairs: what is asked; every placement of the run's letters, mirrored, when None. Of a fine-tuning they must be
            given, of kind "same_target".
        steps: which checkpoints, negative ones counted from the last; all that are complete when None.
        weights: "raw" or "ema"; both where the run keeps an average when None.
        progress: called with (checkpoints done, checkpoints in all); None shows a bar, False nothing.
    Returns: tidy rows: model, step, weights, kind, curve, direction, value, n (pairs), facts, low, high (95 %, over
        facts); for the stored evidence under the reverse query control, control_n, control_low, control_high; reason
        (why there is no interval, as where all facts are alike) and statistics_version. Curves: stored (S[v, u]),
        weight (attention on the evidence, mean over layers and heads), contribution (what the evidence position adds to
        the logit, all sources), margin and rank (of S[v, u] among the targets), logit.
    Raises: RevprobeError, for a run without checkpoints, an empty list of steps, a step it lacks, a fine-tuning
        without pairs, or a causal run, whose pairs swap roles (S couples one target with one evidence token).
    """
    run = run if isinstance(run, Run) else open_run(run)
    require_masked(run, pairs)
    rows: list[dict[str, Any]] = []
    for model in checkpoints(run, steps, weights, progress):
        asked = letter_questions(run, model) if pairs is None else pairs
        reading = probe_stored_evidence(model, asked, batch_size=batch_size, seed=seed)
        at = {"model": run.path.name, "step": model.step, "weights": model.weights}
        rows += [at | row for row in curve_rows(reading)]
    return pd.DataFrame(rows, columns=COLUMNS)


def checkpoints(
    run: Run, steps: Iterable[int] | None, weights: str | None, progress: Progress | bool | None = None
) -> Iterator[ProbedModel]:
    """The models of a run's checkpoints, raw before their average.

    Args:
        progress: called when each has been dealt with.

    Raises: RevprobeError, as `chosen_steps`, and for weights that are not there.
    """
    asked: list[tuple[int, str]] = []
    for step in chosen_steps(run, steps):
        averaged = (run.path / CHECKPOINTS / step_name(step) / EMA).is_dir()
        asked += [(step, kind) for kind in ((weights,) if weights else ("raw", "ema") if averaged else ("raw",))]
    for step, kind in counted(asked, progress):
        yield run.load(step, kind)


def chosen_steps(run: Run, steps: Iterable[int] | None) -> list[int]:
    """The checkpoints asked for, each once; negative steps count from the last, and None is all of them.

    Raises: RevprobeError, when there is none, not that step, or nothing is asked for.
    """
    if not run.steps:
        raise RevprobeError(f"{run.path} has no complete checkpoint; train it first")
    if steps is None:
        return run.steps
    chosen = list(dict.fromkeys(checkpoint_folder(run.path, step, "raw")[1] for step in steps))
    if not chosen:
        listed = ", ".join(map(str, run.steps))
        raise RevprobeError(f"steps is an empty list; expected some of {listed}, or None for all of them")
    return chosen


def letter_questions(run: Run, model: ProbedModel) -> ReversalPairs:
    """Every placement of the run's letters, mirrored: each placement once in each direction."""
    return letters(run.config.relation.length, run.config.relation.alphabet).pairs(model, placements="mirror")


def require_masked(run: Run, pairs: ReversalPairs | None) -> None:
    """Raises: RevprobeError, when no pairs are given and the run has none of its own, or they swap their roles."""
    if pairs is not None:
        return
    if not isinstance(run, OneLayerRun):
        raise RevprobeError(f"{run.path} is a fine-tuning, which has no letters to ask; pass same_target pairs=")
    if run.config.model.objective == "causal":
        raise RevprobeError(f"{run.path} is causal: {NEEDS_ONE_ENTRY}")


def curve_rows(reading: Reading) -> list[dict[str, Any]]:
    """The curves of one reading, as `storage_curves` tells of them."""
    table = evidence_by_pair(reading)
    rows: list[dict[str, Any]] = []
    for curve in CURVES:
        for direction in ("forward", "reverse"):
            values, facts = table[f"{curve}_{direction}"].to_numpy(dtype=np.float64), Facts.of_rows(table, direction)
            found = mean_over_facts(values, facts)
            row = {"kind": reading.meta["kind"], "curve": curve, "direction": direction, "value": found.value}
            row |= {"n": found.n, "facts": found.facts, "low": found.low, "high": found.high}
            row |= {"reason": missing_interval(found), "statistics_version": STATISTICS_VERSION}
            if (curve, direction) == ("stored", "reverse") and reading.control is not None:
                low, high = reading.control.interval
                row |= {"control": reading.control.value, "control_n": reading.control.n}
                row |= {"control_low": low, "control_high": high}
            rows.append(row)
    return rows
