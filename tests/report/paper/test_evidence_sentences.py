"""The sentences a page begins with say what the tables say, and what contradicts the account comes first."""

import pandas as pd
import pytest
from made_sweeps import made

from revprobe.report.paper.evidence_markdown import cells_table, evidence_sections, spread_text, verdict_table
from revprobe.report.paper.evidence_sentences import Told
from revprobe.report.paper.predictions import judged, overall
from revprobe.report.paper.rules import NOT_RUN

PRICES = {"keep_loss": 0.75, "ill_formed": 0.3, "reversed_order": 0.1, "entropy": 0.7}
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
    assert contradictions.startswith("Of 16 predictions (each under recipe W or P) written before the runs, none fails")
    assert "16 hold (W0, W0 (causal), W1, " in contradictions
    assert table_1.startswith("RADD's published recipe has not been collected")
    assert "RoPE 2 → 99 % (W, n = 5), 2 → 99 % (P, n = 5); absolute 2 → 99 % (W, n = 5)" in outvoted
    assert outvoted.endswith("at the lowest 100 %: outvoted, not forgotten.")
    assert (
        "fades too, and stays without those terms, so negative evidence suffices (reverse 2 % under keep, 99" in price
    )
    assert "drop-right costs RoPE +0.020 nats per token and 30 → 40 % ill-formed samples" in price


def test_what_fails_comes_first_by_name_with_the_numbers_against_it() -> None:
    def of(axes: dict[str, object]) -> bool:
        return (axes["dial"], axes["switch_dial"], axes["recipe"]) == ("keep", "drop-right", "W")

    tables = priced(made(lambda axes: {"reverse": 0.1}, of=of))
    first = Told(*tables).four()[0]
    said = (
        "1 fails: **W4** (rope-l10-then-drop-right, claimed *recovers: reverse comes above 0.9*, found s0 0.10 → 0.10"
    )
    assert said in first and first.index(said) < first.index("15 hold (")
    assert "1 fails (W4), 15 hold." in Told(*tables).short()[0]
    table = verdict_table(overall(judged(*tables)))
    assert table.splitlines()[2].startswith("| W | 4. ") and "**fails**" in table.splitlines()[2]


def test_where_the_letters_are_not_known_it_is_not_called_outvoted() -> None:
    forgotten = priced(made(lambda axes: {"letters": 0.3}, of=lambda axes: axes["dial"] == "drop-left"))
    sentence = Told(*forgotten).four()[2]
    assert "outvoted" not in sentence and "prediction 0 reads fails (W), fails (P)" in sentence
    assert "letters-only in any masked run at the lowest 30 %" in sentence


def test_what_was_not_collected_is_said() -> None:
    assert all("not been" in sentence or "not run" in sentence or "alone" in sentence for sentence in Told().four()), (
        Told().four()
    )
    nothing = priced(made(ran=lambda axes: False))
    assert "16 not run" in Told(*nothing).four()[0] and "not run (W)" in Told(*nothing).four()[2]


def test_every_cell_stands_in_the_tables_run_or_not() -> None:
    """Never hide a cell: those of a dial that nobody ran are there by name, with their reason."""
    runs, answers = priced(made(ran=lambda axes: axes["dial"] != "drop-both"))
    sections = evidence_sections(runs, answers)
    for cell in runs["cell"].unique():
        for title in ("Every cell", "Price of a dial", "Steps and probes"):
            rows = [line for line in sections[title].splitlines() if f"| {cell} |" in line]
            assert len(rows) == 1 and rows[0].split(" | ")[0] in ("| W", "| P"), f"{cell}: {title}"
            assert ("0 of" in rows[0]) == ("drop-both" in cell), rows
        assert f"| {cell} |" in sections["Every part of every prediction"]
    assert f"- {NOT_RUN}: rope-l10-s0-drop-both, rope-l10-s1-drop-both" in sections["Every cell"]


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
    text = evidence_sections(own, answers)["Price of a dial"]
    line = next(line for line in text.splitlines() if line.startswith("| W | rope-l10-drop-right |"))
    assert "| +0.02000 [+0.02000, +0.02000] |" in line
    keep = next(line for line in text.splitlines() if line.startswith("| W | rope-l10 |"))
    assert "| - |" in keep
