"""Gradient readings of a model with a LoRA adapter: over the model's own parameters, and over the adapter's.

Both come from one pass, told apart row by row. The model's own are read through the adapter, so they are those of the
merged model; the adapter's are what training moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from ...errors import RevprobeError, did_you_mean
from ...models.peft_adapters import is_adapter_parameter
from ...models.probed import ProbedModel
from ...probes.readings.readings import Reading, Readings

OWNERS = ("all", "lora", "both")
GRADIENT, LORA_GRADIENT = "gradient_cosine", "lora_gradient_cosine"


def asked_parameters(model: ProbedModel, owner: str) -> list[str] | None:
    """The parameters a gradient probe is to read; None for every one there is.

    Raises: RevprobeError, for an unknown owner, and for an adapter's parameters where there is none.
    """
    if owner not in OWNERS:
        raise RevprobeError(f"unknown parameters {owner!r}{did_you_mean(owner, OWNERS)}")
    names = [name for name, _ in model.module.named_parameters()]
    lora = [name for name in names if is_adapter_parameter(name)]
    if owner == "all":
        return [name for name in names if not is_adapter_parameter(name)] if lora else None
    if not lora:
        raise RevprobeError(f"{model.name} has no LoRA parameters; use parameters='all', or load an adapter")
    return lora if owner == "lora" else None


def by_owner(readings: Iterable[Reading], owner: str) -> Readings:
    """The readings, with the gradient's split into those asked for."""
    return Readings(part for reading in readings for part in _parts(reading, owner))


def _parts(reading: Reading, owner: str) -> Iterator[Reading]:
    if reading.name != GRADIENT:
        yield reading
        return
    adapter = reading.frame["parameter"].map(is_adapter_parameter).to_numpy(dtype=bool)
    if owner == "all" and reading.meta["parameters"] == "all":
        yield reading
        return
    if owner in ("all", "both"):
        yield replace(reading, frame=_kept(reading, ~adapter), meta=reading.meta | {"parameters": "all"})
    if owner in ("lora", "both"):
        yield Reading(LORA_GRADIENT, _kept(reading, adapter), reading.meta | {"parameters": "lora"})


def _kept(reading: Reading, rows: np.ndarray) -> pd.DataFrame:
    return reading.frame[rows].reset_index(drop=True)
