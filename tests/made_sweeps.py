"""The sweep of negative evidence as made tables: every run came out as predicted, but for what a test changes."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from revprobe.finetune.config.loading import load_config
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.report.paper.evidence_runs import FINISHED, axes_of, statistics, weights_of
from revprobe.report.paper.rules import NOT_RUN

N = 1000
Row = dict[str, Any]
Change = Callable[[Row], dict[str, float]]
# When the reverse answer falls under each dose.
FALLS = {0.0: np.inf, 0.03: np.inf, 0.1: 3000, 0.3: 1500, 1.0: 800}


def as_predicted(axes: Row, step: int) -> dict[str, float]:
    """Forward, reverse, mirror-reverse, letters-only and p(placeholder) of a run at a step, as the account has it."""
    if axes["objective"] == "causal":
        return {"forward": 1.0, "reverse": 0.0, "mirror": np.nan, "letters": 1.0}
    dial = axes["dial"] if axes["switch_step"] is None or step <= axes["switch_step"] + 500 else axes["switch_dial"]
    falls = FALLS[axes["dose"]] if axes["dial"] in ("keep", "drop-right") else 800
    reverse = 0.99 if dial == "drop-right" and axes["dose"] == 0 else 0.02 if step >= falls else 0.8
    if axes["switch_step"] is not None:
        reverse = 0.99 if dial == "drop-right" else 0.02
    return {"forward": 1.0, "reverse": reverse, "mirror": 0.99 if dial == "mirror" else 0.05, "letters": 1.0}


def one_run(config: RunConfig, change: Change | None, late: dict[str, float] | None) -> tuple[pd.DataFrame, list[Row]]:
    """The answers and the rows of a run."""
    axes, own = axes_of(config), []
    for step in config.answer_steps:
        found = as_predicted(axes, step) | (change({**axes, "step": step}) if change else {})
        errors = round(N * (1 - found["reverse"]))
        shared = {"step": step, "n": N, "log_odds": 0.0, "probability": found["reverse"], "extra": 0}
        reverse = {"question": "reverse", "accuracy": found["reverse"], "letters_only": found["letters"]}
        reverse |= {"errors": errors, "placeholder_errors": round(found.get("outvoted", 1.0) * errors)}
        other = {"letters_only": 1.0, "errors": 0, "placeholder_errors": 0}
        own += [shared | reverse, shared | other | {"question": "forward", "accuracy": found["forward"]}]
        own += [shared | other | {"question": "mirror_reverse", "accuracy": found["mirror"]}]
    table = pd.DataFrame(own).assign(run=config.name)
    row = axes | {"status": FINISHED, "negative_probability": 0.99} | statistics(table, config.training.steps)
    kinds = weights_of(config)
    rows = [row | {"weights": weights} | (late or {}) for weights in kinds]
    return pd.concat([table.assign(weights=weights) for weights in kinds]), rows


@functools.cache
def as_configured() -> dict[str, tuple[RunConfig, pd.DataFrame, list[Row]]]:
    """Every run of the sweep as predicted; changed ones are made anew."""
    return {
        config.name: (config, *one_run(config, None, None))
        for config in load_config("negative-evidence", SweepConfig).runs()
    }


def made(
    change: Change | None = None,
    *,
    of: Callable[[Row], bool] = lambda axes: True,
    ran: Callable[[Row], bool] = lambda axes: True,
    late: dict[str, float] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of the sweep as configured, where every run in `ran` came out as predicted, but for what changes.

    Args:
        change: answers that take the place of the predicted ones, from a run's axes and the step, in runs of `of`.
        late: columns of the runs' table besides, in those runs.
    """
    answers, rows = [], []
    for config, table, own in as_configured().values():
        axes = axes_of(config)
        if not ran(axes):
            rows += [{**axes, "weights": weights, "status": NOT_RUN} for weights in weights_of(config)]
            continue
        if change is not None and of(axes):
            table, own = one_run(config, change, late)
        answers.append(table)
        rows += own
    return pd.DataFrame(rows), pd.concat(answers, ignore_index=True) if answers else pd.DataFrame()
