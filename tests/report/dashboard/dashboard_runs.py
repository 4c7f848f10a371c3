"""Run folders for the dashboard's tests: config, readings and checkpoints, as training writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from revprobe import ProbedModel, Reading, Readings
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.config.loading import dump_config
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.finetune.runs.finetuning import fine_tune
from revprobe.finetune.runs.one_layer import build_model
from revprobe.finetune.training.probe_callback import take_readings
from revprobe.models.checkpoints import step_name
from revprobe.relations.catalog import letters
from tiny import made_probabilities

EVIL = "<script>document.title='planted'<\u2215script><img src=x onerror=\"document.title='planted'\"><b>%{x}"
CARRIER = "<script>x "  # what every template of the fine-tunings begins with
FACTS = [EVIL, *"bcdefghi"]


def run_config(name: str, **changes: Any) -> RunConfig:
    """A tiny one-layer run of ten steps, probed at the first and the last."""
    model = {"d_model": 8, "position_encoding": changes.pop("position_encoding", "rope")}
    training = {"steps": 10, "batch_size": 4, "warmup_steps": 0, "ema_decay": None, "seed": changes.pop("seed", 0)}
    relation = {"length": changes.pop("length", 4), "alphabet": 9}
    return RunConfig(name=name, model=model, relation=relation, training=training, snapshots={"every": 10})


def finetune_config(name: str) -> FinetuneConfig:
    """A fine-tuning whose templates begin with markup."""
    relation = {"name": "invented_names", "direction": "P2C", "carrier": CARRIER}
    return FinetuneConfig(name=name, model={"name": "gpt2"}, relation=relation, training={"steps": 10})


def attention(draw: int, about: dict[str, Any]) -> Reading:
    rng = np.random.default_rng(draw)
    shared, own = rng.normal(size=(2, len(FACTS)))
    columns = {"pair": np.arange(len(FACTS)), "fact": FACTS, "group": 0, "layer": 0, "head": 0, "kind": "same_target"}
    columns |= {"offset_forward": 1, "offset_reverse": -1, "distance_forward": 1, "distance_reverse": 1, "reason": ""}
    columns |= {"score_forward": shared, "score_reverse": shared + own, "weight_forward": 0.5, "weight_reverse": 0.5}
    return Reading("attention_correlation", pd.DataFrame(columns), about)


def write_step(run: Path, step: int, *, weights: tuple[str, ...] = ("raw",), kind: str = "same_target") -> None:
    """A snapshot: its readings appear whole, then its checkpoint is marked complete (without weights in it)."""
    made = []
    for place, which in enumerate(weights):
        about = {"kind": kind, "objective": "masked", "step": step, "weights": which, "dtype": "float32"}
        about |= {"model": run.name, "versions": {"revprobe": "0"}, "pairs": "d1", "control": True}
        made += [attention(7 * step + place, about), made_probabilities(7 * step + place, FACTS, about)]
    Readings(made).save(run / "readings" / step_name(step))
    checkpoint = run / "checkpoints" / step_name(step)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "COMPLETE").touch()


def write_run(run: Path, *steps: int, config: Any = None, **more: Any) -> Path:
    """A run folder with readings at these steps; `more` as `write_step` takes it."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump_config(config or run_config("toy")), encoding="utf-8")
    for step in steps:
        write_step(run, step, **more)
    return run


def write_real_run(run: Path, config: RunConfig) -> Path:
    """A finished run of an untrained model: real checkpoints, and readings really taken from them."""
    write_run(run, config=config)
    torch.manual_seed(config.training.seed)
    module, tokenizer = build_model(config)
    relation = letters(config.relation.length, config.relation.alphabet)
    for step in config.snapshot_steps:
        wrapping: dict[str, Any] = {"objective": config.model.objective, "name": run.name}
        model = ProbedModel(module, tokenizer, step=step, weights="raw", **wrapping)
        take_readings(model, relation.pairs(model)).save(run / "readings" / step_name(step))
        checkpoint = run / "checkpoints" / step_name(step)
        module.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        (checkpoint / "COMPLETE").touch()
    return run


def write_real_finetuning(run: Path) -> Path:
    """A fine-tuning of two steps on a model made for it, its templates beginning with markup."""
    tiny = {"layout": "dream", "d_model": 16, "n_layers": 2, "n_heads": 2}
    tiny["pretraining"] = {"facts": 10, "steps": 2, "batch_size": 4}
    config = FinetuneConfig(
        name=run.name,
        model={"tiny": tiny},
        relation={"name": "invented_names", "direction": "P2C", "carrier": CARRIER},
        training={"steps": 2, "batch_size": 4, "device": "cpu"},
        snapshots={"count": 2, "facts": 6},
        evaluation={"max_new_tokens": 2},
    )
    fine_tune(config, run)
    return run
