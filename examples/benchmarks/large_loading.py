"""Loading a checkpoint of LLaDA-8B's published layout: seconds and memory until the first forward pass has ended.

    python examples/benchmarks/large_loading.py                          # 16 GB are written, and deleted at the end
    python examples/benchmarks/large_loading.py --depth 4                # four layers of that width
    python examples/benchmarks/large_loading.py --tiny                   # two layers of width 64, in seconds

A checkpoint of random bfloat16 weights is written in shards with the published names, into a new folder in --scratch.
Each way is measured in a process of its own, with the files out of the page cache ("cold") and in it ("warm"):

    load_model   `load_model(folder, dtype="bfloat16")` and one forward pass of 16 tokens; before it, weights are mapped
    read         every byte of the files, once, and then the same forward pass with the weights in memory: what it takes
                 at least

and `load_model(..., dtype="bfloat16")` of float32 files at the depth of --float32-depth. Memory is what the kernel says
of the process, sampled every 20 ms: all that is resident, and of it what is its own (anonymous) and what is pages of
files, which the kernel takes back when others need them. "of the weights" is the peak over the bytes of the weights as
loaded, less what the process held before it began.

It refuses without 40 GB of free disk for the whole depth (two and a half times what is written), and deletes what it
wrote, also when it fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from large_models import TINY
from measuring import show
from safetensors.torch import save_file
from torch import Tensor

import revprobe as rp
from revprobe.models.families.known import family_of_config
from revprobe.models.published import published_config

GB = 10**9
SHARD = 5 * GB  # as they are published
SLACK = 2.5  # free disk asked for, over what is written
EVERY = 0.02  # seconds between two looks at the memory


def config_for(shape: str, depth: int | None, tiny: bool) -> Any:
    """The published config, at fewer layers where asked."""
    config: Any = published_config(shape)
    if config is None:
        sys.exit(f"{shape!r} is no published shape; expected a name that `revprobe plan` knows")
    for key, value in TINY.get(shape, {}).items() if tiny else ():
        setattr(config, key, value)
    if depth is not None:
        config.num_hidden_layers = depth
    return config


def write_checkpoint(folder: Path, config: Any, dtype: torch.dtype, shard: int) -> int:
    """Random weights in shards under the published names, one shard in memory at a time; returns their bytes."""
    family = family_of_config(config)
    assert family is not None, f"{type(config).__name__} is a config of a family"
    with torch.device("meta"):
        module = family.model_class._from_config(config, dtype=dtype)
    named = {family.official_name(name): value for name, value in module.named_parameters()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, value in named.items():
        size = value.numel() * dtype.itemsize
        if shards[-1] and filled + size > shard:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    index, generator = {}, torch.Generator().manual_seed(0)
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _drawn(named[name], dtype, generator) for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    total = sum(value.numel() for value in named.values()) * dtype.itemsize
    said = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(said), encoding="utf-8")
    config.architectures = [family.model_class.__name__]
    config.save_pretrained(folder)
    return total


def _drawn(like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """N(0, 0.02), norms about 1, of one block of noise over and over: times do not depend on the values."""
    noise = 0.02 * torch.randn((1 << 20) + 7, generator=generator) + (like.dim() == 1)
    count = like.numel()
    return noise.to(dtype).repeat(-(-count // len(noise)))[:count].reshape(like.shape).contiguous()


# ---- one way, in a process of its own ----


@dataclass
class Memory:
    """The most that was resident at any look, of its own and of files, in bytes; and what was there before."""

    before: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def now() -> dict[str, int]:
        """Resident, anonymous and file-backed bytes of this process."""
        told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return {key: 1024 * int(told[name].split()[0]) for key, name in _KINDS.items()}


_KINDS = {"resident": "VmRSS", "anonymous": "RssAnon", "files": "RssFile"}


@contextmanager
def sampled() -> Iterator[Memory]:
    """Look at this process's memory while the block runs."""
    memory, ended = Memory(before=Memory.now()), threading.Event()
    memory.most = dict(memory.before)

    def look() -> None:
        while True:
            for kind, size in Memory.now().items():
                memory.most[kind] = max(memory.most[kind], size)
            if ended.wait(EVERY):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def set_cache(folder: Path, cache: str) -> None:
    """Take the files out of the kernel's cache, or read them into it."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                _read(file)


def _read(file: Any) -> None:
    block = bytearray(16 << 20)
    while file.readinto(block):
        pass


def measure(way: str, folder: Path, cache: str, tokens: int, threads: int) -> dict[str, Any]:
    """Seconds and memory of one way, from the files to the logits."""
    torch.set_num_threads(threads)
    ids = torch.arange(3, 3 + tokens)[None]
    set_cache(folder, cache)
    start = time.perf_counter()
    with sampled() as memory, torch.no_grad():
        if way == "read":
            for path in sorted(folder.glob("*.safetensors")):
                with path.open("rb", buffering=0) as file:
                    _read(file)
        else:
            model = rp.load_model(folder, dtype="bfloat16")
            loaded = time.perf_counter() - start
            assert bool(model.logits(ids).isfinite().all()), "random weights gave logits that are no numbers"
            forward = time.perf_counter() - start - loaded
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {"seconds": seconds}
    if way != "read":
        again = time.perf_counter()
        with torch.no_grad():
            model.logits(ids)
        found |= {"load": loaded, "first forward": forward, "second forward": time.perf_counter() - again}
        found["weights"] = sum(p.numel() * p.element_size() for p in model.module.parameters())
    more = {f"{kind} beyond": memory.most[kind] - memory.before[kind] for kind in _KINDS}
    return found | more


# ---- all ways ----


def _in_a_process(way: str, folder: Path, cache: str, asked: argparse.Namespace) -> dict[str, Any]:
    own = ["--here", way, "--folder", folder, "--cache", cache, "--tokens", asked.tokens, "--threads", asked.threads]
    done = subprocess.run([sys.executable, __file__, *map(str, own)], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rows_of(folder: Path, files: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Both caches: medians over rounds of what loading takes, beside reading the files and a second forward pass."""
    rows = []
    for cache in asked.caches:
        ways = [way for _ in range(asked.rounds) for way in ("read", "load")]
        found = [_in_a_process(way, folder, cache, asked) for way in ways]
        rounds = list(zip(found[::2], found[1::2], strict=True))
        loads = [load for _, load in rounds]
        least = [read["seconds"] + load["second forward"] for read, load in rounds]
        seconds = statistics.median(load["seconds"] for load in loads)
        weights = loads[0]["weights"]
        row = {"files": files, "cache": cache, "weights GB": round(weights / GB, 3), "seconds": round(seconds, 2)}
        row["range"] = [round(edge(load["seconds"] for load in loads), 2) for edge in (min, max)]
        row["of it load_model"] = round(statistics.median(load["load"] for load in loads), 2)
        row["read + forward, s"] = round(statistics.median(least), 2)
        ratios = [load["seconds"] / low for load, low in zip(loads, least, strict=True)]
        row["of read + forward"] = round(statistics.median(ratios), 2)
        for kind in _KINDS:
            row[f"{kind} GB"] = round(max(load[f"{kind} beyond"] for load in loads) / GB, 3)
        row["peak of the weights"] = round(max(load["resident beyond"] for load in loads) / weights, 3)
        rows.append(row)
        print(row, flush=True)
    return rows


def checkpoint_rows(depth: int | None, dtype: torch.dtype, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Write one checkpoint, measure it, delete it."""
    config = config_for(asked.shape, depth, asked.tiny)
    asked.scratch.mkdir(parents=True, exist_ok=True)
    family = family_of_config(config)
    assert family is not None, "config_for gives a family's"
    with torch.device("meta"):  # shapes alone
        parameters = sum(p.numel() for p in family.model_class._from_config(config).parameters())
    size = parameters * dtype.itemsize
    free, needed = shutil.disk_usage(asked.scratch).free, int(SLACK * size)
    if free < needed:
        least = f"{needed / GB:.1f} GB, {SLACK} times what is written"
        sys.exit(f"{asked.scratch} has {free / GB:.1f} GB free; expected {least}")
    folder = Path(tempfile.mkdtemp(prefix="large_loading-", dir=asked.scratch))
    try:
        start = time.perf_counter()
        total = write_checkpoint(folder, config, dtype, asked.shard or SHARD)
        print(f"{total / GB:.2f} GB of {dtype} written in {time.perf_counter() - start:.0f} s: {folder}", flush=True)
        name = str(dtype).removeprefix("torch.")
        return rows_of(folder, f"{name}, {config.num_hidden_layers} layers", asked)
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Write, measure and delete each checkpoint; print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="GSAI-ML/LLaDA-8B-Base")
    parser.add_argument("--depth", type=int, help="layers; the published number by default")
    parser.add_argument("--float32-depth", type=int, default=4, help="layers of the float32 files; 0 leaves them out")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64")
    parser.add_argument("--tokens", type=int, default=16, help="of the forward pass")
    parser.add_argument("--caches", nargs="+", choices=["cold", "warm"], default=["cold", "warm"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shard", type=int, help="bytes of a shard; 5 GB by default")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    for hidden in ("--here", "--folder", "--cache"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure(asked.here, Path(asked.folder), asked.cache, asked.tokens, asked.threads)))
        return
    rows = checkpoint_rows(asked.depth, torch.bfloat16, asked)
    if asked.float32_depth:
        rows += checkpoint_rows(asked.float32_depth, torch.float32, asked)
    show("large_loading", rows, shape=asked.shape, tokens=asked.tokens, rounds=asked.rounds)


if __name__ == "__main__":
    main()
