"""Collect Section 6 in miniature, finished or not, into examples/results/, and draw its page and README's lines.

    python examples/collect_section6.py runs --data data

RUNS has the folders section6, section6-ablations, section6-methods and mini-models, as `revprobe reproduce section6`
leaves them. A run that is not finished, one that is being trained too, stands in the tables as such, so the command can
be given again while the sweeps go on; it reads and never writes a run. Runs that were collected before and whose
folders are gone stay, as long as their config is the planned one and the file that the small models are made by is the
same. Page and lines come from the tables alone:

    python examples/collect_section6.py --page-only

section6.html beside it is the same page in one file, to open; it is not committed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from collect_negative_evidence import predictions_since
from collect_results import RESULTS, commit_of
from results_table import section_of, with_section

from revprobe.atomic_files import write_text
from revprobe.finetune.config.finetuning import FinetuneSweepConfig
from revprobe.finetune.config.loading import find_config, load_config
from revprobe.finetune.config.places import DATA
from revprobe.finetune.config.pretraining import PretrainSweepConfig
from revprobe.report.html.section6 import write_html
from revprobe.report.paper.reproduce import records
from revprobe.report.paper.section6.collect import collect
from revprobe.report.paper.section6.frames import FINISHED, Section6
from revprobe.report.paper.section6.kept import with_kept
from revprobe.report.paper.section6.page import write_markdown
from revprobe.report.paper.section6.plan import DROP_ORDER, MODELS
from revprobe.report.paper.section6.sentences import Told

BEGIN = "<!-- drawn by examples/collect_section6.py -->"


def commits_of(given: Sequence[str]) -> dict[str, str]:
    """What each sweep, and the small models, were trained with: "COMMIT" for all, "NAME=COMMIT" for one of them."""
    found: dict[str, str] = {}
    for one in given:
        name, equals, commit = one.rpartition("=")
        if equals and name not in (*DROP_ORDER, MODELS):
            raise SystemExit(
                f"--commit {one}: expected a commit, or one of {', '.join((*DROP_ORDER, MODELS))} before ="
            )
        found |= {name: commit} if equals else dict.fromkeys((*DROP_ORDER, MODELS), commit)
    return found


def collected(folders: dict[str, Path], data: Path, commits: Mapping[str, str]) -> Section6:
    """Every planned run and model, with the commits and the files that say where the numbers come from.

    Args:
        folders: of each sweep and of the small models, by name.
        data: the folder that the plans call data.
        commits: what runs and models that are finished there were trained with, where it is known (`commits_of`).
    """
    sweeps = {name: (load_config(name, FinetuneSweepConfig), folders[name]) for name in DROP_ORDER}
    models = (load_config(MODELS, PretrainSweepConfig), folders[MODELS])
    found = collect(sweeps, models, data, lambda text: print(text, flush=True))
    about: dict[str, Any] = {"collected": datetime.now(UTC).date().isoformat(), "collected_at_commit": commit_of()}
    about |= found.about
    here = {name: bool(about[name]["finished"]) for name in DROP_ORDER}
    here[MODELS] = any(record["status"] == FINISHED for record in found.models.values())
    for name, any_here in here.items():
        known = commits.get(name) if any_here else None
        about[name] |= {"trained_at_commit": known} | predictions_since(find_config(name))
    return replace(found, about=about)


def lost_runs(before: Section6, now: Section6) -> list[str]:
    """The runs that were in and are no more, as SWEEP/NAME; those that are planned no more are no loss."""
    names = [[f"{row['sweep']}/{row['run']}" for row in records(one.runs)] for one in (before, now)]
    there = [one.runs["status"].eq(FINISHED).tolist() for one in (before, now)]
    old, new = ({name for name, done in zip(*both, strict=True) if done} for both in zip(names, there, strict=True))
    return sorted((old & {*names[1]}) - new)


def checked_section(found: Section6) -> str:
    """README's lines about Section 6, between their two marks."""
    return section_of(Told(found).short(), BEGIN)


def main() -> None:
    """Collect what is there, then draw the page and, of the committed tables, README's lines from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="?", default=Path("runs"), help="folder of the sweeps; runs by default"
    )
    parser.add_argument("--models", type=Path, help="folder of the small models; RUNS/mini-models by default")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder of the files that were trained on; data by default"
    )
    parser.add_argument(
        "--commit",
        action="append",
        default=[],
        help="what all in RUNS was trained with, or NAME=COMMIT for a sweep or mini-models; of what is kept it stays",
    )
    parser.add_argument("--drop", action="store_true", help="lose runs that were collected before and are others now")
    parser.add_argument("--page-only", action="store_true", help="draw page and lines of what has been collected")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if not asked.page_only:
        folders = {name: asked.runs / name for name in DROP_ORDER} | {MODELS: asked.models or asked.runs / MODELS}
        if not any(folder.is_dir() for folder in folders.values()):
            raise SystemExit(f"none of {', '.join(map(str, folders.values()))} is there; give the folder of the sweeps")
        before = Section6.read(asked.out)
        found = with_kept(collected(folders, asked.data, commits_of(asked.commit)), before)
        if (lost := lost_runs(before, found)) and not asked.drop:
            raise SystemExit(
                f"{len(lost)} runs that were collected before would be lost ({lost[0]} among them), as their config, "
                "data, small model or statistics are others now; give their folders, or --drop to lose them"
            )
        found.write(asked.out)
        statuses = found.runs["status"]
        print(f"{(statuses == FINISHED).sum()} runs finished, {(statuses != FINISHED).sum()} not")
    found = Section6.read(asked.out)
    print(write_markdown(found, asked.out))
    print(write_html(found, asked.out))
    if asked.out == RESULTS:
        readme = RESULTS.parents[1] / "README.md"
        write_text(readme, with_section(readme.read_text(encoding="utf-8"), checked_section(found)))
        print(readme)


if __name__ == "__main__":
    main()
