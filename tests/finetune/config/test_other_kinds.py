"""A config that a command cannot take says which one can; sizes that no machine has are refused by their key."""

from pathlib import Path

import pytest

from revprobe import FinetuneConfig, RevprobeError, RunConfig, SweepConfig, train
from revprobe.finetune.config.finetuning import read_finetune
from revprobe.finetune.config.loading import load_config, parse_config

RUN = {"name": "x", "training": {"steps": 4}}


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("one-layer-quick", RunConfig, r"is a sweep \(it has 'cells'\); use `revprobe sweep"),
        ("finetune-tiny", RunConfig, r"a fine-tuning or a sweep of them .*; use `revprobe finetune"),
        ("table7", SweepConfig, r"a fine-tuning or a sweep of them .*; use `revprobe finetune"),
        ("one-layer", FinetuneConfig, "a sweep of one-layer runs .*; use `revprobe sweep"),
    ],
)
def test_a_config_of_another_command_names_it(source: str, kind: type, words: str) -> None:
    with pytest.raises(RevprobeError, match=words):
        load_config(source, kind)


def test_a_one_layer_run_is_no_fine_tuning_nor_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: x\nmodel: {family: radd}\ntraining: {steps: 4}\n")
    with pytest.raises(RevprobeError, match=r"a one-layer run \(it has 'model.family'\); use `revprobe train"):
        read_finetune(tmp_path / "a.yaml")
    with pytest.raises(RevprobeError, match=r"it has 'model.tiny'\); use `revprobe finetune"):
        parse_config("name: x\nmodel: {tiny: {layout: llada}}\ntraining: {steps: 4}\n", RunConfig, "b.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nrelation: {length: 100000}\ntraining: {steps: 4}", "relation.length is 100000; expected less than"),
        ("name: x\nmodel: {n_layers: 10000000}\ntraining: {steps: 4}", "model.n_layers is 10000000; expected less"),
        ("name: x\ntraining: {steps: 4, threads: 100000}", "training.threads is 100000; expected less than"),
        ("name: x\ntraining: {steps: 1" + "0" * 40 + "}", "training.steps is 1000"),
        ("{" * 5000, "nested deeper than any config|not valid YAML"),
    ],
)
def test_sizes_that_no_machine_has_are_refused_by_their_key(text: str, words: str) -> None:
    with pytest.raises(RevprobeError, match=words):
        parse_config(text, RunConfig, "a.yaml")


def test_a_mapping_is_a_config() -> None:
    assert load_config(RUN, RunConfig) == RunConfig(**RUN)
    with pytest.raises(RevprobeError, match=r"the config: .*unknown key 'trainig'"):
        train({"name": "x", "trainig": {"steps": 4}})
