"""The sentences a page begins with say what the tables say, and what contradicts the account comes first."""

from textwrap import wrap
from typing import Any

import pandas as pd
import pytest
from made_published import made as published
from made_sweeps import made

from revprobe.report.paper.evidence_markdown import cells_table, evidence_sections, spread_text, verdict_table
from revprobe.report.paper.evidence_sentences import Told, _range
from revprobe.report.paper.predictions import judged, overall
from revprobe.report.paper.rules import NOT_RUN

PRICES = {"keep_loss": 0.75, "ill_formed": 0.3, "reversed_order": 0.1, "entropy": 0.7}
CELLS = (
    "How does each dial answer?",
    "What does a dial cost?",
    "How did training go, and what do the probes read?",
)
COUNTS = {"rows": 8192, "negatives": 2000, "samples": 1024}


def priced(tables: tuple[pd.DataFrame, pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """With a price: drop-right costs 0.02 nats and 10 points of samples more than keep."""
    runs, answers = tables
    more = (runs["dial"] == "drop-right").astype(float)
    runs = runs.assign(**PRICES, **COUNTS)
    return runs.assign(keep_loss=0.75 + 0.02 * more, ill_formed=0.3 + 0.1 * more), answers


@pytest.fixture(scope="module")
def predicted() -> tuple[pd.DataFrame, pd.DataFrame]:
    return priced(made())


def test_all_that_holds_is_said_with_its_numbers(predicted: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    contradictions, table_1, outvoted, price = Told(*predicted).four()
    assert contradictions.startswith("**Predictions.** Of 14 written before the runs")
    assert "none fails, 14 hold (W0, W1, " in contradictions and "\n" not in contradictions
    assert "RADD's published recipe has not been collected" in table_1
    assert "RoPE 2 → 99 % (W), 2 → 99 % (P); absolute 2 → 99 % (W), 2 → 99 % (P) (n = 5 each)" in outvoted
    assert outvoted.endswith("and 100 % or more of errors are the placeholder: outvoted, not forgotten.")
    assert "fades too and stays without those terms: negative evidence suffices (reverse 2 % under keep, 99" in price
    assert "Drop-right costs RoPE +0.020 nats per token and 30 → 40 % ill-formed samples (W)" in price


def failing(axes: dict[str, object]) -> bool:
    return (axes["dial"], axes["switch_dial"], axes["recipe"]) == ("keep", "drop-right", "W")


def test_what_fails_comes_first_in_words_with_the_range_over_seeds() -> None:
    """Lowest to highest seed, and no list of seeds; in the table of verdicts it stands first, with the cell."""
    tables = priced(made(lambda axes: {"reverse": 0.1 + 0.01 * axes["seed"]}, of=failing))
    first = Told(*tables).four()[0]
    assert "1 fails, 13 hold (" in first and "s0" not in first
    said = "- **W4**: switched from keep to drop-right, RoPE was to recover above 90 % within 1,000 steps; found 10 to"
    assert f"{said} 14 %." in first.splitlines()
    assert "1 fails (W4), 13 hold." in Told(*tables).short()[0]
    row = verdict_table(overall(judged(*tables))).splitlines()[2]
    assert row.startswith("| W | 4. ") and "| **fails** | rope-l10-then-drop-right: 0.10 to 0.14 |" in row


def test_raw_weights_seeds_that_do_not_count_and_both_recipes_are_told_beside() -> None:
    """A seed that does not count is in no range; what fails alike under both recipes is told in one line."""

    def change(axes: Any) -> dict[str, float]:
        return {"reverse": 0.7} | ({"forward": 0.5, "reverse": 0.1} if axes["seed"] == 4 else {})

    runs, answers = priced(made(change, of=lambda axes: axes["dial"] == "drop-right" and axes["length"] == 20))
    runs = runs.assign(reverse_lowest=runs["reverse_lowest"].where(runs["weights"] == "ema", 0.95))
    (line,) = (line for line in Told(runs, answers).failures() if line.startswith("- **W1, P1**"))
    assert (
        "RoPE at length 20: reverse accuracy was to stay above 90 % under drop-right; found W averaged weights" in line
    )
    assert "averaged weights 70 %, raw 95 %; P averaged weights 70 %, raw 95 %" in line


def test_a_causal_model_that_does_not_know_is_not_called_outvoted() -> None:
    """What it is asked, at what chance, what it gets right among the letters, and where nothing is priced."""

    def forgotten(axes: Any) -> dict[str, float]:
        return {"letters": 0.2, "reverse": 0.5 if axes["dial"] == "drop-after" and axes["recipe"] == "W" else 0.0}

    first = Told(*priced(made(forgotten, of=lambda axes: axes["objective"] == "causal"))).four()[0]
    assert "- **W0, P0**: causal models: the right letter was to lead the 26" in first
    assert (
        "- **W7**: the causal model at length 10: with the tokens after the second letter unpriced it was to answer"
        in (first)
    )
    assert "So the causal model is not merely outvoted" in first and "by chance 4 %" in first
    assert "ahead of the others in 20 %. With that place unpriced it is right in 50 % (W, " in first
    assert "causal model is not" not in Told(*priced(made(forgotten, of=failing))).four()[0]


def test_where_the_letters_are_not_known_it_is_not_called_outvoted() -> None:
    forgotten = priced(made(lambda axes: {"letters": 0.3}, of=lambda axes: axes["dial"] == "drop-left"))
    sentence = Told(*forgotten).four()[2]
    assert "not forgotten" not in sentence and "(verdict on masked models: fails)" in sentence
    assert "the right letter leads the 26 in 30 % or more" in sentence


def test_what_was_not_collected_is_said() -> None:
    assert all("not been" in sentence or "not run" in sentence or "alone" in sentence for sentence in Told().four()), (
        Told().four()
    )
    nothing = priced(made(ran=lambda axes: False))
    assert "14 not run" in Told(*nothing).four()[0] and "not run (W)" in Told(*nothing).four()[2]


def everything_fails() -> Told:
    """Every part of every prediction fails, and the published recipe is there: the longest that can be told."""

    def reverse(axes: Any) -> dict[str, float]:
        after = axes["switch_step"] is not None and axes["step"] > axes["switch_step"]
        wrong = 0.3 if axes["dial"] == "drop-right" or axes["masks"] == "2" else 0.7
        if axes["switch_step"] is not None:
            kept = 0.95 if axes["dial"] == "drop-right" else 0.1
            wrong = (0.8 if axes["switch_dial"] == "mirror" else kept) if after else kept
        return {"reverse": wrong, "mirror": 0.5, "letters": 0.4, "outvoted": 0.1}

    return Told(*priced(made(reverse)), *published(reach=21.0))


@pytest.mark.parametrize("told", ["as predicted", "fails", "nothing", "partly"])
def test_sentences_are_short_whatever_came_out(told: str, predicted: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    """A sentence has some 60 words, a failure one line, README's section at most ten lines with its two of text."""
    which = {"as predicted": Told(*predicted, *published()), "fails": everything_fails(), "nothing": Told()}
    partly = priced(made(ran=lambda axes: axes["seed"] < 2 or axes["recipe"] == "W"))
    one = which.get(told) or Told(*partly, *published(without=("rope-l40-s0",)))
    if told == "fails":
        assert "holds" not in one.contradictions(short=True) and len(one.failures()) > 8
    for sentence in one.four():
        for line in filter(None, sentence.splitlines()):
            words = [word for word in line.split() if any(letter.isalpha() for letter in word)]
            assert len(words) <= 75, line
    lines = [part for line in one.short() for part in wrap(f"- {line}", 120, break_on_hyphens=False)]
    assert len(lines) <= 8, lines


def test_every_cell_stands_in_the_tables_run_or_not() -> None:
    """Never hide a cell: those of a dial that nobody ran are there by name, with their reason."""
    runs, answers = priced(made(ran=lambda axes: axes["dial"] != "drop-both"))
    sections = evidence_sections(runs, answers)
    for cell in runs["cell"].unique():
        for title in CELLS:
            every = sections[title].partition("Every cell:")
            rows = [line for line in (every[2] or every[0]).splitlines() if f"| {cell} |" in line]
            assert len(rows) == 1 and rows[0].split(" | ")[0] in ("| W", "| P"), f"{cell}: {title}"
            assert ("0 of" in rows[0]) == ("drop-both" in cell), rows
        assert f"| {cell} |" in sections["Which predictions hold?"]
    assert f"- {NOT_RUN}: rope-l10-drop-both (s0, s1, s2, s3, s4), absolute-l10-drop-both (s0, " in sections[CELLS[0]]
    for run in runs.loc[runs["status"] == "finished", "run"].unique():
        assert f"| {run} |" in sections[CELLS[0]], "every run by itself"


def test_a_cell_shows_mean_and_range_over_seeds_and_what_has_no_error() -> None:
    runs, _ = priced(made(lambda axes: {"reverse": 0.1 * axes["seed"]}, of=lambda axes: axes["dial"] == "keep"))
    line = next(line for line in cells_table(runs).splitlines() if line.startswith("| W | rope-l10 |"))
    assert "| 20.0 (0.0 to 40.0) |" in line
    right, _ = priced(made(lambda axes: {"reverse": 1.0}, of=lambda axes: axes["dial"] == "keep"))
    line = next(line for line in cells_table(right).splitlines() if line.startswith("| W | rope-l10 |"))
    assert "| no errors |" in line
    assert (spread_text([]), spread_text([float("nan")]), spread_text([1, 1])) == ("-", "NaN", "100.0")


def test_a_price_is_the_difference_to_keep_of_the_same_seed(predicted: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    runs, answers = predicted
    seeds = runs["seed"].astype(float)
    own = runs.assign(keep_loss=runs["keep_loss"] + 0.1 * seeds)  # seeds differ by more than dials do
    text = evidence_sections(own, answers)["What does a dial cost?"]
    line = next(line for line in text.splitlines() if line.startswith("| W | rope-l10-drop-right |"))
    assert "| +0.02000 [+0.02000, +0.02000] |" in line
    keep = next(line for line in text.splitlines() if line.startswith("| W | rope-l10 |"))
    assert "| - |" in keep


def test_hardly_all_is_not_told_as_all() -> None:
    """99.96 % read as 100.0 %."""
    assert _range([0.9996]) == "99.96 %" and _range([0.9991, 0.99996]) == "99.9 to 99.996 %"
    assert _range([1.0]) == "100 %" and _range([0.0, 0.42]) == "0 to 42 %" and _range([0.0004]) == "0.04 %"
