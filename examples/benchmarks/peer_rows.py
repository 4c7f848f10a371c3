"""What one process measures of one peer, on the shared inputs: all its times in turn, or the memory of one way.

`peers.py` calls it with the interpreter of the peer's environment; rows are JSON, a line each.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import forget_peak, machine, megabytes, peak_resident, seconds
from peer_gradients import gradient_ways, training_step
from peer_inputs import Inputs, read_inputs
from peer_readouts import readouts
from torch import Tensor

Row = dict[str, Any]
STEP, FORWARD = "training step", "plain forward"
LARGE = 131072  # bytes; what is larger is given back to the kernel when it is freed, so that a peak is of what is alive


def ways_of(inputs: Inputs, peer: str) -> dict[str, Callable[[], Any] | str]:
    """Everything that is measured in the process of a peer, first what times are multiples of."""
    if len(inputs.ids):
        return {STEP: partial(training_step, inputs)} | gradient_ways(inputs, peer)
    (ids, _), *_ = inputs.attention.values()
    return {name: torch.no_grad()(partial(run, ids)) for name, run in readouts(inputs, peer).items()}


def times(inputs: Inputs, peer: str, rounds: int) -> list[Row]:
    """Each way's seconds, their range, time as a multiple of the first way's; what it covers and how far off it is."""
    ways, answers = ways_of(inputs, peer), {}
    able = {name: run for name, run in ways.items() if not isinstance(run, str)}

    def kept(name: str) -> None:
        answers[name] = able[name]()

    measured = seconds({name: partial(kept, name) for name in able}, rounds=rounds)
    unit = statistics.median(measured[next(iter(ways))])
    rows: list[Row] = []
    for name, run in ways.items():
        if name not in able:
            rows.append({"way": name, "not run": run})
            continue
        middle, low, high = (of(measured[name]) for of in (statistics.median, min, max))
        about: Row = {"seconds": middle, "low": low, "high": high, "times": middle / unit, "rounds": rounds}
        if name not in (STEP, FORWARD):
            about |= agreement(inputs, answers[name]) if len(inputs.ids) else weights_off(inputs, answers[name])
        rows.append({"way": name, **about})
    return rows


def agreement(inputs: Inputs, found: Mapping[str, Tensor]) -> Row:
    """Shares of parameters and products that a way gives, and its largest error of these.

    The error of a product is relative to the product of the two norms: that of a squared norm is its relative error,
    that of an inner product the error of the cosine. Answers are over the same parameters.
    """
    sizes = {name: p.numel() for name, p in inputs.model.named_parameters()}
    given, answer = (torch.stack([side[name].double() for name in found]).sum(0) for side in (found, inputs.answers))
    same = inputs.left == inputs.right
    norms = torch.zeros(len(inputs.ids), dtype=torch.float64)
    norms[inputs.left[same]] = answer[same].sqrt()
    there = ~given.isnan()
    errors = (given - answer).abs() / (norms[inputs.left] * norms[inputs.right])
    return {
        "parameters": sum(sizes[name] for name in found) / sum(sizes.values()),
        "products": f"{int(there.sum())} of {len(there)}",
        "largest error": float(errors[there].max()),
    }


def weights_off(inputs: Inputs, found: Tensor) -> Row:
    """The largest error of an attention weight, which is between 0 and 1, and the share of the heads that are given."""
    (_, answer), *_ = inputs.attention.values()
    return {"heads": found.numel() / answer.numel(), "largest error": float((found.double() - answer).abs().max())}


def peak_of(run: Callable[[], Any], warm: Callable[[], Any]) -> float:
    """MB that were resident at most while a way ran, for the kernel, beyond what was resident before; Linux alone.

    `warm` is the same way on a tiny model: what is loaded at the first call is not counted.
    """
    warm()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = forget_peak()
    run()
    return megabytes(peak_resident() - before)


def about(inputs: Inputs, peer: str) -> Row:
    """What a row was measured on."""
    named = ("revprobe", "torch", "transformers", "transformer_lens", "numpy", *([peer] if peer != "plain" else []))
    versions = {"python": platform.python_version()}
    for name in named:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed by a package manager"
    memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    return {
        "machine": {"processor": machine(), "cores": os.cpu_count(), "memory": memory},
        "versions": versions,
        "inputs": inputs.facts,
    }


def main() -> None:
    """Print a line of JSON for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("peer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", help="the way whose memory is measured, and nothing else")
    parser.add_argument("--warm", type=Path, help="the tiny inputs that it is called on before")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    inputs = read_inputs(asked.inputs)
    if asked.peak is None:
        rows = [{**row, **about(inputs, asked.peer)} for row in times(inputs, asked.peer, asked.rounds)]
    else:
        # Queries a batch are part of a way's name, and the tiny inputs have fewer: it is known by its place.
        ways, tiny = (list(ways_of(one, asked.peer).items()) for one in (inputs, read_inputs(asked.warm)))
        place = [name for name, _ in ways].index(asked.peak)
        rows = [{"way": asked.peak, "peak MB": peak_of(ways[place][1], tiny[place][1])}]
    sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
