"""Does the gradient product foretell what a training step does to the reverse loss?

    trainer.add_callback(FirstOrderPrediction(pairs))        # a table in output_dir/predictions.parquet

At every snapshot the optimizer's next step is measured twice: what it should change by the gradient of the loss at
the snapshot, <gradient, update>, and what it changed. The update is the one that was made, preconditioner, momentum,
weight decay, clipping and learning rate included, so nothing but curvature lies between the two numbers. Works with
any optimizer and any Trainer; training ends at the same bits with and without it.

Source: paper Sec. 4.3 (the alignment of forward and reverse gradients), taken from plain gradient flow to AdamW.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...arguments import checked
from ...atomic_files import written_whole
from ...errors import RevprobeError, first_line
from ...models.peft_adapters import without_wrapper
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.pairs.query import Query
from ...probes.passes.asked import asked_pairs, out_of_sight
from ...probes.passes.batches import prepare_queries
from ...probes.passes.prompts import facts_of, null_partners
from ...probes.passes.slopes import loss_slopes
from ...probes.statistics.coverage import missing_intervals
from ...probes.statistics.estimators import LATER_BLOCK, STATISTICS_VERSION
from ...probes.statistics.intervals import mean_over_facts
from ...probes.statistics.measures import current_columns
from ...probes.statistics.resampling import Facts
from .adamw_update import adamw_update, innermost_optimizer
from .distributed import ProcessGroup, require_whole
from .probe_callback import Wrapping, in_its_own_dtype

PREDICTIONS = "predictions.parquet"
NO_STEP_FOLLOWS = "training ended here: no step follows this snapshot"
# Means over pairs, each with an interval over facts.
_MEASURES = ("loss", "predicted", "predicted_by_adamw", "observed", "error", "predicted_control", "observed_control")
_INTERVALS = [f"{name}{end}" for name in _MEASURES for end in ("", "_low", "_high")]
COLUMNS = [
    "step",
    "direction",
    "kind",
    "n",
    "facts",
    *_INTERVALS,
    "learning_rate",
    "update_norm",
    "optimizer",
    "reason",
]
COLUMNS.append("statistics_version")


class FirstOrderPrediction(TrainerCallback):
    """Compare the first-order prediction of each snapshot's next step with the change observed.

    Args:
        pairs: whose forward and reverse losses are followed. The loss of a query is the mean negative log-likelihood
            over its target tokens, all hidden at once, in nats.
        path: the table's file; `output_dir/predictions.parquet` of the Trainer when None.
        steps: the snapshots: the step that follows each is measured. Whenever the Trainer writes a checkpoint, and at
            step 0, when None.
        control: also follow each pair's target under the query of another fact of its group, as the probability
            probe's control does: what the update does to any answer there, right or wrong.
        batch_size: queries per run of the model.
        wrapping: how to wrap the Trainer's model, as in `ProbeCallback`.

    The table has two rows a snapshot, one for each direction: step, direction, kind, n (pairs), facts; then, each with
    _low and _high (95 %, over facts), loss (before the step), predicted (<gradient, update made>), predicted_by_adamw
    (<gradient, AdamW's formula worked out before the step>; NaN with the reason for other optimizers), observed (loss
    after minus loss before), error (observed minus predicted), predicted_control and
    observed_control; then learning_rate, update_norm (Euclidean, over all trainable parameters), optimizer, reason, and
    statistics_version, under which the row's intervals were worked out: a resumed run keeps the rows it had.
    All changes are in nats.
    Raises: RevprobeError, for pairs that are no ReversalPairs, and whatever the probes refuse.
    """

    @checked
    def __init__(
        self,
        pairs: ReversalPairs,
        path: str | Path | None = None,
        *,
        steps: Iterable[int] | None = None,
        control: bool = True,
        batch_size: int | None = None,
        seed: int = 0,
        **wrapping: Any,
    ) -> None:
        self.pairs, self.path = pairs, None if path is None else Path(path)
        self.steps = None if steps is None else frozenset(steps)
        self.control, self.batch_size, self.seed = control, batch_size, seed
        self.wrap = Wrapping(**wrapping)
        self.table = pd.DataFrame(columns=COLUMNS)
        self._due: set[int] = set()
        self._step: _ComingStep | None = None

    # ---- when ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        self.wrap.forget()
        self._step, start = None, state.global_step
        # A resumed run's own snapshot may have been cut off before its next step.
        self._due = {start} if self.steps is None else set(self.steps)
        self.table = self._rows_before(start, self._file(args))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        if self.steps is None and control.should_save:
            self._due.add(state.global_step)

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        if self.steps is None:
            self._due.add(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any
    ) -> None:
        if state.global_step in self._due:
            self._step = _ComingStep.of(at["model"], at["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any
    ) -> None:
        if self._step is not None:
            with in_its_own_dtype(at["model"]):
                rows = self._measure(self._step, at["model"], args, state)
            self._step = None
            self._add(rows, args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        if state.global_step in self._due and not (self.table["step"] == state.global_step).any():
            blank = {"step": state.global_step, "kind": self.pairs.kind, "n": 0, "facts": 0, "reason": NO_STEP_FOLLOWS}
            self._add([{**blank, "direction": direction} for direction in ("forward", "reverse")], args, state)

    # ---- what ----

    def _measure(
        self, step: _ComingStep, model: nn.Module, args: TrainingArguments, state: TrainerState
    ) -> list[dict[str, Any]]:
        """The two rows of the step that has just been made; weights, gradients and generators stay as they are."""
        parameters = step.parameters(model)
        made = {name: _wide(p.detach()) - _wide(step.before[name]) for name, p in parameters.items()}
        require_whole(model)
        probed = self.wrap(model, name=Path(args.output_dir or ".").resolve().name, step=state.global_step)
        asked = _Asked.of(probed, self.pairs, self.control, self.seed)
        team = ProcessGroup.of(args)
        directions = [made] if step.by_formula is None else [made, step.by_formula]
        with _holding(parameters, step.before):
            before = team.slopes(lambda part: loss_slopes(probed, part, directions, batch_size=self.batch_size), asked)
        after = team.slopes(lambda part: loss_slopes(probed, part, batch_size=self.batch_size), asked)
        values = {"loss": before.loss, "predicted": before.slope[0], "observed": after.loss - before.loss}
        values["predicted_by_adamw"] = (
            before.slope[1] if step.by_formula is not None else np.full(len(asked.queries), np.nan)
        )
        unseen = out_of_sight(probed, asked.queries)
        values = {name: np.where(unseen, np.nan, each) for name, each in values.items()}
        facts = {
            "step": state.global_step,
            "kind": self.pairs.kind,
            "learning_rate": step.learning_rate,
            "update_norm": float(torch.stack([u.double().square().sum() for u in made.values()]).sum().sqrt()),
            "optimizer": step.optimizer,
        }
        return [
            facts | self._row(direction, values, asked, unseen, step.reason) for direction in ("forward", "reverse")
        ]

    def _row(
        self, direction: str, values: Mapping[str, np.ndarray], asked: _Asked, unseen: np.ndarray, reason: str
    ) -> dict[str, Any]:
        own, other = asked.index[direction], asked.index[f"{direction}_control"]
        columns = {name: each[own] for name, each in values.items()}
        columns["error"] = columns["observed"] - columns["predicted"]
        for name in ("predicted", "observed"):
            columns[f"{name}_control"] = np.where(other >= 0, values[name][other], np.nan)
        row: dict[str, Any] = {"direction": direction}
        means = {name: mean_over_facts(columns[name], asked.facts[direction]) for name in _MEASURES}
        for name, found in means.items():
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        row |= {"n": means["observed"].n, "facts": means["observed"].facts}
        later = f"{int(unseen[own].sum())} {LATER_BLOCK}" if unseen[own].any() else ""
        return row | {"reason": "; ".join(filter(None, [reason, later, missing_intervals(means)]))}

    # ---- where ----

    def _file(self, args: TrainingArguments) -> Path:
        return self.path or Path(args.output_dir or ".") / PREDICTIONS

    def _rows_before(self, step: int, path: Path) -> pd.DataFrame:
        """The rows a resumed run has already; those from its own step on are measured again."""
        if step == 0 or not path.is_file():
            return pd.DataFrame(columns=COLUMNS)
        try:
            table = current_columns(pd.read_parquet(path))
            return table[table["step"] < step][COLUMNS]
        except Exception as error:
            raise RevprobeError(
                f"{path} is damaged ({first_line(error)}); delete it to go on without its rows"
            ) from error

    def _add(self, rows: list[dict[str, Any]], args: TrainingArguments, state: TrainerState) -> None:
        kept, rows = self.table.to_dict("records"), [row | {"statistics_version": STATISTICS_VERSION} for row in rows]
        self.table = pd.DataFrame([*kept, *rows]).reindex(columns=COLUMNS)
        if state.is_world_process_zero:
            facts = {"pairs": self.pairs.digest, "pair_count": len(self.pairs), "seed": self.seed}
            facts |= {"versions": {name: version(name) for name in ("revprobe", "torch", "transformers")}}
            stored = pa.Table.from_pandas(self.table, preserve_index=False)
            about = {**(stored.schema.metadata or {}), b"revprobe": json.dumps(facts).encode()}
            path = self._file(args)
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as part:
                pq.write_table(stored.replace_schema_metadata(about), part, compression="zstd")


@dataclass(frozen=True)
class _ComingStep:
    """What is known just before a step: the weights, the update AdamW's formula gives, or why there is none."""

    before: dict[str, Tensor]
    by_formula: dict[str, Tensor] | None
    reason: str
    learning_rate: float
    optimizer: str

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any) -> _ComingStep:
        trained = {name: p for name, p in without_wrapper(model).named_parameters() if p.requires_grad}
        by_formula, reason = None, ""
        try:
            by_parameter = adamw_update(optimizer)
            by_formula = {name: by_parameter[id(p)] for name, p in trained.items() if id(p) in by_parameter}
        except RevprobeError as error:
            reason = f"predicted_by_adamw: {error}"
        torch_optimizer = innermost_optimizer(optimizer)
        before = {name: p.detach().clone() for name, p in trained.items()}
        rate = float(torch_optimizer.param_groups[0]["lr"])
        return cls(before, by_formula, reason, rate, type(torch_optimizer).__name__)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in without_wrapper(model).named_parameters() if name in self.before}


@dataclass(frozen=True)
class _Asked:
    """The queries whose losses are followed, and which of them belong to each pair.

    Shapes: `index`: "forward", "reverse" and their "_control" -> `pair`, -1 where a pair has no control;
    `facts`, of each direction: `pair`.
    """

    queries: list[Query]
    index: dict[str, np.ndarray]
    facts: dict[str, Facts]

    @classmethod
    def of(cls, model: ProbedModel, pairs: ReversalPairs, control: bool, seed: int) -> _Asked:
        pairs = asked_pairs(model, pairs, "first_order_prediction")
        queries = prepare_queries(model, pairs.queries)
        partner = null_partners(pairs, pairs.groups(model.logit_shift), seed=seed)
        index = {"forward": pairs.forward, "reverse": pairs.reverse}
        places: dict[Query, int] = {}
        for direction, own in list(index.items()):
            found = np.full(len(pairs), -1)
            for pair in np.flatnonzero(partner >= 0) if control else ():
                elsewhere = _with_target(queries[own[partner[pair]]], queries[own[pair]].target)
                if elsewhere is not None:
                    found[pair] = places.setdefault(elsewhere, len(queries) + len(places))
            index[f"{direction}_control"] = found
        return cls([*queries, *places], index, {side: facts_of(pairs, side) for side in ("forward", "reverse")})


def _with_target(query: Query, target: tuple[int, ...]) -> Query | None:
    """The query with another target in its place; None for a target of another length."""
    if len(target) != len(query.target_positions):
        return None
    put = dict(zip(query.target_positions, target, strict=True))
    tokens = [put.get(position, token) for position, token in enumerate(query.token_ids)]
    return Query.unchecked(tokens, query.target_positions, query.evidence_positions)


@contextmanager
def _holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put `values` into the parameters, and what was there back again, bit for bit."""
    now = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        _put(parameters, values)
        yield
    finally:
        _put(parameters, now)


@torch.no_grad()
def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
