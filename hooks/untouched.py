"""Leave no trace: whatever happens inside, the model and the random generators come out as they went in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

# What torch keeps on every module: parameters, hooks and mode are restored by whoever changes them.
_OF_TORCH = frozenset(vars(nn.Module()))
# Buffers of more elements are not copied each time; a model that writes into one is refused when it is wrapped.
SMALL_BUFFER = 1 << 20


@contextmanager
def untouched(module: nn.Module) -> Iterator[nn.Module]:
    """Run `module` in eval mode and restore its modes, requires_grad flags, .grad tensors and all RNG states.

    So are attributes, buffers and submodules that a forward pass replaces (BigBird gives up its block attention for
    good after one short sequence). Hooks are not restored here: each context manager of this package removes the
    hooks it added, and only those.
    """
    modes = [(m, m.training) for m in module.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    put_back = [_state_of(m) for m, _ in modes]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [d.index for d in {p.device for p, *_ in parameters} if d.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        try:
            module.eval()
            yield module
        finally:
            for restore in put_back:
                restore()
            for m, mode in modes:
                m.training = mode
            for p, requires_grad, grad in parameters:
                p.grad = grad
                p.requires_grad_(requires_grad)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _state_of(module: nn.Module) -> Callable[[], None]:
    """Note a module's own attributes, submodules and buffers; what is returned puts them back."""
    attributes = {key: value for key, value in vars(module).items() if key not in _OF_TORCH}
    modules, buffers = dict(module._modules), dict(module._buffers)
    copies = {key: (b, b._version, b.clone()) for key, b in buffers.items() if b is not None and _is_small(b)}

    def restore() -> None:
        state = vars(module)
        for key in [key for key in state if key not in _OF_TORCH and key not in attributes]:
            del state[key]
        state.update(attributes)
        for held, kept in ((module._modules, modules), (module._buffers, buffers)):
            if _identities(held) != _identities(kept):
                held.clear()
                held.update(kept)  # type: ignore[arg-type]  # each with its own
        with torch.no_grad():
            for buffer, version, values in copies.values():
                if buffer._version != version:
                    buffer.copy_(values)

    return restore


def _identities(held: Mapping[str, object]) -> list[tuple[str, int]]:
    return [(key, id(value)) for key, value in held.items()]


def _is_small(buffer: Tensor) -> bool:
    return buffer.numel() <= SMALL_BUFFER and not buffer.is_meta and not buffer.is_inference()
