"""Runs of one shape trained together against one by one: milliseconds per model and step.

    python examples/benchmarks/batched_training.py                     # length 10, 3 seeds, one thread
    python examples/benchmarks/batched_training.py --device cuda --threads 16

One by one is `ForwardOnlyTrainer`, run after run; together is the batched step of `finetune.runs.batched`. Neither
writes checkpoints or takes readings here. On the CPU the seconds are this process's own, on a GPU those of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import show
from transformers import TrainerCallback

from revprobe.finetune.config.loading import load_config
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.finetune.runs.batched import Batch
from revprobe.finetune.runs.one_layer import build_trainer
from revprobe.finetune.runs.run import claim_run
from revprobe.models.hub import quiet_transformers


def configs(family: str, encodings: list[str], asked: argparse.Namespace) -> list[RunConfig]:
    """`asked.seeds` runs of each encoding, of the one-layer sweep's configuration, without snapshots on the way."""
    values: dict[str, Any] = load_config("one-layer", SweepConfig).runs()[0].model_dump()
    values["relation"]["length"] = asked.length
    values["snapshots"] = {"steps": [0]}
    values["training"] |= {"device": asked.device, "threads": asked.threads, "steps": 10**6}
    made = []
    for encoding in encodings:
        for seed in range(asked.seeds):
            values["model"] |= {"family": family, "position_encoding": encoding}
            values["training"]["seed"] = seed
            made.append(RunConfig(**values | {"name": f"{family}-{encoding}-{seed}"}))
    return made


def together(made: list[RunConfig], folder: Path, asked: argparse.Namespace) -> Callable[[], float]:
    """A callable that takes `asked.steps` batched steps and returns the seconds they took."""
    batch = Batch([claim_run(_new(folder / config.name), config) for config in made], {})
    batch.stack.base.train()
    rows, clock = batch.rows(), clock_of(asked.device)

    def run() -> float:
        start = clock()
        for _ in range(asked.steps):
            batch.take_step(next(rows))
        return clock() - start

    return run


def one_by_one(made: list[RunConfig], folder: Path, asked: argparse.Namespace) -> Callable[[], float]:
    """A callable that trains the runs in turn, `asked.steps` steps each, and returns the seconds of the steps alone."""
    trainers = []
    for config in made:
        trainer, _ = build_trainer(claim_run(_new(folder / config.name), config), None)
        trainer.args.max_steps = asked.steps
        trainer.callback_handler.callbacks.remove(
            next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "_Snapshots")
        )
        stopwatch = _Stopwatch(clock_of(asked.device))
        trainer.add_callback(stopwatch)
        trainers.append((trainer, stopwatch))

    def run() -> float:
        for trainer, _ in trainers:
            trainer.train()
        return sum(stopwatch.seconds for _, stopwatch in trainers)

    return run


class _Stopwatch(TrainerCallback):
    """The time of a training's steps, without setting it up."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.start, self.seconds = clock, 0.0, 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.start = self.clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = self.clock() - self.start


def clock_of(device: str) -> Callable[[], float]:
    """This process's own seconds on a CPU; the wall clock's on a GPU, once it has finished."""
    if device == "cpu":
        return time.process_time

    def finished() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return finished


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    """Measure RADD with one encoding, with all three, and the ARM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    shapes = {"rope": ("radd", ["rope"]), "rope, alibi, absolute": ("radd", ["rope", "alibi", "absolute"])}
    shapes |= {"arm": ("gpt2", ["absolute"])}
    with tempfile.TemporaryDirectory() as home, quiet_transformers():
        candidates: dict[str, Callable[[], float]] = {}
        models: dict[str, int] = {}
        for name, (family, encodings) in shapes.items():
            made = configs(family, encodings, asked)
            models[name] = len(made)
            for way, build in (("one by one", one_by_one), ("together", together)):
                candidates[f"{name}: {way}"] = build(made, Path(home) / f"{name}-{way}", asked)
        times = [{name: run() for name, run in candidates.items()} for _ in range(asked.rounds + 1)]
    seconds = {name: statistics.median(turn[name] for turn in times[1:]) for name in candidates}
    rows = []
    for name, count in models.items():
        alone = seconds[f"{name}: one by one"]
        for way in ("one by one", "together"):
            spent = seconds[f"{name}: {way}"]
            each = {"models": f"{name} x {asked.seeds} seeds", "way": way, "number": count}
            rows.append(each | {"ms a model and step": 1e3 * spent / asked.steps / count, "speed": alone / spent})
    show("batched_training", rows, length=asked.length, steps=asked.steps, rounds=asked.rounds, device=asked.device)


if __name__ == "__main__":
    main()
