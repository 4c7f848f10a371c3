"""A config that a command cannot take says which one can; sizes that no machine has are refused by their key."""

from pathlib import Path

import pytest

from revprobe import FinetuneConfig, RevprobeError, RunConfig, SweepConfig, run_sweep, train
from revprobe.finetune.config.finetuning import FinetuneSweepConfig, parse_finetune, read_finetune
from revprobe.finetune.config.loading import (
    EXAMPLES,
    find_config,
    load_config,
    parse_config,
    parse_yaml,
    require_no_config,
)
from revprobe.finetune.config.pretraining import PretrainSweepConfig, read_pretraining

RUN = {"name": "x", "training": {"steps": 4}}


CORPUS = "corpus: {told: once, datasets: {a: {name: invented_names, facts: 3}}}"
# What each kind of config looks like, what it is called and what is to be done with it.
KINDS = {
    "run": ("name: x\nrelation: {length: 4}\ntraining: {steps: 4}", "a one-layer run", "revprobe train FILE"),
    "sweep": ("one-layer-quick", "a sweep of one-layer runs", "revprobe sweep FILE"),
    "tuning": ("differ", "a fine-tuning", "revprobe finetune FILE"),
    "tunings": ("table7", "a sweep of fine-tunings", "revprobe finetune FILE"),
    "models": ("mini-models", "a list of small models", "revprobe pretrain FILE"),
    "model": (f"name: x\nlayout: llada\n{CORPUS}\ntraining: {{steps: 4}}", "one small model", "under 'models'"),
    "accelerate": (str(EXAMPLES / "fsdp.yaml"), "a config of accelerate", "accelerate launch --config_file FILE"),
}
READERS = {
    "train": (lambda source: load_config(source, RunConfig), {"run"}),
    "sweep": (lambda source: load_config(source, SweepConfig), {"sweep"}),
    "finetune": (read_finetune, {"tuning", "tunings"}),
    "pretrain": (read_pretraining, {"models"}),
    "run_sweep": (lambda source: run_sweep(parse_yaml(find_config(source).read_text(), "x")), {"sweep"}),
    "probe": (require_no_config, set()),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_config_of_another_command_names_it(reader: str, kind: str, tmp_path: Path) -> None:
    """Every kind at every reader: it is taken, or the one line says what it is and what takes it."""
    read, taken = READERS[reader]
    text, what, way = KINDS[kind]
    source = text
    if "\n" in text:
        source = str(tmp_path / "mine.yaml")
        Path(source).write_text(text)
    if kind in taken and reader == "run_sweep":
        return  # it would be trained
    if kind in taken:
        assert read(source).kind.what == what
        return
    with pytest.raises(RevprobeError) as caught:
        read(source)
    said = str(caught.value)
    assert f"is {what} (it has '" in said
    shown = source if reader == "probe" else str(find_config(source))
    in_python = {"tunings": "use `rp.run_sweep`", "tuning": "use `rp.fine_tune`", "run": "use `rp.train`"}
    assert (way.replace("FILE", shown) if reader != "run_sweep" else in_python.get(kind, way.split(" FILE")[0])) in said


def test_a_sweep_on_stdin_is_written_to_a_file_first_and_a_folder_is_no_config(tmp_path: Path) -> None:
    text = find_config("one-layer-quick").read_text()
    with pytest.raises(RevprobeError, match=r"stdin is a sweep .*; write it to a file and use `revprobe sweep FILE`"):
        parse_config(text, RunConfig, "stdin")
    with pytest.raises(RevprobeError, match=r"use `revprobe train -`"):
        parse_finetune("name: x\nrelation: {length: 4}\n", "stdin")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RevprobeError, match=r"is a folder; expected a YAML file: its config is .*config.yaml"):
        find_config(tmp_path)


def test_a_file_that_may_be_of_this_kind_is_explained_key_by_key() -> None:
    """What lacks its sections, or has a mistyped one, is not taken for another kind."""
    for text, kind in (
        ("name: x\nmodels: {a: {}}\n", PretrainSweepConfig),
        ("name: x\nmodels: {a: {name: gpt2}}\nbase: {training: {steps: 3}}\n", FinetuneSweepConfig),
        ("name: x\ntraining: {steps: 3}\n", FinetuneConfig),
        ("name: x\nmodel: {position_encodin: rope}\ntraining: {steps: 3}\n", RunConfig),
    ):
        with pytest.raises(RevprobeError, match=r"is missing|problems|unknown key"):
            parse_config(text, kind, "a.yaml")


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
