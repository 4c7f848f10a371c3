"""One HTML file about a run or a sweep, the tidy `summary.csv` beside it, and `controls.csv` where there are some.

A tab each for the overview, routing, gradients, probability, the instruments (storage, edits and what else a run's
folder holds) and configuration; one checkpoint slider and the choice of layer and head drive three of them. A tab that
no run has a reading for is left out. What is chosen stands in the page's address. The page opens without a network and
shows what there is: a broken or unfinished run is listed with its reason. All files are written to temporary names and
renamed, so an interrupted report leaves the old one whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from ...atomic_files import written_whole
from ...errors import RevprobeError
from ...finetune.config.loading import dump_yaml
from ...finetune.runs.alerts import CROSSED, UNDEFINED
from ...finetune.runs.record import AXES, NOT_STARTED, RunRecord, tidy_summary
from ...probes.figures.controls import LOOKS
from ...probes.figures.training_curves import PANELS, VIEWS, measures_with_reasons, run_colours, signatures_figure
from ...probes.statistics.estimators import STATISTICS_VERSION
from ...progress import Progress, counted_together, shows_progress
from ..summary.alerts import alerts_table
from ..summary.controls import controls_frame, last_controls
from ..summary.finding import finding
from ..summary.tables import final_table, format_final_table, raw_with_ema
from .explorer_tabs import EXPLORED, explorer
from .finetune_sections import tuned_signatures
from .page import choice, controls, details, figure_data, figure_place, folded, page, paragraph, section, table
from .reading_tabs import reading_tabs

CONTROLS = "controls.csv"
TUNED = ("model", "dataset", "direction", "variant")  # what a sweep of fine-tunings varies beside AXES
LONG = 32  # more rows than this are folded away
MANY = 8  # more configurations, or runs that wait, than this are folded into one line
WHAT = (
    "For each checkpoint of each run this page shows whether a language model that saw a relation in one direction "
    "answers the reversed question, and two signatures of why: whether attention routes to the evidence alike in both "
    "directions, and whether the two gradients agree. Every number stands beside its 95 % interval over "
    "facts and its control, the same measurement with the facts shuffled."
)
KINDS = (
    "Kinds of pairs: same_target asks for the same target from the same evidence in opposite order (masked models); "
    "swapped exchanges the roles (autoregressive models). The two answer different questions."
)
COUNTS = "n pairs, n facts: one number where the probes share them, else those of answer / attention / gradient."
AGAINST = (
    "Untrained twin: the same configuration with initial weights. Neighbour: the token beside the evidence "
    "(attention), or beside the reverse target (gradient). Sink: the position that each head attends to most, evidence "
    "aside. Reading - control is paired over the facts that both have. An untrained twin may stand high: what it shows "
    "needs no training."
)
IDENTITY = (
    "For ALiBi, reverse = forward and correlation = 1 are identities of its symmetric position bias in a one-layer "
    "model, not findings."
)


@shows_progress("parts")
def write_report(
    runs: Sequence[RunRecord],
    path: str | Path,
    *,
    title: str = "revprobe report",
    sections: Sequence[Markup] = (),
    progress: Progress | bool | None = None,
) -> Path:
    """Write the report to `path` and `summary.csv` beside it, each whole or not at all.

    Where a run has controls beside shuffled facts, `controls.csv` as well; where none has, an older one is removed.

    Args:
        sections: made with `section` and the other parts of `page.py`, shown after the list of runs.
        progress: a bar on a terminal or in a notebook (None, True), nothing (False), or called with (done, in all).
            Each reading is dealt with once for the numbers, and most once more for the tabs that the slider drives.
    Raises: RevprobeError, when the folder cannot be written or two runs share a name.
    """
    path = Path(path)
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise RevprobeError(f"two runs are called {twice[0]!r}: expected different names, rename one of their folders")
    explored = sum(reading.name in EXPLORED for run in runs for reading in run.readings)
    watch = counted_together(sum(len(run.readings) for run in runs) + explored, progress)
    measures = {run.name: run.label(measures_with_reasons(watch(run.readings))) for run in runs}
    summary = tidy_summary(measures.values())
    held_against = controls_frame(runs)
    tabs = explorer(runs, watch=watch)
    document = _document(title, runs, summary, measures, held_against, sections, tabs, path.parent)
    texts = {path.with_name("summary.csv"): summary.to_csv(index=False, lineterminator="\n"), path: document}
    if len(held_against):
        texts[path.with_name(CONTROLS)] = held_against.to_csv(index=False, lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Both under temporary names first, so that a full disk leaves both old ones.
        with ExitStack() as renamed_at_the_end:
            for file, text in texts.items():
                part = renamed_at_the_end.enter_context(written_whole(file))
                part.write_text(text, encoding="utf-8", newline="")
        if not len(held_against):
            path.with_name(CONTROLS).unlink(missing_ok=True)
    except OSError as error:
        raise RevprobeError(
            f"cannot write the report in {str(path.parent)!r}: {error}; expected a writable folder"
        ) from error
    return path


def _document(
    title: str,
    runs: Sequence[RunRecord],
    summary: pd.DataFrame,
    measures: Mapping[str, pd.DataFrame],
    held_against: pd.DataFrame,
    sections: Sequence[Markup],
    explorer_tabs: tuple[Markup, dict[str, list[Markup]]],
    folder: Path,
) -> str:
    """The page: what it is about, and a tab for each side of the runs; one without data says what fills it."""
    listed = section("runs", "Runs", *_runs_listed(runs))
    colours: dict[str, str] = {}
    if summary.empty:
        why = "There are no runs here yet." if not runs else "No run has a reading yet."
        overview = [paragraph(f"Nothing to show: {why}"), listed, *sections]
    else:
        # What came out, the figure of it, and only then the tables.
        measured = pd.concat([part for part in measures.values() if len(part)], ignore_index=True)
        overview = [section("finding", "Finding", *(paragraph(text) for text in finding(final_table(summary))))]
        overview += _alerts(runs)
        signatures, colours = _signatures_section(runs, measured, held_against)
        overview += [signatures, _final_section(runs, summary), *sections]
        overview += [_controls_section(held_against)] if len(held_against) else []
        overview.append(listed)
    chooser, explored = explorer_tabs
    tabs = [
        ("overview", "overview", [*overview, _warnings(runs)]),
        *((name, name, parts) for name, parts in explored.items()),
        *reading_tabs(runs, folder),
        ("configuration", "configuration", [_configs(runs), _versions(runs)]),
    ]
    return page(title, WHAT, tabs, chooser=chooser, colours=colours)


def _runs_listed(runs: Sequence[RunRecord]) -> list[Markup]:
    """Every run in a table; of a sweep that has begun, those that wait are folded into one line."""
    waiting = [run for run in runs if run.problem == NOT_STARTED]
    if len(waiting) <= MANY:
        return [_runs_table(runs)]
    names = paragraph(", ".join(run.name for run in waiting))
    begun = [run for run in runs if run.problem != NOT_STARTED]
    table_of_begun = [_runs_table(begun)] if begun else []
    return [*table_of_begun, folded(f"{len(waiting)} of {len(runs)} runs are not started yet", names)]


def _runs_table(runs: Sequence[RunRecord]) -> Markup:
    rows, problems = [], []
    # What no run has is no column: a fine-tuning has no length and no encoding, but a model and a dataset.
    of = [axis for axis in (*TUNED, *AXES) if any(run.axes.get(axis) not in (None, "") for run in runs)]
    for place, run in enumerate(runs):
        steps = run.readings.steps
        if run.problem:
            problems.append(place)
        shown = f"{len(steps)} ({steps[0]:,} to {steps[-1]:,})" if steps else str(min(len(run.readings), 1))
        axes = ["-" if run.axes.get(axis) is None else run.axes[axis] for axis in of]
        rows.append([run.name, *axes, shown, run.problem or "complete"])
    names = [axis.replace("_", " ") for axis in of]
    headings = ["run", *names, "checkpoints (steps)", "state"]
    return table(headings, rows, problems=problems) if rows else paragraph("There are none.")


def _final_section(runs: Sequence[RunRecord], summary: pd.DataFrame) -> Markup:
    shown = raw_with_ema(format_final_table(final_table(summary)))
    broken = {run.name for run in runs if run.problem}
    problems = [place for place, name in enumerate(shown["run"]) if name in broken]
    notes = [KINDS, COUNTS + " Marked rows are of unfinished runs, at their last checkpoint." * bool(problems)]
    if any(run.axes.get("position_encoding") == "alibi" for run in runs):
        notes.append(IDENTITY)
    body = table(list(shown.columns), shown.to_numpy().tolist(), problems=problems)
    return section("final", "Last checkpoint", body, *(paragraph(note, note=True) for note in notes))


def _signatures_section(
    runs: Sequence[RunRecord], measures: pd.DataFrame, held_against: pd.DataFrame
) -> tuple[Markup, dict[str, str]]:
    """The figure of the signatures with the choices of what it shows, and the colours of its lines."""
    drawn_runs = set(measures["run"])
    if all("dataset" in run.axes for run in runs if run.name in drawn_runs):
        return tuned_signatures(runs, measures, held_against)
    figure = signatures_figure(measures, buttons=False, controls=held_against)
    drawn = {panel.measure for panel in PANELS}
    selects = []
    if {"raw", "ema"} <= set(measures["weights"].dropna()):
        selects.append(choice("choose-weights", "weights", list(VIEWS.items())))
    for axis in ("length", "run"):
        values = list(dict.fromkeys(str(value) for value in measures[axis]))
        if len(values) > 1:
            # Lengths are different tasks: a sweep opens on the first, not on all of them over each other.
            first = values[0] if axis == "length" else "all"
            selects.append(choice(f"choose-{axis}", axis, [("all", "all"), *((v, v) for v in values)], chosen=first))
    against = list(dict.fromkeys(held_against.loc[held_against["measure"].isin(drawn), "control"]))
    if against:
        options = [("all", "all"), *((name, LOOKS[name].words) for name in against), ("none", "shuffled facts alone")]
        selects.append(choice("choose-against", "controls", options))
    note = "Colour: position encoding (ARM: autoregressive model). A click on a legend entry hides its run."
    parts = [controls(*selects), figure_place("signatures"), figure_data("signatures", figure)]
    colours = {f"run {name}": colour for name, colour in run_colours(measures).items()}
    return section("signatures", "The three signatures over training", *parts, paragraph(note, note=True)), colours


def _alerts(runs: Sequence[RunRecord]) -> list[Markup]:
    """What the configs' alerts come to at the last checkpoints; nothing where there are none."""
    shown = alerts_table(runs)
    if shown.empty:
        return []
    problems = [place for place, state in enumerate(shown["state"]) if state in (CROSSED, UNDEFINED)]
    said = f"{len(problems)} of {len(shown)} alerts are crossed, or undefined, at the last checkpoints."
    body = table(list(shown.columns), shown.to_numpy().tolist(), problems=problems)
    return [section("alerts", "Alerts", paragraph(said), body if len(shown) <= LONG else folded(said, body))]


def _controls_section(held_against: pd.DataFrame) -> Markup:
    shown = last_controls(held_against)
    body = table(list(shown.columns), shown.to_numpy().tolist())
    body = body if len(shown) <= LONG else folded(f"{len(shown)} controls", body)
    return section("controls", "Controls beside shuffled facts, last checkpoint", body, paragraph(AGAINST, note=True))


def _warnings(runs: Sequence[RunRecord]) -> Markup:
    rows: list[list[object]] = []
    for run in runs:
        counts: dict[tuple[str, str, str], list[int]] = {}  # of each checkpoint that has some
        for reading in run.readings:
            for reason, count in reading.undefined.items():
                place = (reading.name, str(reading.meta.get("weights") or "-"), reason)
                counts.setdefault(place, []).append(count)
        rows += [[run.name, *place, f"{sum(found):,}", len(found)] for place, found in counts.items() if sum(found)]
    headings = ["run", "probe", "weights", "reason", "undefined points", "checkpoints"]
    undefined = table(headings, rows) if rows else paragraph("No point is undefined.")
    undefined = undefined if len(rows) <= LONG else folded(f"{len(rows)} kinds of undefined points", undefined)
    said = [f"{run.name}: {warning}" for run in runs for warning in _run_warnings(run)]
    return section("undefined", "Undefined points and warnings", undefined, *(paragraph(text) for text in said))


def _run_warnings(run: RunRecord) -> list[str]:
    """What makes a run's numbers incomparable or incomplete, found in its readings' meta."""
    # Of a run without a reading the table of runs says all there is to say.
    found = [run.problem] if run.problem and len(run.readings) else []
    other = [reading.statistics_version for reading in run.readings if reading.recomputed]
    if other:
        versions = ", ".join(str(number) for number in sorted(set(other)))
        found.append(
            f"{len(other)} readings were written under other statistics (version {versions}); their intervals and "
            f"controls were worked out again from their rows, under version {STATISTICS_VERSION}"
        )
    for caution in dict.fromkeys(f"{r.name}: {r.caution}" for r in run.readings if r.caution):
        found.append(caution)
    steps = run.readings.steps
    if steps and steps[0] != 0:
        found.append(f"no reading of the untrained model: the first is at step {steps[0]:,}")
    for key, words in (("pairs", "sets of pairs"), ("dtype", "dtypes"), ("versions", "sets of library versions")):
        by_probe: dict[str, set[str]] = {}
        for reading in run.readings:
            by_probe.setdefault(reading.name, set()).add(json.dumps(reading.meta.get(key), sort_keys=True, default=str))
        for probe, values in by_probe.items():
            if len(values) > 1:
                found.append(f"{probe} was taken with {len(values)} {words}; its checkpoints are not comparable")
    return found


def _configs(runs: Sequence[RunRecord]) -> Markup:
    shown = []
    for run in runs:
        # Through JSON first: YAML refuses paths and numpy numbers, and would fail the report for one of them.
        plain = json.loads(json.dumps(dict(run.config), default=str))
        shown.append(details(run.name, dump_yaml(plain, allow_unicode=True, width=110)))
    if len(shown) > MANY:
        shown = [folded(f"{len(shown)} configurations", *shown)]
    return section("configuration", "Configuration", *(shown or [paragraph("There are no runs here yet.")]))


def _versions(runs: Sequence[RunRecord]) -> Markup:
    found: dict[str, list[str]] = {}
    for run in runs:
        for reading in run.readings:
            for key in ("versions", "dtype", "threads", "statistic"):
                stated = reading.meta.get(key)
                named = stated if isinstance(stated, Mapping) else {} if stated is None else {key: stated}
                for name, value in named.items():
                    if str(value) not in found.setdefault(str(name), []):
                        found[str(name)].append(str(value))
    rows = [[name, "; ".join(values)] for name, values in found.items()]
    shown = table(["name", "value"], rows) if rows else paragraph("No run has a reading yet.")
    return section("versions", "Versions and settings", shown)
