"""Weights that FSDP2 spreads over processes: which parameters run, and holding them whole again for a while.

`fully_shard` leaves each process a piece of every weight. While one of its units runs, the modules inside hold whole
parameters instead: always the same objects, whose memory is filled before the unit runs and freed after. Those are the
ones that autograd's graph knows, so those are what gradients are asked of. All processes must ask together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed
from torch import Tensor, nn

from ...errors import RevprobeError


def in_a_group() -> bool:
    """Whether this process belongs to a group, without which nothing is spread."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def spread_units(module: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on; none of an ordinary model."""
    if not in_a_group():
        return []
    from torch.distributed.fsdp import FSDPModule  # slow to import

    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def is_piece(parameter: Tensor) -> bool:
    """Whether a parameter is one process's piece of a weight."""
    if not in_a_group():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def require_units(module: nn.Module) -> None:
    """Refuse pieces of weights that nothing gathers before they run as whole ones.

    Raises: RevprobeError, for FSDP1's flat parameters, and for tensor parallelism, whose activations are pieces too.
    """
    inside = {id(p) for unit in spread_units(module) for p in unit.parameters()}
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] == "_flat_param" or (is_piece(parameter) and id(parameter) not in inside):
            raise RevprobeError(
                f"parameter {name!r} is a piece of a weight that no unit of fully_shard gathers (FSDP1 or tensor "
                "parallelism); spread the model with torch.distributed.fsdp.fully_shard, or load it whole"
            )


def require_whole(module: nn.Module, what: str) -> None:
    """Refuse a spread model where its weights are read outside of a forward pass.

    Raises: RevprobeError, which says what was asked for.
    """
    for name, parameter in module.named_parameters():
        if is_piece(parameter):
            raise RevprobeError(
                f"parameter {name!r} is spread over processes, and {what} reads whole weights; load the model whole "
                "in one process"
            )


class WholeWeights:
    """The parameters of a module as they are while it runs.

    Of an ordinary model they are the parameters themselves, and nothing here does anything.
    """

    def __init__(self, module: nn.Module) -> None:
        self._units = spread_units(module)
        self._whole: dict[int, nn.Parameter] = {}
        self._piece: dict[int, nn.Parameter] = {}  # held, so that no other object takes an id
        self._unit_of = {id(m): unit for unit in self._units for m in unit.modules()}  # the innermost comes last
        self.let_go()
        for unit in self._units:
            pieces = _by_path(unit)
            with self.gathered(unit):
                for path, whole in _by_path(unit).items():
                    if is_piece(pieces[path]) and not is_piece(whole):
                        self._whole[id(pieces[path])] = whole
                        self._piece[id(whole)] = pieces[path]

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """The whole parameter that runs in place of this one."""
        return self._whole.get(id(parameter), parameter)

    def require_grad(self, whole: nn.Parameter) -> None:
        """Let gradients reach it. Its unit gives it the flag of its piece whenever it is gathered."""
        for parameter in (whole, self._piece.get(id(whole), whole)):
            parameter.requires_grad_(True)

    @contextmanager
    def gathered(self, inside: nn.Module) -> Iterator[None]:
        """Hold the weights of the unit around a module whole."""
        unit = self._unit_of.get(id(inside))
        if unit is None:
            yield
            return
        unit.unshard()
        try:
            yield
        finally:
            unit.reshard()

    def let_go(self) -> None:
        """Leave each process its pieces."""
        for unit in self._units:
            unit.reshard()


def let_go(module: nn.Module) -> None:
    """Leave each process its pieces: after a forward pass the outermost unit is still whole."""
    for unit in spread_units(module):
        unit.reshard()


def _by_path(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(remove_duplicate=False))
