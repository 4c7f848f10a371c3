"""A small model from its config to its record: the same bytes twice, resumed or not, and its parent's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from revprobe import RevprobeError, load_model
from revprobe.cli.main import app
from revprobe.finetune.config.loading import checked_config
from revprobe.finetune.config.pretraining import PretrainConfig, PretrainSweepConfig
from revprobe.finetune.runs.pretraining import PretrainedModel, chosen_models, pretrain

BASE: dict[str, Any] = {
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "vocabulary": 400,
    "corpus": {
        "told": "once",
        "datasets": {"names": {"name": "invented_names", "rows": [0, 40], "facts": 8}},
        "fillers": 4,
    },
    "training": {"steps": 6, "batch_size": 4, "warmup_steps": 2, "checkpoints": 3},
    "check": {"facts": 2},
}


def config(layout: str, **own: Any) -> PretrainConfig:
    return checked_config({**BASE, "name": layout, "layout": layout, **own}, PretrainConfig, "the test")


@pytest.mark.parametrize("layout", ["llada", "llama", "qwen2", "dream"])
def test_a_model_is_made_saved_and_asked(layout: str, tmp_path: Path) -> None:
    made = pretrain(config(layout), tmp_path / "a")
    assert made.finished and not (tmp_path / "a" / "checkpoints").exists()
    record = made.record
    assert record["answers"].keys() == {f"names.{d}.{t}" for d in ("P2C", "C2P") for t in ("told", "untold")}
    assert all(found["n"] == 2 for found in record["answers"].values())
    assert [step for step, _ in record["losses"]] == [1, 2, 3, 4, 5, 6]
    model = load_model(tmp_path / "a" / "model")
    assert model.objective == ("masked" if layout in ("llada", "dream") else "causal")
    assert record["parameters"] == sum(p.numel() for p in model.module.parameters())
    again = pretrain(config(layout), tmp_path / "b").record
    assert again["sha256"] == record["sha256"] and again["corpus"] == record["corpus"]


def test_a_stopped_model_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_at(step: int, steps: int, loss: float | None) -> None:
        if step >= 5:
            raise Stop

    whole = pretrain(config("llada"), tmp_path / "whole").record
    with pytest.raises(Stop):
        pretrain(config("llada"), tmp_path / "cut", listener=stop_at)
    assert not PretrainedModel(tmp_path / "cut").finished
    assert (tmp_path / "cut" / "checkpoints" / "step-000004").is_dir()
    assert pretrain(config("llada"), tmp_path / "cut").record["sha256"] == whole["sha256"]


def test_a_dream_starts_from_its_qwen2(tmp_path: Path) -> None:
    child = config("dream", parent="qwen2", training={**BASE["training"], "steps": 1, "learning_rate": 1e-30})
    with pytest.raises(RevprobeError, match="starts from qwen2, which is not finished"):
        pretrain(child, tmp_path / "dream")
    parent = pretrain(config("qwen2"), tmp_path / "qwen2").load().module.state_dict()
    own = pretrain(child, tmp_path / "dream").load()
    assert own.objective == "masked" and own.logit_shift == 1
    for name, tensor in own.module.state_dict().items():
        assert torch.allclose(tensor, parent[name], atol=1e-6), name


def test_a_folder_of_another_config_is_refused(tmp_path: Path) -> None:
    pretrain(config("llama"), tmp_path / "a")
    with pytest.raises(RevprobeError, match=r"another config: training\.steps: 6 -> 7"):
        pretrain(config("llama", training={**BASE["training"], "steps": 7}), tmp_path / "a")


def test_wrong_configs_say_what_to_change() -> None:
    for own, said in [
        ({"positions": "learned", "layout": "llama"}, "is of the layout llada"),
        ({"parent": "qwen2"}, "a Dream starts from a Qwen2"),
        ({"n_heads": 3}, "an even head dimension"),
        ({"layout": "qwen2", "training": {**BASE["training"], "rates": [0.15, 0.15]}}, "a qwen2 masks nothing"),
    ]:
        with pytest.raises(RevprobeError, match=said):
            config(**{"layout": "llada", **own})


def test_a_sweep_makes_the_models_asked_for_and_their_parents(tmp_path: Path) -> None:
    models = {
        "llama": {"layout": "llama"},
        "qwen2": {"layout": "qwen2"},
        "dream": {"layout": "dream", "parent": "qwen2"},
    }
    values = {"name": "minis", "base": BASE, "models": models}
    sweep = checked_config(values, PretrainSweepConfig, "the test")
    assert [one.name for one in chosen_models(sweep, ["dream"])] == ["qwen2", "dream"]
    with pytest.raises(RevprobeError, match="no model 'drem'; the closest is 'dream'"):
        chosen_models(sweep, ["drem"])
    with pytest.raises(RevprobeError, match="expected a model listed above it"):
        checked_config(
            {**values, "models": {"dream": models["dream"], "qwen2": models["qwen2"]}}, PretrainSweepConfig, "x"
        )
    file = tmp_path / "minis.yaml"
    file.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["pretrain", str(file), "--only", "dream", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert PretrainedModel(tmp_path / "minis" / "dream").finished
    assert not (tmp_path / "minis" / "llama").exists()
