"""Many pairs on a small model, in parts whose rows go to disk: does the time grow as their number, and memory not?

    python examples/benchmarks/many_pairs.py                                  # 1,000, 10,000 and 100,000 pairs
    python examples/benchmarks/many_pairs.py --pairs 1000 10000 --probes attention gradient probability
    python examples/benchmarks/many_pairs.py --long 512 1024 2048 4096 --pairs    # long queries instead

Each number of pairs is measured in a process of its own, once in parts (`rp.probe_in_parts`, pairs in a file) and, up
to --whole, once by `rp.probe` with all rows in memory. Memory is the kernel's VmHWM beyond what was resident after one
part had been probed, so that libraries and a batch's activations are not counted. Seconds are those of the call, by the
clock and of this process's own; the pairs were written before.

Long queries: the tap of one row of scores, and the gradients of a pair, beside the plain forward of the same two
queries; medians, and the allocator's peak beyond what was alive before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import forget_peak, medians, megabytes, peak_extra_bytes, peak_resident, show
from transformers import LlamaConfig, LlamaForCausalLM

import revprobe as rp

VOCABULARY, LAYERS, WIDTH, HEADS = 512, 2, 64, 4


def small_model(length: int) -> rp.ProbedModel:
    """A Llama shape of two layers with random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 160, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = LlamaConfig(**shape, **heads, vocab_size=VOCABULARY, max_position_embeddings=max(64, length))
    return rp.ProbedModel(LlamaForCausalLM(config).eval(), objective="causal", name="llama of two layers")


def write_pairs(path: Path, count: int, tokens: int) -> None:
    """So many pairs of a fact each, as JSON lines: the reverse query exchanges the first and the last token."""
    generator = torch.Generator().manual_seed(0)
    ends = {"target_positions": [tokens - 1], "evidence_positions": [0]}
    with path.open("w", encoding="utf-8") as file:
        for fact in range(count):
            row = torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist()
            row[-1] = row[-1] if row[-1] != row[0] else 3 + (row[0] - 2) % (VOCABULARY - 3)
            swapped = [row[-1], *row[1:-1], row[0]]
            sides = {side: {"token_ids": ids, **ends} for side, ids in (("forward", row), ("reverse", swapped))}
            file.write(json.dumps({"fact": str(fact), "kind": "swapped", **sides}) + "\n")


# ---- one number of pairs, in a process of its own ----


def measure(way: str, count: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of one call, after a part that is not counted."""
    torch.set_num_threads(asked.threads)
    model = small_model(asked.tokens)
    with tempfile.TemporaryDirectory() as home:
        file, first = Path(home) / "pairs.jsonl", Path(home) / "first.jsonl"
        write_pairs(file, count, asked.tokens)
        write_pairs(first, min(count, asked.size), asked.tokens)
        options = {"only": asked.probes, "size": asked.size, "progress": False}
        rp.probe_in_parts(model, first, Path(home) / "first", **options)
        before, told = forget_peak(), list[tuple[float, int]]()
        start, own = time.perf_counter(), time.process_time()
        if way == "in parts":
            options["progress"] = lambda done, of: told.append((time.perf_counter() - start, done))
            table = rp.probe_in_parts(model, file, Path(home) / "parts", **options)
            value = float(table["value"].iloc[0])
        else:
            readings = rp.probe(model, rp.ReversalPairs.load(file), only=asked.probes, progress=False)
            value = readings[0].value
        seconds, spent, peak = time.perf_counter() - start, time.process_time() - own, peak_resident()
        disk = sum(path.stat().st_size for path in (Path(home) / "parts").rglob("*.parquet"))
    return {
        "pairs": count,
        "way": way,
        "seconds": round(seconds, 2),
        "processor seconds": round(spent, 2),
        "processor ms a pair": round(1e3 * spent / count, 3),
        "MB beyond one part": megabytes(peak - before),
        "resident MB before": megabytes(before),
        "MB on disk": megabytes(disk),
        "end told at half, of the true": _foretold(told, count, seconds),
        "value": value,
    }


def _foretold(told: list[tuple[float, int]], count: int, seconds: float) -> float:
    """The whole time as the progress bar works it out when half the pairs are done, over what it came to."""
    half = next(((at, done) for at, done in told if 2 * done >= count), None)
    return float("nan") if half is None else round(half[0] * count / half[1] / seconds, 3)


# ---- long queries ----


def long_query(tokens: int, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Tap and gradient of one pair of that length beside the plain forward of its two queries."""
    model = small_model(tokens)
    generator = torch.Generator().manual_seed(0)
    row = [3, *torch.randint(5, VOCABULARY, (tokens - 2,), generator=generator).tolist(), 4]
    swapped = [row[-1], *row[1:-1], row[0]]
    forward, reverse = (rp.Query(ids, [tokens - 1], [0]) for ids in (row, swapped))
    pairs = rp.ReversalPairs.from_pairs([rp.ReversalPair(forward, reverse, "swapped", "0")])
    ids = torch.tensor([row, swapped])
    shared = {"control": False, "batch_size": 2, "progress": False}

    def plain() -> None:
        with torch.no_grad():
            model.logits(ids)

    def step() -> None:
        model.module(ids).logits[:, -2].float().log_softmax(-1).sum().backward()
        model.module.zero_grad(set_to_none=True)

    ways = {
        "plain forward": plain,
        "training step": step,
        "attention, one row": lambda: rp.probe_attention_correlation(model, pairs, **shared),
        "gradient cosine": lambda: rp.probe_gradient_cosine(model, pairs, **shared),
    }
    seconds = medians(ways, rounds=asked.rounds)
    return [
        {
            "T": tokens,
            "way": name,
            "seconds": seconds[name],
            "of a forward": seconds[name] / seconds["plain forward"],
            "peak extra MB": megabytes(peak_extra_bytes(run)),
        }
        for name, run in ways.items()
    ]


def main() -> None:
    """Measure each number of pairs in a process of its own, then the long queries; print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--probes", nargs="+", default=["attention"], choices=["attention", "gradient", "probability"])
    parser.add_argument("--tokens", type=int, default=12, help="of a query; at least 4")
    parser.add_argument("--size", type=int, default=1000, help="pairs of a part")
    parser.add_argument("--whole", type=int, default=0, help="rp.probe too, up to so many pairs")
    parser.add_argument("--long", type=int, nargs="*", default=[], help="tokens of long queries")
    parser.add_argument("--rounds", type=int, default=5, help="of long queries")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure(asked.here, asked.pairs[0], asked)))
        return
    torch.set_num_threads(asked.threads)
    rows = []
    for count in asked.pairs:
        for way in ("in parts", "all at once")[: 1 + (count <= asked.whole)]:
            own = ["--pairs", count, "--tokens", asked.tokens, "--size", asked.size, "--threads", asked.threads]
            command = [sys.executable, __file__, *map(str, own), "--probes", *asked.probes, "--here", way]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    if rows:
        show("many_pairs", rows, probes=asked.probes, tokens=asked.tokens, size=asked.size)
    if asked.long:
        found = [row for tokens in asked.long for row in long_query(tokens, asked)]
        show("long_queries", found, rounds=asked.rounds, layers=LAYERS, d_model=WIDTH, heads=HEADS)


if __name__ == "__main__":
    main()
