"""Only runs that differ in nothing but their seed are seeds of one line or cell, whatever they are called."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from revprobe import Readings
from revprobe.finetune.config.finetuning import FinetuneConfig, FinetuneSweepConfig
from revprobe.finetune.config.loading import load_config
from revprobe.finetune.runs.record import RunRecord, family_of
from revprobe.report.bundle.private import Private
from revprobe.report.html.finetune_sections import tuned_signatures
from revprobe.report.paper.figure4 import figure4, with_axes
from revprobe.report.paper.table7 import match_frame, table7, table7_figure
from revprobe.report.summary.families import Seed, lines_of, short_names, variants_of
from revprobe.report.summary.seed_bands import pool_seeds


def drawn_runs(draw: random.Random) -> dict[str, Seed]:
    """Runs in a few folders, with few labels, variants, configs and seeds, so that all of them clash."""
    runs = {}
    for _ in range(draw.randint(1, 8)):
        name = f"{draw.choice(['a', 'b'])}-{draw.choice(['x', ''])}-s{draw.randint(0, 2)}"
        place = "/".join([*draw.sample(["up", "low"], draw.randint(0, 2)), name])
        variant = draw.choice(["", "", "x", "up", "low"])
        runs[place] = Seed(draw.choice("mn"), variant, draw.choice("fg"), str(draw.randint(0, 2)))
    return runs


def seeds_of_each_other(one: Seed, other: Seed, runs: dict[str, Seed]) -> bool:
    """The rule, pair by pair: one config under one name, and no run of this config and name has its seed twice."""
    same = [
        run for run in runs.values() if (run.label, run.variant, run.family) == (one.label, one.variant, one.family)
    ]
    seeds = [run.seed for run in same]
    return other in same and seeds.count(one.seed) == seeds.count(other.seed) == 1


def test_runs_share_label_and_variant_exactly_where_they_are_seeds_of_each_other() -> None:
    """Against every pair of 400 drawn sets: a name may clash with another's folder, stem or variant."""
    draw = random.Random(0)
    for _ in range(400):
        runs = drawn_runs(draw)
        told = variants_of(runs)
        for one in runs:
            for other in runs:
                if one != other:
                    shared = (runs[one].label, told[one]) == (runs[other].label, told[other])
                    assert shared == seeds_of_each_other(runs[one], runs[other], runs), (runs, told)


def test_lines_are_shared_exactly_by_seeds_of_each_other() -> None:
    """The same of `compare` and the dashboard, where a line is called by its runs alone."""
    draw = random.Random(1)
    for _ in range(300):
        runs = {path: Seed("", "", one.family, one.seed) for path, one in drawn_runs(draw).items()}
        rows = pd.DataFrame({"run": list(runs), "family": [one.family for one in runs.values()]})
        rows = rows.assign(seed=[one.seed for one in runs.values()], weights="ema", kind="k")
        called = dict(zip(runs, lines_of(rows, short_names(runs)), strict=True))
        for one in runs:
            for other in runs:
                if one != other:
                    alike = seeds_of_each_other(runs[one], runs[other], runs)
                    assert (called[one] == called[other]) == alike, (runs, called)


def test_what_is_no_part_of_a_family_is_the_name_the_seed_and_where_it_ran() -> None:
    config: dict[str, Any] = {"name": "a", "alerts": [], "training": {"seed": 0, "threads": 1, "learning_rate": 1e-3}}
    config["training"] |= {"device": "cpu", "report_to": "none"}
    same = {"name": "b", "alerts": [1], "training": config["training"] | {"seed": 1, "threads": 2, "device": "cuda"}}
    assert family_of(config) == family_of(same) == family_of(same | {"training": same["training"] | {"report_to": "x"}})
    other = config | {"training": config["training"] | {"learning_rate": 1e-4}}
    assert family_of(other) != family_of(config) != family_of(config | {"model": {"name": "b"}})
    assert config["name"] == "a" and config["training"]["seed"] == 0, "the config itself stays"


def test_a_family_stays_where_a_config_is_told_without_its_folders(tmp_path: Path) -> None:
    """Told, both are `.../facts.csv`; they are two relations all the same."""
    records = [
        RunRecord(name, {}, {"relation": {"path": f"/srv/{name}/facts.csv"}}, Readings([])) for name in ("one", "two")
    ]
    told = [Private(tmp_path).record(record) for record in records]
    assert told[0].config == told[1].config and told[0].family != told[1].family
    assert [one.family for one in told] == [one.family for one in records]


# ---- Table 7 and Fig. 4 over several sweeps ----

PLACES = {"slow/tiny-s0": (0, 1e-5, 0.9), "slow/tiny-s1": (1, 1e-5, 0.8), "fast/tiny-s2": (2, 1e-2, 0.1)}
PLACES |= {"fast/tiny-s3": (3, 1e-2, 0.2)}


def configs() -> dict[str, FinetuneConfig]:
    """One model on one dataset in one direction, trained at two rates in two sweeps, two seeds each."""
    one = load_config("finetune-tiny", FinetuneSweepConfig).runs()[0]
    return {
        place: one.model_copy(
            update={"training": one.training.model_copy(update={"seed": seed, "learning_rate": rate})}
        )
        for place, (seed, rate, _) in PLACES.items()
    }


def evaluated(root: Path) -> list[Any]:
    """Those runs as `match_frame` asks them, each with its own share of right answers."""
    about = {"split": "train", "templates": "train"}
    return [
        SimpleNamespace(
            path=root / place,
            finished=True,
            asks=True,
            config=config,
            axes={"objective": "masked", **config.axes},
            evaluation=lambda value=PLACES[place][2]: [
                SimpleNamespace(
                    value=value, interval=(0.0, 1.0), n=10, facts=10, control=None, meta=about | {"asked": asked}
                )
                for asked in ("forward", "reverse")
            ],
        )
        for place, config in configs().items()
    ]


def test_table_7_has_a_row_for_each_config_where_labels_are_alike(tmp_path: Path) -> None:
    """Two learning rates were the mean of four seeds, 50 ± 41 %."""
    runs = evaluated(tmp_path)
    matches = match_frame([*runs, runs[0]])
    assert len(matches) == 8, "a run that is given twice counts once"
    shown = table7(matches).set_index("trained on")["llada Rev."]
    assert shown.index.tolist() == ["names (P2C), slow", "names (P2C), fast"]
    assert [cell.partition(" [")[0] for cell in shown] == ["85.0 ± 7.1", "15.0 ± 7.1"]
    assert all("(2 seeds" in cell for cell in shown)
    assert [line[1] for line in table7_figure(matches).data[0].z] == pytest.approx([85, 15]), "and their shades"


def test_one_seed_that_stands_twice_in_a_table_is_never_two() -> None:
    rows = [
        {"run": f"{folder}/llada-s0", "model": "llada", "dataset": "d", "direction": "P2C", "variant": "", "seed": 0}
        | {"asked": "reverse", "split": "train", "value": value, "low": 0.0, "high": 1.0, "n": 10, "facts": 10}
        for folder, value in (("a", 0.9), ("b", 0.1))
    ]
    shown = table7(pd.DataFrame(rows))
    assert shown["trained on"].tolist() == ["d (P2C), a/llada-s0", "d (P2C), b/llada-s0"]
    assert [cell.split()[0] for cell in shown["llada Rev."]] == ["90.0", "10.0"]


def test_figure_4_has_a_line_for_each_config_where_labels_are_alike() -> None:
    rows = [
        {"run": place, "step": step, "weights": "raw", "kind": "same_target", "measure": "reverse_probability"}
        | {"value": value, "low": 0.0, "high": 1.0, "n": 9, "facts": 9, "control": 0.0, "reason": "", "caution": ""}
        for place, (_, _, value) in PLACES.items()
        for step in (0, 10)
    ]
    records = [
        RunRecord(place, config.axes, config.model_dump(mode="json"), Readings([]))
        for place, config in configs().items()
    ]
    axes = {record.name: {**record.axes, "family": record.family} for record in records}
    drawn = figure4(with_axes(pd.DataFrame(rows), axes))
    lines = {trace.name: list(trace.y) for trace in drawn.data if trace.meta["part"] == "value"}
    assert lines == {
        "llada names (P2C), slow, same target": pytest.approx([0.85, 0.85]),
        "llada names (P2C), fast, same target": pytest.approx([0.15, 0.15]),
    }
    against = pd.DataFrame(columns=["run", "control", "model", "measure", "value", "step"])
    page, _ = tuned_signatures(records, pd.DataFrame(rows), against)
    assert "names (P2C), slow" in page and "names (P2C), fast" in page, "the page knows each run's config"


def test_two_configs_of_one_name_are_two_lines_of_seeds() -> None:
    """By hand: 0.1 and 0.3, 0.7 and 0.9; their common name made them one line with two points at each step."""
    runs = {"low/rope-s0": 0.1, "low/rope-s1": 0.3, "high/rope-s2": 0.7, "high/rope-s3": 0.9}
    rows = pd.DataFrame(
        {"run": run, "family": run[:3], "seed": int(run[-1]), "weights": "ema", "kind": "k", "step": 0, "measure": "m"}
        | {"value": value, "low": 0.0, "high": 1.0, "control": 0.0, "n": 9, "facts": 9, "reason": ""}
        for run, value in runs.items()
    )
    pooled, _ = pool_seeds(rows, short_names(runs))
    assert dict(zip(pooled["run"], pooled["value"], strict=True)) == {
        "low/rope (2 seeds)": pytest.approx(0.2),
        "high/rope (2 seeds)": pytest.approx(0.8),
    }
    again, _ = pool_seeds(rows.assign(family="f", seed=[0, 1, 0, 2]), short_names(runs))
    assert sorted(again["run"]) == ["rope (2 seeds)", "rope-s0", "rope-s2"], "seed 0 twice is no third and fourth seed"
