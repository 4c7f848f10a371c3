"""Probe a model while it trains: a callback for any transformers Trainer.

    trainer.add_callback(ProbeCallback(pairs))               # readings in output_dir/readings

Readings are taken on the weights as they are, and on their average where there is one, before the checkpoint of the
same step is completed. Probing leaves no trace: with and without the callback, training ends at the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..hooks.untouched import untouched
from ..models.checkpoints import step_name
from ..models.probed import ProbedModel, as_probed
from ..probes.fused import probe, require_probes
from ..probes.pairs import ReversalPairs
from ..probes.readings import Reading, Readings
from .saving import READINGS

Pairs = ReversalPairs | Mapping[str, ReversalPairs]
ProbeListener = Callable[[str, int, int], None]


def take_readings(
    model: ProbedModel, pairs: Pairs, *, batch_size: int | None = None, listener: ProbeListener | None = None
) -> Readings:
    """All three probes on one list of pairs (in one fused pass), or each named probe on its own list.

    Args:
        listener: called with the probe's name ("all" for the fused pass), queries done, and queries in all.
    Raises: RevprobeError, for an unknown probe name and for whatever the probes refuse.
    """

    def progress(name: str) -> Callable[[int, int], None] | None:
        return None if listener is None else partial(listener, name)

    if isinstance(pairs, ReversalPairs):
        return probe(model, pairs, batch_size=batch_size, progress=progress("all"))
    names = require_probes(pairs)
    alone = (
        probe(model, pairs[name], only=[name], batch_size=batch_size, progress=progress(name))[0] for name in names
    )
    return Readings(alone)


class ProbeCallback(TrainerCallback):
    """Take readings at step 0, at the steps asked for, and at the last step.

    Args:
        pairs: one `ReversalPairs` for all three probes, or a mapping such as {"attention": grid, "probability": mirror}
            that gives each named probe its own.
        folder: where `step-000500/` folders appear; `output_dir/readings` of the Trainer when None.
        steps: the steps to probe at; whenever the Trainer writes a checkpoint when None.
        ema: an `AveragedModel` (or a module with `.module`); its weights are read too, labelled "ema".
        done: steps whose readings are there already and are not taken again (a resumed run's own step).
        batch_size: passed on to the probes.
        wrapping: how to wrap the Trainer's model: tokenizer, objective, mask_token_id, logit_shift, name, check, as
            in `ProbedModel`. The objective is found out by running the model when it is not given, and held against
            the model when it is; both at the first reading only.
    Raises: RevprobeError, for an unknown probe name.
    """

    def __init__(
        self,
        pairs: Pairs,
        folder: str | Path | None = None,
        *,
        steps: Iterable[int] | None = None,
        ema: nn.Module | None = None,
        done: Collection[int] = (),
        batch_size: int | None = None,
        **wrapping: Any,
    ) -> None:
        if not isinstance(pairs, ReversalPairs):
            require_probes(pairs)
        self.pairs, self.folder, self.ema = pairs, None if folder is None else Path(folder), ema
        self.steps = None if steps is None else frozenset(steps)
        self.batch_size, self.wrapping = batch_size, wrapping
        self.done, self._done = frozenset(done), set(done)
        self._known: dict[str, Any] = {}  # what the first reading found out about the model

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        self._done, self._known = set(self.done), {}  # a second train() takes its own readings
        if state.global_step == 0:
            self._take(at["model"], args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        # The Trainer's own callback has decided by now whether a checkpoint follows this step.
        if control.should_save if self.steps is None else state.global_step in self.steps:
            self._take(at["model"], args, state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        if self.steps is None and control.should_save:
            self._take(at["model"], args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        # Reached first only by checkpoints that nothing announced, such as those of save_strategy="best".
        if self.steps is None:
            self._take(at["model"], args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        if not args.load_best_model_at_end:  # else the model here is no longer that of the last step
            self._take(at["model"], args, state)

    def _take(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        """Probe and write one step's folder, unless it has been done or another process does it."""
        step = state.global_step
        if step in self._done or not state.is_world_process_zero:
            return
        home = Path(args.output_dir or ".")
        name = self.wrapping.get("name") or home.resolve().name
        readings: list[Reading] = []
        for weights, module in (("raw", model), ("ema", getattr(self.ema, "module", None))):
            if module is None:
                continue
            with untouched(module):
                probed = self._wrap(module, name=name, step=step, weights=weights)
                readings += take_readings(probed, self.pairs, batch_size=self.batch_size)
        folder = self.folder or home / READINGS
        folder.mkdir(parents=True, exist_ok=True)
        Readings(readings).save(folder / step_name(step))
        self._done.add(step)

    def _wrap(self, module: nn.Module, **provenance: Any) -> ProbedModel:
        options = {**self.wrapping, **provenance, **self._known}
        if options.get("objective") is None:
            options |= {"objective": as_probed(module).objective, "check": False}
        probed = ProbedModel(module, **options)
        # Which way a model reads does not change while it trains.
        self._known = {"objective": probed.objective, "check": False}
        return probed
