"""What snapshots of all three probes at 20 checkpoints add to one-layer training.

    python examples/benchmarks/training_overhead.py                     # the full configuration, length 10
    python examples/benchmarks/training_overhead.py --steps 2000

One run, timed from within: the seconds of every snapshot against those of the steps that led to it, so that both sides
of each ratio were taken moments apart. Checkpoints are written too; they count as training.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import show
from torch import nn
from transformers import TrainerState, TrainingArguments, set_seed

from revprobe.finetune.config.loading import load_config
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.finetune.runs.one_layer import build_model, training_arguments
from revprobe.finetune.training.probe_callback import ProbeCallback
from revprobe.finetune.training.trainer import ForwardOnlyTrainer, TokenRows
from revprobe.models.probed import ProbedModel
from revprobe.models.registry import quiet_transformers
from revprobe.relations.catalog import letters


class TimedProbes(ProbeCallback):
    """Readings, with the moments at which each snapshot began and ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times: list[tuple[int, float, float]] = []

    def _take(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        began = time.perf_counter()
        super()._take(model, args, state)
        if state.global_step not in (step for step, _, _ in self.times):  # asked again at the end, it takes nothing
            self.times.append((state.global_step, began, time.perf_counter()))


def train(config: RunConfig) -> list[tuple[int, float, float]]:
    """One run of the config in a temporary folder; the step, begin and end of its snapshots."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        set_seed(config.training.seed)
        model, tokenizer = build_model(config)
        relation = letters(config.relation.length, config.relation.alphabet)
        rows = TokenRows(torch.tensor(tokenizer(relation.training_texts())["input_ids"]))
        trainer = ForwardOnlyTrainer(
            model=model,
            args=training_arguments(config, Path(folder)),
            train_dataset=rows,
            processing_class=tokenizer,
            objective=config.model.objective,
            ema_decay=config.training.ema_decay,
            snapshots=config.snapshot_steps,
        )
        wrapping = {"tokenizer": tokenizer, "objective": config.model.objective}
        pairs = relation.pairs(ProbedModel(model, **wrapping))
        probes = TimedProbes(pairs, steps=config.snapshot_steps, ema=trainer.ema, **wrapping)
        trainer.add_callback(probes)
        trainer.train()
    return probes.times


def main() -> None:
    """Measure, print the share that probing adds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="training steps; those of one-layer by default")
    parser.add_argument("--snapshots", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    base = load_config("one-layer", SweepConfig).runs()[0].model_dump()
    steps = asked.steps or base["training"]["steps"]
    every = {"every": max(1, steps // asked.snapshots)}
    config = RunConfig(**base | {"training": base["training"] | {"steps": steps}, "snapshots": every})
    times = train(config)
    # The first comes before any step and finds the kernels cold.
    snapshots = [end - began for _, began, end in times[1:]]
    trained = [began - before for (_, began, _), (_, _, before) in zip(times[1:], times, strict=False)]
    between = [step - before for (step, _, _), (before, _, _) in zip(times[1:], times, strict=False)]
    rows = [
        {
            "snapshots": len(snapshots),
            "weights read at each": 2,
            "seconds a snapshot": statistics.median(snapshots),
            "ms a training step": 1e3 * statistics.median(t / n for t, n in zip(trained, between, strict=True)),
            "added, median over snapshots": statistics.median(s / t for s, t in zip(snapshots, trained, strict=True)),
            "added, whole run": sum(snapshots) / sum(trained),
        }
    ]
    show("training_overhead", rows, steps=steps)


if __name__ == "__main__":
    main()
