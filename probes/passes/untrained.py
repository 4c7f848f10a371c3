"""The same model before it learned anything: what its readings show is architecture, tokens and chance."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import RevprobeError
from ...models.contract.block_masks import WHOLE
from ...models.peft_adapters import adapter_parameters
from ...models.probed import ProbedModel

ADAPTER_LEFT_OUT = "adapters are left out of the untrained twin, so it has no parameters of theirs"
# Where peft keeps a module that it has put something on, or that it trains a copy of.
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.|$)")


def untrained_twin(model: ProbedModel, seed: int = 0) -> ProbedModel:
    """A model of the same configuration with the initial weights that its class draws, in dtype and place of the other.

    Adapters are left out. The random generators come out as they went in.
    Raises: RevprobeError, for a module that is no model of transformers (how it is initialised is not known), and for
        one whose parameters are not those that its configuration makes.
    """
    inner = _without_adapter(model.module)
    if not isinstance(inner, PreTrainedModel):
        raise RevprobeError(
            f"{model.name} ({type(inner).__name__}) cannot be made anew: only models of transformers say how they are "
            "initialised; probe one that you initialise yourself, and compare"
        )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        fresh: nn.Module = type(inner)(copy.deepcopy(inner.config))
    _dress(fresh, inner, model)
    name = f"{model.name} untrained"
    if inner is model.module:
        return model.with_module(fresh.eval(), name=name)
    # Without the adapter its rows may be others: a prompt's virtual tokens are gone.
    return ProbedModel(
        fresh.eval(),
        model.tokenizer,
        objective=model.objective,
        mask_token_id=model.mask_token_id,
        logit_shift=model.logit_shift,
        begin_token_id=model.begin_token_id,
        block_size=(model.block_size or WHOLE) if model.objective == "masked" else None,
        name=name,
        step=model.step,
        weights=model.weights,
    )


def twin_parameters(model: ProbedModel, names: Sequence[str] | None) -> list[str] | None:
    """What the untrained twin calls some parameters of a model, an adapter's left out; None for all.

    Raises: RevprobeError, when none is left.
    """
    if names is None:
        return None
    inside = {id(p): name for name, p in _without_adapter(model.module).named_parameters()}
    adapters, own = set(adapter_parameters(model.module)), dict(model.module.named_parameters())
    kept = [inside.get(id(own[name]), name) for name in names if name not in adapters]
    if not kept:
        raise RevprobeError(ADAPTER_LEFT_OUT)
    return list(dict.fromkeys(_WRAPPED.sub("", name) for name in kept))


def _without_adapter(module: nn.Module) -> nn.Module:
    """The model that peft's wrapper holds; a model that holds its adapter inside, as it is."""
    unwrap = getattr(module, "get_base_model", None)
    return module if unwrap is None else unwrap()


def _dress(fresh: nn.Module, like: nn.Module, model: ProbedModel) -> None:
    """Give each parameter and buffer the dtype of its namesake, and all the model's device.

    Not the model's dtype throughout: rotary frequencies stay float32 in a bfloat16 model that was loaded so.
    Raises: RevprobeError, when the parameters of the two are not of the same names and shapes.
    """
    adapters = set(adapter_parameters(like))
    own = {_WRAPPED.sub("", name): p for name, p in like.named_parameters() if name not in adapters}
    made = dict(fresh.named_parameters())
    # Weights of 4 and 8 bits are kept in another shape.
    other = [n for n, p in own.items() if n not in made or (p.is_floating_point() and p.shape != made[n].shape)]
    if other := other + [name for name in made if name not in own]:
        raise RevprobeError(
            f"{model.name} cannot be made anew from its configuration: parameter {other[0]!r} is of another shape, or "
            "in one of the two alone; probe an untrained model that you make yourself, and compare"
        )
    kept: dict[str, Tensor] = {**own, **{_WRAPPED.sub("", name): b for name, b in like.named_buffers()}}
    for name, tensor in [*made.items(), *fresh.named_buffers()]:
        there = kept.get(name, tensor)
        dtype = there.dtype if there.is_floating_point() else model.dtype
        tensor.data = tensor.data.to(model.device, dtype if tensor.is_floating_point() else tensor.dtype)
