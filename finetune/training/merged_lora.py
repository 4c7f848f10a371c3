"""A LoRA asked in the weights that it adapts: a copy that answers as the model does, in the time its base takes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...hooks.untouched import untouched
from ...models.peft_adapters import adapter_parameters
from ...models.probed import ProbedModel

# Adapted weights of more elements in all are not copied: a large model's are worth more than the time.
_MOST = 1 << 26
_TOKENS = 8  # of the row that copy and model are compared on
_AGREES = 1e-4  # of the largest logit: sums of float32 come in another order


def merged_lora(model: ProbedModel) -> ProbedModel:
    """The model with its LoRA merged in a copy, which shares all other weights with it; itself where that may not be.

    A LoRA of rank r takes up to r / rows + r / columns of a matrix's time. It is merged in float32 and float64 (half
    precision rounds W + BA otherwise than Wx + BAx), on linear modules as torch has them whose weights stand nowhere
    else, where no module has hooks or a forward of its own, and where the copy answers a few tokens as the model does.
    """
    layers = _plain_layers(model.module)
    own = {id(p): p for layer in layers.values() for p in layer.get_base_layer().parameters()}
    if not own or sum(p.numel() for p in own.values()) > _MOST or _shared(model.module, own):
        return model
    try:
        other = model.with_module(_merged(model.module, list(layers), own))
        return other if _agree(model, other) else model
    except Exception:  # whatever a foreign attribute raises when it is copied, a LoRA without a merge, too long a row
        return model


def _plain_layers(module: nn.Module) -> dict[str, Any]:
    """Every layer of the adapter by its path; none where one is no plain LoRA, or anything runs beside the layers."""
    if not adapter_parameters(module):
        return {}
    from peft.tuners.lora.layer import Linear  # seconds to import, and only adapters need it
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = dict(module.named_modules())
    if any("forward" in vars(p) or p._forward_hooks or p._forward_pre_hooks for p in parts.values()):
        return {}
    layers: dict[str, Any] = {name: part for name, part in parts.items() if isinstance(part, BaseTunerLayer)}
    for layer in layers.values():
        base = layer.get_base_layer()
        precise = all(p.dtype in (torch.float32, torch.float64) and not p.is_meta for p in layer.parameters())
        plain = type(layer) is Linear and type(base) in (nn.Linear, Conv1D) and not list(base.children())
        if not (plain and precise) or layer.merged or layer.disable_adapters:
            return {}
    return layers


def _shared(module: nn.Module, own: dict[int, nn.Parameter]) -> bool:
    """Whether some adapted weight stands elsewhere too, as a tied unembedding's does."""
    return sum(id(p) in own for _, p in module.named_parameters(remove_duplicate=False)) > len(own)


def _merged(module: nn.Module, layers: list[str], own: dict[int, nn.Parameter]) -> nn.Module:
    """A copy with the named layers merged and out of the way; every tensor but `own` is the module's."""
    others = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in own]
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in others})
    for name in layers:
        layer: Any = copied.get_submodule(name)
        layer.merge()
        home, _, last = name.rpartition(".")
        setattr(copied.get_submodule(home), last, layer.get_base_layer())
    return copied


def _agree(model: ProbedModel, other: ProbedModel) -> bool:
    """Whether both give the same logits for a short row: a weight may be read past the module that holds it."""
    ids = torch.arange(_TOKENS, device=model.device)[None] % model.vocab_size
    with untouched(model.module), untouched(other.module), torch.no_grad():
        wanted, found = model.logits(ids), other.logits(ids)
    return torch.allclose(found, wanted, rtol=0, atol=_AGREES * float(wanted.abs().max()))
