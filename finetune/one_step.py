"""What one real optimizer step on forward-only data does to what is stored, and to the reverse loss.

    steps = rp.one_step("runs/one-layer-quick/rope-l10-s0")
    rp.one_step_curves(steps)

From each checkpoint the run's own next step is taken on a copy: the same rows, masks, learning rate, clipping and
AdamW, with the optimizer's saved state where the checkpoint keeps it (the last ones) and a fresh one elsewhere, which
moves every weight by about the learning rate: a longer step than the run's own, so each row says which it was. The
change of every pair's losses stands beside its first-order prediction, the product of the loss gradient with
the update that was made (preconditioner, momentum and decay included), so only curvature lies between the two.

Source: paper Sec. 4.1 and 4.3, taken from gradient flow to the optimizer that trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..errors import RevprobeError
from ..hooks.untouched import untouched
from ..models.checkpoints import checkpoint_folder
from ..models.probed import ProbedModel
from ..models.registry import load_model
from ..probes.batches import prepare_queries
from ..probes.pairs import Query, ReversalPairs
from ..probes.slopes import loss_slopes
from ..probes.statistics import derangement, mean_over_facts, resampled_facts
from ..probes.storage import evidence_by_pair, probe_stored_evidence
from .runs import Run, build_trainer, open_run, pinned_threads
from .saving import missing_state
from .storage_curves import letter_questions
from .trainer import ForwardOnlyTrainer, Permutations, TokenRows

NO_RATE = "the learning rate is 0 at this step"
SWAPPED = "pairs of kind 'swapped' do not share an entry of S"
QUANTITIES = ("stored", "forward_loss", "reverse_loss")


@dataclass(frozen=True)
class Step:
    """A checkpoint before and after its run's next optimizer step; two models that share nothing.

    `optimizer`: "saved" (the checkpoint's own state) or "fresh"; `update`: what was added to each parameter, float64.
    """

    before: ProbedModel
    after: ProbedModel
    update: dict[str, Tensor]
    learning_rate: float
    optimizer: str


def one_step(
    run: Run | str | Path,
    *,
    pairs: ReversalPairs | None = None,
    steps: Iterable[int] | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Take the run's next step from each checkpoint, on a copy, and follow every pair.

    Args:
        pairs: what is followed; every placement of the run's letters, mirrored, when None.
        steps: which checkpoints; all that are complete when None. The step is taken on the raw weights.
        learning_rate: instead of the schedule's (which is 0 at step 0 of a warm-up).
    Returns: one row per checkpoint, quantity and pair: step, optimizer ("saved" or "fresh" state), learning_rate,
        quantity ("stored": S[v, u] under the reverse query, logits; "forward_loss", "reverse_loss": nats), pair,
        fact, kind, before, came (the change), predicted (first order; NaN for "stored"), came_control and
        predicted_control (the same target on the evidence of another fact), reason. Measured in float64 whatever
        the model's dtype, since a step's change can be as small as float32 rounding. See `one_step_curves`.
    Raises: RevprobeError, for a run without checkpoints or a step it lacks.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if not run.steps:
        raise RevprobeError(f"{run.path} has no complete checkpoint; train it first")
    tables = []
    for at in run.steps if steps is None else steps:
        step = next_step(run, at, learning_rate=learning_rate)
        asked = letter_questions(run, step.before) if pairs is None else pairs
        table = follow(step, asked, batch_size=batch_size, seed=seed)
        table.insert(0, "step", step.before.step)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def next_step(run: Run, step: int = -1, *, learning_rate: float | None = None) -> Step:
    """The run's next optimizer step from a checkpoint; files, models and random generators stay as they are.

    Raises: RevprobeError, when the run has no such checkpoint.
    """
    checkpoint, step, _ = checkpoint_folder(run.path, step, "raw")
    before = load_model(run.path, step=step, weights="raw")
    with untouched(before.module), pinned_threads(run.config.training.threads):
        trainer, _ = build_trainer(run, None)
        module = trainer.model
        assert module is not None, "build_trainer gives it one"
        before.module.to(trainer.args.device)
        module.to(trainer.args.device)
        module.load_state_dict(before.module.state_dict())
        trainer.create_optimizer_and_scheduler(num_training_steps=run.config.training.steps)
        saved = not missing_state(checkpoint)
        if saved:
            trainer._load_optimizer_and_scheduler(str(checkpoint))
        rate = _set_rate(trainer, step, learning_rate)
        if saved:  # last: dropout then draws what the run drew
            trainer._load_rng_state(str(checkpoint))
        _take_step(trainer, step)
    start, end = _in_float64(before, before.module), _in_float64(before, module)
    moved = dict(end.module.named_parameters())
    update = {name: (moved[name] - p).detach() for name, p in start.module.named_parameters()}
    return Step(start, end, update, rate, "saved" if saved else "fresh")


def _set_rate(trainer: ForwardOnlyTrainer, step: int, asked: float | None) -> float:
    """The learning rate of step number `step` by the run's schedule, unless one is asked for."""
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None, "they were created just before"
    lambdas = trainer.lr_scheduler.lr_lambdas
    for group, schedule in zip(trainer.optimizer.param_groups, lambdas, strict=True):
        group["lr"] = group["initial_lr"] * schedule(step) if asked is None else asked
    return float(trainer.optimizer.param_groups[0]["lr"])


def _take_step(trainer: ForwardOnlyTrainer, step: int) -> None:
    """Loss, gradient, clipping and update as in the run, on the rows and masks the run drew there."""
    module, arguments = trainer.model, trainer.args
    assert module is not None and trainer.optimizer is not None, "the caller made both"
    table = cast(TokenRows, trainer.train_dataset)  # build_trainer's own
    size = trainer.get_total_train_batch_size(arguments)
    order = Permutations(len(table), (step + 1) * size, arguments.seed)
    rows = table.__getitems__(list(islice(order, step * size, None)))
    trainer.state.global_step = step
    module.train()
    loss = trainer.compute_loss(module, {"input_ids": rows.to(arguments.device)})
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), arguments.max_grad_norm)
    trainer.optimizer.step()


def _in_float64(model: ProbedModel, module: nn.Module) -> ProbedModel:
    """A wrapped copy of `module`; what is known about `model` holds for it too."""
    twin = copy.copy(model)
    twin.module = copy.deepcopy(module).double().eval()
    return twin


def follow(step: Step, pairs: ReversalPairs, *, batch_size: int | None = None, seed: int = 0) -> pd.DataFrame:
    """What a step changed, pair by pair: the columns of `one_step` but for `step`."""
    facts = {"pair": np.arange(len(pairs)), "fact": pairs.facts.astype(str), "kind": pairs.kind}
    shared = {"optimizer": step.optimizer, "learning_rate": step.learning_rate}
    tables = [{"quantity": "stored", **_stored_change(step, pairs, batch_size, seed)}]
    tables += [{"quantity": f"{side}_loss", **values} for side, values in _loss_changes(step, pairs, batch_size, seed)]
    return pd.concat([pd.DataFrame(shared | {"quantity": t.pop("quantity")} | facts | t) for t in tables])


def _stored_change(step: Step, pairs: ReversalPairs, batch_size: int | None, seed: int) -> dict[str, Any]:
    columns = {name: np.full(len(pairs), np.nan) for name in ("before", "came", "predicted", "came_control")}
    columns["predicted_control"] = np.full(len(pairs), np.nan)
    if pairs.kind != "same_target":
        return columns | {"reason": SWAPPED}
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    start, end = (evidence_by_pair(probe_stored_evidence(m, pairs, **options)) for m in (step.before, step.after))
    for name, column in (("came", "stored_reverse"), ("came_control", "stored_control")):
        columns[name] = (end[column] - start[column]).to_numpy()
    return columns | {"before": start["stored_reverse"].to_numpy(), "reason": start["reason"].to_numpy()}


def _loss_changes(
    step: Step, pairs: ReversalPairs, batch_size: int | None, seed: int
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Of the pairs' own queries, and of their targets under the queries of other facts."""
    queries = prepare_queries(step.before, pairs.queries)
    partner = derangement(pairs.facts.astype(str), pairs.groups(step.before.logit_shift), seed=seed)
    own = {"forward": pairs.forward, "reverse": pairs.reverse}
    asked: dict[Query, int] = {query: place for place, query in enumerate(queries)}
    elsewhere = {side: np.full(len(pairs), -1) for side in own}
    for side, index in own.items():
        for pair in np.flatnonzero(partner >= 0):
            moved = _with_target(queries[index[partner[pair]]], queries[index[pair]].target)
            if moved is not None:
                elsewhere[side][pair] = asked.setdefault(moved, len(asked))
    before = loss_slopes(step.before, list(asked), [step.update], batch_size=batch_size)
    came = loss_slopes(step.after, list(asked), batch_size=batch_size).loss - before.loss
    for side, index in own.items():
        other = elsewhere[side]
        columns = {"before": before.loss[index], "came": came[index], "predicted": before.slope[0][index]}
        for name, values in (("came_control", came), ("predicted_control", before.slope[0])):
            columns[name] = np.where(other >= 0, values[other], np.nan)
        yield side, columns | {"reason": ""}


def _with_target(query: Query, target: tuple[int, ...]) -> Query | None:
    """The query asked for another target; None for one of another length."""
    if len(target) != len(query.target_positions):
        return None
    tokens = list(query.token_ids)
    for position, token in zip(query.target_positions, target, strict=True):
        tokens[position] = token
    return Query.unchecked(tokens, query.target_positions, query.evidence_positions)


def one_step_curves(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """What `one_step` gave, averaged over pairs: one row per checkpoint and quantity.

    Columns: step, optimizer, learning_rate, quantity, kind, n; before, came, predicted, error (came less predicted),
    came_control, excess (came less came_control) and predicted_control, each a mean with _low and _high (95 %, over
    facts); slope (of came on predicted over pairs, through zero; 1 where curvature does not matter) with the same;
    correlation (Pearson r of the two over pairs); reason.
    """
    table = table.assign(error=table["came"] - table["predicted"], excess=table["came"] - table["came_control"])
    keys = ["step", "optimizer", "learning_rate", "quantity", "kind"]
    rows = []
    for key, part in table.groupby(keys, sort=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True))
        facts = part["fact"].to_numpy().astype(str)
        for name in ("before", "came", "predicted", "error", "came_control", "excess", "predicted_control"):
            found = mean_over_facts(part[name].to_numpy(dtype=np.float64), facts, seed=seed)
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            row |= {"n": found.n} if name == "came" else {}
        row |= _agreement(part, facts, seed)
        row["reason"] = NO_RATE if row["learning_rate"] == 0 else next(iter(part["reason"][part["reason"] != ""]), "")
        rows.append(row)
    return pd.DataFrame(rows)


def _agreement(part: pd.DataFrame, facts: np.ndarray, seed: int) -> dict[str, float]:
    """Least-squares slope through zero, with its interval, and Pearson r over pairs; NaN without a prediction."""
    came, predicted = (part[name].to_numpy(dtype=np.float64) for name in ("came", "predicted"))
    found = dict.fromkeys(("slope", "slope_low", "slope_high", "correlation"), float("nan"))
    if not np.isfinite(predicted).all() or not predicted.any():
        return found
    index = np.unique(facts, return_inverse=True)[1]
    products, squares = np.bincount(index, came * predicted), np.bincount(index, predicted**2)
    found["slope"] = float(products.sum() / squares.sum())
    if len(products) > 1:
        draws = resampled_facts(len(products), seed=seed)
        low, high = np.percentile((draws @ products) / (draws @ squares), [2.5, 97.5])
        found |= {"slope_low": float(low), "slope_high": float(high)}
    if np.ptp(came) > 0 and np.ptp(predicted) > 0:
        found["correlation"] = float(np.corrcoef(came, predicted)[0, 1])
    return found
