"""Which readings a run should have, which of them are missing, and taking those again from their checkpoints.

A checkpoint holds exactly the weights its readings were taken on, so a reading taken again is the one that was lost,
byte for byte (on the same software and machine).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import enable_full_determinism

from ...errors import RevprobeError
from ...models.checkpoints import checkpoint_steps, step_name
from ...models.registry import load_model
from ...probes.fused import PROBES
from ...relations.catalog import letters
from ..config.one_layer import RunConfig
from ..training.checkpointing import READINGS
from ..training.probe_callback import take_readings
from .building import probe_pairs, uses_cpu

_SHOWN = 3


class Expected(NamedTuple):
    """One reading a run should have: at a step, by a probe ("attention", ...), on weights ("raw" or "ema")."""

    step: int
    probe: str
    weights: str

    @property
    def file(self) -> str:
        """Its path from the run's folder."""
        return f"{READINGS}/{step_name(self.step)}/{PROBES[self.probe]}.{self.weights}.parquet"


def expected_readings(config: RunConfig) -> list[Expected]:
    """Every snapshot x probe x weights of a run."""
    averaged = config.model.objective == "masked" and config.training.ema_decay is not None
    weights = ("raw", "ema") if averaged else ("raw",)
    return [Expected(step, probe, kind) for step in config.snapshot_steps for kind in weights for probe in PROBES]


def missing_readings(run: Path, config: RunConfig) -> list[Expected]:
    """The readings that should be there by the last complete checkpoint, and are not."""
    last = max(checkpoint_steps(run), default=-1)
    return [one for one in expected_readings(config) if one.step <= last and not (run / one.file).is_file()]


def describe_missing(missing: list[Expected], config: RunConfig) -> str:
    """How many readings are missing, and the first of them, for one line."""
    named = ", ".join(one.file for one in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return f"{len(missing)} of {len(expected_readings(config))} readings are missing ({named}{more})"


def retake_missing(run: Path, config: RunConfig) -> list[Expected]:
    """Take the missing readings from the run's checkpoints and write them; the others stay as they are.

    Returns: the readings taken.
    Raises: RevprobeError, for readings whose checkpoint is missing as well, after all others were taken.
    """
    missing, there = missing_readings(run, config), checkpoint_steps(run)
    taken = [one for one in missing if one.step in there]
    on_cpu = uses_cpu(config.training.device)
    if taken and not on_cpu:
        enable_full_determinism(config.training.seed)  # as it was while training
    relation = letters(config.relation.length, config.relation.alphabet)
    for step, weights in dict.fromkeys((one.step, one.weights) for one in taken):
        model = load_model(run, step=step, weights=weights, device="cpu" if on_cpu else "cuda")
        lists = probe_pairs(relation, model)
        asked = [one for one in taken if (one.step, one.weights) == (step, weights)]
        for one, reading in zip(asked, take_readings(model, {a.probe: lists[a.probe] for a in asked}), strict=True):
            (run / one.file).parent.mkdir(parents=True, exist_ok=True)
            reading.save(run / one.file)
    lost = [one for one in missing if one.step not in there]
    if lost:
        raise RevprobeError(
            f"{run}: {describe_missing(lost, config)}, and the checkpoint of step {lost[0].step} with them; delete the "
            "run's folder to train it anew"
        )
    return taken
