"""Probe a model while it trains: a callback for any transformers Trainer.

    trainer.add_callback(ProbeCallback(pairs))               # readings in output_dir/readings

Readings are taken on the weights as they are, and on their average where there is one, before the checkpoint of the
same step is completed. Probing leaves no trace: with and without the callback, training ends at the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from ...hooks.untouched import untouched
from ...models.checkpoints import step_name
from ...models.peft_adapters import adapter_parameters, is_adapter_parameter, own_parameters, without_wrapper
from ...models.probed import ProbedModel, as_probed
from ...probes.controls import Controls, Parent, Reader
from ...probes.fused import PROBES, control_readers, lists_read, probe, require_probes
from ...probes.pairs.pairs import ReversalPairs
from ...probes.passes.plan import Plan, Share
from ...probes.readings.reading import Reading
from ...probes.readings.readings import Readings
from .checkpointing import READINGS
from .distributed import ProcessGroup, require_whole

Pairs = ReversalPairs | Mapping[str, ReversalPairs]
ProbeListener = Callable[[str, int, int], None]
# Whose parameters' gradients are compared, and what the readings are called.
OWNERS = ("all", "lora", "both")
# Where accelerate keeps the forward that its autocast goes around.
_OWN = "_original_forward"
GRADIENT, LORA_GRADIENT = "gradient_cosine", "lora_gradient_cosine"
NO_ADAPTER = "its model has no adapter, whose parameters alone this reading is of"


def take_readings(
    model: ProbedModel,
    pairs: Pairs,
    *,
    batch_size: int | None = None,
    parameters: str = "all",
    listener: ProbeListener | None = None,
    share: Share | None = None,
    controls: str | Iterable[str] = (),
    parent: Parent | None = None,
) -> Readings:
    """All three probes on some pairs (one fused pass over each list they read), or the named ones of a mapping.

    Args:
        parameters: whose gradients are compared. "all": the model's own, an adapter's left out, as they are once it
            is merged; "lora": the adapter's, as a reading of its own, `lora_gradient_cosine`; "both" gives both.
        listener: called with the probe's name ("all" for a pass that several share), queries done, and queries in all.
        share: divides the work among processes, as in `probe`.
        controls, parent: what attention and gradients are held against beside shuffled facts, as in `probe`; each
            process takes them whole.
    Raises: RevprobeError, for an unknown probe name, the parameters of an adapter that is not there, and for whatever
        the probes refuse.
    """
    asked = asked_parameters(model, parameters)
    options: dict[str, Any] = {"parameters": asked, "batch_size": batch_size, "share": share}

    def progress(name: str) -> Callable[[int, int], None] | bool:
        return False if listener is None else partial(listener, name)

    if isinstance(pairs, ReversalPairs):
        lists = lists_read(pairs, PROBES)
    else:
        lists = [([name], pairs[name].for_probe(name)) for name in require_probes(pairs)]
    beside = Controls.asked(controls, parent)
    taken: list[Reading] = []
    for names, own in lists:
        told = progress(names[0] if len(names) == 1 else "all")
        found = by_owner(probe(model, own, only=names, progress=told, **options), parameters)
        plan = Plan(parameters=asked, batch_size=batch_size, progress=told)
        readers = control_readers(model, own, plan, beside) if beside.names else {}
        taken += [_held_against(reading, beside, readers, parameters) for reading in found]
    return Readings(taken)


def _held_against(
    reading: Reading, beside: Controls, readers: Mapping[str, Mapping[str, Reader]], owner: str
) -> Reading:
    """A reading beside its controls, of the same owner's parameters."""
    probes = {name: probe for probe, name in PROBES.items()} | {LORA_GRADIENT: "gradient"}

    def part(other: Reading) -> Reading:
        own = next(one for one in by_owner([other], owner) if one.name == reading.name)
        if own.frame.empty:
            raise RevprobeError(NO_ADAPTER)
        return own

    return beside.beside(reading, readers[probes[reading.name]], part) if probes[reading.name] in readers else reading


def logged_values(readings: Iterable[Reading]) -> dict[str, float]:
    """What is handed to a tracker: each measure's value and control, averaged weights under "probe_ema/"."""
    logged: dict[str, float] = {}
    for reading in readings:
        group = "probe_ema" if reading.meta.get("weights") == "ema" else "probe"
        for row in reading.measures().itertuples():
            logged[f"{group}/{row.measure}"] = float(row.value)  # type: ignore[arg-type]  # a column of floats
            logged[f"{group}/{row.measure}_control"] = float(row.control)  # type: ignore[arg-type]
    return logged


@contextmanager
def in_its_own_dtype(module: nn.Module) -> Iterator[None]:
    """Run a model's own forward inside, without the autocast that a Trainer with bf16 or fp16 has put around it.

    accelerate replaces `forward` of the whole model: probed through it, logits are rounded to bfloat16, where a step's
    change of a loss has no digits left, while the same checkpoint is read in the dtype of its weights.
    """
    wrapped = [(part, vars(part)["forward"]) for part in module.modules() if {"forward", _OWN} <= vars(part).keys()]
    for part, _ in wrapped:
        own = vars(part)[_OWN]
        if getattr(own, "__func__", None) is type(part).forward:
            del part.forward  # the class's own, which a copy of the module has as well
        else:
            part.forward = own
    try:
        yield
    finally:
        for part, forward in wrapped:
            part.forward = forward


class Wrapping:
    """How to wrap a Trainer's model, time and again: what `ProbedModel` takes, and what the first time found out."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._first: ProbedModel | None = None

    def __call__(self, module: nn.Module, **provenance: Any) -> ProbedModel:
        module = without_wrapper(module)
        if self._first is None:
            options = {**self.options, **provenance}
            if options.get("objective") is None:
                options["objective"] = as_probed(module).objective
            self._first = ProbedModel(module, **options)
        # Which way a model reads does not change while it trains; what its modules do is known of each once.
        return self._first.with_module(module, **provenance)

    def forget(self) -> None:
        """Find it out again: another training begins."""
        self._first = None


class ProbeCallback(TrainerCallback):
    """Take readings at step 0, at the steps asked for, and at the last step.

    Under `accelerate launch` or `torchrun` every process probes its part of the pairs, and the first one writes.

    Args:
        pairs: what all three probes read, such as `Run.pairs()`; or a mapping such as {"attention": grid,
            "probability": mirror}, whose probes alone are taken, each on its own list.
        folder: where `step-000500/` folders appear; `output_dir/readings` of the Trainer when None.
        steps: the steps to probe at; whenever the Trainer writes a checkpoint when None.
        ema: an `AveragedModel` (or a module with `.module`); its weights are read too, labelled "ema".
        done: steps whose readings are there already and are not taken again (a resumed run's own step).
        batch_size, parameters, controls: as in `take_readings`.
        log: called with the probes' values under stable names ("probe/gradient_cosine", ...); `trainer.log` hands
            them to whatever `report_to` names.
        wrapping: how to wrap the Trainer's model: tokenizer, objective, mask_token_id, logit_shift, name, check, as
            in `ProbedModel`. The objective is found out by running the model when it is not given, and held against
            the model when it is; both at the first reading only.
    Raises: RevprobeError, for an unknown probe name; while training, for weights sharded over processes.
    """

    @checked
    def __init__(
        self,
        pairs: Pairs,
        folder: str | Path | None = None,
        *,
        steps: Iterable[int] | None = None,
        ema: nn.Module | None = None,
        done: Collection[int] = (),
        batch_size: int | None = None,
        parameters: str = "all",
        controls: str | Iterable[str] = (),
        log: Callable[[dict[str, float]], None] | None = None,
        **wrapping: Any,
    ) -> None:
        if not isinstance(pairs, ReversalPairs):
            require_probes(pairs)
        self.pairs, self.folder, self.ema = pairs, None if folder is None else Path(folder), ema
        self.steps = None if steps is None else frozenset(steps)
        self.batch_size, self.parameters, self.log = batch_size, parameters, log
        self.controls = Controls.asked(controls).names  # told now, not at the first snapshot
        self.wrapping = Wrapping(**wrapping)
        self.done, self._done = frozenset(done), set(done)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        self._done = set(self.done)  # a second train() takes its own readings
        self.wrapping.forget()
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
        """Probe one step, unless it has been done; the first process writes its folder."""
        step, team = state.global_step, ProcessGroup.of(args)
        if step in self._done:
            return
        home = Path(args.output_dir or ".")
        name = self.wrapping.options.get("name") or home.resolve().name
        readings: list[Reading] = []
        for weights, module in (("raw", model), ("ema", getattr(self.ema, "module", None))):
            if module is None:
                continue
            require_whole(module)
            with in_its_own_dtype(module), untouched(module):
                probed = self._wrap(module, name=name, step=step, weights=weights)
                asked: dict[str, Any] = {"batch_size": self.batch_size, "parameters": self.parameters}
                readings += take_readings(probed, self.pairs, share=team.share, controls=self.controls, **asked)
        folder = self.folder or home / READINGS
        if state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
            Readings(readings).save(folder / step_name(step))
        self._done.add(step)
        if self.log is not None:
            self.log(logged_values(readings))

    def _wrap(self, module: nn.Module, **provenance: Any) -> ProbedModel:
        return self.wrapping(module, **provenance)


def asked_parameters(model: ProbedModel, owner: str) -> list[str] | None:
    """The parameters a gradient probe is to read; None for every one there is.

    Raises: RevprobeError, for an unknown owner, and for an adapter's parameters where there is none.
    """
    if owner not in OWNERS:
        raise RevprobeError(f"unknown parameters {owner!r}{did_you_mean(owner, OWNERS)}")
    if owner == "all":
        return own_parameters(model.module)
    lora = adapter_parameters(model.module)
    if not lora:
        raise RevprobeError(f"{model.name} has no LoRA parameters; use parameters='all', or load an adapter")
    return lora if owner == "lora" else None


def by_owner(readings: Iterable[Reading], owner: str) -> Readings:
    """The readings, with the gradient's split into those asked for."""
    parts = []
    for reading in readings:
        if reading.name != GRADIENT or (owner == "all" and reading.meta["parameters"] == "all"):
            parts.append(reading)
            continue
        adapter = reading.frame["parameter"].map(is_adapter_parameter).to_numpy(dtype=bool)
        if owner in ("all", "both"):
            parts.append(replace(reading, frame=_kept(reading, ~adapter), meta=reading.meta | {"parameters": "all"}))
        if owner in ("lora", "both"):
            parts.append(Reading(LORA_GRADIENT, _kept(reading, adapter), reading.meta | {"parameters": "lora"}))
    return Readings(parts)


def _kept(reading: Reading, rows: np.ndarray) -> pd.DataFrame:
    return reading.frame[rows].reset_index(drop=True)
