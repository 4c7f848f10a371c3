"""Leave no trace: whatever happens inside, the model and the random generators come out as they went in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from .gradients.spread_weights import let_go

# What torch keeps on every module; the mode is restored apart, and parameters are never replaced by a forward pass.
_OF_TORCH = frozenset(vars(nn.Module()))
_TABLES = [key for key, value in vars(nn.Module()).items() if isinstance(value, dict) and key != "_parameters"]
# Buffers of more elements are not copied each time; a model that writes into one is refused when it is wrapped.
SMALL_BUFFER = 1 << 20


@contextmanager
def untouched(module: nn.Module) -> Iterator[nn.Module]:
    """Run `module` in eval mode and restore its modes, requires_grad flags, .grad tensors and all RNG states.

    So are attributes, buffers, submodules, hooks and settings that a forward pass changes (BigBird gives up its block
    attention for good after one short sequence; transformers writes into its config). Weights that are spread over
    processes are in pieces again.
    """
    modes = [(m, m.training) for m in module.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    configs = {id(held): held for m, _ in modes for held in [vars(m).get("config")] if hasattr(held, "__dict__")}
    put_back = [*(_state_of(m) for m, _ in modes), *(_settings_of(config) for config in configs.values())]
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
            let_go(module)
            for p, requires_grad, grad in parameters:
                p.grad = grad
                p.requires_grad_(requires_grad)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _settings_of(config: object) -> Callable[[], None]:
    kept = dict(vars(config))

    def restore() -> None:
        if _identities(vars(config)) != _identities(kept):
            vars(config).clear()
            vars(config).update(kept)

    return restore


def _state_of(module: nn.Module) -> Callable[[], None]:
    """Note a module's own attributes, submodules, hooks and buffers; what is returned puts them back."""
    attributes = {key: value for key, value in vars(module).items() if key not in _OF_TORCH}
    tables = [(table, dict(table)) for key in _TABLES if isinstance(table := vars(module).get(key), dict)]
    buffers = module._buffers
    copies = {key: (b, b._version, b.clone()) for key, b in buffers.items() if b is not None and _is_small(b)}

    def restore() -> None:
        state = vars(module)
        for key in [key for key in state if key not in _OF_TORCH and key not in attributes]:
            del state[key]
        state.update(attributes)
        for table, kept in tables:
            if _identities(table) != _identities(kept):
                table.clear()
                table.update(kept)
        with torch.no_grad():
            for buffer, version, values in copies.values():
                if buffer._version != version:
                    buffer.copy_(values)

    return restore


def _identities(held: Mapping[str, object]) -> list[tuple[str, int]]:
    return [(key, id(value)) for key, value in held.items()]


def _is_small(buffer: Tensor) -> bool:
    return buffer.numel() <= SMALL_BUFFER and not buffer.is_meta and not buffer.is_inference()
