"""A pass shared out over workers that hold the model, on a cluster or wherever an engine has them.

This process holds the model too, without running it: what is asked, and what the parts say together, is worked out
here. A part that is lost is asked again, so the whole is that of one process up to the rounding of batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...engines.workers import Team, Workers
from ...errors import RevprobeError, first_line
from ...models.probed import ProbedModel
from ...models.registry import as_probed, load_model, register_model, registered
from ..pairs.pairs import ReversalPairs
from .alone import PaddingReaches
from .plan import Part, PassResult, Plan, Share, Work, merged
from .run import run_part

# Parts of one worker: what a loss costs at most is one of them. A part has its own cost, so it has some queries.
_PARTS_EACH, _QUERIES_EACH = 4, 32

Source = ProbedModel | nn.Module | str | Path


@contextmanager
def shared_out(workers: Workers | None, source: Source, **load: Any) -> Iterator[tuple[ProbedModel, Share | None]]:
    """The model, and what shares its passes out while the block lasts; None without workers.

    Args:
        source: a loaded model, which is sent to the workers; or what `load_model` takes, which each of them loads.
        load: options of `load_model` where there are no workers, which have their own.
    Raises: RevprobeError, when the model cannot be loaded here or there, or cannot be sent; and as `Workers.holding`.
    """
    options = load if workers is None else workers.load
    model = load_model(source, **options) if isinstance(source, str | Path) or options else as_probed(source)
    if workers is None:
        yield model, None
        return
    sent = not isinstance(source, str | Path)
    held, loader = (_sendable(model), None) if sent else (str(source), registered().get(str(source)))
    with workers.holding(Making(held, workers.device, workers.threads, workers.load, loader)) as team:
        yield model, WorkerShare(team)


def _sendable(model: ProbedModel) -> ProbedModel:
    """Raises: RevprobeError, when it is not on the CPU."""
    if model.device.type != "cpu":
        raise RevprobeError(
            f"{model.name} is on {model.device}, and is sent to workers from the CPU; call module.to('cpu') first, or "
            "pass the name or folder that it was loaded from, which each worker loads by itself"
        )
    return model


@dataclass(frozen=True)
class Making:
    """What a worker does once: it loads the model, or takes the one that was sent, with its own number of threads."""

    source: ProbedModel | str
    device: str
    threads: int
    load: Mapping[str, Any]
    loader: Any = None

    def __call__(self) -> ProbedModel:
        torch.set_num_threads(self.threads)
        if isinstance(self.source, ProbedModel):
            self.source.module.to(self.device)
            return self.source
        if self.loader is not None and self.source not in registered():
            register_model(self.source, self.loader)
        return load_model(self.source, **{"device": self.device, **self.load})


@dataclass(frozen=True)
class Question:
    """What workers are asked: a pass, part by part. `lengths_apart`: why queries of several lengths go apart, if so."""

    pairs: ReversalPairs
    plan: Plan
    parts: int
    lengths_apart: str

    def __call__(self, model: ProbedModel, part: int) -> Part:
        if self.lengths_apart and not model.contract.equal_lengths:
            model.contract = replace(model.contract, equal_lengths=self.lengths_apart)
        return run_part(model, self.pairs, self.plan, part, self.parts)


@dataclass(frozen=True)
class WorkerShare:
    """The `share` of passes whose parts a team runs."""

    team: Team

    def __call__(self, work: Work) -> PassResult:
        own = work.prepared()
        queries = len(own.pairs.queries)
        each = max(1, min(_PARTS_EACH, queries // (_QUERIES_EACH * self.team.size)))
        parts = each * self.team.size
        plan = replace(work.plan, share=None, progress=None)
        told = work.plan.progress

        def listen(done: int, of: int) -> None:
            if callable(told):
                told(queries * done // of, queries)

        def asked() -> list[Part]:
            return self.team.ask(Question(own.pairs, plan, parts, work.model.contract.equal_lengths), parts, listen)

        try:
            return merged(own, asked())
        except PaddingReaches as error:  # found out by one of them, and true of all
            work.model.contract = replace(work.model.contract, equal_lengths=first_line(error))
            return merged(work.prepared(), asked())
