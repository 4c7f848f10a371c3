"""The same model before it learned anything: what its readings show is architecture, tokens and chance."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import RevprobeError
from ...models.probed import ProbedModel


def untrained_twin(model: ProbedModel, seed: int = 0) -> ProbedModel:
    """A model of the same configuration with the initial weights that its class draws, in dtype and place of the other.

    Adapters are left out. The random generators come out as they went in.
    Raises: RevprobeError, for a module that is no model of transformers: how it is initialised is not known.
    """
    module = model.module
    inner = module.get_base_model() if hasattr(module, "peft_config") else module  # type: ignore[operator]
    if not isinstance(inner, PreTrainedModel):
        raise RevprobeError(
            f"{model.name} ({type(inner).__name__}) cannot be made anew: only models of transformers say how they are "
            "initialised; probe one that you initialise yourself, and compare"
        )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        fresh: nn.Module = type(inner)(copy.deepcopy(inner.config))
    return model.with_module(fresh.to(model.device, model.dtype).eval(), name=f"{model.name} untrained")
