"""What `test_spread_weights.py` runs in each of two gloo processes: `spread_processes.py FOLDER RANK SIZE`.

The group is made over a file, and gloo is kept to the loopback interface, so that nothing listens elsewhere.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).parents[2]))
import revprobe as rp
from revprobe.models.probed import as_probed
from tiny import gpt2, llama, pairs_at, radd, text_like_pairs, uneven_pairs

FIXTURES = Path(__file__).parents[2] / "fixtures"
MIXTURE = "lladamoe-tiny"


def mixture() -> rp.ProbedModel:
    """Experts chosen by what they are given."""
    return rp.load_model(FIXTURES / MIXTURE, mask_token_id=252)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The layers: what one usually spreads."""
    lists = [list(m) for m in module.modules() if isinstance(m, nn.ModuleList)]
    return lists[0]


def leaves(module: nn.Module) -> list[nn.Module]:
    """Every module without children that holds weights, as a unit of its own."""
    return [m for m in module.modules() if not list(m.children()) and list(m.parameters())]


CASES: dict[str, tuple[Callable[[], rp.ProbedModel], Any, Any]] = {
    "radd": (lambda: radd(n_layers=2), lambda: pairs_at((2, 7), (7, 2), count=6), blocks),
    "radd, root alone": (lambda: radd(n_layers=2), lambda: pairs_at((2, 7), (7, 2), count=6), lambda module: []),
    "gpt2": (gpt2, text_like_pairs, blocks),
    "llama": (llama, text_like_pairs, blocks),
    "llama, leaf by leaf": (llama, text_like_pairs, leaves),
    "mixture": (mixture, lambda: pairs_at((2, 7), (7, 2), count=4), blocks),
    "lengths apart": (lambda: radd(n_layers=2), uneven_pairs, blocks),
}
PROBES: dict[str, Callable[[rp.ProbedModel, rp.ReversalPairs], rp.Reading]] = {
    "gradient": lambda model, pairs: rp.probe_gradient_cosine(model, pairs, batch_size=5, progress=False),
    "attention": lambda model, pairs: rp.probe_attention_correlation(model, pairs, progress=False),
    "probability": lambda model, pairs: rp.probe_reverse_probability(model, pairs, progress=False),
    "route": lambda model, pairs: rp.probe_route_edit(model, pairs, progress=False),
    "lens": lambda model, pairs: rp.probe_logit_lens(model, pairs, progress=False),
    "trace": lambda model, pairs: rp.probe_causal_trace(model, pairs, progress=False),
}


def spread(model: rp.ProbedModel, units: Callable[[nn.Module], list[nn.Module]]) -> rp.ProbedModel:
    """The model with its weights over both processes; small embeddings and tied weights stay with the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    uses = [id(p) for m in model.module.modules() for p in m.parameters(recurse=False)]
    for unit in units(model.module):
        if all(uses.count(id(p)) == 1 for p in unit.parameters()):
            fully_shard(unit, mesh=mesh)
    fully_shard(model.module, mesh=mesh)
    return model


def difference(found: rp.Reading, alone: rp.Reading) -> float:
    """The largest difference of two readings, as a share of each column's largest number where that is above 1.

    Infinite where other rows or gaps are there.
    """
    numbers = alone.frame.select_dtypes("number").columns
    ours, theirs = (reading.frame[numbers].to_numpy(dtype=float, na_value=float("nan")) for reading in (found, alone))
    if ours.shape != theirs.shape or (found.frame["fact"] != alone.frame["fact"]).any():
        return float("inf")
    same_gaps = bool(((ours != ours) == (theirs != theirs)).all())
    scale = torch.tensor(theirs).nan_to_num().abs().amax(0).clamp(min=1.0)
    return float((torch.tensor(ours - theirs).nan_to_num().abs() / scale).max()) if same_gaps else float("inf")


def traces(module: nn.Module) -> dict[str, Any]:
    """What a probe must leave as it was: pieces, flags and no gradients."""
    return {
        name: [isinstance(p, DTensor), p.requires_grad, p.grad is None, p.to_local().double().sum().item()]
        for name, p in module.named_parameters()
    }


def refused(what: Callable[[], Any]) -> str:
    """The error of a call."""
    try:
        what()
    except rp.RevprobeError as error:
        return str(error)
    return "nothing"


def one_case(name: str) -> dict[str, Any]:
    """Largest differences by probe, and whether the spread model was left as it was."""
    make, pairs, units = CASES[name]
    alone, model, asked = make(), spread(make(), units), pairs()
    for one in (alone, model) if name == "lengths apart" else ():
        # Only queries of one length may share a batch, so that unequal ones are run by themselves.
        one.contract = replace(as_probed(one).contract, equal_lengths="planted")
    next(iter(model.module.parameters())).requires_grad_(False)  # a frozen weight stays so
    before = traces(model.module)
    deep = ("route", "lens", "trace")
    found: dict[str, Any] = {}
    for probe, read in PROBES.items():
        if probe in deep and name != "radd":
            continue
        ours, theirs = read(model, asked), read(alone, asked)
        found[probe] = {"difference": difference(ours, theirs), "n": ours.n, "value": ours.value}
        found[probe]["one by one"] = [ours.meta.get("one_by_one", {}), theirs.meta.get("one_by_one", {})]
        found[probe]["left"] = traces(model.module) == before
    return found


def main(folder: Path, rank: int, size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    told: dict[str, Any] = {name: one_case(name) for name in CASES}
    model, pairs = spread(radd(n_layers=2), blocks), pairs_at((2, 7), (7, 2), count=4)
    told["bare"] = rp.probe_gradient_cosine(spread(gpt2(), blocks).module, text_like_pairs(), progress=False).value
    told["bare alone"] = rp.probe_gradient_cosine(gpt2(), text_like_pairs(), progress=False).value
    told["stored"] = refused(lambda: rp.probe_stored_evidence(model, pairs, progress=False))
    told["terms"] = refused(lambda: rp.objective_terms(model, pairs, progress=False))
    split = llama()
    mesh = init_device_mesh("cpu", (size,))
    parallelize_module(split.module, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    told["tensor parallel"] = refused(lambda: rp.probe_gradient_cosine(split, text_like_pairs(), progress=False))
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
