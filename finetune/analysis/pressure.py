"""What presses on the reverse answer over a run's checkpoints, and whether that foretells where the answer goes.

    table = rp.pressure("runs/one-layer-quick/rope-l10-s0")
    rp.foretelling(table)

Of the terms in rows whose evidence is visible and whose target is hidden, the target's own press towards the reverse
answer (paper Thm 4.6); the placeholders right of the evidence say "placeholder" at the reverse query's place.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from ...arguments import checked
from ...errors import RevprobeError
from ...models.one_layer import PLACEHOLDER
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.passes.alone import in_equal_lengths_if_need_be
from ...probes.passes.batches import in_batches, make_batch, prepare_queries, queries_per_batch
from ...probes.passes.likelihood import readout
from ...probes.passes.plan import Plan
from ...probes.readings.reading import Reading
from ...probes.statistics.by_class import facts_by_label
from ...probes.statistics.coverage import missing_intervals
from ...probes.statistics.estimators import STATISTICS_VERSION
from ...probes.statistics.intervals import mean_over_facts
from ...progress import Progress, counted, shows_progress
from ..runs.one_layer import OneLayerRun
from ..runs.open import open_run
from ..runs.run import Run
from .asked_terms import asked_terms
from .objective_terms import DRAWS, taken_apart
from .storage_curves import chosen_steps

# Which terms each row of the table sums; all of them where target and evidence are not named.
TERMS: dict[str, dict[str, str]] = {
    "target": {"priced": "target", "target": "hidden", "evidence": "visible"},
    "negative": {"priced": "right", "target": "hidden", "evidence": "visible"},
    "left": {"priced": "left", "target": "hidden", "evidence": "visible"},
    "asked": {"target": "hidden", "evidence": "visible"},
    "all": {},
}
NET = "net"  # target and negative terms
NO_STEP_AHEAD = "the reverse answer is not known so many steps ahead"
NO_TERMS = "the objective has no such term"
FEW = "fewer than 4 checkpoints with a later answer"
ALIKE = "pressure or change is the same at all of them"
LEAST = 4


@checked
@shows_progress("checkpoints")
def pressure(
    run: Run | str | Path,
    *,
    steps: Iterable[int] | None = None,
    dial: str | None = None,
    draws: int = DRAWS,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> pd.DataFrame:
    """The pressure of the training terms on the reverse answer at every checkpoint of a letters run.

    Args:
        steps: which checkpoints, negative ones counted from the last; all that are complete when None. Their raw
            weights, which are what the optimizer moves.
        dial, draws: as in `objective_terms`.
        progress: called with (checkpoints done, checkpoints in all); None shows a bar, False nothing.
    Returns: a row for each checkpoint and sum of terms: model, step, dial, terms ("target": the target's, evidence
        visible; "negative": placeholders right of the visible evidence, target hidden; "left": those left of it;
        "asked": these three; "net": target and negative; "all"), pressure (as trained, the dial's factor included; nats
        per unit of learning rate, positive where a step lowers the reverse loss), letters, margin and control, each a
        mean over facts with _low and _high (95 %), dropped (the pressure of the terms that the dial leaves out),
        sampling_error, change_adamw (by the coming step, nats; NaN without the optimizer's state), n (facts), log_odds
        (of the target against the placeholder, reverse queries, nats) with _low and _high, reverse_loss, reason,
        statistics_version.
    Raises: RevprobeError, for a fine-tuning or a causal run, and as `objective_terms`.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if not isinstance(run, OneLayerRun):
        raise RevprobeError(
            f"{run.path} is a fine-tuning, which has no placeholders; pass its steps to objective_terms"
        )
    tables = []
    for at in counted(chosen_steps(run, steps), progress):
        asked = asked_terms(run, step=at, dial=dial)
        plan = Plan(batch_size=batch_size, seed=seed)
        reading = taken_apart(asked, draws, plan).reading(plan)
        tables.append(pressure_rows(reading).assign(**_answer(asked.model, asked.pairs, batch_size)))
    return pd.concat(tables, ignore_index=True)


def pressure_rows(reading: Reading) -> pd.DataFrame:
    """The sums of terms of one reading, as `pressure` has them, without the answer."""
    frame = reading.frame[reading.frame["loss"].notna()]
    chosen = {name: np.ones(len(frame), dtype=bool) for name in TERMS}
    for name, where in TERMS.items():
        for column, value in where.items():
            chosen[name] &= (frame[column] == value).to_numpy()
    chosen[NET] = chosen["target"] | chosen["negative"]
    return pd.DataFrame([_row(name, frame[rows], reading.meta) for name, rows in chosen.items()])


def _row(name: str, part: pd.DataFrame, meta: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": meta.get("model"), "step": meta["step"], "dial": meta["dial"], "terms": name}
    columns = {"pressure": "inner", "letters": "inner_letters", "margin": "inner_margin", "control": "inner_control"}
    columns |= {"change_adamw": "adamw"}
    facts, found = facts_by_label(part), {}
    if part.empty:  # as where one token is hidden at a time: a sum of nothing
        nothing = dict.fromkeys(columns, 0.0) | {
            f"{name}{end}": np.nan for name in columns for end in ("_low", "_high")
        }
        row |= nothing | {"dropped": 0.0, "sampling_error": 0.0, "n": 0, "reason": NO_TERMS}
        return row | {"statistics_version": STATISTICS_VERSION}
    for column, of in columns.items():
        factor = 1.0 if column == "change_adamw" else part["factor"]
        values = (part[of] * factor).groupby(part["fact"], sort=True).sum(min_count=1).to_numpy(dtype=np.float64)
        found[column] = mean_over_facts(values, facts)
        row |= {column: found[column].value}
        row |= {f"{column}_low": found[column].low, f"{column}_high": found[column].high}
    out = part[part["dropped"].to_numpy(dtype=bool)]
    row["dropped"] = float(out["inner"].sum() / max(len(facts), 1))
    # The draw's error, told along all parameters, of the classes as they are trained.
    factors = part.drop_duplicates("class_number").set_index("class_number")["factor"]
    along = factors.to_numpy() @ np.array(meta["deviations"])[factors.index.to_numpy(dtype=int)]
    row["sampling_error"] = float(np.sqrt((along**2).sum() / (len(along) * (len(along) - 1))))
    reasons = [f"change_adamw: {meta['reason_adamw']}" if meta["reason_adamw"] else "", missing_intervals(found)]
    row |= {"n": found["pressure"].n, "reason": "; ".join(filter(None, reasons))}
    return row | {"statistics_version": STATISTICS_VERSION}


def _answer(model: ProbedModel, pairs: ReversalPairs, batch_size: int | None) -> dict[str, float]:
    """How far the target leads the placeholder under the reverse queries, and their loss."""
    queries = prepare_queries(model, pairs.queries)
    asked = [queries[one] for one in pairs.reverse]
    size, placeholder = queries_per_batch(model, asked, batch_size), model.tokenizer.get_vocab()[PLACEHOLDER]

    @torch.no_grad()
    def run() -> np.ndarray:
        found = np.zeros((2, len(asked)))
        for numbers in in_batches(model, range(len(asked)), size, lambda q: len(asked[q].token_ids)):
            batch = make_batch(model, [asked[q] for q in numbers])
            first = readout(model, batch)[:, 0]
            values = torch.stack([first.gather(1, batch.targets)[:, 0], first[:, placeholder]])
            found[:, numbers] = values.cpu().numpy()
        return found

    own, other = in_equal_lengths_if_need_be(model, run)
    loss, lead = -own, own - other
    odds = mean_over_facts(lead, pairs.facts.astype(str))
    return {
        "log_odds": odds.value,
        "log_odds_low": odds.low,
        "log_odds_high": odds.high,
        "reverse_loss": float(loss.mean()),
    }


@checked
@shows_progress("sums of terms")
def foretelling(
    table: pd.DataFrame,
    answers: pd.DataFrame | None = None,
    *,
    ahead: int = 100,
    progress: Progress | bool | None = None,
) -> pd.DataFrame:
    """Does the pressure at a checkpoint foretell how the reverse log-odds change over the next steps of the same run?

    Args:
        table: what `pressure` gave for one run.
        answers: its `run.answers()`, which are read at more steps than its checkpoints; the checkpoints' own log-odds
            when None. Between two steps that are at most `ahead` apart the log-odds are interpolated.
        ahead: so many steps.
        progress: called with (sums of terms done, sums of terms in all); None shows a bar, False nothing.
    Returns: a row for each sum of terms: terms, ahead, n (checkpoints with an answer so far ahead), spearman (rank
        correlation of pressure and change over them), control (mean of the same with the pressure shifted in time, by
        every number of checkpoints, round the end), control_low and control_high (2.5 and 97.5 % of the shifts), p (the
        share of shifts, the true one included, that reach the true correlation), left_out (checkpoints without a later
        answer), reason. NaN below 4 checkpoints. With few checkpoints p can be no smaller than 1 / n.
    Raises: RevprobeError, for a table of something else.
    """
    if missing := sorted({"step", "terms", "pressure", "log_odds"} - set(table.columns)):
        raise RevprobeError(f"the table has no column {missing[0]!r}; expected what pressure gives")
    if ahead < 1:
        raise RevprobeError(f"ahead={ahead!r}: expected at least 1 step")
    if bool(table.duplicated(["step", "terms"]).any()):
        raise RevprobeError("the table holds a step twice; expected the pressure of one run, each run apart")
    known = table.drop_duplicates("step")[["step", "log_odds"]]
    if answers is not None:
        known = _reverse_answers(answers)
    known = known.sort_values("step")
    rows = []
    for name, part in counted(list(table.groupby("terms", sort=False)), progress):
        part = part.sort_values("step")
        change = _change(known, part["step"].to_numpy(dtype=np.float64), ahead)
        found = _shifted(part["pressure"].to_numpy(dtype=np.float64), change)
        rows.append({"terms": name, "ahead": ahead} | found)
    return pd.DataFrame(rows)


def _reverse_answers(answers: pd.DataFrame) -> pd.DataFrame:
    """The reverse log-odds of a run's raw weights. Raises: RevprobeError, for a table of something else."""
    if missing := sorted({"step", "weights", "question", "extra", "log_odds"} - set(answers.columns)):
        raise RevprobeError(f"the answers have no column {missing[0]!r}; expected what run.answers() gives")
    asked = (answers["question"] == "reverse") & (answers["extra"] == 0) & (answers["weights"] == "raw")
    return answers.loc[asked, ["step", "log_odds"]]


def _change(known: pd.DataFrame, steps: np.ndarray, ahead: int) -> np.ndarray:
    """How the log-odds change over the next steps; NaN where they are not known. Shapes: `step -> step`."""
    at, value = (known[column].to_numpy(dtype=np.float64) for column in ("step", "log_odds"))

    def read(wanted: np.ndarray) -> np.ndarray:
        right = np.searchsorted(at, wanted).clip(0, len(at) - 1)
        left = np.searchsorted(at, wanted, side="right").clip(1, len(at)) - 1
        inside = (at[left] <= wanted) & (wanted <= at[right]) & (at[right] - at[left] <= ahead)
        return np.where(inside, np.interp(wanted, at, value), np.nan)

    return read(steps + ahead) - read(steps)


def _shifted(values: np.ndarray, change: np.ndarray) -> dict[str, Any]:
    """The rank correlation, and those of the values shifted in time. Shapes: `step, step`."""
    there = np.isfinite(values) & np.isfinite(change)
    values, change = values[there], change[there]
    names = ("spearman", "control", "control_low", "control_high", "p")
    row: dict[str, Any] = dict.fromkeys(names, float("nan"))
    row = {"n": len(values)} | row | {"left_out": int((~there).sum())}
    if len(values) < LEAST:
        return row | {"reason": f"{FEW}; {NO_STEP_AHEAD}" if row["left_out"] else FEW}
    if np.ptp(values) == 0 or np.ptp(change) == 0:
        return row | {"reason": ALIKE}
    found = [float(stats.spearmanr(np.roll(values, shift), change).statistic) for shift in range(len(values))]
    low, high = np.percentile(found[1:], [2.5, 97.5])
    row |= {"spearman": found[0], "control": float(np.mean(found[1:])), "control_low": low, "control_high": high}
    row["p"] = sum(one >= found[0] - 1e-12 for one in found) / len(found)
    return row | {"reason": ""}
