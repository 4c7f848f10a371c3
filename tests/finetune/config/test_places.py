"""A config with its folders elsewhere: what moves, what stays, and when two are the same but for that."""

from pathlib import Path

import pytest

from revprobe.finetune.config.finetuning import FinetuneConfig, FinetuneSweepConfig
from revprobe.finetune.config.loading import load_config, merged
from revprobe.finetune.config.places import DATA, MODELS, placed, same_elsewhere
from revprobe.finetune.config.pretraining import PretrainSweepConfig

PLACES = {MODELS: Path("/a/minis"), DATA: Path("b")}


@pytest.mark.parametrize("name", ["section6", "section6-ablations", "section6-methods"])
def test_models_and_files_move_and_nothing_else_does(name: str) -> None:
    """Variants have models of their own, which must not be left behind."""
    planned = load_config(name, FinetuneSweepConfig)
    moved = placed(planned, PLACES)
    for old, new in zip(planned.runs(), moved.runs(), strict=True):
        assert new.model.name == str(old.model.name).replace("runs/mini-models", "/a/minis") != old.model.name
        assert new.relation.path == (old.relation.path and old.relation.path.replace("data/", "b/"))
        values = {"model": old.model.model_dump(), "relation": {"path": old.relation.path}}
        back = FinetuneConfig(**merged(new.model_dump(), values if old.relation.path else {"model": values["model"]}))
        assert back == old and same_elsewhere(old, new)


def test_what_lies_in_no_such_folder_stays_as_it_is_spelled() -> None:
    table7 = load_config("table7", FinetuneSweepConfig)
    assert placed(table7, PLACES).models == table7.models
    planned = load_config("section6", FinetuneSweepConfig)
    assert placed(planned, {MODELS: MODELS, DATA: DATA}) == planned


def test_the_corpora_of_small_models_move_with_the_data() -> None:
    planned = load_config("mini-models", PretrainSweepConfig)
    for old, new in zip(planned.runs(), placed(planned, PLACES).runs(), strict=True):
        assert [one.path for one in new.corpus.datasets.values()] == [
            "b/parent_child_pairs.csv",
            "b/person_description",
            "b/trex",
        ]
        assert same_elsewhere(old, new)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"model": {"name": "/c/minis/mini-llada/model"}}, True),
        ({"training": {"device": "cuda"}}, True),
        ({"relation": {"path": "/published/parent_child_pairs.csv"}}, True),
        ({"model": {"name": "/c/minis/mini-llama/model"}}, False),
        ({"relation": {"path": "/published/other.csv"}}, False),
        ({"training": {"seed": 7}}, False),
        ({"name": "another"}, False),
        ({"evaluation": {"facts": 3}}, False),
    ],
)
def test_a_run_is_the_planned_one_wherever_its_model_and_data_lay(change: dict[str, object], same: bool) -> None:
    planned = load_config("section6", FinetuneSweepConfig).runs()[0]
    assert planned.model.name == "runs/mini-models/mini-llada/model"
    assert same_elsewhere(planned, FinetuneConfig(**merged(planned.model_dump(), change))) is same
