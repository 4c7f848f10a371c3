"""Leave no trace: whatever happens inside, the model and the random generators come out as they went in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(module: nn.Module) -> Iterator[nn.Module]:
    """Run `module` in eval mode and restore its modes, requires_grad flags, .grad tensors and all RNG states.

    Hooks are not restored here: each context manager of this package removes the hooks it added, and only those.
    """
    modes = [(m, m.training) for m in module.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [d.index for d in {p.device for p, *_ in parameters} if d.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        try:
            module.eval()
            yield module
        finally:
            for m, mode in modes:
                m.training = mode
            for p, requires_grad, grad in parameters:
                p.grad = grad
                p.requires_grad_(requires_grad)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
