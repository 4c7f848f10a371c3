"""Gradient products and attention readouts of revprobe beside those of other libraries, each in its own environment.

python examples/benchmarks/peers.py --gradients 30M                 # 64 queries of 32 tokens
python examples/benchmarks/peers.py --gradients --lengths 128 512 1024
python examples/benchmarks/peers.py --gradients 30M --products gram --peers plain bergson

Environments are made by `peer_environments.py` where they are not there. Ours is measured again in every process,
beside the peer: times are compared within a process only. Inputs and float64 answers are one file, made once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import medians, megabytes, peak_extra_bytes, show
from peer_environments import PEERS, CannotInstall, environment_of
from peer_gradients import gradient_ways, training_step
from peer_inputs import SIZES, Inputs, read_inputs, write_inputs
from peer_readouts import readouts
from torch import Tensor

Row = dict[str, Any]


def gradient_rows(inputs: Inputs, peer: str, rounds: int) -> list[Row]:
    """Each way's time as multiples of a training step, its peaks, what it covers, how far off it is."""
    ways = gradient_ways(inputs, peer)
    step = "training step"
    seconds = medians({step: lambda: training_step(inputs), **ways}, rounds=rounds)
    rows = [
        {"peer": peer, "way": step, "seconds": seconds[step], "of a step": 1.0, **peaks(lambda: training_step(inputs))}
    ]
    for name, run in ways.items():
        about = {"seconds": seconds[name], "of a step": seconds[name] / seconds[step], **peaks(run)}
        rows.append({"peer": peer, "way": name, **about, **agreement(inputs, run())})
    return rows


def agreement(inputs: Inputs, found: dict[str, Tensor]) -> Row:
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


@torch.no_grad()
def readout_rows(inputs: Inputs, peer: str, rounds: int) -> list[Row]:
    """Each way's time as multiples of a plain forward at each T, its peaks, its largest error of a weight."""
    rows = []
    for length, (ids, answer) in inputs.attention.items():
        ways = {name: partial(run, ids) for name, run in readouts(inputs, peer).items()}
        seconds = medians(ways, rounds=rounds)
        for name, run in ways.items():
            about = {"seconds": seconds[name], "of a forward": seconds[name] / seconds["plain forward"], **peaks(run)}
            error = None if name == "plain forward" else float((run().double() - answer).abs().max())
            rows.append({"peer": peer, "T": length, "way": name, **about, "largest error": error})
    return rows


def peaks(run: Callable[[], Any]) -> Row:
    """The most memory during a run beyond that before it: tensors, and what Python and numpy hold (Bergson's store)."""
    tracemalloc.start()
    run()
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"peak MB": megabytes(peak_extra_bytes(run)), "numpy MB": megabytes(arrays)}


def measure(path: Path, peer: str, rounds: int, threads: int) -> list[Row]:
    """All rows of one peer; in the process of its environment."""
    torch.set_num_threads(threads)
    inputs = read_inputs(path)
    rows = gradient_rows(inputs, peer, rounds) if len(inputs.ids) and peer != "nnsight" else []
    return rows + (readout_rows(inputs, peer, rounds) if peer in ("plain", "nnsight") else [])


def in_its_environment(path: Path, peer: str, asked: argparse.Namespace) -> list[Row]:
    """The rows of a peer, or one row that says why it was not run."""
    version = PEERS[peer][0] if peer in PEERS else peer
    try:
        python = environment_of(peer, asked.folder) if peer in PEERS else Path(sys.executable)
    except CannotInstall as error:
        return [{"peer": peer, "way": f"not run: {error}"}]
    call = [str(python), __file__, "--inputs", str(path), "--peers", peer, "--rounds", str(asked.rounds)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "BNB_SKIP_CPU_KERNELS": "1"}
    done = subprocess.run([*call, "--threads", str(asked.threads)], capture_output=True, text=True, env=environment)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        last = said[-1] if said else f"its process ended with {done.returncode}"
        return [{"peer": peer, "way": f"not run: {version}: {last}"}]
    rows: list[Row] = json.loads(done.stdout.strip().splitlines()[-1])
    return rows


def main() -> None:
    """Write the inputs, measure each peer in its environment, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gradients", nargs="*", choices=SIZES, default=["30M"], help="model sizes; none: no gradients"
    )
    parser.add_argument("--products", choices=["pairs", "gram"], default="pairs")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[], help="T of the attention readouts, on the 30M shape"
    )
    parser.add_argument("--size", choices=SIZES, default="30M", help="the model of the attention readouts")
    parser.add_argument("--batch", type=int, default=1, help="queries of an attention readout")
    parser.add_argument("--peers", nargs="+", choices=["plain", *PEERS], default=["plain", *PEERS])
    parser.add_argument("--folder", type=Path, default=Path(".peers"), help="where the environments are")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inputs", type=Path, help="measure the one peer named, in this process, on these inputs")
    asked = parser.parse_args()
    if asked.inputs:
        print(json.dumps(measure(asked.inputs, asked.peers[0], asked.rounds, asked.threads)))
        return
    torch.set_num_threads(asked.threads)
    tasks = [(size, asked.queries, []) for size in asked.gradients]
    tasks += [(asked.size, 0, [length]) for length in asked.lengths]
    for size, queries, lengths in tasks:
        with tempfile.TemporaryDirectory() as folder:
            path, more = Path(folder) / "inputs.safetensors", {"lengths": lengths, "batch": asked.batch}
            write_inputs(path, size, queries=queries, tokens=asked.tokens, kind=asked.products, **more)
            able = [peer for peer in asked.peers if (peer != "nnsight" if queries else peer in ("plain", "nnsight"))]
            rows = [row for peer in able for row in in_its_environment(path, peer, asked)]
            facts = read_inputs(path).facts
        columns = dict.fromkeys(key for row in rows for key in row)
        table = [{column: row.get(column, "") for column in columns} for row in rows]
        title = "peers, gradient products" if queries else "peers, attention readout"
        show(title, table, rounds=asked.rounds, **facts)


if __name__ == "__main__":
    main()
