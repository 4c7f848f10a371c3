"""All weights trained, without an adapter: checkpoints are whole models that load, resume and probe like any other."""

import math
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, Trainer

import revprobe as rp
from revprobe import RevprobeError
from revprobe.finetune.config.finetuning import FinetuneConfig, FinetuneSweepConfig
from revprobe.finetune.config.loading import example_names, load_config, parse_config
from revprobe.finetune.memory.from_config import plan_finetuning
from revprobe.finetune.runs.finetune_setup import _warn_of_narrow_weights
from revprobe.finetune.runs.finetuning import FinetuneRun, fine_tune
from revprobe.finetune.training.arguments import training_arguments
from revprobe.finetune.training.trainer import ForwardOnlyTrainer

CONFIG = """
name: tiny
model: {tiny: {layout: LAYOUT, d_model: 16, n_heads: 2, pretraining: {steps: 4, facts: 8, batch_size: 8}}}
relation: {name: invented_names, rows: [60, 72], heldout: 0.2, direction: P2C}
lora: null
training: {steps: 4, batch_size: 8, learning_rate: 1.0e-2, min_learning_rate: 1.0e-3, seed: 3, device: cpu}
snapshots: {every: 2, facts: 4, parameters: all}
"""


def config(layout: str = "llada", **changes: str) -> FinetuneConfig:
    text = CONFIG.replace("LAYOUT", layout)
    for old, new in changes.items():
        text = text.replace(old, new)
    return parse_config(text, FinetuneConfig, "test")


@pytest.mark.parametrize("layout", ["llada", "llama"])
def test_checkpoints_are_whole_models(tmp_path: Path, layout: str) -> None:
    run = fine_tune(config(layout), tmp_path / "tiny")
    assert run.finished and isinstance(rp.open_run(run.path), FinetuneRun)
    assert run.resolved["targets"] == "all weights"
    base, first, last = (rp.load_model(source, **at) for source, at in [
        (run.path / "base", {}), (run.path, {"step": 0}), (run.path, {"step": 4}),
    ])  # fmt: skip
    for (name, before), untouched, after in zip(
        base.module.named_parameters(), first.module.parameters(), last.module.parameters(), strict=True
    ):
        assert torch.equal(before, untouched), name
        assert not torch.equal(before, after), f"{name} was not trained"
    readings = run.readings()
    assert {r.name for r in readings} == {"attention_correlation", "gradient_cosine", "reverse_probability"}
    pairs = run.pairs(last)
    stored = readings.select(name="reverse_probability", step=4)[0]
    assert rp.probe_reverse_probability(last, pairs).value == stored.value
    if layout == "llada":
        plain = AutoModelForMaskedLM.from_pretrained(run.path / "checkpoints" / "step-000004").eval()
        ids = torch.arange(20)[None]
        with torch.no_grad():
            assert torch.equal(plain(input_ids=ids).logits, last.logits(ids))


def test_a_run_that_stops_is_taken_up_at_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fine_tune(config(), tmp_path / "whole" / "tiny")
    step, calls, folder = ForwardOnlyTrainer.training_step, [], tmp_path / "cut" / "tiny"

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.extend([1] * (folder / "base").is_dir())  # the base is trained before, in four steps of its own
        if len(calls) == 4:  # behind the checkpoint of step 2
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ForwardOnlyTrainer, "training_step", stopping)
        fine_tune(config(), folder)
    assert rp.open_run(folder).steps == [0, 2]
    resumed = fine_tune(config(), folder)
    name = "checkpoints/step-000004/model.safetensors"
    assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_what_does_not_go_with_all_weights_is_told() -> None:
    with pytest.raises(RevprobeError, match=r"snapshots.parameters is 'both', but lora: null trains all weights"):
        config(**{", parameters: all": ""})
    with pytest.raises(RevprobeError, match=r"min_learning_rate 0.1 is where a cosine ends, below learning_rate 0.01"):
        config(**{"min_learning_rate: 1.0e-3": "min_learning_rate: 0.1"})


def test_the_memory_plan_counts_all_weights_as_trained() -> None:
    full = plan_finetuning(config())
    lora = plan_finetuning(config(**{"lora: null": "lora: {rank: 2}", "parameters: all": "parameters: both"}))
    assert full.trained == full.parameters > lora.trained
    frame = full.to_frame()
    assert frame.loc["adapters", "training"] == 0
    assert frame.loc["AdamW's two moments", "training"] == 2 * 4 * full.parameters


def finetunings(name: str) -> list[FinetuneConfig]:
    """The fine-tunings of an example; none of an example of another kind."""
    for kind in (FinetuneConfig, FinetuneSweepConfig):
        with suppress(RevprobeError):
            read = load_config(name, kind)
            return [read] if isinstance(read, FinetuneConfig) else read.runs()
    return []


def stored_dtype(run: FinetuneConfig) -> torch.dtype:
    """What its base is loaded in: as asked, else as stored. An example's own models are stored in float32."""
    own = run.model.tiny is not None or str(run.model.name).startswith("runs/")
    return getattr(torch, run.model.dtype or ("float32" if own else "bfloat16"))


def test_no_example_trains_weights_that_hardly_move() -> None:
    whole = [run for name in example_names() for run in finetunings(name) if run.lora is None]
    assert {"smdm-reversal", "mini-llada-parent-child-P2C-full-s0"} <= {run.name for run in whole}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run in whole:
            _warn_of_narrow_weights(run, SimpleNamespace(name=run.model.name, dtype=stored_dtype(run)))
    smdm = next(run for run in whole if run.name == "smdm-reversal")
    assert smdm.training.bf16, "so many weights are multiplied in bfloat16"
    with pytest.warns(UserWarning, match="lora: null trains weights in bfloat16"):
        _warn_of_narrow_weights(smdm, SimpleNamespace(name="as it was", dtype=torch.bfloat16))


def test_the_recipes_are_what_their_sources_say() -> None:
    """SMDM's learning rate, step by step, against its own formula; and two causal configs that differ in one key."""
    smdm = load_config("smdm-reversal", FinetuneConfig)
    assert (smdm.lora, smdm.training.batch_size, smdm.training.weight_decay) == (None, 64, 0.1)
    training = smdm.training
    steps = 562
    arguments = training_arguments(
        Path("."), steps=steps, schedule="cosine", min_learning_rate=training.min_learning_rate,
        learning_rate=training.learning_rate, warmup_steps=training.warmup_steps,
    )  # fmt: skip
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments)
    trainer.create_optimizer_and_scheduler(steps)
    for step in range(steps):
        if step < 200:
            expected = 2e-4 * step / 200
        else:
            expected = 2e-5 + 0.5 * (1 + math.cos(math.pi * (step - 200) / (steps - 200))) * (2e-4 - 2e-5)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6, abs=1e-12), step
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    names = ("causal-completion-only", "causal-all-tokens")
    only, every = (load_config(name, FinetuneConfig).model_dump() for name in names)
    assert only.pop("objective") == every.pop("objective") | {"scope": "response_only"}
    only.pop("name"), every.pop("name")
    assert only == every
    differ = load_config("differ", FinetuneConfig)
    assert (differ.training.epochs, differ.training.learning_rate) == (50, 1e-5) and differ.objective.whole_entity
