"""Tables of Section 6 that grow over several collections: what stays of an earlier one, and what must not."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from made_section6 import made as tables

from revprobe.report.paper.section6.frames import FINISHED, NOT_RUN, Section6, times_made, weights_of
from revprobe.report.paper.section6.kept import with_kept
from revprobe.report.paper.section6.page import markdown
from revprobe.report.paper.section6.plan import DROP_ORDER, MODELS
from revprobe.report.paper.section6.tables import methods

WEIGHTS, OTHER = "5" * 64, "6" * 64
SHA = {"tokenizer.json": "t" * 64}
LOST = ["section6", "section6-ablations"]


def collection(draw: int = 0, weights: str = WEIGHTS, commit: str = "a" * 40) -> Section6:
    """Made tables with what a collection says of configs, weights and origin."""
    found = tables(draw)
    runs = found.runs.assign(config=found.runs["run"] + " as planned", weights_of=found.runs["model"], weights=weights)
    made = {
        "status": FINISHED,
        "sha256": SHA | {"model.safetensors": weights},
        "corpus": {"told": "once", "sha256": "c"},
    }
    models = {name: dict(made) for name in set(runs["model"])}
    about: dict[str, Any] = {"statistics_version": 3}
    for name in DROP_ORDER:
        own = runs[runs["sweep"] == name]
        done = own["status"] == FINISHED
        about[name] = {
            "command": f"revprobe finetune {name}",
            "versions": [{"torch": commit[:1]}],
            "finished": sorted(own.loc[done, "run"]),
            "not_run": dict(zip(own.loc[~done, "run"], own.loc[~done, "status"], strict=True)),
            "trained_at_commit": commit,
        }
    return replace(found, runs=runs, models=models, about=about)


def by_one_file(found: Section6, file: str = "f" * 64) -> Section6:
    """With the hash of the file that its small models are made by."""
    return replace(found, about=found.about | {MODELS: {"file_sha256": file, "trained_at_commit": "c" * 40}})


def without(found: Section6, sweeps: list[str]) -> Section6:
    """The same where the folders of these sweeps are gone: nothing of them was run."""
    gone = found.runs["sweep"].isin(sweeps)
    runs = found.runs.assign(
        status=found.runs["status"].where(~gone, NOT_RUN),
        objective=found.runs["objective"].where(~gone, ""),
        steps=found.runs["steps"].where(~gone),
    )
    tables = {
        name: (table := getattr(found, name))[~table["sweep"].isin(sweeps)].reset_index(drop=True)
        for name in ("answers", "ranks", "signatures")
    }
    about = dict(found.about)
    for name in sweeps:
        names = [*about[name]["finished"], *about[name]["not_run"]]
        about[name] = about[name] | {"finished": [], "not_run": dict.fromkeys(names, NOT_RUN), "versions": []}
    return replace(found, runs=runs, about=about, **tables)


def test_runs_whose_folders_are_gone_stay_row_by_row() -> None:
    before = collection()
    again = with_kept(without(collection(commit="b" * 40), LOST), before)
    for name in ("answers", "ranks", "signatures"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(before, name))
    done = before.runs["status"] == FINISHED
    pd.testing.assert_frame_equal(again.runs[done], before.runs[done])
    assert set(again.runs.loc[~done & again.runs["sweep"].isin(LOST), "status"]) == {NOT_RUN}
    whole = replace(before, runs=again.runs, models={}, about={})
    assert markdown(replace(again, models={}, about={})) == markdown(whole), "as of tables that were never lost"
    assert again.about["section6"]["finished"] == before.about["section6"]["finished"]
    assert again.about["section6"]["trained_at_commit"] == f"{'a' * 40}, {'b' * 40}"
    assert again.about["section6-methods"]["trained_at_commit"] == "b" * 40
    assert again.about["section6"]["versions"] == [{"torch": "a"}]
    assert not set(again.about["section6"]["finished"]) & set(again.about["section6"]["not_run"])


def test_what_is_finished_here_is_what_counts() -> None:
    """The same run trained again, here with other numbers, takes the place of what was collected."""
    now, before = collection(1), collection(0)
    again = with_kept(now, before)
    done = set(now.runs.loc[now.runs["status"] == FINISHED, "run"])
    assert done and again.answers["run"].nunique() > len(done), "gaps of the second are filled by the first"
    ours = again.answers[again.answers["run"].isin(done)].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, now.answers)


@pytest.mark.parametrize(
    "what",
    ["config", "weights", "corpus", "tokenizer", "data", "no model, another file", "statistics", "unfinished"],
)
def test_what_is_another_run_does_not_stay(what: str) -> None:
    """Another config, a model of other bytes that nobody says is made the same way, numbers of another definition, or a
    run that had not ended."""
    now, before = without(collection(), LOST), collection()
    if what == "config":
        before = replace(before, runs=before.runs.assign(config="another"))
    if what == "weights":
        now = by_one_file(without(collection(weights=OTHER), LOST), "e" * 64)
        before = by_one_file(before)
    if what in ("corpus", "tokenizer"):
        change = (
            {"corpus": {"sha256": "another"}} if what == "corpus" else {"sha256": SHA | {"tokenizer.json": "another"}}
        )
        models = {name: record | change for name, record in now.models.items()}
        now, before = replace(by_one_file(now), models=models), by_one_file(collection(weights=OTHER))
    if what == "data":
        told = {"data/x.csv": {"sha256": "1", "look_alike": False}}
        before = replace(before, about=before.about | {"data": told})
        now = replace(now, about=now.about | {"data": {"data/x.csv": {"sha256": "2", "look_alike": False}}})
    if what == "no model, another file":
        models = {name: {"status": NOT_RUN} for name in now.models}
        now, before = replace(by_one_file(now, "e" * 64), models=models), by_one_file(before)
    if what == "statistics":
        before = replace(before, about=before.about | {"statistics_version": 2})
    if what == "unfinished":
        before = replace(before, runs=before.runs.assign(status="not finished"))
    again = with_kept(now, before)
    assert set(again.answers["sweep"]) == set(DROP_ORDER) - set(LOST)
    assert (again.runs.loc[again.runs["sweep"].isin(LOST), "status"] == NOT_RUN).all()


def test_what_newer_statistics_give_other_intervals_is_missing_in_runs_of_before() -> None:
    """Version 4 changed how far proportions exceed their controls, and nothing else that stands in the tables."""
    before = collection()
    now = without(before, LOST)
    newer = replace(now, about=now.about | {"statistics_version": 4})
    kept, same = with_kept(newer, before), with_kept(now, before)
    pd.testing.assert_frame_equal(kept.answers, same.answers)
    pd.testing.assert_frame_equal(kept.ranks, same.ranks)
    old = kept.signatures["sweep"].isin(LOST)
    shares = kept.signatures["measure"].str.endswith("_accuracy")
    assert (old & shares).any() and kept.signatures.loc[
        old & shares, ["excess_low", "excess_high"]
    ].isna().to_numpy().all()
    rest = kept.signatures[~(old & shares)].reset_index(drop=True)
    pd.testing.assert_frame_equal(rest, same.signatures[~(old & shares)].reset_index(drop=True))
    assert kept.about["statistics_version"] == 4
    # Nothing that was collected is told otherwise by 5 and 6.
    for version in (5, 6):
        about = now.about | {"statistics_version": version}
        today = with_kept(replace(now, about=about), replace(before, about=kept.about))
        pd.testing.assert_frame_equal(today.signatures, same.signatures)
    newest = with_kept(replace(now, about=now.about | {"statistics_version": 7}), before)
    assert not set(newest.answers["sweep"]) & set(LOST)


def test_runs_from_the_same_command_on_another_machine_stay_beside_those_made_here() -> None:
    """Both say which bytes they started from, and the page which runs start from the second."""
    full = {"answers": {}, "parameters": 1, "core_minutes": 1.0, "losses": [[1, 2.0]]}

    def of(weights: str) -> Section6:
        found = by_one_file(collection(weights=weights))
        return replace(found, models={name: record | full for name, record in found.models.items()})

    before, now = of(WEIGHTS), without(of(OTHER), LOST)
    again = with_kept(now, before)
    lost = again.runs["sweep"].isin(LOST) & (again.runs["status"] == FINISHED)
    done = again.runs["status"] == FINISHED
    assert lost.any() and set(again.runs.loc[lost, "weights"]) == {WEIGHTS}
    assert set(again.runs.loc[done & ~lost, "weights"]) == {OTHER}
    used = again.runs[done].groupby("weights_of")["weights"].agg(set)
    for name, record in again.models.items():
        assert [one["sha256"]["model.safetensors"] for one in times_made(record)] == sorted(used[name]), name
    told = [run for runs in again.from_made_again.values() for run in runs]
    both = {name for name, weights in used.items() if len(weights) == 2}
    assert sorted(told) == sorted(again.runs.loc[done & ~lost & again.runs["weights_of"].isin(both), "run"]) != []
    page = markdown(again)
    assert f"{len(told)} runs start from small models made again, to other bytes" in page
    assert "mini-llada, made again" in page and f"mini-llada of {OTHER[:16]}: " in page
    for column in ("Fwd.", "Rev.", "floor, reverse", "ranked first backwards"):
        marked = sum(map(int, re.findall(r"‡(\d)", " ".join(row[column] for row in methods(again)))))
        assert marked == len(told), f"each number of a method's cell is marked: {column}"
    third = with_kept(without(of("7" * 64), list(DROP_ORDER)), again)
    assert (third.runs["status"] == FINISHED).sum() == done.sum(), "nothing is lost on a third machine"
    assert third.models == again.models, "no run starts from what was made there"
    assert not before.from_made_again and "made again" not in markdown(before) and "‡" not in markdown(before)


def test_a_model_that_no_run_starts_from_any_more_is_not_told() -> None:
    """All runs were trained again here: so was the model, and its commit is the one of these runs."""
    before = by_one_file(collection())
    now = by_one_file(collection(weights=OTHER, commit="b" * 40))
    now = replace(now, about=now.about | {MODELS: now.about[MODELS] | {"trained_at_commit": "b" * 40}})
    again = with_kept(now, before)
    assert {weights_of(record) for record in again.models.values()} == {OTHER}
    assert not again.from_made_again and again.about[MODELS]["trained_at_commit"] == "b" * 40


def test_the_commits_of_kept_and_new_runs_stand_beside_each_other() -> None:
    before, now = by_one_file(collection()), without(by_one_file(collection(commit="b" * 40)), LOST)
    for name in LOST:
        now.about[name]["trained_at_commit"] = None
    about = with_kept(now, before).about
    assert [about[name]["trained_at_commit"] for name in LOST] == ["a" * 40] * len(LOST)
    assert about[MODELS]["trained_at_commit"] == "c" * 40


def test_models_that_are_not_made_here_are_told_as_they_were() -> None:
    now, before = without(collection(), LOST), collection()
    now = replace(now, models={name: {"status": NOT_RUN} for name in now.models})
    again = with_kept(now, before)
    assert again.models == before.models
    assert len(again.answers) == len(before.answers)


def test_a_first_collection_is_as_it_is() -> None:
    now = collection()
    assert with_kept(now, Section6()) is now or with_kept(now, Section6()).answers.equals(now.answers)
