"""What intervals cover: the limits of the caution are those of the committed table, and both of a simulation."""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from revprobe.probes.statistics.coverage import FEWEST, caution
from revprobe.probes.statistics.estimators import direction_mean
from revprobe.probes.statistics.intervals import FRACTION, mean_over_facts, proportion
from revprobe.probes.statistics.paired import Answers, measured_difference

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


def statistic_of(row: str) -> tuple[str, int]:
    """The statistic of a row of the table, and how many questions each fact has: "proportion, 1,000 questions"."""
    statistic, _, questions = row.partition(", ")
    return statistic, int(questions.partition(" ")[0].replace(",", "")) if questions else 1


def test_every_cell_is_filled(table: pd.DataFrame) -> None:
    assert list(table.columns) == [3, 5, 8, 13, 26, 60] and table.notna().all(axis=None)
    wanted = {(name, interval) for name in FEWEST for interval in ("value", "control", "excess")}
    assert {(statistic_of(name)[0], interval) for name, interval in table.index} == wanted
    assert table.gt(0.5).all(axis=None) and all(len(table.loc[name]) == 3 for name, _ in table.index)
    simulated = [questions for _, questions in map(statistic_of, table.index.unique(0)) if questions > 1]
    assert {most for most in FEWEST["proportion"] if most < math.inf} < set(simulated), "each limit was simulated"


def test_cells_under_90_percent_carry_a_caution_and_no_others(table: pd.DataFrame) -> None:
    for row in table.index.unique(0):
        statistic, questions = statistic_of(row)
        lowest = table.loc[row].min()
        enough = [facts for facts in table.columns if (lowest.loc[facts:] >= FLOOR).all()]
        for facts in table.columns:
            assert bool(caution(statistic, facts, facts * questions)) == (facts < min(enough)), (row, facts)


def test_the_skewed_shape_below_the_limit_covers_what_the_table_says(table: pd.DataFrame) -> None:
    """Drawn again with another generator: means of beta(0.1, 1), the shape that sets the limit."""
    generator, names = np.random.default_rng(7), np.arange(5).astype(str)
    found = [mean_over_facts(generator.beta(0.1, 1, 5), names, bounds=FRACTION) for _ in range(400)]
    share = np.mean([one.low <= 1 / 11 <= one.high for one in found])
    assert share == pytest.approx(table.loc[("mean", "value"), 5], abs=0.06) and share < FLOOR


def wanderers(generator: np.random.Generator, seeds: int, questions: int) -> np.ndarray:
    """Exact matches by seed, of which three in four are right 4 % of the time and one in four 60 %."""
    return generator.binomial(questions, np.where(generator.random(seeds) < 0.25, 0.6, 0.04)) / questions


@pytest.mark.parametrize(("seeds", "covers"), [(3, False), (5, False), (60, True)])
def test_few_seeds_of_many_questions_carry_a_caution_and_miss(seeds: int, covers: bool) -> None:
    """200 questions each: a seed's own rate is known, and what seeds do is known from three of them alone."""
    generator, truth, held = np.random.default_rng(8), 0.25 * 0.6 + 0.75 * 0.04, 0
    for _ in range(300):
        found = proportion(wanderers(generator, seeds, 200), np.full(seeds, 200))
        held += found.low <= truth <= found.high
    assert (held / 300 >= FLOOR) == covers == (caution("proportion", found.facts, found.n) == "")


def test_the_caution_of_a_proportion_is_that_of_its_facts_and_their_questions() -> None:
    """Twelve facts of 40 questions each: their rates are known, and twelve are few. Of one question they are not."""
    facts = np.repeat(np.arange(12), 40).astype(str)
    right = np.random.default_rng(9).random(480) < 0.4
    columns = {"pair": range(480), "fact": facts, "direction": "reverse", "argmax_match": right, "reason": ""}
    frame = pd.DataFrame(columns)
    many = direction_mean(frame, "reverse", "argmax_match")
    assert many.caution.startswith("few facts (12) of 40 questions each: 95 % intervals of a proportion")
    assert direction_mean(frame.iloc[::40], "reverse", "argmax_match").caution == ""
    null = np.where(np.arange(480) < 120, 0.0, np.nan)
    shared = frame.assign(argmax_match_control=null, fact=np.arange(480).astype(str))
    assert direction_mean(shared, "reverse", "argmax_match").caution == ""
    sides = [Answers(right ^ flip, None, facts, FRACTION, binary=True) for flip in (False, np.arange(480) < 9)]
    assert "few facts (12) of 40 questions each" in measured_difference(*sides).caution


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
