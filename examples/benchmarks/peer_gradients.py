"""The ways to products of per-example gradients: a loop, torch.func, Opacus, Bergson, and ours.

Each is a function of the inputs that returns {parameter: products}; a product it does not give is NaN, a parameter it
does not cover is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
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


def gradient_ways(inputs: Inputs, peer: str) -> dict[str, Way | str]:
    """What is measured in the process of a peer: ours, and what the peer's documentation says is fastest.

    A way that needs more memory than there is, is the sentence that says so.
    """
    ours: dict[str, Way | str] = {"revprobe, record_gradients": partial(recorded, inputs)}
    if inputs.facts["products"] == "pairs":
        few = min(8, len(inputs.ids))
        ours = {
            "revprobe, probe_gradient_cosine, one batch": _probed(inputs, len(inputs.ids)),
            f"revprobe, probe_gradient_cosine, {few} queries a batch": _probed(inputs, few),
        }
    theirs: dict[str, Callable[[Inputs], dict[str, Way | str]]] = {
        "plain": _plain,
        "opacus": lambda given: {"Opacus, ghost norms": _ghost_norms(given)},
        "bergson": _bergson,
    }
    return ours | theirs[peer](inputs)


def _by_chunks(inputs: Inputs, size: int, gradients: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Products out of per-example gradients, {parameter: `chunk ...`}, formed for so many queries at a time.

    Where all meet all, gradients of all queries are held, each parameter's until its products are there.
    """
    held = len(inputs.ids) if inputs.facts["products"] == "gram" else size
    found: dict[str, Tensor] = {}

    def multiply(start: int) -> None:  # returns before the next are formed: none is held twice
        rows, places = inputs.ids[start : start + held], torch.nonzero(inputs.left // held == start // held)[:, 0]
        left, right = inputs.left[places] - start, inputs.right[places] - start
        parts = [gradients(part) for part in rows.split(size)]
        for name in list(parts[0]):
            formed = [part.pop(name).flatten(1) for part in parts]
            flat = torch.cat(formed) if len(formed) > 1 else formed[0]
            found.setdefault(name, torch.full((len(inputs.left),), torch.nan))[places] = (flat @ flat.T)[left, right]

    for start in range(0, len(inputs.ids), held):
        multiply(start)
    return found


def _if_it_fits(inputs: Inputs, ways: dict[str, Way]) -> dict[str, Way | str]:
    """Ways that form whole gradients, or why not, where those of all queries are held and memory is too small."""
    needed = 4 * inputs.facts["parameters"] * (len(inputs.ids) if inputs.facts["products"] == "gram" else 0)
    memory = psutil.virtual_memory().total
    if needed < 0.8 * memory:
        return dict(ways)
    why = f"not run: {len(inputs.ids)} gradients are {needed / 1e9:.0f} GB, of memory {memory / 1e9:.0f} GB"
    return dict.fromkeys(ways, why)


def _plain(inputs: Inputs) -> dict[str, Way | str]:
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

    ways: dict[str, Way] = {
        "loop, autograd.grad": lambda: _by_chunks(inputs, 2, looped),
        "torch.func, vmap(grad), 2 at a time": lambda: _by_chunks(inputs, 2, partial(each, parameters)),
        "torch.func, vmap(grad), 8 at a time": lambda: _by_chunks(inputs, 8, partial(each, parameters)),
    }
    return _if_it_fits(inputs, ways)


def recorded(inputs: Inputs) -> dict[str, Tensor]:
    """Ours, from below: any products of any queries, one pass forwards and one backwards."""
    with record_gradients(inputs.model, dict(inputs.model.named_parameters()), len(inputs.ids)) as recorder:
        return recorder.backward(losses(inputs.model, inputs.ids), inputs.left, inputs.right).inner


def _probed(inputs: Inputs, batch: int) -> Way:
    """Ours, as a user calls it: a table of inner products and norms of pairs."""
    end = inputs.ids.shape[1] - 1
    queries = [rp.Query(row, [end], [0]) for row in inputs.ids.tolist()]
    couples = [rp.ReversalPair(*queries[n : n + 2], kind="swapped", fact=str(n)) for n in range(0, len(queries), 2)]
    pairs = rp.ReversalPairs.from_pairs(couples)
    model = rp.ProbedModel(inputs.model, objective="causal", name="llama")

    def run() -> dict[str, Tensor]:
        frame = rp.probe_gradient_cosine(model, pairs, control=False, batch_size=batch, progress=False).frame
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


def _bergson(inputs: Inputs) -> dict[str, Way | str]:
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

    whole: dict[str, Way] = {
        "Bergson, as they are, 2 at a time": lambda: _by_chunks(inputs, 2, partial(collected, 0)),
        "Bergson, as they are, 8 at a time": lambda: _by_chunks(inputs, 8, partial(collected, 0)),
    }
    return _if_it_fits(inputs, whole) | {
        "Bergson, projected to 16 x 16": lambda: _by_chunks(inputs, len(inputs.ids), partial(collected, 16)),
        "Bergson, projected to 64 x 64": lambda: _by_chunks(inputs, len(inputs.ids), partial(collected, 64)),
    }
