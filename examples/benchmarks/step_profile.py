"""Where the time of a one-layer training step goes, on one thread.

    python examples/benchmarks/step_profile.py                # length 10, RADD with rope and the ARM
    python examples/benchmarks/step_profile.py --length 20

The phases are timed inside one loop and each is the median over its steps; "Trainer" is the whole step of
`ForwardOnlyTrainer`, timed from callback to callback, and what it takes beyond the phases is the framework's. Seconds
are those of this process on the processor, so that company on the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import show
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, set_seed

from revprobe.finetune.config.loading import load_config
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.finetune.runs.one_layer import build_model, training_arguments
from revprobe.finetune.training.ema import MovingAverage
from revprobe.finetune.training.objectives import causal_loss, draw_masks, price_masks, step_generator
from revprobe.finetune.training.trainer import ForwardOnlyTrainer, TokenRows
from revprobe.models.hub import quiet_transformers
from revprobe.relations.catalog import letters

MASK = 53


def phases(config: RunConfig, steps: int) -> dict[str, float]:
    """Median seconds of each phase of a step, with the package's own functions in the order the Trainer calls them."""
    set_seed(0)
    model, tokenizer = build_model(config)
    rows = torch.tensor(tokenizer(letters(config.relation.length).training_texts())["input_ids"])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, fused=True)
    average = MovingAverage(model, 0.9995)
    causal, spent, clock = config.model.objective == "causal", defaultdict(list), time.process_time
    shape = (config.training.batch_size, config.relation.length)

    def timed(phase: str, run: Callable[[], Any]) -> Any:
        start = clock()
        result = run()
        spent[phase].append(clock() - start)
        return result

    for step in range(steps):
        ids = timed("rows", lambda: rows[torch.randperm(len(rows))[: shape[0]].tolist()])
        if causal:
            loss = timed("forward and loss", lambda ids=ids: causal_loss(model, ids))
        else:
            rate, is_masked = timed("masks", lambda step=step: draw_masks(shape, generator=step_generator(0, step)))
            loss = timed(
                "forward and loss",
                lambda ids=ids, rate=rate, is_masked=is_masked: price_masks(
                    model(ids.masked_fill(is_masked, MASK)).logits, ids, is_masked, rate
                ).mean(),
            )
        timed("backward", loss.backward)
        timed("clipping", lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        timed("AdamW (fused)", optimizer.step)
        if not causal:
            timed("average", lambda: average.update_parameters(model))
        optimizer.zero_grad()
    return {phase: statistics.median(times[steps // 10 :]) for phase, times in spent.items()}


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.at.append(time.process_time())


def trainer_step(config: RunConfig, steps: int) -> float:
    """Median seconds from one step's end to the next inside the Trainer, without snapshots."""
    config = RunConfig(**config.model_dump() | {"training": config.training.model_dump() | {"steps": steps}})
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        set_seed(0)
        model, tokenizer = build_model(config)
        rows = TokenRows(torch.tensor(tokenizer(letters(config.relation.length).training_texts())["input_ids"]))
        clock = _Clock()
        ForwardOnlyTrainer(
            model=model,
            args=training_arguments(config, Path(folder)),
            train_dataset=rows,
            processing_class=tokenizer,
            objective=config.model.objective,
            ema_decay=config.training.ema_decay,
            snapshots=(),
            callbacks=[clock],
        ).train()
    return statistics.median(b - a for a, b in zip(clock.at, clock.at[1:], strict=False))


def slowest_operations(config: RunConfig, count: int) -> list[dict[str, Any]]:
    """The operators that take the most time of forward, loss and backward, from torch's profiler."""
    set_seed(0)
    model, tokenizer = build_model(config)
    rows = torch.tensor(tokenizer(letters(config.relation.length).training_texts())["input_ids"])
    ids, shape = rows[: config.training.batch_size], (config.training.batch_size, config.relation.length)
    rate, is_masked = draw_masks(shape, generator=step_generator(0, 0))

    def run() -> None:
        if config.model.objective == "causal":
            causal_loss(model, ids).backward()
        else:
            price_masks(model(ids.masked_fill(is_masked, MASK)).logits, ids, is_masked, rate).mean().backward()

    run()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(20):
            run()
    events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {"operator": event.key, "calls a step": event.count / 20, "share": event.self_cpu_time_total / total}
        for event in events[:count]
    ]


def main() -> None:
    """Print the phases and the slowest operators of a masked and of a causal step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--operators", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for family, encoding in (("radd", "rope"), ("gpt2", "absolute")):
        values = load_config("one-layer", SweepConfig).runs()[0].model_dump()
        values["model"] |= {"family": family, "position_encoding": encoding}
        values["relation"]["length"] = asked.length
        config = RunConfig(**values)
        seconds = phases(config, asked.steps)
        seconds |= {"all phases": sum(seconds.values()), "Trainer": trainer_step(config, asked.steps)}
        rows = [
            {"phase": name, "ms": 1e3 * value, "of Trainer": value / seconds["Trainer"]}
            for name, value in seconds.items()
        ]
        show(f"step_profile {family}", rows, length=asked.length, steps=asked.steps)
        show(f"step_profile {family} operators", slowest_operations(config, asked.operators), length=asked.length)


if __name__ == "__main__":
    main()
