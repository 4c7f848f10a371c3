"""All three probes at the shapes of published checkpoints: seconds and peak memory beside a plain forward.

    python examples/benchmarks/large_models.py                             # LLaDA-8B and Dream-7B, 4 pairs of 16 and 64
    python examples/benchmarks/large_models.py --shape GSAI-ML/LLaDA-8B-Base --pairs 32 --tokens 16 --rounds 1
    python examples/benchmarks/large_models.py --tiny                      # the same path at two layers, in seconds

The weights are random: times and memory do not depend on them, and nothing is downloaded. A shape is a published name
of `revprobe plan`, or a folder with a config.json. Each shape is measured in a process of its own, and each line is
written to --out as it is measured; lines that are there are not measured again.

"forward" is one pass of the forward and one of the reverse queries, in the same batches as the probes. Resident memory
is the kernel's (VmHWM, set back before each way), so it holds weights, libraries and what was freed and not given back;
on a GPU it is the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import forget_peak, machine, peak_resident, show
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import revprobe as rp
from revprobe.models.families.known import family_of_config
from revprobe.models.published import config_of, published_config
from revprobe.models.registry import stated_objective
from revprobe.probes.passes.batches import queries_per_batch

SHAPES = ("GSAI-ML/LLaDA-8B-Base", "Dream-org/Dream-v0-Base-7B")
TINY = {
    "GSAI-ML/LLaDA-8B-Base": {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 192},
    "Dream-org/Dream-v0-Base-7B": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 160,
    },
}
GIB = 2**30
WAYS: dict[str, Callable[[rp.ProbedModel, rp.ReversalPairs], Any]] = {
    "attention": lambda model, pairs: rp.probe_attention_correlation(model, pairs),
    "probability": lambda model, pairs: rp.probe_reverse_probability(model, pairs),
    "gradient": lambda model, pairs: rp.probe_gradient_cosine(model, pairs),
    "fused": lambda model, pairs: rp.probe(model, pairs),
}


@dataclass(frozen=True)
class Case:
    """Pairs of so many tokens."""

    pairs: int
    tokens: int


def build(shape: str, device: str, tiny: bool) -> rp.ProbedModel:
    """A model of that shape with random bf16 weights, made where they stay: never two copies of them."""
    config: Any = published_config(shape) or config_of(shape)
    for key, value in TINY.get(shape, {}).items() if tiny else ():
        setattr(config, key, value)
    objective = stated_objective(config, shape)
    family = family_of_config(config)
    torch.manual_seed(0)
    with torch.device(device):
        if family is not None:
            module = family.class_for(objective)._from_config(config, dtype=torch.bfloat16)
        else:
            auto = AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM
            module = auto.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    return rp.ProbedModel(module.eval(), objective=objective, name=shape)


def make_pairs(model: rp.ProbedModel, case: Case) -> rp.ReversalPairs:
    """Random queries with two-token targets and evidence, the reverse ones with both exchanged in place."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for fact in range(case.pairs):
        draw = lambda size: torch.randint(3, 500, (size,), generator=generator).tolist()  # noqa: E731
        target, evidence, fill = draw(2), draw(2), draw(case.tokens - 5)
        places = [1, 2], [case.tokens - 2, case.tokens - 1]
        forward = rp.Query([3, *target, *fill, *evidence], *places)
        reverse = rp.Query([3, *evidence, *fill, *target], *reversed(places))
        made.append(rp.ReversalPair(forward, reverse, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(made)


# ---- one shape, in a process of its own ----


def measure(shape: str, asked: argparse.Namespace) -> None:
    """Build the model once, and write a line for each way of each case that is not there yet."""
    started = time.perf_counter()
    model = build(shape, asked.device, asked.tiny)
    built = time.perf_counter() - started
    weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
    print(f"{shape}: {weights / GIB:.2f} GiB of weights, made in {built:.0f} s", flush=True)
    for tokens in asked.tokens:
        case = Case(asked.pairs, tokens)
        wanted = [way for way in ("forward", *asked.ways) if _key(shape, case, way, asked) not in _done(asked.out)]
        if not wanted:
            continue
        pairs = make_pairs(model, case)
        ways = {"forward": forward_of(model, pairs)} | {
            way: (lambda run=WAYS[way], pairs=pairs: run(model, pairs)) for way in asked.ways
        }
        plain = _timed(ways["forward"], asked)  # again in this process, whatever an earlier one had measured
        for way in wanted:
            seconds, peak = plain if way == "forward" else _timed(ways[way], asked)
            row = _key(shape, case, way, asked) | {
                "seconds": round(statistics.median(seconds), 3),
                "range": [round(min(seconds), 3), round(max(seconds), 3)],
                "of a forward": round(statistics.median(seconds) / statistics.median(plain[0]), 2),
                "weights GiB": round(weights / GIB, 2),
                "peak GiB": round(peak / GIB, 2),
                "beyond the weights GiB": round((peak - weights) / GIB, 2),
            }
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{way}, {case}: {row['seconds']} s, peak {row['peak GiB']} GiB", flush=True)


def forward_of(model: rp.ProbedModel, pairs: rp.ReversalPairs) -> Callable[[], None]:
    """One pass of every query, in the probes' own batches."""
    size = queries_per_batch(model, pairs.queries)
    ids = torch.tensor([query.token_ids for query in pairs.queries], device=model.device)

    def forward() -> None:
        with torch.no_grad():
            for batch in ids.split(size):
                model.logits(batch)

    return forward


def _timed(run: Callable[[], Any], asked: argparse.Namespace) -> tuple[list[float], int]:
    """Seconds of each round after a first one, and the most memory that was resident in any of them."""
    _forget_peak(asked.device)
    seconds = []
    for turn in range(asked.rounds + 1):
        start = time.perf_counter()
        run()
        if asked.device == "cuda":
            torch.cuda.synchronize()
        if turn or asked.rounds == 1:
            seconds.append(time.perf_counter() - start)
        if asked.rounds == 1:
            break
    return seconds, _peak(asked.device)


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def _peak(device: str) -> int:
    """Bytes: resident for the kernel, or the CUDA allocator's."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return peak_resident()


# ---- all shapes ----


def _key(shape: str, case: Case, way: str, asked: argparse.Namespace) -> dict[str, Any]:
    return {"shape": shape, "way": way, "pairs": case.pairs, "tokens": case.tokens, "machine": _machine(asked)}


def _machine(asked: argparse.Namespace) -> str:
    return f"{machine()}{', two layers' if asked.tiny else ''}, {asked.rounds} rounds"


def _rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []


def _done(out: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("shape", "way", "pairs", "tokens", "machine")} for row in _rows(out)]


def main() -> None:
    """Measure each shape in a process of its own, then print one table of all lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="a published name or a folder with a config.json; repeat it")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted; 1 counts the first")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64")
    parser.add_argument("--out", type=Path, default=Path("large_models.jsonl"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if min(asked.tokens) < 6:
        parser.error(
            "--tokens: expected at least 6: two of the target, two of the evidence, one before them, one between"
        )
    if asked.here:
        measure(asked.shape[0], asked)
        return
    for shape in asked.shape or SHAPES:
        own = ["--shape", shape, "--pairs", asked.pairs, "--rounds", asked.rounds, "--device", asked.device]
        own += ["--tokens", *asked.tokens, "--ways", *asked.ways, "--out", asked.out, "--here"]
        own += ["--tiny"] if asked.tiny else []
        # glibc keeps what is freed in pieces below 32 MB; so it goes back, and what is resident is what is held.
        environment = {"MALLOC_MMAP_THRESHOLD_": "524288", **os.environ}
        subprocess.run([sys.executable, __file__, *map(str, own)], check=True, env=environment)
    rows = [row for row in _rows(asked.out) if row["machine"] == _machine(asked)]
    show("large_models", [{key: row[key] for key in row if key != "machine"} for row in rows])


if __name__ == "__main__":
    main()
