"""Variants and overrides of a sweep of fine-tunings: what each run is made of, and what is refused."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from revprobe import RevprobeError
from revprobe.finetune.config.finetuning import FinetuneSweepConfig
from revprobe.finetune.config.loading import checked_config
from revprobe.report.paper.table7 import table7


def sweep(**own: Any) -> FinetuneSweepConfig:
    values: dict[str, Any] = {
        "name": "ablations",
        "base": {"training": {"steps": 10, "learning_rate": 1e-3}},
        "models": {"a": {"name": "gpt2"}, "b": {"name": "other"}},
        "datasets": {"names": {"name": "invented_names", "directions": ["P2C"]}},
        "seeds": [0, 1],
    }
    return checked_config({**values, **own}, FinetuneSweepConfig, "the test")


def test_a_run_has_its_variant_over_its_overrides_over_the_base() -> None:
    variants = {
        "plain": {},
        "whole": {"objective": {"whole_entity": True}, "training": {"steps": 20}},
        "elsewhere": {"model": {"name": "third"}, "relation": {"heldout": 0.5}},
    }
    overrides = {"b": {"training": {"batch_size": 3, "steps": 15}}, "names": {"lora": {"rank": 2}}}
    runs = {run.name: run for run in sweep(variants=variants, overrides=overrides).runs()}
    assert len(runs) == 12
    whole = runs["b-names-P2C-whole-s1"]
    assert (whole.training.steps, whole.training.batch_size, whole.training.seed) == (20, 3, 1)
    assert whole.objective.whole_entity and whole.lora.rank == 2 and whole.model.name == "other"
    assert whole.axes == {"model": "b", "dataset": "names", "variant": "whole", "direction": "P2C", "seed": 1}
    assert runs["b-names-P2C-plain-s0"].training.steps == 15
    assert runs["a-names-P2C-plain-s0"].training.steps == 10
    moved = runs["a-names-P2C-elsewhere-s0"]
    assert (moved.model.name, moved.relation.heldout) == ("third", 0.5)


def test_a_sweep_without_either_names_its_runs_as_before() -> None:
    assert [run.name for run in sweep().runs()] == [f"{m}-names-P2C-s{s}" for m in "ab" for s in (0, 1)]
    assert "variant" not in sweep().runs()[0].axes


def test_what_is_excluded_leaves_the_rest_of_the_product_in_its_order() -> None:
    datasets = {name: {"name": "invented_names", "directions": ["P2C", "C2P"]} for name in ("first", "second")}
    whole = sweep(variants={"x": {}, "y": {}}, datasets=datasets)
    left_out = [{"model": "b", "variant": "y"}, {"dataset": "second", "direction": "C2P"}]
    some = sweep(variants={"x": {}, "y": {}}, datasets=datasets, exclude=left_out)
    names = [run.name for run in whole.runs()]
    assert [run.name for run in some.runs()] == [
        name for name in names if not (name[0] == "b" and "-y-" in name) and "second-C2P" not in name
    ]
    assert len(names) == 32 and len(some.runs()) == 18
    again = checked_config(some.model_dump(), FinetuneSweepConfig, "the test")
    assert again.runs() == some.runs()


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"variants": {"x": {"objective": {"whole_entiti": True}}}}, "whole_entiti"),
        ({"overrides": {"c": {}}}, "overrides names 'c'; expected some of a, b, names"),
        ({"overrides": {"a": {"training": {"steps": "many"}}}}, "steps"),
        (
            {"exclude": [{"model": "c"}]},
            "exclude names {'model': 'c'}, none of .*; expected of {'model': \\['a', 'b'\\]}",
        ),
        ({"exclude": [{"model": "a", "direction": "p2c"}]}, "'direction': \\['P2C'\\]}"),
        ({"exclude": [{"model": "a", "variant": "x"}]}, "none of this sweep's runs"),
        ({"exclude": [{"seed": "0"}]}, "exclude.*seed"),
        ({"exclude": [{}]}, "exclude leaves no run"),
        ({"exclude": [{"model": "a"}, {"dataset": "names"}]}, "exclude leaves no run"),
    ],
)
def test_what_is_wrong_is_told_when_the_sweep_is_read(own: dict[str, Any], said: str) -> None:
    with pytest.raises(RevprobeError, match=said):
        sweep(**own)


def test_variants_are_rows_of_their_own_in_the_table() -> None:
    """Seeds of two variants must never be averaged into one cell."""
    common = {"model": "a", "dataset": "names", "direction": "P2C", "asked": "reverse", "split": "train", "n": 10}
    common |= {"facts": 10, "low": 0.0, "high": 1.0, "seed": 0}
    rows = [{**common, "variant": variant, "value": value} for variant, value in (("x", 0.1), ("y", 0.9))]
    table = table7(pd.DataFrame(rows))
    assert table["trained on"].tolist() == ["names (P2C), x", "names (P2C), y"]
    assert [cell.split()[0] for cell in table["a Rev."]] == ["10.0", "90.0"]
