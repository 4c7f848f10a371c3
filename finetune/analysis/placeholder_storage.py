"""What is stored for the placeholder beside what is stored for the answer, by side and over training: S[0, u], S[v, u].

    stored = rp.placeholder_storage("runs/one-layer-quick/rope-l10-s0")

At a forward query's readout row the evidence stands on the right, at a reverse one's on the left. Where the reverse
answer is outvoted rather than forgotten, S[v, u] stays above that of the other letters while the placeholder's share of
the logit grows on that side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ...arguments import checked
from ...models.one_layer import PLACEHOLDER
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.statistics.by_part import evidence_by_pair
from ...probes.statistics.coverage import missing_interval
from ...probes.statistics.estimators import STATISTICS_VERSION
from ...probes.statistics.intervals import mean_over_facts
from ...probes.storage import probe_stored_evidence
from ...progress import Progress, shows_progress
from ..runs.open import open_run
from ..runs.run import Run
from .one_step import with_target
from .storage_curves import checkpoints, letter_questions, require_masked

SIDES = {"forward": "right", "reverse": "left"}  # where the evidence stands, seen from the readout row
MEASURES = ("stored", "contribution", "logit")
ANSWERS = ("target", "placeholder", "difference")


@checked
@shows_progress("checkpoints")
def placeholder_storage(
    run: Run | str | Path,
    *,
    steps: Iterable[int] | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> pd.DataFrame:
    """S[placeholder, u] beside S[v, u] at every checkpoint of a letters run, with the evidence on either side.

    Args:
        steps, weights, progress: as in `storage_curves`.
    Returns: tidy rows: step, weights, side (of the evidence, seen from the readout row: "right" in forward queries,
        "left" in reverse ones), measure ("stored": S, logits; "contribution": what the evidence position adds to the
        logit, all sources; "logit": the whole), answer ("target", "placeholder", "difference": target less placeholder,
        pair by pair), value, low, high (95 %, over facts), n (pairs), facts, control (of S[v, u] on the left: the same
        target on the evidence of another fact; NaN elsewhere), reason, statistics_version.
    Raises: RevprobeError, as `storage_curves`, and for a fine-tuning, which has no placeholder.
    """
    run = run if isinstance(run, Run) else open_run(run)
    require_masked(run, None)
    models = checkpoints(run, steps, weights, progress)
    rows = [row for model in models for row in storage_rows(run, model, batch_size, seed)]
    return pd.DataFrame(rows)


def storage_rows(run: Run, model: ProbedModel, batch_size: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of one checkpoint."""
    pairs = letter_questions(run, model)
    tables = {
        answer: evidence_by_pair(probe_stored_evidence(model, asked, batch_size=batch_size, seed=seed))
        for answer, asked in (("target", pairs), ("placeholder", asking_for_placeholder(pairs, model)))
    }
    facts = pairs.facts.astype(str)
    rows = []
    for direction, side in SIDES.items():
        for measure in MEASURES:
            values = {name: table[f"{measure}_{direction}"].to_numpy(float) for name, table in tables.items()}
            values["difference"] = values["target"] - values["placeholder"]
            # Of the placeholder it would be the same numbers in another order.
            controlled = measure == "stored" and direction == "reverse"
            control = mean_over_facts(tables["target"]["stored_control"].to_numpy(float), facts).value
            for answer in ANSWERS:
                found = mean_over_facts(values[answer], facts)
                rows.append(
                    {"step": model.step, "weights": model.weights, "side": side, "measure": measure, "answer": answer}
                    | {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "facts": found.facts}
                    | {
                        "control": control if controlled and answer == "target" else float("nan"),
                        "reason": missing_interval(found),
                        "statistics_version": STATISTICS_VERSION,
                    }
                )
    return rows


def asking_for_placeholder(pairs: ReversalPairs, model: ProbedModel) -> ReversalPairs:
    """The same queries, as the model sees them, with the placeholder as the token asked for."""
    placeholder = model.tokenizer.get_vocab()[PLACEHOLDER]
    queries = tuple(with_target(query, (placeholder,) * len(query.target)) for query in pairs.queries)
    return replace(pairs, queries=queries)
