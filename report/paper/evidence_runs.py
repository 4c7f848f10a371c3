"""The runs of a sweep about negative evidence as two tables: their answers over training, and one row for each.

A run's statistics are those its sweep's rules name: means over the answers read in the second half of its training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...atomic_files import written_whole
from ...errors import RevprobeError
from ...finetune.analysis.price import Price, read_price
from ...finetune.config.one_layer import RunConfig
from ...finetune.runs.one_layer import OneLayerRun
from ...finetune.runs.open import is_finished
from ...models.checkpoints import CHECKPOINTS, step_name
from ...probes.statistics.estimators import STATISTICS_VERSION
from .reproduce import NOT_RUN, on_device_of

FINISHED = "finished"
# Of each reading at the last checkpoint; the accuracies are the answers'.
MEASURES = ("attention_correlation", "gradient_cosine", "reverse_probability")
PARTS = {"": "value", "_low": "low", "_high": "high", "_control": "control"}
SUMS = "SHA256SUMS"
# A row's price is read anew when this changes, or its checkpoint does.
PRICE_VERSION = 1

Priced = Callable[[OneLayerRun, str], Price]


def axes_of(config: RunConfig) -> dict[str, Any]:
    """What a run differs in from others of its sweep.

    Recipe P is RADD's published one, which sums its loss over tokens; W takes their mean. `dose` is what the dropped
    terms are multiplied by; 1 where none is dropped.
    """
    model, training = config.model, config.training
    own = {
        "run": config.name,
        "cell": config.name.replace(f"-s{training.seed}", "", 1),
        "recipe": "P" if training.loss == "sequence" else "W",
        **config.axes,
        "dial": training.negatives,
        "switch_step": training.switch.step if training.switch else None,
        "switch_dial": training.switch.negatives if training.switch else None,
        "dose": 1.0 if training.negatives == "keep" else training.negative_weight,
        "masks": str(training.masks),
        "clip": training.gradient_clipping,
        "learning_rate": training.learning_rate,
        "d_model": model.d_model,
        "steps": training.steps,
        "batch_size": training.batch_size,
    }
    return own


def weights_of(config: RunConfig) -> tuple[str, ...]:
    """The weights it is read on, those that decide first."""
    return ("ema", "raw") if config.model.objective == "masked" and config.training.ema_decay else ("raw",)


def collect_run(
    folder: Path,
    config: RunConfig,
    *,
    known: Mapping[str, Mapping[str, Any]] | None = None,
    price: Priced | None = None,
) -> tuple[pd.DataFrame | None, list[dict[str, Any]]]:
    """The answers of a run, None of an unfinished one; and a row for each of its weights, be it finished or not.

    Args:
        folder: the sweep's.
        known: rows of an earlier collection by weights; the price of a checkpoint that is still the same is theirs.
        price: what reads a price; `read_price` of the last checkpoint when None.
    """
    run, price = OneLayerRun(folder / config.name), price or _price
    status = status_of(run, config)
    named = axes_of(config) | {"status": status, "facts": config.relation.alphabet}
    named |= {"statistics_version": STATISTICS_VERSION}
    if status != FINISHED:
        return None, [named | {"weights": weights} for weights in weights_of(config)]
    answers = run.answers().assign(run=config.name)
    log, measures = log_summary(run.steps_log(), config), run.readings().measures()
    rows = []
    for weights in weights_of(config):
        row = named | {"weights": weights, "price_version": PRICE_VERSION}
        row |= {"checkpoint": checkpoint_digest(run, weights)}
        row |= statistics(answers[answers["weights"] == weights], config.training.steps)
        row |= log | _measures(measures, config.training.steps, weights)
        rows.append(row | (_priced_before((known or {}).get(weights), row) or asdict(price(run, weights))))
    return answers, rows


def status_of(run: OneLayerRun, config: RunConfig) -> str:
    """ "finished", "not run", or why it is not finished."""
    try:
        if is_finished(run.path, on_device_of(run.path, config)):
            return FINISHED
        return run.problem or "a run of another config lies in its folder"
    except RevprobeError as error:
        return str(error) if run.path.is_dir() else NOT_RUN


def _price(run: OneLayerRun, weights: str) -> Price:
    return read_price(run.load(weights=weights), run.relation)


def _priced_before(known: Mapping[str, Any] | None, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The price that was read of the very same weights, if one was."""
    if known is None or any(known.get(key) != row[key] for key in ("checkpoint", "price_version")):
        return None
    return {name: known[name] for name in Price.__annotations__}


def checkpoint_digest(run: OneLayerRun, weights: str) -> str:
    """Which bytes the last checkpoint is made of."""
    sums = (run.path / CHECKPOINTS / step_name(run.total_steps) / SUMS).read_bytes()
    return hashlib.sha256(sums + weights.encode()).hexdigest()[:16]


# ---- statistics ----


def second_half(answers: pd.DataFrame, steps: int) -> pd.DataFrame:
    """The answers read after half of the training."""
    return answers[answers["step"] > steps / 2]


def statistics(answers: pd.DataFrame, steps: int) -> dict[str, Any]:
    """What the rules ask of one run on one kind of weights; see the columns below.

    Returns: for each question (reverse_1 and reverse_2 with so many further masks) its mean accuracy; of the reverse
        ones lowest, highest and spread (standard deviation) over the readings and the last value; letters_only and
        its lowest; reverse_errors and placeholder_share (of them, pooled; NaN where there are none); log_odds and
        reverse_answer (mean p(target)); readings (how many).
    """
    late = second_half(answers, steps)
    found: dict[str, Any] = {"readings": int(late["step"].nunique())}
    for question in ("forward", "reverse", "mirror_reverse"):
        found[question] = _asked(late, question)["accuracy"].mean()
    for extra in (1, 2):
        found[f"reverse_{extra}"] = _asked(late, "reverse", extra)["accuracy"].mean()
    for question, name in (("reverse", "reverse"), ("mirror_reverse", "mirror")):
        values = _asked(late, question)["accuracy"]
        found |= {f"{name}_lowest": values.min(), f"{name}_highest": values.max(), f"{name}_spread": values.std(ddof=1)}
    reverse = _asked(late, "reverse").sort_values("step")
    found["reverse_last"] = reverse["accuracy"].iloc[-1] if len(reverse) else np.nan
    found |= {"letters_only": reverse["letters_only"].mean(), "letters_only_lowest": reverse["letters_only"].min()}
    errors = int(reverse["errors"].sum())
    found |= {"reverse_errors": errors}
    found["placeholder_share"] = reverse["placeholder_errors"].sum() / errors if errors else np.nan
    return found | {"log_odds": reverse["log_odds"].mean(), "reverse_answer": reverse["probability"].mean()}


def _asked(answers: pd.DataFrame, question: str, extra: int = 0) -> pd.DataFrame:
    return answers[(answers["question"] == question) & (answers["extra"] == extra)]


def log_summary(log: pd.DataFrame, config: RunConfig) -> dict[str, Any]:
    """What a run's steps came to.

    Returns: share_clipped; gradient_norm (median, before the clip); loss_at_end (mean of the last tenth, in the run's
        own unit); dropped_terms (a step); dropped_share (of the weight, sum of 1/t, that a batch has on average: L a
        row under any rate, and L - 1 for a causal model).
    """
    length = config.relation.length - (config.model.objective == "causal")
    weight = config.training.batch_size * length
    return {
        "share_clipped": float(log["clipped"].mean()),
        "gradient_norm": float(log["gradient_norm"].median()),
        "loss_at_end": float(log["loss"].tail(max(1, len(log) // 10)).mean()),
        "dropped_terms": float(log["dropped"].mean()),
        "dropped_share": float(log["dropped_weight"].mean()) / weight,
    }


def _measures(measures: pd.DataFrame, step: int, weights: str) -> dict[str, Any]:
    """The three probes at the last checkpoint, each with its interval and control."""
    last = measures[(measures["step"] == step) & (measures["weights"] == weights)].set_index("measure")
    found: dict[str, Any] = {}
    for part, column in PARTS.items():
        values = last[column].astype(float).to_dict()
        found |= {f"{name}{part}": values.get(name, np.nan) for name in MEASURES}
    return found


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a table in single precision, which keeps the ends of an interval apart and halves the file."""
    kinds = {name: "float32" for name in table.select_dtypes("float").columns}
    kinds |= {name: "int32" for name in table.select_dtypes("int64").columns}
    with written_whole(file) as part:
        table.astype(kinds).to_parquet(part, index=False, compression="zstd", compression_level=19)
