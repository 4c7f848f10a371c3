"""Where the paper's reverse accuracies lie among ours, on made distributions: inside, outside, or too wide to say."""

import numpy as np
import pandas as pd
import pytest
from made_published import made

from revprobe.finetune.config.loading import load_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.report.paper.published_recipe import (
    BLIND,
    INSIDE,
    OUTSIDE,
    SECOND,
    TRAINED,
    joint_test,
    paired_by_seed,
    places,
    wandering,
)
from revprobe.report.paper.rules import CANNOT, FAILS, HOLDS, NOT_RUN


def place(found: pd.DataFrame, encoding: str, length: int, weights: str = "ema", scope: str = SECOND) -> pd.Series:
    chosen = (found["position_encoding"] == encoding) & (found["length"] == length) & (found["weights"] == weights)
    (row,) = (row for _, row in found[chosen & (found["scope"] == scope)].iterrows())
    return row


def test_a_printed_value_is_inside_with_its_percentile_and_width() -> None:
    row = place(places(*made()), "rope", 10)
    assert (row["paper"], row["reads"], row["seeds"], row["planned"]) == (43.1, INSIDE, 3, 3)
    assert row["lowest"] == pytest.approx(28) and row["highest"] == pytest.approx(58)
    assert row["width"] == pytest.approx(30)
    config = next(run for run in load_config("one-layer-published", SweepConfig).runs() if run.name == "rope-l10-s0")
    late = [place for place, step in enumerate(config.answer_steps) if step > 5000]
    assert row["n"] == 3 * len(late), "three seeds, the checkpoints after half of the training"
    assert row["percentile"] == pytest.approx(100 * np.mean([place % 2 == 0 for place in late]))


def test_checkpoints_before_the_model_answers_forwards_are_left_out() -> None:
    """Steps below 1,000 have forward 0.5; the untrained one is never among them."""
    row = place(places(*made()), "rope", 10, scope=TRAINED)
    config = next(run for run in load_config("one-layer-published", SweepConfig).runs() if run.name == "rope-l10-s0")
    assert row["n"] == 3 * sum(step >= 1000 for step in config.answer_steps)


def test_seeds_without_a_checkpoint_in_the_scope_are_not_counted() -> None:
    """All numbers were of one seed and said to be of three."""
    runs, answers = made()
    low = answers["run"].isin(["rope-l10-s1", "rope-l10-s2"]) & (answers["question"] == "forward")
    found = places(runs, answers.assign(accuracy=answers["accuracy"].mask(low, 0.9)))
    config = next(run for run in load_config("one-layer-published", SweepConfig).runs() if run.name == "rope-l10-s0")
    row = place(found, "rope", 10, scope=TRAINED)
    assert (row["seeds"], row["planned"], row["n"]) == (1, 3, sum(step >= 1000 for step in config.answer_steps))
    assert place(found, "rope", 10)["seeds"] == 3, "after half of the training there are all three"


def test_a_value_that_equals_ours_counts_half() -> None:
    row = place(places(*made({("absolute", 10): 11.5}, reach=0.0)), "absolute", 10)
    assert (row["percentile"], row["reads"], row["width"]) == (50, INSIDE, 0)


@pytest.mark.parametrize(
    ("middle", "reach", "reads"),
    [(43.0, 15.0, INSIDE), (10.0, 15.0, OUTSIDE), (43.0, 21.0, BLIND), (90.0, 40.0, BLIND)],
)
def test_a_distribution_wider_than_forty_points_is_not_informative(middle: float, reach: float, reads: str) -> None:
    assert place(places(*made({("rope", 10): middle}, reach=reach)), "rope", 10)["reads"] == reads


def joint(runs: pd.DataFrame, answers: pd.DataFrame) -> pd.Series:
    table = joint_test(runs, places(runs, answers))
    return table[(table["weights"] == "ema") & (table["scope"] == SECOND)].iloc[0]


def test_the_joint_test_asks_for_all_four_and_the_order() -> None:
    row = joint(*made())
    assert (row["verdict"], row["inside"], row["above"], row["pairs"]) == (HOLDS, 4, 6, 6)
    assert joint(*made({("rope", 40): 2.0}))["verdict"] == FAILS
    swapped = joint(*made({"absolute-l10-s1": 60.0}))
    assert (swapped["verdict"], swapped["above"], swapped["pairs"]) == (FAILS, 5, 6)
    assert "L = 10 s1" in swapped["numbers"]


def test_a_blind_or_missing_distribution_leaves_the_joint_test_open() -> None:
    wide = joint(*made(reach=21.0))
    assert (wide["verdict"], wide["not_informative"]) == (CANNOT, 4)
    assert joint(*made(without=("rope-l40-s0",)))["verdict"] == CANNOT
    assert joint(*made(without=("absolute-l20-s2",)))["verdict"] == CANNOT, "one pair has not been run"
    names = tuple(run.name for run in load_config("one-layer-published", SweepConfig).runs())
    masked = tuple(name for name in names if not name.startswith("arm"))
    assert joint(*made(without=masked))["verdict"] == NOT_RUN


def test_a_variant_of_the_recipe_is_no_seed_of_it() -> None:
    """rope-l10-s0-wide has length 10 and is RoPE; it is neither among the values nor among the pairs."""
    moved = {f"rope-l10-s{seed}-{name}": 99.0 for seed in range(3) for name in ("wide", "high-rate")}
    runs, answers = made(moved)
    assert place(places(runs, answers), "rope", 10)["highest"] == pytest.approx(58)
    assert paired_by_seed(runs[runs["weights"] == "ema"])["rope"].max() < 0.6


def test_wandering_is_told_by_rate_and_width() -> None:
    table = wandering(made({f"rope-l10-s{seed}-wide": 50.0 for seed in range(3)})[0]).set_index(["cell", "weights"])
    row = table.loc[("rope-l10-wide", "raw")]
    assert (row["d_model"], row["seeds"], row["planned"]) == (128, 3, 3)
    assert row["range"] == pytest.approx(0.30) and row["spread"] == pytest.approx(0.15, rel=0.05)
    assert table.loc[("rope-l10-high-rate", "ema"), "learning_rate"] == 1e-3
    assert not any(cell.startswith("arm") for cell, _ in table.index)


def test_a_cell_of_another_recipe_is_not_among_the_seeds() -> None:
    """Two sweeps have a cell rope-l10, and one number of both would be neither's."""
    runs = made({})[0]
    other = runs.assign(recipe="W", reverse=0.99, learning_rate=1e-3)
    found = wandering(pd.concat([runs, other])).set_index(["recipe", "cell", "weights"])
    alone = wandering(runs).set_index(["recipe", "cell", "weights"])
    for key, row in alone.iterrows():
        assert found.loc[key, "seeds"] == row["seeds"] and found.loc[key, "learning_rate"] == row["learning_rate"]
        assert found.loc[key, "reverse"] == pytest.approx(row["reverse"], nan_ok=True)
