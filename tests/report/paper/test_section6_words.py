"""What Section 6's page says beside its numbers: ranks of the recipe, methods, seeds not in, whose words a claim is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_section6 import STEPS, made

from revprobe.report.paper.section6.ablations import PREDICTIONS
from revprobe.report.paper.section6.cells import at_reached, cell_words
from revprobe.report.paper.section6.frames import Section6, tidy
from revprobe.report.paper.section6.other_claims import PAPER, repeats
from revprobe.report.paper.section6.page import COUNTED_APART, markdown
from revprobe.report.paper.section6.plan import DATASETS, METHODS, SEEDS, TABLE_7, main_cell
from revprobe.report.paper.section6.sentences import Told
from revprobe.report.paper.section6.tables import ablations, methods
from revprobe.report.paper.section6.traces import CAUSAL as CAUSAL_TRACE
from revprobe.report.paper.section6.traces import blocks
from revprobe.report.paper.section6.verdicts import Claim

# In which direction the YAML says that a variant moves reverse from plain's.
FORETOLD = {"whole-entity": 1, "one-span": 1, "absolute": -1, "low-rates": -1, "read-both": 1}


@pytest.fixture(scope="module")
def whole() -> Section6:
    return made(7, gaps=False)


def ranks_at_the_end(found: Section6, variant: str) -> dict[int, float]:
    """By pandas alone: how often the right answer ranks first backwards at the last step, by seed."""
    rows = found.ranks
    rows = rows[(rows["asked"] == "reverse") & (rows["split"] == "train") & (rows["step"] == STEPS[-1])]
    if variant == "plain":
        cell = {"sweep": "section6", "model": "mini-llada", "dataset": "parent-child", "direction": "P2C"}
    else:
        cell = {"sweep": "section6-ablations", "variant": variant}
    own = rows[(rows[list(cell)] == pd.Series(cell)).all(axis=1)]
    return {int(seed): float(value) for seed, value in zip(own["seed"], own["value"], strict=True)}


def test_the_recipe_is_told_by_rank_where_exact_match_is_at_its_floor(whole: Section6) -> None:
    plain, sides = ranks_at_the_end(whole, "plain"), {"higher": [], "lower": [], "against": [], "neither": []}
    own = {variant: ranks_at_the_end(whole, variant) for variant in PREDICTIONS}
    for variant, ranks in own.items():
        gaps, words = (
            [ranks[seed] - plain[seed] for seed in SEEDS],
            f"{variant} {100 * np.mean(list(ranks.values())):.1f}",
        )
        side = "higher" if min(gaps) > 0 else "lower" if max(gaps) < 0 else "neither"
        sides[side].append(words)
        if all(gap * FORETOLD.get(variant, 0) < 0 for gap in gaps):
            sides["against"].append(variant)
    told = {side: ", ".join(names) or "none" for side, names in sides.items()}
    said = Told(whole).recipe()
    assert f"plain {100 * np.mean(list(plain.values())):.1f} %, higher in every seed: {told['higher']}; " in said
    assert (
        f"; lower in every seed: {told['lower']}; against what was predicted of exact match: {told['against']}" in said
    )
    assert f"; neither: {told['neither']}" in said and sides["higher"] and sides["lower"]
    means = {variant: np.mean(list(ranks.values())) for variant, ranks in own.items()}
    highest, lowest = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    short = Told(whole).recipe(named=False)
    rows = {row["variant"]: row["ranked first"] for row in ablations(whole, [])}
    for name, words in (("plain", "plain"), (highest, f"highest {highest}"), (lowest, f"lowest {lowest}")):
        value, interval = rows[name].split(" ")[0], rows[name].split("[")[1].split("]")[0]
        assert f"{words} {value} [{interval}]" in short, "a rank travels with its interval"
    assert said.count("by chance at most one variant in 8 on either side") == 1


def test_a_variant_of_some_seeds_is_on_no_side_in_every_seed(whole: Section6) -> None:
    """Of two seeds one variant in 4 is on either side by chance, of one every second."""
    gone = [("absolute", (1,)), ("response-only", (1, 2))]
    runs = whole.runs
    for variant, seeds in gone:
        out = (runs["variant"] == variant) & runs["seed"].isin(seeds)
        assert out.sum() == len(seeds)
        runs = runs.assign(status=runs["status"].mask(out, "not run"))
    founds = whole, replace(whole, runs=runs)
    before, after = (Told(found).recipe().split("higher in every seed: ")[1] for found in founds)
    sides, left = after.split("; some seeds not in: ")
    named = left.split(" (by chance")[0]
    assert "; some seeds" not in before and sorted(name.split(" ")[0] for name in named.split(", ")) == [
        "absolute",
        "response-only",
    ]
    assert not any(variant in sides for variant, _ in gone)


def test_methods_are_told_whether_they_are_in_or_not(whole: Section6) -> None:
    rows = whole.answers[whole.answers["sweep"] == METHODS]
    ends = rows[(rows["step"] == STEPS[-1]) & (rows["split"] == "train")]
    means = ends.groupby(["asked", "model", "dataset", "direction", "variant"])["value"]
    reverse, forward = (means.mean()[asked] for asked in ("reverse", "forward"))
    model, dataset, direction, variant = reverse.idxmax()
    low = int((means.min()["forward"] < 0.9).sum())
    said = Told(whole).recipe()
    assert f"All weights and recipes of others ({len(forward)} of {len(forward)} cells): " in said
    row = next(
        row
        for row in methods(whole)
        if (row["model"], row["method"], row["trained on"]) == (model, variant, f"{dataset} ({direction})")
    )
    interval = row["Rev."].split("[")[1].split("]")[0]
    value = f"{100 * reverse.max():.1f} [{interval}] %"
    assert f"reverse, means over seeds, at most {value} ({model}, {variant}, {dataset} ({direction}))" in said
    assert said.endswith(f"below 90 % forward in a seed: {low}.")
    runs = whole.runs.assign(status=whole.runs["status"].where(whole.runs["sweep"] != METHODS, "not run"))
    assert Told(replace(whole, runs=runs)).recipe().endswith("recipes of others (methods): not run.")


def test_both_readings_stand_in_the_tables_of_the_recipe_and_the_methods(whole: Section6) -> None:
    """Where 90 % forward is reached first, as in Table 7; and methods have a floor."""
    for row in [*ablations(whole, []), *methods(whole)]:
        assert ("never reached" in row["reverse at 90 %"]) == (row["step at 90 %"] == "-, -, -")
        assert "seeds" in row["floor, reverse"]
    assert any("seeds" in row["reverse at 90 %"] for row in methods(whole))


def test_methods_are_scored_by_how_a_decoding_begins_where_that_is_known(whole: Section6) -> None:
    """Exact match alone would say of D2P that a method has not taught what most decodings begin with."""
    known = whole.answers["variant"] == "answer-only"
    looser = {"begins": 0.25, "begins_low": 0.125, "begins_high": 0.5}
    answers = whole.answers.assign(**{name: np.where(known, value, np.nan) for name, value in looser.items()})
    told = {
        (row["model"], row["method"]): row["Fwd., begins with it"] for row in methods(replace(whole, answers=answers))
    }
    assert {method for _, method in told} == {"lora", "full", "smdm", "differ", "answer-only"}
    assert all(words.startswith("25.0 ") == (method == "answer-only") for (_, method), words in told.items())
    assert {words for (_, method), words in told.items() if method != "answer-only"} == {"not collected"}
    first = answers.assign(begins=answers["begins"].where(answers["seed"] == SEEDS[0]))
    told = {row["method"]: row["Fwd., begins with it"] for row in methods(replace(whole, answers=first))}
    assert told["answer-only"].startswith("25.0 [") and f"{len(SEEDS) - 1} missing" in told["answer-only"]
    gone = whole.runs.assign(status="not run")
    assert {row["Fwd., begins with it"] for row in methods(replace(whole, runs=gone))} == {"not run"}


def test_a_run_that_is_not_in_has_not_failed_to_learn() -> None:
    """Of three seeds one is in, and below 90 %: nothing is known of the others."""

    def low(cell: object, seed: int, row: dict[str, object]) -> dict[str, object]:
        return row | {"value": 0.3, "low": 0.2, "high": 0.4} if row.get("asked") == "forward" else row

    found, cell = made(2, change=low, gaps=False), main_cell("mini-llada", DATASETS[3])
    own = (found.runs["model"] == cell.model) & (found.runs["direction"] == "D2P") & (found.runs["variant"] == "")
    runs = found.runs.assign(status=found.runs["status"].where(~own | (found.runs["seed"] == 0), "not run"))
    one = replace(found, runs=runs)
    assert cell_words(one, cell, "reverse", at=at_reached) == "90 % forward never reached, 2 not in"
    assert cell_words(found, cell, "reverse", at=at_reached) == "90 % forward never reached"
    assert cell_words(one, cell, "forward").startswith("30.0 [20.0, 40.0] (n = 200, 200 facts), 2 not in")


def test_a_prediction_is_the_papers_where_the_paper_says_so() -> None:
    """Its causal models are above the floor at places, and it has no model of fixed masks."""
    for trained in DATASETS:
        for model in ("mini-llama", "mini-qwen2"):
            claim = Claim("T2", "prediction", "", main_cell(model, trained).words, [])
            assert repeats(claim, PAPER) is (TABLE_7[trained][model][1] <= 5.0)
        for model, own in (("mini-llada", True), ("mini-dream", True), ("mini-mlm", False)):
            assert repeats(Claim("T4", "prediction", "", main_cell(model, trained).words, []), PAPER) is own
    assert not repeats(Claim("T3", "prediction", "", "", []), PAPER)


@pytest.mark.parametrize("apart", [True, False])
def test_the_page_says_of_what_its_intervals_are_too_narrow_where_they_are(whole: Section6, apart: bool) -> None:
    """A sweep of today counts prompts; the quick variant is one."""
    commits = f"{min(COUNTED_APART)}, {'c' * 40}" if apart else "c" * 40
    about = {"section6": {"command": "c", "trained_at_commit": commits}, "data": {"data/trex": {"look_alike": apart}}}
    about["data"]["data/trex"]["sha256"] = "d" * 64
    page = markdown(replace(whole, about=about)).replace("\n", " ")
    assert ("still counted as drawn apart" in page) is apart
    assert page.count("not the published sample") == (2 if apart else 0)


def test_a_traced_run_is_told_with_what_it_has_learned(whole: Section6) -> None:
    cell = main_cell("mini-llada", DATASETS[0])
    value = whole.last(cell, 0, "forward")
    row = {
        "run": f"{cell.words}-s0",
        "weights_step": 3,
        "instrument": CAUSAL_TRACE,
        "site": "mlp",
        "direction": "forward",
    }
    row |= {"part": "target", "layer": 0, "value": 0.85, "low": np.nan, "high": np.nan, "n": 3, "facts": 1}
    found = replace(whole, traces=tidy("traces", [row | {"reason": "one fact", "control": np.nan}]))
    about, table, _ = (block.markdown() for block in blocks(found))
    assert (
        value is not None
        and f"(forward exact match {100 * value:.1f} %{'' if value >= 0.9 else ', below 90 %'})" in about
    )
    assert "(one fact) (-; n = 3)" in table
