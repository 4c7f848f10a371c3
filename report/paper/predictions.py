"""The predictions of examples/negative_evidence.yaml, each judged by its rules on the runs there are.

    verdicts = judged(runs, answers)   # a row for each part of each prediction, recipe and kind of weights
    overall(verdicts)                  # a row for each prediction and recipe

`runs` and `answers` are the tables of `evidence_runs`. The averaged weights decide; the raw ones stand beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .comparisons import passes
from .evidence_runs import FINISHED
from .prediction_parts import Cell, Part, cell_name, listed, mark, numbers_of, spans_of, time_text
from .rules import (
    CANNOT,
    FAILS,
    FORWARD,
    GATE,
    HOLDS,
    NOT_RUN,
    Bound,
    Seed,
    by_equality,
    by_order,
    by_threshold,
    combined,
    interval,
)

RECIPES = ("W", "P")
WEIGHTS = ("ema", "raw")
ENCODINGS, LENGTHS = ("rope", "absolute"), (10, 20)
QUESTIONS = {"reverse": "reverse accuracy", "mirror_reverse": "accuracy on the mirrored question"}
DOSES = (0.0, 0.03, 0.1, 0.3, 1.0)
WITHIN = 1_000  # steps after a switch
HIGH, LOW = Bound(">", 0.9), Bound("<", 0.5)
LETTERS, OUTVOTED, FITTED = Bound(">=", 0.95), Bound(">=", 0.95), Bound(">=", 0.9)
NOUGHT = Bound("<", 0.005)  # 0 %, rounded to whole per cent
CHANGE = "change"  # the name of a span that is a difference
SUFFICES, NARROWED = "negative evidence suffices", "the claim is narrowed"
CLAIMS = {
    "0": "letters-only accuracy at least 0.95 in every cell, and at least 95 % of reverse errors are the placeholder",
    "0 (masked)": "of this, the cells of masked models",
    "0 (causal)": "of this, the cells of causal models",
    "1": "drop-right: RoPE's reverse accuracy stays above 0.9",
    "2": "drop-right: so does the absolute encoding's",
    "3": "drop-right raises reverse above 0.9 and leaves mirror-reverse; mirror the other way round",
    "4": "switches: keep to drop-right recovers, drop-right to keep fades, keep to mirror does not recover",
    "5": "the more of the right-hand terms is priced, the sooner the reverse answer fades",
    "6": "with exactly two masks a row it fades too, and drop-right removes that",
    "7": "the causal model with its own dial answers 0 % backwards",
    "open": "scalar positions: does the reverse answer fade under keep?",
}


def judged(runs: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Every part of every prediction: recipe, weights, prediction, claim, cell, verdict, n (seeds that count), planned
    (seeds), numbers; plain and spans (see `Part`); why (what keeps it from holding). A causal model has no averaged
    weights: its raw ones stand for both.
    """
    rows = []
    for recipe in RECIPES:
        for weights in WEIGHTS:
            own = runs[(runs["recipe"] == recipe) & _on(runs, weights)]
            read = answers[answers["run"].isin(own["run"])] if len(answers) else answers
            if len(read):
                objectives = own.drop_duplicates("run").set_index("run")["objective"]
                read = read[_on(read.assign(objective=read["run"].map(objectives)), weights)]
            for prediction, parts in _Judge(own, read).predictions().items():
                rows += [{"recipe": recipe, "weights": weights} | part.row(prediction) for part in parts]
    return pd.DataFrame(rows)


def overall(parts: pd.DataFrame) -> pd.DataFrame:
    """A row for each prediction and recipe: verdict on averaged weights, and on raw ones, n and planned over parts,
    why (what keeps it from holding). Prediction 0 is of every cell; masked and causal ones stand beside it.
    """
    rows = []
    for recipe, every in parts.groupby("recipe", sort=False):
        for prediction, claim in CLAIMS.items():
            own = every[
                every["prediction"].isin([prediction, *(("0 (masked)", "0 (causal)") if prediction == "0" else ())])
            ]
            if own.empty:
                continue
            judge = open_verdict if prediction == "open" else combined
            found = {weights: judge(list(part["verdict"])) for weights, part in own.groupby("weights")}
            ema = own[own["weights"] == "ema"]
            row = {"prediction": prediction, "recipe": recipe, "claim": claim}
            row |= {"verdict": found["ema"], "raw": found["raw"], "parts": len(ema), "n": ema["n"].sum()}
            rows.append(row | {"planned": ema["planned"].sum(), "why": _why(ema, found["ema"])})
    return pd.DataFrame(rows)


def counted(table: pd.DataFrame) -> pd.DataFrame:
    """Of `overall`, the predictions that were written, each once, under the recipes that have cells for them."""
    return table[table["prediction"].str.isdigit() & (table["planned"] > 0)]


def _why(parts: pd.DataFrame, verdict: str) -> str:
    """Which parts keep a prediction from holding, those alike told together; where one fails, those that fail."""
    left = parts[parts["verdict"] == FAILS] if verdict == FAILS else parts[parts["why"] != ""]
    told = []
    for why, own in left[left["planned"] > 0].groupby("why", sort=False):
        cells = list(dict.fromkeys(own["cell"]))
        told.append(f"{', '.join(cells) if len(cells) <= 2 else f'{len(cells)} cells'}: {why}")
    return "; ".join(told)


def open_verdict(verdicts: Sequence[str]) -> str:
    """The word on the open test: does it fade, are the negatives fitted, and does it stay where they are left out?

    The last part is stricter than the rule written beforehand: a fade that drop-right does not prevent would have
    another cause.
    """
    fades, fitted, stays = verdicts
    if fades in (NOT_RUN, GATE):
        return fades
    if fades == HOLDS:
        return SUFFICES if stays == HOLDS else CANNOT
    return NARROWED if fades == FAILS and fitted == HOLDS else CANNOT


def fading_time(steps: np.ndarray, accuracy: np.ndarray) -> float:
    """The first reading from which on the reverse accuracy is below 0.5 for good; 0 where it never was above, infinite
    where it still is at the end. Shapes: `reading, reading ->`.
    """
    above = np.flatnonzero([not LOW.passes(float(value)) for value in accuracy])
    if not len(above):
        return 0.0
    return float("inf") if above[-1] == len(steps) - 1 else float(steps[above[-1] + 1])


def _on(table: pd.DataFrame, weights: str) -> pd.Series:
    return (table["weights"] == weights) | (table["objective"] == "causal")


@dataclass(frozen=True)
class _Judge:
    """The runs of one recipe on one kind of weights, and their answers."""

    runs: pd.DataFrame
    answers: pd.DataFrame

    def predictions(self) -> dict[str, list[Part]]:
        every = [(encoding, length) for encoding in ENCODINGS for length in LENGTHS]
        stays, lasts = "reverse_lowest", "reverse accuracy was to stay above 90 % under drop-right"
        causal = "with the tokens after the second letter unpriced it was to answer 0 % backwards"
        return {
            "0 (masked)": self.outvoted("masked"),
            "0 (causal)": self.outvoted("causal"),
            "1": [self.bounded(Cell("rope", n, "drop-right"), stays, HIGH, "reverse stays", lasts) for n in LENGTHS],
            "2": [
                self.bounded(Cell("absolute", n, "drop-right"), stays, HIGH, "reverse stays", lasts) for n in LENGTHS
            ],
            "3": [part for encoding, length in every for part in self.dissociated(encoding, length)],
            "4": self.switched(),
            "5": [self.dosed()],
            "6": [
                self.bounded(
                    Cell(masks="2"), "reverse", LOW, "reverse", "with two masks a row it was to fade below 50 %"
                ),
                self.bounded(
                    Cell(masks="2", dial="drop-right"),
                    "reverse",
                    HIGH,
                    "reverse",
                    "with two masks a row drop-right was to keep it above 90 %",
                ),
            ],
            "7": [self.bounded(Cell(objective="causal", dial="drop-after"), "reverse", NOUGHT, "reverse", causal)],
            "open": [
                self.bounded(Cell("scalar"), "reverse", LOW, "fades: reverse", "does it fade"),
                self.bounded(
                    Cell("scalar"),
                    "negative_probability",
                    FITTED,
                    "negatives fitted: p(placeholder)",
                    "are they fitted",
                ),
                self.bounded(
                    Cell("scalar", dial="drop-right"), "reverse", HIGH, "drop-right beside it: reverse", "does it stay"
                ),
            ],
        }

    def seeds(self, rows: pd.DataFrame, column: str) -> list[Seed]:
        """A number of each planned seed; one counts where forward accuracy meets the gate."""
        named = rows.reindex(columns=["seed", "status", column, "forward"]).itertuples(index=False, name=None)
        return [
            Seed(int(seed), float(value), passes(float(forward), ">=", FORWARD) is True)
            if status == FINISHED
            else Seed(int(seed), np.nan, False)
            for seed, status, value, forward in named
        ]

    def bounded(self, cell: Cell, column: str, bound: Bound, what: str, plain: str) -> Part:
        rows = cell.among(self.runs)
        seeds, name = self.seeds(rows, column), cell_name(rows, cell)
        verdict, plain = by_threshold(seeds, bound), f"{cell.words}: {plain}"
        return Part(f"{what} {bound}", name, verdict, seeds, numbers_of(seeds), plain, spans_of(seeds))

    def outvoted(self, objective: str) -> list[Part]:
        """A part for each cell there is; where no answer is wrong there is no error to be the placeholder."""
        parts = []
        own = self.runs[self.runs["objective"] == objective]
        for name, rows in own.groupby("cell", sort=False):
            rows = rows.sort_values("seed")
            right = rows.get("reverse_errors", pd.Series(np.nan, rows.index)) == 0
            share = rows.get("placeholder_share", pd.Series(np.nan, rows.index)).mask(right, 1.0)
            letters = self.seeds(rows, "letters_only")
            placeholder = self.seeds(rows.assign(placeholder_share=share), "placeholder_share")
            verdict = combined([by_threshold(letters, LETTERS), by_threshold(placeholder, OUTVOTED)])
            numbers = f"letters-only {numbers_of(letters)}; placeholder {numbers_of(placeholder)}"
            claim = "letters-only and share of placeholder errors at least 0.95"
            plain = (
                f"{objective} models: the right letter was to lead the 26, and the placeholder to be the error, in 95 %"
            )
            spans = [*spans_of(letters, "letters-only"), *spans_of(placeholder, "placeholder")]
            parts.append(Part(claim, str(name), verdict, letters, numbers, plain, spans))
        return parts

    def dissociated(self, encoding: str, length: int) -> list[Part]:
        parts = []
        for dial, raised, left in (
            ("drop-right", "reverse", "mirror_reverse"),
            ("mirror", "mirror_reverse", "reverse"),
        ):
            cell, keep = Cell(encoding, length, dial), Cell(encoding, length)
            plain = f"{dial} was to raise the {QUESTIONS[raised]} above 90 %"
            parts.append(self.bounded(cell, raised, HIGH, f"{dial} raises {raised}", plain))
            parts.append(self.unmoved(cell, keep, left))
        return parts

    def unmoved(self, cell: Cell, keep: Cell, column: str) -> Part:
        """Whether a dial leaves a question where keep has it, paired by seed."""
        rows = cell.among(self.runs)
        before = {one.seed: one for one in self.seeds(keep.among(self.runs), column)}
        missing = Seed(-1, np.nan, False)
        seeds = []
        for one in self.seeds(rows, column):
            other = before.get(one.seed, missing)
            seeds.append(Seed(one.seed, one.value - other.value, one.counts and other.counts))
        low, high = interval([one.value for one in seeds if one.ran and one.counts])
        found = "" if np.isnan(low) else f"90 % interval [{low:+.3f}, {high:+.3f}]"
        numbers = "; ".join([numbers_of(seeds, signed=True), *([found] if found else [])])
        claim = f"{cell.dial} moves {column} by less than 0.15"
        plain = f"{cell.words}: {cell.dial} was to move the {QUESTIONS[column]} by less than 15 points against keep"
        spans = spans_of(seeds, CHANGE)
        return Part(claim, cell_name(rows, cell), by_equality(seeds), seeds, numbers, plain, spans, found)

    def switched(self) -> list[Part]:
        """Only a run whose answer has faded can recover, only one that has an answer can fade; others do not count."""
        faded, answering = LOW, Bound(">", LOW.limit)
        return [
            self.after_switch(Cell(switch="drop-right"), "recovers: reverse comes", HIGH, faded, best=True),
            self.after_switch(
                Cell(dial="drop-right", switch="keep"), "fades: reverse falls", LOW, answering, best=True
            ),
            self.after_switch(Cell(switch="mirror"), "does not recover: reverse stays", LOW, faded, best=False),
        ]

    def after_switch(self, cell: Cell, what: str, bound: Bound, premise: Bound, *, best: bool) -> Part:
        """The reading nearest to (`best`) or farthest from the bound, within 1,000 steps of the switch."""
        rows, seeds, told = cell.among(self.runs), [], []
        named = rows[["run", "switch_step"]].itertuples(index=False, name=None)
        for (run, switch_step), plain in zip(named, self.seeds(rows, "reverse"), strict=True):
            if not plain.ran:
                seeds.append(plain)
                continue
            curve, at = self.curve(run), int(switch_step)
            after = curve[(curve.index > at) & (curve.index <= at + WITHIN)]
            upwards = (bound.sign[0] == ">") == best
            value, start = float(after.max() if upwards else after.min()), float(curve[at])
            seeds.append(Seed(plain.seed, value, plain.counts and premise.passes(start)))
            told.append(f"s{plain.seed} {start:.2f} → {value:.2f} (then {after.iloc[-1]:.2f}){mark(seeds[-1])}")
        was_to = {"drop-right": "recover above 90 %", "keep": "fade below 50 %", "mirror": "stay below 50 %"}
        words = f"switched from {cell.dial} to {cell.switch}, RoPE was to {was_to[str(cell.switch)]} within 1,000 steps"
        verdict, numbers = by_threshold(seeds, bound), ", ".join(told)
        return Part(f"{what} {bound}", cell_name(rows, cell), verdict, seeds, numbers, words, spans_of(seeds))

    def curve(self, run: str) -> pd.Series:
        """A run's reverse accuracy by step."""
        asked = (self.answers["run"] == run) & (self.answers["question"] == "reverse") & (self.answers["extra"] == 0)
        return self.answers[asked].set_index("step")["accuracy"].sort_index()

    def dosed(self) -> Part:
        """Of each seed the times at which it fades under each dose, the smallest dose first."""
        by_dose = [self.fading(Cell(dial="keep" if dose == 1 else "drop-right", dose=dose)) for dose in DOSES]
        planned = sorted(by_dose[0]) if all(by_dose) else []
        missing = (Seed(-1, np.nan, False), 0.0)
        own = {seed: [times.get(seed, missing) for times in by_dose] for seed in planned}
        times = [[one.value for one, _ in found] for found in own.values()]
        found = by_order(times, [max(apart for _, apart in doses) for doses in own.values()])
        seeds = [
            Seed(seed, float(sum(one.value for one, _ in doses)), all(one.counts for one, _ in doses if one.ran))
            for seed, doses in own.items()
        ]
        verdicts = [word if one.counts else GATE for word, one in zip(found, seeds, strict=True)]
        told = [
            f"s{one.seed} {', '.join(time_text(time) for time in curve)}{mark(one)}"
            for one, curve in zip(seeds, times, strict=True)
        ]
        numbers = f"steps at doses {', '.join(f'{dose:g}' for dose in DOSES)}: {'; '.join(told)}" if told else ""
        against = [one.seed for word, one in zip(verdicts, seeds, strict=True) if word == FAILS]
        plain = "the larger the share of the right-hand terms that is priced, the sooner it was to fade"
        told_why = f"{listed(against)} the other way round" if against else "times alike" if told else ""
        claim, verdict = "time to fade shortens with the dose", combined(verdicts)
        return Part(claim, "rope-l10, doses", verdict, seeds, numbers, plain, (), told_why)

    def fading(self, cell: Cell) -> dict[int, tuple[Seed, float]]:
        """By seed, when it fades, and how far its readings lie apart at most."""
        rows, found = cell.among(self.runs), {}
        for run, plain in zip(rows["run"], self.seeds(rows, "forward"), strict=True):
            if not plain.ran:
                found[plain.seed] = (plain, 0.0)
                continue
            curve = self.curve(run)
            steps = curve.index.to_numpy()
            time = fading_time(steps, curve.to_numpy(float))
            found[plain.seed] = (Seed(plain.seed, time, plain.counts), float(np.diff(steps).max(initial=0)))
        return found
