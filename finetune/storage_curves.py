"""Storage and routing as two curves over a run's checkpoints: what is stored on the evidence, and what of it arrives.

curves = rp.storage_curves("runs/one-layer-quick/rope-l10-s0")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import RevprobeError
from ..models.checkpoints import CHECKPOINTS, EMA, step_name
from ..models.probed import ProbedModel
from ..models.registry import load_model
from ..probes.pairs import ReversalPairs
from ..probes.readings import Reading
from ..probes.statistics import mean_over_facts
from ..probes.storage import evidence_by_pair, probe_stored_evidence
from .relations import letters
from .runs import Run, open_run

# Per pair, summed over layers and heads; attention is averaged over them.
CURVES = ("stored", "weight", "contribution", "margin", "rank", "logit")
COLUMNS = ["step", "weights", "kind", "curve", "direction", "value", "n", "low", "high"]
COLUMNS += ["control", "control_low", "control_high"]


def storage_curves(
    run: Run | str | Path,
    *,
    pairs: ReversalPairs | None = None,
    steps: Iterable[int] | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Stored evidence S[v, u] and the route a_ij at every checkpoint of a run.

    Args:
        pairs: what is asked; every placement of the run's letters, mirrored, when None.
        steps: which checkpoints; all that are complete when None.
        weights: "raw" or "ema"; both where the run keeps an average when None.
    Returns: tidy rows: step, weights, kind, curve, direction, value, n, low, high (95 %, over facts), and for the
        stored evidence under the reverse query control, control_low, control_high. Curves: stored (S[v, u]), weight
        (attention on the evidence, mean over layers and heads), contribution (what the evidence position adds to the
        logit, all sources), margin and rank (of S[v, u] among the targets), logit.
    Raises: RevprobeError, for a run without checkpoints, a step it lacks, or a causal run, whose pairs swap roles (S
        couples one target with one evidence token).
    """
    run = run if isinstance(run, Run) else open_run(run)
    require_masked(run, pairs)
    rows: list[dict[str, Any]] = []
    for model in checkpoints(run, steps, weights):
        asked = letter_questions(run, model) if pairs is None else pairs
        reading = probe_stored_evidence(model, asked, batch_size=batch_size, seed=seed)
        rows += [{"step": model.step, "weights": model.weights, **row} for row in curve_rows(reading)]
    return pd.DataFrame(rows, columns=COLUMNS)


def checkpoints(run: Run, steps: Iterable[int] | None, weights: str | None) -> Iterator[ProbedModel]:
    """The models of a run's checkpoints, ascending; raw before their average.

    Raises: RevprobeError, when there is none, or not that step or those weights.
    """
    if not run.steps:
        raise RevprobeError(f"{run.path} has no complete checkpoint; train it first")
    for step in run.steps if steps is None else steps:
        averaged = (run.path / CHECKPOINTS / step_name(step) / EMA).is_dir()
        for kind in (weights,) if weights else ("raw", "ema") if averaged else ("raw",):
            yield load_model(run.path, step=step, weights=kind)


def letter_questions(run: Run, model: ProbedModel) -> ReversalPairs:
    """Every placement of the run's letters, mirrored: each placement once in each direction."""
    return letters(run.config.relation.length, run.config.relation.alphabet).pairs(model, placements="mirror")


def require_masked(run: Run, pairs: ReversalPairs | None) -> None:
    """Raises: RevprobeError, when a run's own pairs, or those given, swap target and evidence."""
    if pairs is None and run.config.model.objective == "causal":
        raise RevprobeError(
            f"{run.path} is causal: its pairs of kind 'swapped' do not share an entry of S; pass same_target pairs"
        )


def curve_rows(reading: Reading) -> list[dict[str, Any]]:
    """The curves of one reading: curve, direction, value, n, low, high and, where there is one, the control."""
    table = evidence_by_pair(reading)
    facts = table["fact"].to_numpy().astype(str)
    rows: list[dict[str, Any]] = []
    for curve in CURVES:
        for direction in ("forward", "reverse"):
            found = mean_over_facts(table[f"{curve}_{direction}"].to_numpy(dtype=np.float64), facts, seed=reading.seed)
            row = {"kind": reading.meta["kind"], "curve": curve, "direction": direction, "value": found.value}
            row |= {"n": found.n, "low": found.low, "high": found.high}
            if (curve, direction) == ("stored", "reverse") and reading.control is not None:
                low, high = reading.control.interval
                row |= {"control": reading.control.value, "control_low": low, "control_high": high}
            rows.append(row)
    return rows
