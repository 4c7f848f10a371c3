"""What one real optimizer step on forward-only data does to what is stored, and to the reverse loss.

    steps = rp.one_step("runs/one-layer-quick/rope-l10-s0")
    rp.one_step_curves(steps)

From each checkpoint the run's own next step is taken on a copy: the same rows, masks, learning rate, clipping and
AdamW, with the optimizer's saved state where the checkpoint keeps it (the last ones) and a fresh one elsewhere, which
moves every weight by about the learning rate: a longer step than the run's own, so each row says which it was. The
change of S[v, u] and of every pair's losses stands beside its first-order prediction, the derivative along
the update that was made (preconditioner, momentum and decay included), so only curvature lies between the two.

Source: paper Sec. 4.1 and 4.3, taken from gradient flow to the optimizer that trains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ...arguments import checked
from ...errors import RevprobeError
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.pairs.query import Query
from ...probes.passes.asked import asked_pairs
from ...probes.passes.batches import prepare_queries
from ...probes.passes.prompts import facts_of
from ...probes.passes.slopes import loss_slopes
from ...probes.statistics.by_part import evidence_by_pair
from ...probes.statistics.coverage import missing_intervals
from ...probes.statistics.estimators import STATISTICS_VERSION
from ...probes.statistics.intervals import mean_over_facts, ratio_over_facts
from ...probes.statistics.measures import current_columns
from ...probes.statistics.resampling import SHOWN, Facts
from ...probes.storage import control_partners, probe_stored_evidence
from ...progress import Progress, counted, shows_progress
from ..runs.one_layer import OneLayerRun
from ..runs.open import open_run
from ..runs.run import Run
from ..training.prediction_callback import PREDICTIONS
from .next_step import Step, next_step
from .storage_curves import chosen_steps, letter_questions

NO_RATE = "the learning rate is 0 at this step"
SWAPPED = "pairs of kind 'swapped' do not share an entry of S"
PAST_END = "past the end of the run"
KEYS = ("model", "step", "optimizer", "learning_rate", "quantity", "kind")  # of a row of the curves
QUANTITIES = ("stored", "forward_loss", "reverse_loss")
FOLLOWED = ("before", "observed", "predicted", "observed_control", "predicted_control")
AVERAGED = ("before", "observed", "predicted", "error", "observed_control", "excess", "predicted_control")
# How far the central difference of S reaches, as a share of the parameters' norm: in float64 its own error (the square
# of this) and rounding (1e-16 by this) are then about as small.
_REACH = 1e-5


@checked
@shows_progress("checkpoints")
def one_step(
    run: Run | str | Path,
    *,
    pairs: ReversalPairs | None = None,
    steps: Iterable[int] | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> pd.DataFrame:
    """Take the run's next step from each checkpoint, on a copy, and follow every pair.

    Args:
        pairs: what is followed; every placement of the run's letters, mirrored, when None.
        steps: which checkpoints, negative ones counted from the last; when None all that are complete but the run's
            last step, after which there is none. The step is taken on the raw weights.
        learning_rate: instead of the schedule's (which is 0 at step 0 of a warm-up, and ends with the run).
        progress: called with (checkpoints done, checkpoints in all); None shows a bar, False nothing.
    Returns: one row per checkpoint, quantity and pair: model, step, optimizer ("saved" or "fresh" state),
        learning_rate, quantity ("stored": S[v, u] under the reverse query, logits; "forward_loss", "reverse_loss":
        nats), pair, fact, kind, before, observed (the change), predicted (to first order: the derivative along the
        update), observed_control and predicted_control (the same target on another fact's evidence), reason. The last
        step, asked for without a learning rate, is NaN with a reason. Measured in float64 whatever
        the model's dtype, since a step's change can be as small as float32 rounding. See `one_step_curves`.
    Raises: RevprobeError, for a run without checkpoints, a step it lacks, an empty list of steps, or a fine-tuning.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if not isinstance(run, OneLayerRun):
        raise RevprobeError(
            f"{run.path} is a fine-tuning; one_step takes the steps of runs that `revprobe train` made. What a "
            f"fine-tuning's gradients foretell is in its {PREDICTIONS}"
        )
    chosen = chosen_steps(run, steps)
    if steps is None:
        chosen = [at for at in chosen if at < run.config.training.steps]
    if not chosen:
        raise RevprobeError(f"{run.path} has only its last checkpoint, after which no step comes; pass steps= to ask")
    tables = []
    for at in counted(chosen, progress):
        if at < run.config.training.steps or learning_rate is not None:
            step = next_step(run, at, learning_rate=learning_rate)
            asked = letter_questions(run, step.before) if pairs is None else pairs
            table = follow(step, asked, batch_size=batch_size, seed=seed)
        else:
            asked = letter_questions(run, run.load(at, "raw")) if pairs is None else pairs
            nothing = _undefined(asked) | {"reason": PAST_END}  # a step that no schedule names
            table = _tidy(asked, "", float("nan"), dict.fromkeys(QUANTITIES, nothing))
        table.insert(0, "step", at)
        table.insert(0, "model", run.path.name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def follow(step: Step, pairs: ReversalPairs, *, batch_size: int | None = None, seed: int = 0) -> pd.DataFrame:
    """What a step changed, pair by pair: the columns of `one_step` but for `model` and `step`."""
    pairs = asked_pairs(step.before, pairs, "one_step")
    found = {"stored": _stored_change(step, pairs, batch_size, seed)}
    found |= {f"{side}_loss": values for side, values in _loss_changes(step, pairs, batch_size, seed)}
    return _tidy(pairs, step.optimizer, step.learning_rate, found)


def _undefined(pairs: ReversalPairs) -> dict[str, Any]:
    return {name: np.full(len(pairs), np.nan) for name in FOLLOWED}


def _tidy(pairs: ReversalPairs, optimizer: str, rate: float, found: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row per quantity and pair."""
    facts = {"pair": np.arange(len(pairs)), "fact": pairs.facts.astype(str), "kind": pairs.kind}
    shared = {"optimizer": optimizer, "learning_rate": rate}
    tables = []
    for name, columns in found.items():
        drawn = facts_of(pairs, "forward" if name == "forward_loss" else "reverse")  # S is read under reverse queries
        shown = {SHOWN: drawn.unit} if SHOWN in pairs.flags else {}
        tables.append(pd.DataFrame(shared | {"quantity": name} | facts | shown | columns))
    return pd.concat(tables)


def _stored_change(step: Step, pairs: ReversalPairs, batch_size: int | None, seed: int) -> dict[str, Any]:
    if pairs.kind != "same_target":
        return _undefined(pairs) | {"reason": SWAPPED}

    def stored(model: ProbedModel) -> pd.DataFrame:
        return evidence_by_pair(probe_stored_evidence(model, pairs, batch_size=batch_size, seed=seed))

    start, end, slope = stored(step.before), stored(step.after), _slope_along(step, stored)
    columns = {"before": start["stored_reverse"].to_numpy(), "reason": start["reason"].to_numpy()}
    for column, ending in (("stored_reverse", ""), ("stored_control", "_control")):
        columns |= {f"observed{ending}": (end[column] - start[column]).to_numpy()}
        columns |= {f"predicted{ending}": slope[column].to_numpy()}
    return columns


def _slope_along(step: Step, stored: Callable[[ProbedModel], pd.DataFrame]) -> pd.DataFrame:
    """The derivative of what `stored` reads along the update, by a central difference around the checkpoint.

    S has no graph to differentiate: norm scales are measured anew at each point, as they are after the step.
    """
    columns = ["stored_reverse", "stored_control"]
    norm = lambda tensors: float(torch.stack([t.detach().square().sum() for t in tensors]).sum().sqrt())  # noqa: E731
    length = norm(step.update.values())
    if length == 0:
        return stored(step.before)[columns] * 0.0
    reach = _REACH * norm(step.before.module.parameters()) / length
    after, before = (stored(_moved(step, sign * reach))[columns] for sign in (1, -1))
    return (after - before) / (2 * reach)


@torch.no_grad()
def _moved(step: Step, share: float) -> ProbedModel:
    """The checkpoint moved by a share of the update."""
    module = copy.deepcopy(step.before.module)
    for name, parameter in module.named_parameters():
        parameter.add_(step.update[name], alpha=share)
    return step.before.with_module(module)


def _loss_changes(
    step: Step, pairs: ReversalPairs, batch_size: int | None, seed: int
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Of the pairs' own queries, and of their targets under the queries of other facts."""
    queries = prepare_queries(step.before, pairs.queries)
    partner = control_partners(pairs, step.before.logit_shift, seed=seed)
    own = {"forward": pairs.forward, "reverse": pairs.reverse}
    asked: dict[Query, int] = {query: place for place, query in enumerate(queries)}
    elsewhere = {side: np.full(len(pairs), -1) for side in own}
    for side, index in own.items():
        for pair in np.flatnonzero(partner >= 0):
            moved = with_target(queries[index[partner[pair]]], queries[index[pair]].target)
            elsewhere[side][pair] = asked.setdefault(moved, len(asked))
    before = loss_slopes(step.before, list(asked), [step.update], batch_size=batch_size)
    observed = loss_slopes(step.after, list(asked), batch_size=batch_size).loss - before.loss
    for side, index in own.items():
        other = elsewhere[side]
        columns = {"before": before.loss[index], "observed": observed[index], "predicted": before.slope[0][index]}
        for name, values in (("observed_control", observed), ("predicted_control", before.slope[0])):
            columns[name] = np.where(other >= 0, values[other], np.nan)
        yield side, columns | {"reason": ""}


def with_target(query: Query, target: tuple[int, ...]) -> Query:
    """The query asked for another target, of as many tokens."""
    tokens = list(query.token_ids)
    for position, token in zip(query.target_positions, target, strict=True):
        tokens[position] = token
    return Query.unchecked(tokens, query.target_positions, query.evidence_positions)


@checked
def one_step_curves(table: pd.DataFrame) -> pd.DataFrame:
    """What `one_step` gave, averaged over pairs: one row per checkpoint and quantity.

    Columns: model, step, optimizer, learning_rate, quantity, kind, n, n_control (pairs behind observed and behind its
    control), facts (behind observed); before, observed, predicted, error (observed less predicted), observed_control,
    excess (observed less its control, over the pairs that have both) and predicted_control, each a mean with _low and
    _high (95 %, over facts); slope (of observed on predicted over pairs, through zero; 1 where curvature does not
    matter) with the same; correlation (Pearson r of the two over pairs); reason; statistics_version.
    Raises: RevprobeError, for a table without rows.
    """
    if table.empty:
        raise RevprobeError("the table has no rows; expected what one_step gives")
    table = current_columns(table)
    if missing := sorted({"observed", "predicted", "observed_control", "fact"} - set(table.columns)):
        raise RevprobeError(f"the table has no column {missing[0]!r}; expected what one_step gives")
    table = table.assign(
        error=table["observed"] - table["predicted"], excess=table["observed"] - table["observed_control"]
    )
    # What older versions wrote does not name its model.
    keys = [name for name in KEYS if name in table]
    rows = []
    for key, part in table.groupby(keys, sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True))
        facts = Facts.of_rows(part)
        means = {name: mean_over_facts(part[name].to_numpy(dtype=np.float64), facts) for name in AVERAGED}
        for name, found in means.items():
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        own = means["observed"]
        row |= {"n": own.n, "facts": own.facts, "n_control": means["observed_control"].n} | _agreement(part, facts)
        given = part["reason"].astype(object).fillna("")  # read from CSV, a column of empty ones is all NaN: float64
        reasons = [next(iter(given[given != ""]), ""), missing_intervals(means)]
        row["reason"] = NO_RATE if row["learning_rate"] == 0 else "; ".join(filter(None, reasons))
        row["statistics_version"] = STATISTICS_VERSION
        rows.append(row)
    return pd.DataFrame(rows)


def _agreement(part: pd.DataFrame, facts: Facts) -> dict[str, float]:
    """Least-squares slope through zero, with its interval, and Pearson r over pairs; NaN without a prediction."""
    observed, predicted = (part[name].to_numpy(dtype=np.float64) for name in ("observed", "predicted"))
    found = dict.fromkeys(("slope", "slope_low", "slope_high", "correlation"), float("nan"))
    defined = np.isfinite(observed) & np.isfinite(predicted)
    observed, predicted, facts = observed[defined], predicted[defined], facts[defined]
    if not predicted.any():
        return found
    slope = ratio_over_facts(observed * predicted, predicted**2, facts)
    found |= {"slope": slope.value, "slope_low": slope.low, "slope_high": slope.high}
    # Two pairs correlate with 1 or -1 whatever they are.
    if len(observed) > 2 and np.ptp(observed) > 0 and np.ptp(predicted) > 0:
        found["correlation"] = float(np.corrcoef(observed, predicted)[0, 1])
    return found
