"""What untrained twins of Section 6's models read: taken of each run's own pairs, kept, and shown beside the run."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import revprobe as rp
from revprobe.report.paper.section6.frames import FINISHED, Section6, tidy
from revprobe.report.paper.section6.kept import with_kept
from revprobe.report.paper.section6.plan import DATASETS, SEEDS, TABLE_MODELS, main_cell
from revprobe.report.paper.section6.sentences import Told
from revprobe.report.paper.section6.tables import signatures
from revprobe.report.paper.section6.twins import twin_readings, with_twins
from tiny import FIXTURES, pairs_at

SEED = 2
CELL = main_cell(TABLE_MODELS[0], DATASETS[0])
RUN = "a-run"


def axes(seed: int = SEED, run: str = RUN) -> dict[str, Any]:
    own = {"sweep": CELL.sweep, "model": CELL.model, "dataset": CELL.dataset, "direction": CELL.direction}
    return own | {"variant": CELL.variant, "seed": seed, "run": run, "config": "of the plan"}


def parts() -> tuple[rp.ProbedModel, rp.ReversalPairs]:
    return rp.load_model(FIXTURES / "llada-tiny"), pairs_at((2, 5), (5, 2), count=14, length=8)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Of a tiny LLaDA in the place of a finished run."""
    model, pairs = parts()
    run: Any = SimpleNamespace(load=lambda: model, pairs=lambda model: pairs)
    return twin_readings(run, axes())


def collected(status: str = FINISHED, **tables: pd.DataFrame) -> Section6:
    run = axes() | {"status": status, "steps": 7, "objective": "masked"}
    about = {"statistics_version": 1} | {name: {} for name in ("section6", "section6-ablations", "section6-methods")}
    return Section6(runs=tidy("runs", [run]), about=about, **tables)


def test_they_are_those_of_the_classs_initial_weights_at_the_runs_seed(table: pd.DataFrame) -> None:
    model, pairs = parts()
    torch.manual_seed(SEED)
    fresh = type(model.module)(copy.deepcopy(model.module.config)).eval()
    twin = model.with_module(fresh)
    own = table.set_index("measure")
    for reading in (rp.probe_attention_correlation(twin, pairs), rp.probe_gradient_cosine(twin, pairs)):
        (row,) = reading.measures().to_dict("records")
        assert abs(own.loc[reading.name, "value"] - row["value"]) < 1e-5
        assert own.loc[reading.name, "facts"] == 14 and own.loc[reading.name, "n"] == row["n"]
    trained = rp.probe_gradient_cosine(model, pairs).value
    assert abs(own.loc["gradient_cosine", "value"] - trained) > 0.01, "the run's own weights were read"


def test_the_page_shows_them_beside_their_run_alone(table: pd.DataFrame) -> None:
    last = {"step": 7, "kind": "same_target", "measure": "gradient_cosine", "value": 0.3, "low": 0.2, "high": 0.4}
    reading = tidy("signatures", [axes() | last | {"n": 14, "facts": 14, "control": 0.1}])
    rows = signatures(collected(signatures=reading, twins=table))
    (row,) = (
        one for one in rows if one["model"] == CELL.model and one["measure"] == "gradient cosine" and one["n"] != "-"
    )
    told = row["untrained twin"].split("; ")
    assert len(told) == len(SEEDS) and told[SEEDS.index(SEED)].count("[") == 1
    assert [one for place, one in enumerate(told) if place != SEEDS.index(SEED)] == ["-"] * (len(SEEDS) - 1)
    rows = signatures(collected(signatures=reading))
    assert "not read" in {row["untrained twin"] for row in rows}
    rows = signatures(collected("not run", signatures=reading, twins=table))
    assert not [row for row in rows if "[" in row["untrained twin"]]


@pytest.mark.parametrize(("low", "above"), [(0.41, 1), (0.39, 0), (np.nan, 0)])
def test_the_sentence_counts_twins_whose_interval_lies_above(low: float, above: int) -> None:
    rows = [
        axes() | {"kind": "same_target", "measure": measure, "value": 0.3, "low": 0.2, "high": 0.4, "step": 7}
        for measure in ("attention_correlation", "gradient_cosine")
    ]
    twins = tidy("twins", [row | {"value": 0.6, "low": low, "high": 0.8} for row in rows])
    told = Told(collected(signatures=tidy("signatures", rows), twins=twins)).routes()
    assert f"in {above} of 1 (correlation) and {above} of 1 (cosine) masked runs" in told
    assert "twin" not in Told(collected(signatures=tidy("signatures", rows))).routes()


def test_a_second_reading_takes_the_place_of_the_first(table: pd.DataFrame, tmp_path: Path) -> None:
    other = tidy("twins", [row | axes(run="another") for row in table.to_dict("records")])
    changed = table.assign(value=0.25)
    found = with_twins(collected(twins=with_twins(Section6(), table, other)), changed)
    assert set(found.loc[found["run"] == RUN, "value"]) == {0.25} and len(found) == 2 * len(table)
    collected(twins=found).write(tmp_path)
    pd.testing.assert_frame_equal(Section6.read(tmp_path).twins, found)


def test_they_stay_while_their_run_is_the_planned_one(table: pd.DataFrame) -> None:
    stale = tidy("twins", [row | {"config": "of an older plan"} for row in table.to_dict("records")])
    assert len(with_kept(collected(), collected(twins=table)).twins) == len(table)
    assert with_kept(collected(), collected(twins=stale)).twins.empty
