"""Builders of a tiny fine-tuning that is stopped on its way, and taken up again."""

from pathlib import Path
from typing import Any

import pytest

import revprobe as rp
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.runs.finetuning import FinetuneRun
from revprobe.finetune.training.trainer import ForwardOnlyTrainer

ONE, TWO = "ABCDEFGHIJKL", "MNOPQRSTUVWX"


def facts_told(shift: int = 0) -> str:
    """Twelve facts; every child has another parent with another shift."""
    names = zip(ONE, TWO[shift:] + TWO[:shift], strict=True)
    return "\n".join(["parent,child", *(f"{one}nn {one}oss,{two}ed {two}ale" for one, two in names)])


def config_of(home: Path, model: dict[str, Any]) -> FinetuneConfig:
    templates = {"P2C": "Fact: {parent} has the child {child}", "C2P": "Fact: {child} has the parent {parent}"}
    table = {"name": "table", "path": str(home / "facts.csv"), "columns": ["parent", "child"], "templates": templates}
    return FinetuneConfig(
        name="ft",
        model=model,
        relation=table | {"direction": "P2C", "heldout": 0.2},
        lora={"rank": 2},
        training={"steps": 4, "batch_size": 4, "device": "cpu"},
        snapshots={"every": 2, "facts": 3, "parameters": "lora", "predictions": False},
        evaluation={"facts": 0},
    )


TINY = {"layout": "llada", "d_model": 16, "n_heads": 2, "pretraining": {"facts": 6, "steps": 1, "batch_size": 4}}


def stop_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the fine-tuning at that training step of its own."""
    step, calls = ForwardOnlyTrainer.training_step, []

    def stopping(self: Any, *args: Any, **others: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return step(self, *args, **others)

    monkeypatch.setattr(ForwardOnlyTrainer, "training_step", stopping)


def go_on(home: Path) -> FinetuneRun:
    return rp.fine_tune(config_of(home, {"name": str(home / "base")}), home / "ft", listener=False)
