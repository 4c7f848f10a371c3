"""The tables that the page of Section 6 is drawn from, and how they are kept: nothing here has seen a run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ....atomic_files import write_text, written_whole
from ..comparisons import passes
from .plan import LEARNED, Cell

FINISHED, NOT_FINISHED, NOT_RUN = "finished", "not finished", "not run"
AXES = ["sweep", "model", "dataset", "direction", "variant", "seed"]
RUNS = [*AXES, "run", "objective", "steps", "status", "config", "weights_of", "weights"]
_NUMBERS = ["value", "low", "high", "n", "facts", "control", "undefined", "reason", "caution"]
KINDS = ["end", "prompt", "own_entity", "other_entity", "malformed"]
_ASKED = ["step", "asked", "split", "templates"]
BEGINS = {"value": "begins", "low": "begins_low", "high": "begins_high"}  # the looser score's, missing in older runs
ANSWERS = [*AXES, "run", *_ASKED, *_NUMBERS, *KINDS, *BEGINS.values()]
RANKS = [*AXES, "run", *_ASKED, *_NUMBERS, "candidates", "texts", "chance"]
RANKS += ["reciprocal_rank", "reciprocal_rank_low", "reciprocal_rank_high"]
SIGNATURES = [*AXES, "run", "step", "kind", "measure", *_NUMBERS, "excess", "excess_low", "excess_high"]
TWINS = [*AXES, "run", "config", "kind", "measure", *_NUMBERS]
TRACES = ["run", "weights_step", "instrument", "site", "direction", "step", "part", "layer", *_NUMBERS]
TRACES += ["excess", "excess_low", "excess_high"]
TABLES = {"runs": RUNS, "answers": ANSWERS, "ranks": RANKS, "signatures": SIGNATURES}
TABLES |= {"twins": TWINS, "traces": TRACES}
_WHOLE = {"seed", "steps", "step", "weights_step", "layer", "n", "facts", "undefined", "candidates", *KINDS}
_WHOLE |= {"texts"}
_TEXT = {"sweep", "model", "dataset", "direction", "variant", "run", "objective", "status", "asked", "split"}
_TEXT |= {"templates", "reason", "caution", "kind", "measure", "config", "weights_of", "weights"}
_TEXT |= {"instrument", "site", "part"}
WEIGHTS = "model.safetensors"  # among a small model's files
DIGITS = 7  # significant ones: the ends of an interval stay apart, the rest is noise and triples a file


def tidy(name: str, rows: list[dict[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Rows as one of TABLES: its columns, their types, in one order, so that equal numbers are equal bytes."""
    columns = TABLES[name]
    table = pd.DataFrame(rows, columns=columns)
    for column in columns:
        if column in _WHOLE:
            table[column] = pd.to_numeric(table[column]).astype("Int64")
        elif column in _TEXT:
            table[column] = table[column].astype(object).where(table[column].notna(), "").astype(str)
        else:
            table[column] = pd.to_numeric(table[column]).astype("float64").map(_rounded)
    keys = [key for key in (*AXES, "run", "step", "asked", "split", "measure") if key in columns]
    keys += [key for key in ("instrument", "site", "part", "layer") if key in columns]
    return table.sort_values(keys, ignore_index=True, kind="stable")


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class Section6:
    """The tables, the small models' records, and where all of it comes from; empty where nothing was collected.

    Attributes:
        runs: a row for each planned run: its axes, objective, steps and status ("finished", "not run", or why); the
            sha256 of its planned config, its small model's name, and the sha256 of the weights it started from.
        answers: exact match, a row for each run, step, side asked and split; `KINDS` count what wrong answers are, and
            `BEGINS` is the looser score of the same decodings.
        ranks: the right answer's rank among all candidates, likewise: `value` is the share ranked first; where `texts`
            is missing, the candidates are texts, else the entities that so many texts name.
        signatures: the three probes by run and step, each beside its control.
        twins: the same of an untrained twin of each run's model, over the run's pairs (`twin_readings`).
        traces: what was read inside one trained run (`traced`), by instrument, direction, step, part and layer.
        models: of each small model what it came to, or why it is not finished.
        about: commands, versions, data, and what else says where the numbers come from.
    """

    runs: pd.DataFrame = field(default_factory=lambda: tidy("runs", []))
    answers: pd.DataFrame = field(default_factory=lambda: tidy("answers", []))
    ranks: pd.DataFrame = field(default_factory=lambda: tidy("ranks", []))
    signatures: pd.DataFrame = field(default_factory=lambda: tidy("signatures", []))
    twins: pd.DataFrame = field(default_factory=lambda: tidy("twins", []))
    traces: pd.DataFrame = field(default_factory=lambda: tidy("traces", []))
    models: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Section6:
        """What `write` left; tables that are not there are empty."""
        files = {name: folder / f"section6_{name}.parquet" for name in TABLES}
        tables: dict[str, Any] = {
            name: tidy(name, pd.read_parquet(file)) for name, file in files.items() if file.is_file()
        }
        texts = {"models": folder / "section6_models.json", "about": folder / "section6.json"}
        told = {name: json.loads(file.read_text("utf-8")) for name, file in texts.items() if file.is_file()}
        return cls(**tables, **told)

    def write(self, folder: Path) -> list[Path]:
        """Each table as a parquet file, models and origin as JSON; returns them."""
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name in TABLES:
            written.append(folder / f"section6_{name}.parquet")
            with written_whole(written[-1]) as part:
                getattr(self, name).to_parquet(part, index=False, compression="zstd", compression_level=19)
        for name, value in (("section6_models", self.models), ("section6", self.about)):
            written.append(folder / f"{name}.json")
            write_text(written[-1], json.dumps(value, indent=2) + "\n")  # in the plan's order, as the page
        return written

    # ---- looking things up ----

    @cached_property
    def _status(self) -> dict[tuple[Cell, int], tuple[str, int | None]]:
        return {
            (_cell(row), int(row["seed"])): (row["status"], None if pd.isna(row["steps"]) else int(row["steps"]))
            for row in self.runs.to_dict("records")
        }

    def status(self, cell: Cell, seed: int) -> str:
        """ "finished", "not run", or why the run is not finished."""
        return self._status.get((cell, seed), (NOT_RUN, None))[0]

    def steps(self, cell: Cell, seed: int) -> int | None:
        """A finished run's last step."""
        status, steps = self._status.get((cell, seed), (NOT_RUN, None))
        return steps if status == FINISHED else None

    def run(self, cell: Cell, seed: int) -> str | None:
        """A planned run's name."""
        return self._names.get((cell, seed))

    @cached_property
    def _names(self) -> dict[tuple[Cell, int], str]:
        return {(_cell(row), int(row["seed"])): str(row["run"]) for row in self.runs.to_dict("records")}

    def cells(self, sweep: str) -> Iterator[Cell]:
        """The planned cells of a sweep, in order."""
        own = self.runs[self.runs["sweep"] == sweep]
        yield from dict.fromkeys(_cell(row) for row in own.to_dict("records"))

    @cached_property
    def from_made_again(self) -> dict[tuple[str, str], list[str]]:
        """The finished runs that start from a small model made again to other bytes, by its name and their sha256."""
        found: dict[tuple[str, str], list[str]] = {}
        for row in self.runs[self.runs["status"] == FINISHED].to_dict("records"):
            _, *others = times_made(self.models.get(row["weights_of"], {}))
            if row["weights"] in map(weights_of, others):
                found.setdefault((row["weights_of"], row["weights"]), []).append(row["run"])
        return found

    def starts_again(self, cell: Cell) -> int:
        """How many of a cell's finished runs start from a small model made again."""
        return self._cells_from_made_again[cell]

    @cached_property
    def _cells_from_made_again(self) -> Counter[Cell]:
        names = {run for runs in self.from_made_again.values() for run in runs}
        return Counter(_cell(row) for row in self.runs.to_dict("records") if row["run"] in names)

    @cached_property
    def begins(self) -> pd.DataFrame:
        """The `answers` whose looser score is known, with that as their value: a right answer, whatever follows it.

        `exact` is what their value was.
        """
        known = self.answers[self.answers["begins"].notna()]
        return known.assign(exact=known["value"], **{name: known[looser] for name, looser in BEGINS.items()})

    @cached_property
    def _curves(self) -> dict[tuple[str, Cell, int, str, str], dict[int, dict[str, Any]]]:
        """By table, cell, seed, and what was asked or measured: each step's row."""
        found: dict[tuple[str, Cell, int, str, str], dict[int, dict[str, Any]]] = {}
        for name, keys in (
            ("answers", ("asked", "split")),
            ("ranks", ("asked", "split")),
            ("begins", ("asked", "split")),
            ("signatures", ("measure",)),
        ):
            for row in getattr(self, name).to_dict("records"):
                first, second = (*(row[key] for key in keys), "")[:2]
                found.setdefault((name, _cell(row), int(row["seed"]), first, second), {})[int(row["step"])] = row
        return found

    def curve(self, cell: Cell, seed: int, asked: str, split: str = "train", table: str = "answers") -> dict[int, Any]:
        """Each step's row of a finished run, in order; of signatures `asked` is the measure, and split is ""."""
        own = self._curves.get((table, cell, seed, asked, "" if table == "signatures" else split), {})
        return dict(sorted(own.items())) if self.status(cell, seed) == FINISHED else {}

    def twin(self, cell: Cell, seed: int, measure: str) -> dict[Any, Any] | None:
        """What an untrained twin of a finished run's model reads; None where none was read."""
        return self._twins.get((cell, seed, measure)) if self.status(cell, seed) == FINISHED else None

    @cached_property
    def _twins(self) -> dict[tuple[Cell, int, str], dict[Any, Any]]:
        return {(_cell(row), int(row["seed"]), row["measure"]): row for row in self.twins.to_dict("records")}

    def last(self, cell: Cell, seed: int, asked: str, split: str = "train", table: str = "answers") -> float | None:
        """The value at the last step; NaN where it is undefined or missing, None of a run that is not finished."""
        step = self.steps(cell, seed)
        if step is None:
            return None
        row = self.curve(cell, seed, asked, split, table).get(step)
        return math.nan if row is None else float(row["value"])

    def reached(self, cell: Cell, seed: int) -> int | None:
        """The first step at which at least 90 % are answered forwards; None where there is none."""
        forward = self.curve(cell, seed, "forward")
        return next((step for step, row in forward.items() if passes(row["value"], ">=", LEARNED)), None)


def times_made(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a small model, each of other bytes, the first one first."""
    return [record, *record.get("made_again", ())]


def weights_of(record: dict[str, Any]) -> str:
    """The sha256 of a small model's weights; "" where there are none."""
    return str(record.get("sha256", {}).get(WEIGHTS, ""))


def _cell(row: dict[Any, Any]) -> Cell:
    return Cell(row["sweep"], row["model"], row["dataset"], row["direction"], row["variant"])
