"""The ways to products of per-example gradients: a loop, torch.func, Opacus, Bergson, and ours.

Each is a function of the inputs that returns {parameter: products}; a product it does not give is NaN, a parameter it
does not cover is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peer_inputs import Inputs, losses
from torch import Tensor

import revprobe as rp
from revprobe.hooks.gradients.recorder import record_gradients

Way = Callable[[], dict[str, Tensor]]


def training_step(inputs: Inputs) -> None:
    """One batched forward and backward over all queries, gradients of all parameters included."""
    losses(inputs.model, inputs.ids).sum().backward()
    inputs.model.zero_grad(set_to_none=True)


def gradient_ways(inputs: Inputs, peer: str) -> dict[str, Way]:
    """What is measured in the process of a peer: ours, and what the peer's documentation says is fastest."""
    ours: dict[str, Way] = {"revprobe, record_gradients": partial(recorded, inputs)}
    if inputs.facts["products"] == "pairs":
        ours = {"revprobe, probe_gradient_cosine": _probed(inputs), **ours}
    theirs: dict[str, Callable[[Inputs], dict[str, Way]]] = {
        "plain": _plain,
        "opacus": lambda given: {"Opacus, ghost norms": _ghost_norms(given)},
        "bergson": _bergson,
        "nnsight": lambda given: {},
    }
    return ours | theirs[peer](inputs)


def _chunks(inputs: Inputs, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Queries so many at a time, all where all meet, and which products are of those."""
    size = len(inputs.ids) if inputs.facts["products"] == "gram" else size
    for start in range(0, len(inputs.ids), size):
        yield slice(start, start + size), torch.nonzero(inputs.left // size == start // size)[:, 0]


def _by_chunks(inputs: Inputs, size: int, gradients: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Products out of per-example gradients, {parameter: `chunk ...`}, formed for so many queries at a time."""
    found: dict[str, Tensor] = {}

    def multiply(queries: slice, places: Tensor) -> None:  # returns before the next are formed: none is held twice
        left, right = inputs.left[places] - queries.start, inputs.right[places] - queries.start
        for name, formed in gradients(inputs.ids[queries]).items():
            flat = formed.flatten(1)
            found.setdefault(name, torch.full((len(inputs.left),), torch.nan))[places] = (flat @ flat.T)[left, right]

    for queries, places in _chunks(inputs, size):
        multiply(queries, places)
    return found


def _plain(inputs: Inputs) -> dict[str, Way]:
    model = inputs.model
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")  # vmap has no rule for sdpa's kernel, and would run it row by row
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(given: dict[str, Tensor], row: Tensor) -> Tensor:
        logits = torch.func.functional_call(eager, given, (row[None],), {"use_cache": False}).logits[:, -2]
        return F.cross_entropy(logits, row[None, -1])

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))

    def looped(rows: Tensor) -> dict[str, Tensor]:
        trained = dict(model.named_parameters())
        of = [
            torch.autograd.grad(losses(model, rows[n : n + 1]).sum(), list(trained.values())) for n in range(len(rows))
        ]
        return {name: torch.stack(sides) for name, sides in zip(trained, zip(*of, strict=True), strict=True)}

    return {
        "loop, autograd.grad": lambda: _by_chunks(inputs, 2, looped),
        "torch.func, vmap(grad), 2 at a time": lambda: _by_chunks(inputs, 2, partial(each, parameters)),
        "torch.func, vmap(grad), 8 at a time": lambda: _by_chunks(inputs, 8, partial(each, parameters)),
    }


def recorded(inputs: Inputs) -> dict[str, Tensor]:
    """Ours, from below: any products of any queries, one pass forwards and one backwards."""
    with record_gradients(inputs.model, dict(inputs.model.named_parameters()), len(inputs.ids)) as recorder:
        return recorder.backward(losses(inputs.model, inputs.ids), inputs.left, inputs.right).inner


def _probed(inputs: Inputs) -> Way:
    """Ours, as a user calls it: a table of inner products and norms of pairs."""
    end = inputs.ids.shape[1] - 1
    queries = [rp.Query(row, [end], [0]) for row in inputs.ids.tolist()]
    couples = [rp.ReversalPair(*queries[n : n + 2], kind="swapped", fact=str(n)) for n in range(0, len(queries), 2)]
    pairs = rp.ReversalPairs.from_pairs(couples)
    model = rp.ProbedModel(inputs.model, objective="causal", name="llama")

    def run() -> dict[str, Tensor]:
        frame = rp.probe_gradient_cosine(model, pairs, control=False, batch_size=len(queries), progress=False).frame
        found = {}
        for name, rows in frame.sort_values("pair").groupby("parameter", sort=False):
            forward, reverse, inner = (
                torch.tensor(rows[column].to_numpy()) for column in ("norm_forward", "norm_reverse", "inner")
            )
            found[str(name)] = torch.cat([torch.stack([forward, reverse], 1).flatten().square(), inner])
        return found

    return run


def _ghost_norms(inputs: Inputs) -> Way:
    """Norms alone: Opacus' `GradSampleModuleFastGradientClipping`, of which clipping takes a second backward pass."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = copy.deepcopy(inputs.model).train()  # its hooks are for training; the model has no dropout
    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum"
    )
    same = inputs.left == inputs.right

    def run() -> dict[str, Tensor]:
        losses(wrapped, inputs.ids).sum().backward()
        wrapped.get_norm_sample()
        found = {}
        for name, parameter in model.named_parameters():
            found[name] = torch.full((len(same),), torch.nan)
            found[name][same] = parameter._norm_sample.detach()[inputs.left[same]].square()
        wrapped.zero_grad(set_to_none=True)
        return found

    return run


def _bergson(inputs: Inputs) -> dict[str, Way]:
    """Gradients of Linear layers in memory, as they are and projected to 16 x 16 (or 64 x 64) a layer."""
    from bergson import GradientProcessor, InMemoryCollector
    from bergson.config import IndexConfig
    from datasets import Dataset

    processors = {dim: GradientProcessor(projection_dim=dim or None) for dim in (0, 16, 64)}

    def collected(dim: int, rows: Tensor) -> dict[str, Tensor]:
        data = Dataset.from_dict({"input_ids": rows.tolist()})
        config = IndexConfig(run_path="unused", projection_dim=dim)
        collector: Any = InMemoryCollector(model=inputs.model, processor=processors[dim], data=data, cfg=config)
        with collector:
            loss = losses(inputs.model, rows)
            loss.sum().backward()
            collector.process_batch(list(range(len(rows))), losses=loss.detach())
        inputs.model.zero_grad(set_to_none=True)
        if not collector.gradients:
            collector.teardown()
        gradients, collector.gradients = collector.gradients, {}
        collector.builder.grad_buffer = None  # the builder refers to itself, and would keep its store until collected
        return {f"{name}.weight": formed for name, formed in gradients.items()}

    return {
        "Bergson, as they are, 2 at a time": lambda: _by_chunks(inputs, 2, partial(collected, 0)),
        "Bergson, as they are, 8 at a time": lambda: _by_chunks(inputs, 8, partial(collected, 0)),
        "Bergson, projected to 16 x 16": lambda: _by_chunks(inputs, len(inputs.ids), partial(collected, 16)),
        "Bergson, projected to 64 x 64": lambda: _by_chunks(inputs, len(inputs.ids), partial(collected, 64)),
    }
