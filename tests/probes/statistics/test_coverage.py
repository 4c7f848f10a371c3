"""What intervals cover: the limits of the caution are those of the committed table, and both of a simulation."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from revprobe.probes.statistics.coverage import FEWEST, caution
from revprobe.probes.statistics.estimators import direction_mean
from revprobe.probes.statistics.intervals import FRACTION, mean_over_facts

FLOOR = 0.90


@pytest.fixture(scope="module")
def table(root: Path) -> pd.DataFrame:
    """The table of docs/statistics.md: a row for each statistic and interval, a column for each number of facts."""
    lines = (root / "docs" / "statistics.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| statistic | interval |"))
    head = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    frame = pd.DataFrame(rows, columns=head).set_index(["statistic", "interval"])
    counts = frame.pop("shapes x readings").str.extract(r"^(\d+) x (\d+)$").astype(int)
    assert (counts[1] >= 150).all() and (counts[0] >= 4).all()
    frame.columns = [int(re.fullmatch(r"(\d+) facts", name)[1]) for name in frame.columns]  # type: ignore[index]
    return frame.astype(float)


def test_every_cell_is_filled(table: pd.DataFrame) -> None:
    assert list(table.columns) == [3, 5, 8, 13, 26, 60] and table.notna().all(axis=None)
    wanted = {(name, interval) for name in FEWEST for interval in ("value", "control", "excess")}
    assert set(table.index) == wanted and table.gt(0.5).all(axis=None)


def test_cells_under_90_percent_carry_a_caution_and_no_others(table: pd.DataFrame) -> None:
    for statistic, fewest in FEWEST.items():
        lowest = table.loc[statistic].min()
        enough = [facts for facts in table.columns if (lowest.loc[facts:] >= FLOOR).all()]
        assert fewest == min(enough), statistic
        for facts in table.columns:
            assert bool(caution(statistic, facts)) == (facts < min(enough))


def test_the_skewed_shape_below_the_limit_covers_what_the_table_says(table: pd.DataFrame) -> None:
    """Drawn again with another generator: means of beta(0.1, 1), the shape that sets the limit."""
    generator, names = np.random.default_rng(7), np.arange(5).astype(str)
    found = [mean_over_facts(generator.beta(0.1, 1, 5), names, bounds=FRACTION) for _ in range(400)]
    share = np.mean([one.low <= 1 / 11 <= one.high for one in found])
    assert share == pytest.approx(table.loc[("mean", "value"), 5], abs=0.06) and share < FLOOR


def test_an_excess_over_fewer_facts_than_the_value_is_what_the_caution_counts() -> None:
    """Twenty facts have a value and only four of them a control."""
    facts = [str(fact) for fact in range(20)]
    columns = {"pair": range(20), "fact": facts, "direction": "reverse", "probability": np.linspace(0.1, 0.9, 20)}
    control = np.where(np.arange(20) < 4, 0.1 + np.arange(20) / 100, np.nan)
    frame = pd.DataFrame(columns | {"probability_control": control, "reason": ""})
    measured = direction_mean(frame, "reverse", "probability")
    assert measured.estimate.facts == 20 and measured.excess is not None and measured.excess.facts == 4
    assert "few facts (4)" in measured.caution
    whole = direction_mean(frame.assign(probability_control=0.1 + np.arange(20) / 100), "reverse", "probability")
    assert whole.caution == ""
