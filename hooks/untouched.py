"""Leave no trace: whatever happens inside, the model and the random generators come out as they went in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from .gradients.spread_weights import let_go
from .kept_state import KeptState


@contextmanager
def untouched(module: nn.Module) -> Iterator[nn.Module]:
    """Run `module` in eval mode and restore its modes, requires_grad flags, .grad tensors and all RNG states.

    So are attributes and what stands in them, buffers, submodules, hooks and settings that a forward pass changes
    (`kept_state`; BigBird gives up its block attention for good after one short sequence; transformers writes into its
    config), and weights that it gives other tensors. Weights that are spread over processes are in pieces again.

    The mode is set as a flag on every module: `eval()` and `train()` may be the model's own, and change weights
    (loralib merges its adapters). Hooks on parameters are off: a gradient is the loss's own, not what a mask makes of
    it.
    """
    modules = modules_of(module)
    modes = [(m, m.training) for m in modules]
    own = (p for m in modules for p in m._parameters.values() if p is not None)
    parameters = [(p, p.requires_grad, p.grad, p._backward_hooks) for p in own]
    state = KeptState(modules)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [d.index for d in {p.device for p, *_ in parameters} if d.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        try:
            set_eval_mode(module)
            for p, _, _, hooks in parameters:
                if hooks:
                    p._backward_hooks = None
            yield module
        finally:
            try:
                state.restore()
            finally:  # what cannot be put back leaves nothing else behind
                for m, mode in modes:
                    m.training = mode
                let_go(module)
                for p, requires_grad, grad, hooks in parameters:
                    p.grad = grad
                    p.requires_grad_(requires_grad)
                    if hooks:
                        p._backward_hooks = hooks
                random.setstate(python_state)
                np.random.set_state(numpy_state)


def set_eval_mode(module: nn.Module) -> nn.Module:
    """The module with the flag of every part at eval, without a call of its own `eval()` and `train()`."""
    for m in modules_of(module):
        if m.training:
            m.training = False
    return module


def modules_of(module: nn.Module) -> list[nn.Module]:
    """Its modules, and those that one of them keeps as an attribute beside its children (a bridge its original)."""
    found: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        for m in waiting.pop().modules():
            if id(m) not in found:
                found[id(m)] = m
                waiting += [held for held in vars(m).values() if isinstance(held, nn.Module)]
    return list(found.values())
