"""Tables of Section 6 that grow over several collections: what stays of an earlier one, and what must not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from made_section6 import made

from revprobe.report.paper.section6.frames import FINISHED, NOT_RUN, Section6
from revprobe.report.paper.section6.kept import with_kept
from revprobe.report.paper.section6.page import markdown
from revprobe.report.paper.section6.plan import DROP_ORDER

WEIGHTS = "5" * 64
LOST = ["section6", "section6-ablations"]


def collection(draw: int = 0, weights: str = WEIGHTS, commit: str = "a" * 40) -> Section6:
    """Made tables with what a collection says of configs, weights and origin."""
    found = made(draw)
    runs = found.runs.assign(config=found.runs["run"] + " as planned", weights_of=found.runs["model"], weights=weights)
    models = {name: {"status": FINISHED, "sha256": {"model.safetensors": weights}} for name in set(runs["model"])}
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


@pytest.mark.parametrize("what", ["config", "weights", "statistics", "unfinished"])
def test_what_is_another_run_does_not_stay(what: str) -> None:
    """Another config, a model of other bytes, numbers of another definition, or a run that had not ended."""
    now, before = without(collection(), LOST), collection()
    if what == "config":
        before = replace(before, runs=before.runs.assign(config="another"))
    if what == "weights":
        now = without(collection(weights="6" * 64), LOST)
    if what == "statistics":
        before = replace(before, about=before.about | {"statistics_version": 2})
    if what == "unfinished":
        before = replace(before, runs=before.runs.assign(status="not finished"))
    again = with_kept(now, before)
    assert set(again.answers["sweep"]) == set(DROP_ORDER) - set(LOST)
    assert (again.runs.loc[again.runs["sweep"].isin(LOST), "status"] == NOT_RUN).all()


def test_models_that_are_not_made_here_are_told_as_they_were() -> None:
    now, before = without(collection(), LOST), collection()
    now = replace(now, models={name: {"status": NOT_RUN} for name in now.models})
    again = with_kept(now, before)
    assert again.models == before.models
    assert len(again.answers) == len(before.answers)


def test_a_first_collection_is_as_it_is() -> None:
    now = collection()
    assert with_kept(now, Section6()) is now or with_kept(now, Section6()).answers.equals(now.answers)
