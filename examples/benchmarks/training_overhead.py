"""What snapshots of all three probes at 20 checkpoints add to one-layer training.

    python examples/benchmarks/training_overhead.py                     # the full configuration, length 10
    python examples/benchmarks/training_overhead.py --steps 2000 --rounds 1

Both trainings are the same run, with readings and without, in turn; checkpoints are written in both.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from measuring import medians, show
from transformers import set_seed

from revprobe.finetune.building import build_model, probe_pairs, training_arguments
from revprobe.finetune.config import RunConfig, SweepConfig, load_config
from revprobe.finetune.relations import letters
from revprobe.finetune.snapshots import ProbeCallback
from revprobe.finetune.trainer import ForwardOnlyTrainer, TokenRows
from revprobe.models.probed import ProbedModel
from revprobe.models.registry import quiet_transformers


def train(config: RunConfig, *, probed: bool) -> None:
    """One run of the config in a temporary folder, with or without its readings."""
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
        if probed:
            wrapping = {"tokenizer": tokenizer, "objective": config.model.objective}
            pairs = probe_pairs(relation, ProbedModel(model, **wrapping))
            trainer.add_callback(ProbeCallback(pairs, steps=config.snapshot_steps, ema=trainer.ema, **wrapping))
        trainer.train()


def main() -> None:
    """Measure both, print the share that probing adds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="training steps; those of one-layer by default")
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    base = load_config("one-layer", SweepConfig).runs()[0].model_dump()
    steps = asked.steps or base["training"]["steps"]
    every = {"every": max(1, steps // asked.snapshots)}
    config = RunConfig(**base | {"training": base["training"] | {"steps": steps}, "snapshots": every})
    seconds = medians(
        {"without readings": lambda: train(config, probed=False), "with readings": lambda: train(config, probed=True)},
        rounds=asked.rounds,
    )
    plain = seconds["without readings"]
    rows = [
        {"run": name, "seconds": value, "ms a step": 1e3 * value / steps, "added": value / plain - 1}
        for name, value in seconds.items()
    ]
    show("training_overhead", rows, steps=steps, snapshots=len(config.snapshot_steps), rounds=asked.rounds)


if __name__ == "__main__":
    main()
