"""One LoRA step at LLaDA-8B's shape, probed before and after it: minutes, and memory beside what was planned.

    python examples/benchmarks/large_finetune.py                   # 16 GB of weights: on a machine of 24 GiB, alone
    python examples/benchmarks/large_finetune.py --layers 4        # four layers of that width
    python examples/benchmarks/large_finetune.py --tiny            # two layers of width 64, in seconds

The run is that of `large_finetune.yaml`, gradient checkpointing and both snapshots included, by `rp.fine_tune` as any
other. Its weights are random, made in memory where the published ones would be loaded: nothing is downloaded, and the
rows say how often they were made ("loads") and whether any of them came to lie in the run's folder. The folder is
temporary, in --scratch, and deleted at the end.

A row is one process with a limit of its own (--limit, in GiB of data, mapped files apart): what does not fit ends it,
and not the machine's other programs. Before it begins the plan says whether it fits; the row has that word beside what
came. Memory is the kernel's (VmHWM), less what the process held when libraries were loaded and weights were not. Rows
are added to --out as they are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # loaded before memory is counted
import torch
from large_loading import config_for
from measuring import forget_peak, machine, peak_resident, show

import revprobe as rp
from revprobe.finetune.config.finetuning import FinetuneConfig, read_finetune
from revprobe.finetune.memory.from_config import plan_finetuning
from revprobe.finetune.memory.plan import MemoryPlan
from revprobe.finetune.pretraining.layouts import train_tokenizer
from revprobe.finetune.runs.finetune_setup import text_relation
from revprobe.finetune.runs.finetuning import fine_tune
from revprobe.models.families.known import family_of_config

CONFIG = Path(__file__).with_suffix(".yaml")
GB, GIB = 10**9, 2**30
VOCABULARY = 4000  # at most; enough for a token of each word


def config_here(asked: argparse.Namespace, folder: Path) -> tuple[FinetuneConfig, Any]:
    """The committed config with the shape that is asked for, and that shape's config.

    Another shape than the published one is a folder with a config.json, which the plan reads.
    """
    shape, chosen = config_for(asked.shape, asked.layers, asked.tiny), read_finetune(CONFIG)
    assert isinstance(chosen, FinetuneConfig), f"{CONFIG} is one run"
    name = asked.shape
    if asked.tiny or asked.layers:
        family = family_of_config(shape)
        assert family is not None, "config_for gives a family's"
        shape.architectures = [family.model_class.__name__]
        name = str(folder / "shape")
        shape.save_pretrained(name)
    return chosen.model_copy(update={"model": chosen.model.model_copy(update={"name": name})}), shape


def put_random_weights(chosen: FinetuneConfig, shape: Any) -> list[float]:
    """Have `load_model` make random bfloat16 weights under the config's name; returns the seconds of each load."""
    relation = text_relation(chosen)
    texts = [text for direction in relation.directions for text in relation.training_texts(direction)]
    tokenizer, family, seconds = train_tokenizer(texts, VOCABULARY), family_of_config(shape), []
    assert family is not None, "config_for gives a family's"
    for token in ("bos", "eos", "pad", "mask"):
        setattr(shape, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))

    def made(**_: Any) -> rp.ProbedModel:
        start = time.perf_counter()
        torch.manual_seed(0)
        module = family.class_for(family.objective)._from_config(shape, dtype=torch.bfloat16)
        seconds.append(time.perf_counter() - start)
        return rp.ProbedModel(module.eval(), tokenizer, objective=family.objective, name=str(chosen.model.name))

    rp.register_model(str(chosen.model.name), made)
    return seconds


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Plan the run, do it in `folder`, and hold one against the other."""
    chosen, shape = config_here(asked, folder)
    plan = plan_finetuning(chosen, tokens=asked.tokens)
    row = planned_row(plan, shape, asked)
    print(json.dumps(row), flush=True)  # there also when the limit ends what follows
    loads, limit = put_random_weights(chosen, shape), int(asked.limit * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before, start = forget_peak(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a floor that four facts do not have
        run = fine_tune(chosen, folder / "run", listener=False)
    seconds = time.perf_counter() - start
    return row | done_row(run, plan, seconds, loads, peak_resident() - before)


def planned_row(plan: MemoryPlan, shape: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """What the plan says, before anything is made."""
    sums = plan.to_frame().loc["tensors in all"]
    about = {"shape": asked.shape + (" (tiny)" if asked.tiny else ""), "layers": shape.num_hidden_layers}
    return about | {
        "planned GB": round(plan.peak() / GB, 3),
        "in": str(sums.idxmax()),
        "the plan says": "fits" if plan.headroom(int(asked.limit * GIB)) >= 0 else "does not fit",
    }


def done_row(run: Any, plan: MemoryPlan, seconds: float, loads: list[float], peak: int) -> dict[str, Any]:
    """What the run took, and whether its folder holds the adapter alone."""
    weights = next(size for _, what, size in plan.rows if what == "weights")
    first = (run.path / "readings" / "step-000000").stat().st_mtime - (run.path / "config.yaml").stat().st_mtime
    return {
        "measured GB": round(peak / GB, 3),
        "of the plan": round(peak / plan.peak(), 3),
        "beyond the weights, planned": round((plan.peak() - weights) / GB, 3),
        "measured": round((peak - weights) / GB, 3),
        "minutes": round(seconds / 60, 2),
        "of it weights": round(sum(loads) / 60, 2),
        "until step 0 was probed": round(first / 60, 2),
        "loads": len(loads),
        "folder GB": round(sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file()) / GB, 3),
        "decoding": "as configured" if run.asks else "skipped (evaluation.facts: 0)",
    }


def row_of(asked: argparse.Namespace) -> dict[str, Any]:
    """One process of its own; where the limit ends it, what was planned and how it ended."""
    own: Mapping[str, Any] = {"shape": asked.shape, "tokens": asked.tokens, "limit": asked.limit}
    own = {**own, "scratch": asked.scratch, **({"layers": asked.layers} if asked.layers else {})}
    options = [str(part) for name, value in own.items() for part in (f"--{name}", value)]
    options += ["--here"] + ["--tiny"] * asked.tiny
    # glibc keeps what is freed in pieces below 32 MB; so it goes back, and what is resident is what is held.
    environment = {"MALLOC_MMAP_THRESHOLD_": "524288", **os.environ}
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(f"nothing was planned (exit code {done.returncode}); the error stands above")
    return lines[-1] | {"ended": "well" if done.returncode == 0 else f"with exit code {done.returncode}"}


def main() -> None:
    """Measure in a process of its own, keep the row, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="GSAI-ML/LLaDA-8B-Base", help="a published name that `revprobe plan` knows")
    parser.add_argument("--layers", type=int, help="the published number by default")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64")
    parser.add_argument("--tokens", type=int, default=64, help="of a row, for the plan; the config's rows have 64")
    parser.add_argument("--limit", type=float, default=22.0, help="GiB of data in memory, mapped files apart")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path("large_finetune.jsonl"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        asked.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="large_finetune-", dir=asked.scratch) as folder:
            print(json.dumps(measure(asked, Path(folder))), flush=True)
        return
    row = row_of(asked)
    with asked.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"machine": machine(), "limit GiB": asked.limit}) + "\n")
    show("large_finetune", [{"what": key, "value": value} for key, value in row.items()], limit=asked.limit)
    if row["ended"] != "well":
        sys.exit(1)


if __name__ == "__main__":
    main()
