"""A seed without a number is said to be so: it is in no mean, lends no control, and is not against a finding."""

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest

from revprobe.report.paper.evidence_markdown import cells_table, log_table
from revprobe.report.paper.evidence_runs import FINISHED
from revprobe.report.paper.section6 import tables
from revprobe.report.paper.section6.frames import Section6, tidy
from revprobe.report.paper.section6.plan import DATASETS, SEEDS, TABLE_MODELS, main_cell
from revprobe.report.paper.table7 import cell_text


def cell(table: str, column: str) -> str:
    names, _, row = (line.strip("| ").split(" | ") for line in table.strip().splitlines())
    return row[names.index(column)]


def runs(values: list[float], controls: list[float]) -> pd.DataFrame:
    about = {"recipe": "W", "cell": "rope", "weights": "ema", "objective": "masked", "status": FINISHED}
    about |= {"forward": 1.0, "reverse": 0.9, "reverse_errors": 1, "gradient_cosine": 0.5, "reverse_probability": 0.5}
    about |= {"gradient_cosine_control": 0.1, "reverse_probability_control": 0.1}
    return pd.DataFrame(
        about
        | {"run": f"rope-s{seed}", "seed": seed, "attention_correlation": value, "reverse_lowest": value}
        | {"attention_correlation_control": control}
        for seed, (value, control) in enumerate(zip(values, controls, strict=True))
    )


def test_means_say_of_how_many_seeds_they_are_wherever_some_are_undefined() -> None:
    """Every pattern of three seeds, against sums by hand; an undefined seed's control of 0.9 was in the mean."""
    for values in product([0.8, math.nan], [0.6, math.nan], [0.7, math.nan]):
        table = runs(list(values), [0.1, 0.2, 0.9])
        known = [place for place, value in enumerate(values) if not math.isnan(value)]
        shown, lowest = cell(log_table(table), "attention correlation"), cell(cells_table(table), "stays")
        if not known:
            assert (shown, lowest) == ("NaN / NaN", "NaN")
            continue
        value, control = (sum(of[place] for place in known) / len(known) for of in (values, [0.1, 0.2, 0.9]))
        lost = f" ({len(known)} seeds)" if len(known) < 3 else ""
        assert shown == f"{value:.2f}{lost} / {control:.2f}{lost}"
        assert lowest == f"{100 * min(values[place] for place in known):.1f}{lost}"


def test_a_seed_that_cannot_be_held_against_its_control_is_not_below_it() -> None:
    """It was "2 of 3" where the third is undefined; its control is in no mean either."""
    one = main_cell(TABLE_MODELS[0], DATASETS[0])
    for lows in product([0.3, -0.1, math.nan], repeat=len(SEEDS)):
        made: dict[str, list[dict[str, object]]] = {"runs": [], "signatures": []}
        for seed, low in zip(SEEDS, lows, strict=True):
            axes = {"sweep": one.sweep, "model": one.model, "dataset": one.dataset, "direction": one.direction}
            axes |= {"variant": one.variant, "seed": seed, "run": f"r{seed}"}
            more = {
                "objective": "masked",
                "steps": 100,
                "status": FINISHED,
                "config": "",
                "weights_of": "",
                "weights": "",
            }
            made["runs"].append(axes | more)
            numbers = {"value": 0.5 if low == low else math.nan, "low": 0.4, "high": 0.6, "n": 10, "facts": 10}
            numbers |= {"control": 0.1 if low == low else 0.9, "undefined": 0, "reason": "", "caution": ""}
            numbers |= {"excess": 0.4, "excess_low": low, "excess_high": 0.5}
            kind = {"kind": "same_target", "measure": "attention_correlation"}
            made["signatures"] += [axes | kind | numbers | {"step": step} for step in (0, 100)]
        found = Section6(**{name: tidy(name, rows) for name, rows in made.items()})
        row = tables._signature(found, one, "attention_correlation", "words")
        decided = [low for low in lows if low == low]
        lost = f", {len(lows) - len(decided)} undefined" if len(decided) < len(lows) else ""
        expected = f"{int(np.sum(np.array(decided) > 0))} of {len(decided)}{lost}" if decided else "not compared"
        assert row["above control"] == expected
        assert row["control"] == row["control before"] == ("0.10" if decided else "-")


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_one_seed_that_has_a_number_has_its_own_interval(lost: int) -> None:
    """Beside an undefined one it had that of a single draw: [0.04, 99.96] for [30, 70]."""
    own = {"value": 0.5, "low": 0.3, "high": 0.7, "n": 24, "facts": 12}
    none = {"value": np.nan, "low": np.nan, "high": np.nan, "n": 0, "facts": 0}
    said = cell_text(pd.DataFrame([*[none] * lost, own]))
    beside = f"1 seed, {lost} undefined, " if lost else ""
    assert said == f"50.0 [30.0, 70.0] ({beside}n = 24, 12 facts)"
