"""The sweep of the published recipe as made tables, around a middle for each model and length."""

from typing import Any

import numpy as np
import pandas as pd

from revprobe.finetune.config.loading import load_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.report.paper.evidence_runs import FINISHED, axes_of, statistics, weights_of
from revprobe.report.paper.rules import NOT_RUN

# Reverse accuracy in per cent by encoding and length: the middle, to which 15 points to both sides are added.
MIDDLES = {("rope", 10): 43.0, ("rope", 20): 55.0, ("rope", 30): 34.0, ("rope", 40): 38.0}
MIDDLES |= {("absolute", 10): 12.0, ("absolute", 20): 28.0}


def made(
    middles: dict[Any, float] | None = None, *, reach: float = 15.0, without: tuple[str, ...] = ()
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The sweep's tables: half of the checkpoints lie `reach` below the middle and half above, in turn."""
    middle_of = MIDDLES | (middles or {})
    answers, rows = [], []
    for config in load_config("one-layer-published", SweepConfig).runs():
        axes = axes_of(config)
        if config.name in without:
            rows += [{**axes, "weights": weights, "status": NOT_RUN} for weights in weights_of(config)]
            continue
        key = (axes["position_encoding"], axes["length"])
        middle = middle_of.get((config.name), middle_of.get(key, 0.0))
        steps = np.array(config.answer_steps)
        values = np.where(np.arange(len(steps)) % 2, middle + reach, middle - reach).clip(0, 100) / 100
        shared = {"extra": 0, "letters_only": 1.0, "errors": 0, "placeholder_errors": 0, "log_odds": 0.0}
        curves = {"reverse": values, "forward": np.where(steps < 1000, 0.5, 1.0), "mirror_reverse": values}
        own = pd.concat(
            pd.DataFrame({"step": steps, "question": name, "accuracy": curve, "probability": curve} | shared)
            for name, curve in curves.items()
        )
        for weights in weights_of(config):
            answers.append(own.assign(run=config.name, weights=weights))
            rows.append({**axes, "weights": weights, "status": FINISHED} | statistics(own, config.training.steps))
    return pd.DataFrame(rows), pd.concat(answers, ignore_index=True)
