"""`snapshots: controls:` in a run's config: its readings carry them, and nothing else about the run is another."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import revprobe as rp
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.config.loading import dump_config, parse_config
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.finetune.runs.finetuning import fine_tune

RUN = """name: tiny
relation: {length: 4, alphabet: 8}
model: {d_model: 16, dropout: 0.1}
training: {steps: 6, batch_size: 16, warmup_steps: 2, ema_decay: 0.9, seed: 3, device: cpu}
"""
FINETUNING = """name: tiny
model: {tiny: {layout: llada, d_model: 16, n_heads: 2, pretraining: {steps: 4, facts: 8, batch_size: 8}}}
relation: {name: invented_names, rows: [60, 72], heldout: 0.2, direction: P2C}
lora: {rank: 2, alpha: 4, dropout: 0.1}
training: {steps: 4, batch_size: 8, learning_rate: 1.0e-2, seed: 3, device: cpu}
"""
KINDS = {"one layer": (RUN, RunConfig), "fine-tuning": (FINETUNING, FinetuneConfig)}


def config(snapshots: str, kind: str = "one layer") -> RunConfig | FinetuneConfig:
    text, made = KINDS[kind]
    return parse_config(f"{text}snapshots: {{every: 3, {snapshots}}}\n", made, "my.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_controls_are_a_name_or_a_list_and_a_wrong_one_is_one_line(kind: str) -> None:
    assert config("controls: all", kind).snapshots.controls == ("all",)
    assert config("controls: [sink, untrained]", kind).snapshots.controls == ("sink", "untrained")
    with pytest.raises(rp.RevprobeError) as error:
        config("controls: [untrained, neighbor]", kind)
    said = (
        "my.yaml: snapshots.controls[1] is 'neighbor'; expected 'shuffled', 'untrained', 'neighbour', 'sink' or 'all'"
    )
    assert str(error.value) == f"{said}; the closest is 'neighbour'"
    with pytest.raises(rp.RevprobeError, match="controls\\[0\\] is 'parent'; expected"):
        config("controls: parent", kind)
    again = parse_config(dump_config(config("controls: [sink]", kind)), KINDS[kind][1], "again")
    assert again == config("controls: sink", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_without_controls_is_written_as_before_there_were_any(kind: str) -> None:
    assert "controls" not in dump_config(config("", kind))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    asked = {"plain": "", "held": "controls: all"}
    return {name: rp.train(config(controls), home / name / "tiny").path for name, controls in asked.items()}


def names(reading: rp.Reading) -> list[str]:
    return reading.controls["control"].tolist()


def test_readings_carry_their_controls_and_are_those_of_a_run_without(runs: dict[str, Path]) -> None:
    plain, held = (rp.open_run(runs[name]).readings() for name in ("plain", "held"))
    assert len(plain) == len(held) == 18
    for one, other in zip(plain, held, strict=True):
        assert one.frame.equals(other.frame) and one.value == other.value, other
        if one.name == "reverse_probability":
            assert "controls" not in other.meta
            continue
        assert names(one) == ["shuffled"] and names(other) == ["shuffled", "untrained", "neighbour", "sink"]
        told = other.controls
        assert (told["value"].notna() | (told["reason"] != "")).all(), "no number without a reason"


def test_a_snapshots_controls_are_those_of_the_probe_on_its_checkpoint(runs: dict[str, Path]) -> None:
    run = rp.open_run(runs["held"])
    model = run.load(6, "ema")
    for name, probe in (
        ("attention", rp.probe_attention_correlation),
        ("gradient", rp.probe_gradient_cosine),
    ):
        taken = next(
            one for one in run.readings().select(step=6, weights="ema") if one.name.startswith(name)
        ).controls.set_index("control")
        expected = probe(model, run.pairs(model), controls="all").controls.set_index("control")
        numbers = ["value", "low", "high", "difference", "difference_low", "difference_high"]
        assert np.allclose(taken[numbers], expected[numbers], atol=1e-6, equal_nan=True)


def test_checkpoints_are_the_same_bits_with_and_without(runs: dict[str, Path]) -> None:
    """The twin is drawn apart: the training's random numbers go on as if it had not been."""
    for weights in ("model.safetensors", "ema/model.safetensors"):
        plain, held = ((runs[name] / "checkpoints/step-000006" / weights).read_bytes() for name in ("plain", "held"))
        assert plain == held, weights


def test_a_resumed_run_has_the_same_readings(runs: dict[str, Path], tmp_path: Path) -> None:
    home = Path(shutil.copytree(runs["held"], tmp_path / "tiny"))
    shutil.rmtree(home / "checkpoints/step-000006")
    shutil.rmtree(home / "readings/step-000006")
    rp.train(config("controls: all"), home)
    for file in sorted((runs["held"] / "readings").rglob("*.parquet")):
        again = rp.Reading.load(home / "readings" / file.relative_to(runs["held"] / "readings"))
        assert again.frame.equals(rp.Reading.load(file).frame) and again.meta == rp.Reading.load(file).meta


def test_a_lost_reading_is_taken_again_with_its_controls(runs: dict[str, Path], tmp_path: Path) -> None:
    home = Path(shutil.copytree(runs["held"], tmp_path / "tiny"))
    lost = home / "readings/step-000003/gradient_cosine.raw.parquet"
    before = rp.Reading.load(lost).controls
    lost.unlink()
    with pytest.warns(UserWarning, match="1 missing readings were taken from their checkpoints"):
        rp.train(config("controls: all"), home)
    assert rp.Reading.load(lost).controls.equals(before)


def test_a_run_is_not_gone_on_with_under_other_controls(runs: dict[str, Path]) -> None:
    with pytest.raises(rp.RevprobeError, match=r"snapshots\.controls"):
        rp.train(config("controls: sink"), runs["held"])


def test_a_fine_tuning_holds_its_own_and_its_adapters_gradients_against_them(tmp_path: Path) -> None:
    run = fine_tune(config("facts: 6, controls: [untrained, neighbour]", "fine-tuning"), tmp_path / "tiny")
    last = {one.name: one for one in run.readings().select(step=4)}
    base, adapter = last["gradient_cosine"], last["lora_gradient_cosine"]
    for reading in (last["attention_correlation"], base, adapter):
        assert names(reading) == ["shuffled", "untrained", "neighbour"]
    table = adapter.controls.set_index("control")
    assert np.isnan(table.loc["untrained", "value"]) and "adapter" in table.loc["untrained", "reason"]
    assert np.isfinite(table.loc["neighbour", "value"])
    beside = base.controls.set_index("control").loc["neighbour", "value"]
    assert table.loc["neighbour", "value"] != beside, "each of its own parameters"
