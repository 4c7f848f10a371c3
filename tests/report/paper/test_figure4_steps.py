"""Fig. 4 draws a mean over seeds only where all of them are: a mean over changing seeds moves where no seed does."""

import random
from typing import Any

import pandas as pd
import pytest

from revprobe.report.paper.figure4 import KEY, NOTES, figure4, reached_by_all

MEASURES = ("reverse_probability", "gradient_cosine")


def rows_of(*lines: tuple[str, dict[int, dict[int, float]]]) -> pd.DataFrame:
    """Rows of lines (model, seed -> step -> value) in both measures."""
    about = {"task": "d (P2C)", "variant": "", "kind": "same_target", "weights": "raw", "control": 0.0, "n": 9}
    about |= {"facts": 9, "reason": "", "caution": ""}
    return pd.DataFrame(
        about
        | {"run": f"{model}-s{seed}", "model": model, "step": step, "measure": measure, "value": value}
        | {"low": value - 0.05, "high": value + 0.05}
        for model, seeds in lines
        for seed, curve in seeds.items()
        for step, value in curve.items()
        for measure in MEASURES
    )


def drawn(figure: Any, part: str = "value") -> dict[str, list[float]]:
    shown = [trace for trace in figure.data if trace.meta and trace.meta.get("part") == part]
    return {trace.name: list(trace.y) for trace in shown}


def test_a_step_that_one_seed_lacks_is_left_out_and_named() -> None:
    """By hand: seeds stay at 0.9, 0.9 and 0.1; the last step, of the third alone, made the line fall to 0.1."""
    part = {0: {0: 0.9, 100: 0.9}, 1: {0: 0.9, 100: 0.9}, 2: {0: 0.1, 100: 0.1, 200: 0.1}}
    figure = figure4(rows_of(("a", part), ("b", {0: {0: 0.5, 200: 0.6}})))
    lines = drawn(figure)
    assert lines["a d (P2C), same target"] == pytest.approx([1.9 / 3] * 2)
    assert lines["b d (P2C), same target"] == pytest.approx([0.5, 0.6]), "one seed has reached all of its own"
    said = figure.layout.title.text.replace("<br>", " ")
    assert "a d (P2C), same target: step 200 left out, which not all 3 seeds have reached" in said
    assert "b d" not in said and figure.layout.margin.t > figure4(rows_of(("b", {0: {0: 0.5}}))).layout.margin.t


def test_whatever_seeds_have_reached_the_line_is_of_all_of_them() -> None:
    """Against a slow look at each step of 60 drawn tables; with all steps reached there is no note."""
    draw = random.Random(0)
    for _ in range(60):
        seeds = {seed: {step: draw.random() for step in (0, 1, 5) if draw.random() < 0.8} for seed in range(3)}
        seeds = {seed: curve for seed, curve in seeds.items() if curve}
        if not seeds:
            continue
        kept, notes = reached_by_all(rows_of(("a", seeds)))
        common = [step for step in (0, 1, 5) if all(step in curve for curve in seeds.values())]
        assert sorted(kept["step"].unique()) == common
        assert bool(notes) == any(set(curve) != set(common) for curve in seeds.values())


def test_seeds_without_a_measure_do_not_take_it_from_the_others() -> None:
    rows = rows_of(("a", {0: {0: 0.5, 10: 0.5}, 1: {0: 0.7, 10: 0.7}}))
    rows = rows[~((rows["run"] == "a-s1") & (rows["measure"] == "gradient_cosine"))]
    kept, notes = reached_by_all(rows)
    assert len(kept) == len(rows) and not notes


def test_a_further_control_stands_only_at_the_steps_of_its_line() -> None:
    rows = rows_of(("a", {0: {0: 0.5, 10: 0.5}, 1: {0: 0.7}}))
    beside = rows[rows["measure"] == "gradient_cosine"].assign(control="untrained", value=0.2)
    assert [list(trace.y) for trace in figure4(rows, beside).data if trace.meta["part"] == "against"] == [[0.2]]


def test_nothing_in_common_and_many_notes_are_said_in_few_lines() -> None:
    apart = figure4(rows_of(("a", {0: {0: 0.5}, 1: {10: 0.7}})))
    assert "step 0, 10 left out" in apart.layout.annotations[0].text.replace("<br>", " ") and not apart.data
    many = rows_of(*((f"m{at}", {0: {0: 0.5, 10: 0.5}, 1: {0: 0.7}}) for at in range(NOTES + 3)))
    text = figure4(many).layout.title.text.replace("<br>", " ")
    assert text.startswith(KEY) and text.count("left out") == NOTES and text.endswith("and 3 more lines")
