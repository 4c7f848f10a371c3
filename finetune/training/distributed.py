"""Several processes, one reading: work is shared out over the ranks of `accelerate launch` or `torchrun`, and gathered.

Every rank holds the same weights (data parallelism), so each measures its part of the queries, all of them exchange
what they found, and each assembles the whole. What is written is written by the first process alone. An error on one
rank is raised on all: a rank that waits for a part that never comes would hang until the backend gives up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import TrainingArguments

from ...errors import RevprobeError, first_line
from ...probes.pairs.query import Query
from ...probes.passes.plan import Part, PassResult, merged, part_of
from ...probes.passes.slopes import Slopes

Found = TypeVar("Found")
# What launchers tell a process about the others.
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class Asking(Protocol):
    """Whatever lists queries."""

    @property
    def queries(self) -> list[Query]: ...


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one model together; alone, a team of one that gathers nothing.

    `rank` is this process's number, `size` how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, args: TrainingArguments) -> ProcessGroup:
        """The team of a Trainer."""
        if args.world_size > 1 and dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def gather(self, work: Callable[[], Found]) -> list[Found]:
        """Do this rank's work; everyone's results in the order of ranks, on every rank.

        Raises: this rank's own error; RevprobeError, when another rank's work failed, with its first line.
        """
        if self.size == 1:
            return [work()]
        own: Exception | None = None
        message: tuple[bool, Any]
        try:
            message = (True, work())
        except Exception as error:
            own, message = error, (False, first_line(error))
        messages: list[Any] = [None] * self.size
        dist.all_gather_object(messages, message)
        if own is not None:
            raise own
        for rank, (done, found) in enumerate(messages):
            if not done:
                raise RevprobeError(f"process {rank} of {self.size} failed: {found}")
        return [found for _, found in messages]

    def per_process(self, batch: int) -> int:
        """The rows of each process, so that a step has `batch` of them whatever the number of processes.

        Raises: RevprobeError, when they cannot be divided evenly.
        """
        if batch % self.size:
            raise RevprobeError(
                f"a batch of {batch} rows cannot be divided among {self.size} processes; use a multiple, or fewer"
            )
        return batch // self.size

    def on_rank_zero(self, work: Callable[[], Found]) -> Found:
        """Let the first process do something alone (write a file, train a small model); all get what it returned.

        Raises: as `gather`.
        """
        if self.size == 1:
            return work()

        def alone() -> Found:
            with working_alone():
                return work()

        return self.gather(lambda: alone() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def share(self, work: Callable[[int, int], PassResult]) -> PassResult:
        """A probe's pass in parts: `work(part, parts)` runs this rank's batches; the whole comes back on every rank."""
        if self.size == 1:
            return work(0, 1)
        kept: list[PassResult] = []

        def run() -> Part:
            kept.append(work(self.rank, self.size))
            return part_of(kept[0])

        parts = self.gather(run)
        return merged(kept[0], parts)

    def slopes(self, work: Callable[[list[Query]], Slopes], asked: Asking) -> Slopes:
        """Losses and slopes of all queries, each rank working on every `size`-th of them."""
        parts = self.gather(lambda: work(asked.queries[self.rank :: self.size]))
        loss = np.empty(len(asked.queries))
        slope = np.empty((len(parts[0].slope), len(asked.queries)))
        for rank, part in enumerate(parts):
            loss[rank :: self.size], slope[:, rank :: self.size] = part.loss, part.slope
        return Slopes(loss, slope)


@contextmanager
def working_alone() -> Iterator[None]:
    """Hide the other processes from accelerate: a Trainer that one process makes inside must not wait for the rest."""
    shared = {kind: kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)}
    hidden = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    try:
        for kind in shared:
            kind._shared_state = type(kind._shared_state)()  # those made before keep the state they have
        yield
    finally:
        for kind, state in shared.items():
            kind._shared_state = state
        os.environ.update(hidden)


def require_whole(module: nn.Module) -> None:
    """Refuse a model whose weights are spread over processes (FSDP, tensor parallelism).

    Raises: RevprobeError; each rank holds a piece of every weight, which no probe can run on.
    """
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "placements") or name.rpartition(".")[2] == "_flat_param":
            raise RevprobeError(
                f"parameter {name!r} is sharded over processes (FSDP or tensor parallelism), and probes need whole "
                "weights; train without the callback and probe the saved checkpoints with `revprobe probe`"
            )
