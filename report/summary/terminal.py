"""What the terminal shows of finished work: numbers beside their intervals and controls, as tables that fit."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...finetune.runs.record import TEXTS
from ...probes.figures.theme import difference_text, interval_text
from ...probes.readings.readings import Readings
from .controls import reading_controls
from .fitted import FittedTable, Narrow, stacked
from .tables import MEASURES, final_table, last_checkpoints

# Where output is no terminal (a log), lines may be long: a table folded to 80 columns is unreadable.
_LOG_WIDTH = 200
# A number's columns in a table of measures, by the prefix of the value's own.
_STACKED = {"": ("value", "low", "high"), "control": ("", "_low", "_high"), "excess": ("", "_low", "_high")}
# Where the terminal is narrow: which columns stand in cells of others, and which below the table.
OF_EVALUATION = Narrow(
    {
        "facts": ("asked", "{}"),
        "wordings": ("asked", "{} wordings"),
        "control [95 %]": ("exact match (%) [95 %]", "ctrl {}"),
    },
    notes=("wrong answers", "undefined"),
    named=("asked", "facts"),
)
_OF_CONTROLS = Narrow(
    {"weights": ("measure", "{}"), "model": ("control", "of {}"), "n facts": ("n pairs", "{} facts")},
    notes=("reason",),
    named=("measure", "control"),
)
# Columns a terminal needs to show all six measures beside each other.
_WIDE = 108


def make_console() -> Console:
    """A console that is wide where output goes to a file, and prints brackets in paths as they are."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=_LOG_WIDTH)


def readings_table(readings: Readings | pd.DataFrame, title: str) -> Table:
    """One row per number of some readings, or of their measures, with intervals and controls."""
    rows = []
    for row in _measures(readings).to_dict("records"):
        value = interval_text(row["value"], row["low"], row["high"])
        null = [row.get(f"control{end}", float("nan")) for end in ("", "_low", "_high")]
        control = "-" if pd.isna(null[0]) else interval_text(*null)
        shown = {"measure": row["measure"].replace("_", " "), "value [95 %]": value, "control [95 %]": control}
        # What the finding rests on; there is none without a control.
        excess = [row.get(name, float("nan")) for name in ("excess", "excess_low", "excess_high")]
        shown["value - control [95 %]"] = "-" if pd.isna(excess[0]) else difference_text(*excess)
        shown["n"], shown["facts"] = row["n"], row["facts"]
        shown |= {"weights": row["weights"] or "-", "kind": row["kind"].replace("_", " ")}
        # Why pairs have no number, and what a number must be read with.
        rows.append(shown | {"note": "; ".join(filter(None, [row["reason"], row["caution"]])) or "-"})
    return text_table(pd.DataFrame(rows), title)


def _measures(readings: Readings | pd.DataFrame) -> pd.DataFrame:
    return readings.measures() if isinstance(readings, Readings) else readings


def print_readings(readings: Readings | pd.DataFrame, title: str, console: Console) -> None:
    """`readings_table`; where the terminal is narrow, intervals below their values and the notes below the table."""
    if console.width >= _WIDE:
        console.print(readings_table(readings, title))
        return
    rows, notes = [], []
    for row in _measures(readings).to_dict("records"):
        numbers = [interval_text(*(row[f"{name}{end}"] for end in ends)) for name, ends in _STACKED.items()]
        shown = [stacked(text) if not text.startswith("undefined") else "-" for text in numbers]
        shown[0] = "undefined" if pd.isna(row["value"]) else shown[0]
        read = ", ".join(filter(None, [row["weights"], row["kind"].replace("_", " ")]))
        name = row["measure"].replace("_", "\n", 1).replace("_", " ")
        rows.append([f"{name}\n{read}", *shown, f"{row['n']:,} pairs\n{row['facts']:,} facts"])
        said = "; ".join(filter(None, [row["reason"], row["caution"]]))
        notes += [f"{row['measure'].replace('_', ' ')}: {said}"] if said else []
    frame = pd.DataFrame(rows, columns=["measure", "value [95 %]", "control [95 %]", "value - control [95 %]", "n"])
    console.print(text_table(frame, title))
    for note in notes:
        console.print(note)


def controls_table(readings: Readings, title: str) -> Table:
    """One row per control of the readings that were asked for some, with the paired difference to each."""
    return text_table(reading_controls(readings), title, _OF_CONTROLS)


def read_as(readings: Readings) -> str:
    """Which way a model was read, by its readings: "causal", "masked, in blocks of 4" or "masked, bidirectional"."""
    meta = next((reading.meta for reading in readings if "objective" in reading.meta), {})
    if meta.get("objective") != "masked":
        return str(meta.get("objective", "unknown"))
    size = meta.get("block_size")
    return "masked, bidirectional" if size is None else f"masked, in blocks of {size}"


def read_summary(folder: Path) -> pd.DataFrame:
    """The summary.csv a report has just left: reading every run's files again would take as long as the report."""
    # A run may be called 0010, which is no number.
    texts = dict.fromkeys(TEXTS, str)
    return pd.read_csv(folder / "summary.csv", keep_default_na=False, na_values=[""], dtype=texts)


def print_final(summary: pd.DataFrame, console: Console) -> None:
    """The last checkpoint of each run, one row per run and weights; a narrow terminal leaves out the probabilities."""
    if not len(summary):
        return
    wide = console.width >= _WIDE
    shown = [measure for measure in MEASURES if wide or not measure.endswith("probability")]
    table = Table(
        title="last checkpoint: value, 95 % interval, control, n (pairs / facts)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.padding = (0, 1, 0, 0)
    for heading in ("run", *(MEASURES[measure] for measure in shown)):
        table.add_column(heading, overflow="fold")
    for row in final_table(summary).to_dict("records"):
        # Each cell on four lines: value, interval, control, sample.
        cells = [f"{row['run']}\n{row['weights']}, step {row['step']}\n{str(row['kind']).replace('_', ' ')}"]
        for measure in shown:
            numbers = [row[f"{measure}{part}"] for part in ("", "_low", "_high", "_control")]
            sizes = [row[f"{measure}{part}"] for part in ("_n", "_facts")]
            if pd.isna(sizes[0]):  # never measured, which is not undefined
                cells.append("-")
                continue
            text = interval_text(*numbers, percent=measure.endswith("accuracy"))
            size = "" if pd.isna(sizes[1]) else "\nn {:,.0f} / {:,.0f}".format(*sizes)
            cells.append(text.replace(" [", "\n[").replace(" (control ", "\nctrl ").replace(")", "") + size)
        table.add_row(*map(Text, cells))
    console.print(table)
    if not wide:
        console.print("probabilities: see the report, or widen the terminal")
    last = last_checkpoints(summary)
    for column, said in (("reason", last[last["value"].isna()]), ("caution", last)):
        if column not in summary:  # files of earlier statistics
            continue
        for words, part in said.dropna(subset=[column]).groupby(column):
            if words:
                measures = sorted({str(name).replace("_", " ") for name in part["measure"]})
                console.print(f"{', '.join(measures)}: {words!s}")


def text_table(frame: pd.DataFrame, title: str, narrow: Narrow | None = None) -> FittedTable:
    """A data frame of text as a table that fits where it is printed; `narrow` says what it gives up there."""
    return FittedTable(frame, title, narrow)
