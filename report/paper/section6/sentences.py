"""What came out, in four sentences and in README's few lines: filled from the tables, what contradicts first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .ablations import COMPARED, NOT_PREDICTED, PREDICTIONS, F, R, ablation_claims, number
from .cells import cell_words, mean, seed_rows
from .frames import FINISHED, Section6
from .main_claims import ROUTES, TOO_LOW, main_claims
from .other_claims import ONE_LAYER, PAPER, SAID_BY, other_claims
from .plan import (
    CAUSAL,
    DATASETS,
    DROP_ORDER,
    EXEMPT_ABLATIONS,
    FLOOR,
    LEARNED,
    MASKED,
    PLAIN,
    PLANNED,
    SEEDS,
    TABLE_MODELS,
    Cell,
    main_cell,
)
from .verdicts import CANNOT, FAILS, HOLDS, NOT_RUN, Claim, Judged, passes, per_cent

NOTHING = "no run has been collected"
GOES_ON = 0.1  # so much more often than exactly a decoding begins with the right answer, where that is told
_COUNT_WORDS = {FAILS: "fail", HOLDS: "hold", CANNOT: "cannot be told", NOT_RUN: "not run"}


@dataclass(frozen=True)
class Told:
    """The tables, and every claim about them with its verdicts."""

    found: Section6

    @cached_property
    def main(self) -> list[Claim]:
        return main_claims(self.found)

    @cached_property
    def ablations(self) -> list[Claim]:
        return ablation_claims(self.found)

    @cached_property
    def others(self) -> list[Claim]:
        return other_claims(self.found)

    @property
    def empty(self) -> bool:
        return not (self.found.runs["status"] == FINISHED).any()

    # ---- the first ----

    def contradictions(self) -> str:
        """How the predictions fared, and what is against the paper or the one-layer results."""
        if self.empty:
            return f"No prediction has been judged: {NOTHING}."
        predicted = [*self.main, *self.ablations]
        counts = _counts(predicted)
        told = _counted(counts)
        failed = list(dict.fromkeys(claim.name for claim in predicted if FAILS in claim.verdicts))
        named = f"; some seed fails {', '.join(failed)}" if failed else ""
        if settled := _counts(predicted, COMPARED):
            told += f"; of these {_counted(settled)} whatever the cell answers, by what it is compared with"
        if low := _counts(predicted, TOO_LOW):
            told += f"; {_counted(low)} as reverse was never high enough to fall so far"
        against = [f"against {what}: {self._against(source)}" for source, what in _SOURCES.items()]
        return f"Of {sum(counts.values())} verdicts (prediction x cell x seed), {told}{named}; {'; '.join(against)}."

    def _against(self, source: str) -> str:
        names = list(dict.fromkeys(claim.name for claim in self.said_by(source) if _contradicting(claim)))
        return ", ".join(names) if names else "none"

    def said_by(self, source: str) -> list[Claim]:
        """The claims that a source makes, predictions that repeat it among them."""
        own = [claim for claim in (*self.main, *self.ablations) if SAID_BY.get(claim.name) == source]
        return [*own, *(claim for claim in self.others if claim.source == source)]

    def failures(self) -> list[str]:
        """Each claim of the paper or the one-layer results that some seed contradicts, cell by cell.

        A verdict that could not have been another contradicts nobody.
        """
        lines = []
        for source, what in _SOURCES.items():
            by_claim: dict[tuple[str, str], list[str]] = {}
            for claim in self.said_by(source):
                if bad := _contradicting(claim):
                    each = "; ".join(f"s{one.seed} {one.numbers}" for one in bad)
                    by_claim.setdefault((claim.name, _without_side(claim.plain)), []).append(f"{claim.cell}: {each}")
            lines += [
                f"Against {what} ({name}: {plain}): {'. '.join(cells)}." for (name, plain), cells in by_claim.items()
            ]
        return lines

    # ---- the second ----

    def table_7(self, *, named: bool = True) -> str:
        """What each model answers backwards; the cells that have not learned are `named`, or counted."""
        if self.empty:
            return f"Nothing has been asked: {NOTHING}."
        told = []
        for model in TABLE_MODELS:
            means = [self._mean(model, place) for place in range(len(DATASETS))]
            told.append(f"{model} {_span(means)}")
        floors = [
            value
            for cell in _MAIN_CELLS
            for seed in SEEDS
            if (value := self.found.last(cell, seed, "reverse", "heldout")) is not None
        ]
        floor = max((value for value in floors if not math.isnan(value)), default=math.nan)
        low = self._below()
        told_low = ", ".join(low) if named else f"{len(low)} of {len(DATASETS) * len(TABLE_MODELS)} cells"
        marked = f"; below 90 % forward in a seed (its lowest): {told_low}" if low else ""
        return (
            f"Reverse exact match on trained facts at the last step, lowest to highest dataset: {', '.join(told)}; "
            f"facts never trained at most {_per_cent(floor)}{marked}{self._going_on() if named else ''}."
        )

    def _going_on(self) -> str:
        """The cells whose decodings begin with the right answer much more often than they are it."""
        told, backwards = [], []
        for cell in _MAIN_CELLS:
            rows = seed_rows(self.found, cell, "forward", table="begins")
            looser, exact = (mean([float(row[name]) for row in rows]) for name in ("value", "exact"))
            if passes(looser - exact, ">=", GOES_ON):
                told.append(f"{cell.model} {cell.direction} {_per_cent(looser)}")
                own = seed_rows(self.found, cell, "reverse", table="begins")
                backwards.append(mean([float(row["value"]) for row in own]))
        if not told:
            return ""
        return (
            f"; whatever follows it, forwards the right answer begins the decoding in {', '.join(told)}, "
            f"backwards in {_span(backwards)}"
        )

    def _mean(self, model: str, place: int) -> float:
        return mean([self.found.last(main_cell(model, DATASETS[place]), seed, "reverse") for seed in SEEDS])

    def _below(self) -> list[str]:
        """The cells of the main table in which a seed is below 90 % forward at the last step, with the lowest seed."""
        low = []
        for cell in _MAIN_CELLS:
            values = [one for seed in SEEDS if (one := self.found.last(cell, seed, "forward")) is not None]
            if any(passes(value, ">=", LEARNED) is not True for value in values):
                lowest = min((value for value in values if not math.isnan(value)), default=math.nan)
                low.append(f"{cell.model} {cell.direction} ({_per_cent(lowest)})")
        return low

    # ---- the third ----

    def routes(self, *, whole: bool = True) -> str:
        """Whether the signatures stand above their controls, and how often the right answer ranks first.

        The `whole` has what became of the signatures, and untrained twins.
        """
        if self.empty:
            return f"No signature has been read: {NOTHING}."
        held = [claim for claim in self.main if claim.name == "T4"]
        told = []
        for models, words in ((MASKED, "masked"), (CAUSAL, "causal")):
            cells = [cell for cell in self._learned() if cell.model in models]
            of = f" ({len(cells)} cell{'s' if len(cells) > 1 else ''})" if cells else ""
            told.append(f"{words} {_span([self._first(cell) for cell in cells]) if cells else 'no cell'}{of}")
        chances = [self._first(cell, of="chance") for cell in self._learned()]
        floors = [self._first(cell, "heldout") for cell in self._learned()]
        moved, twins = (self._moved(), self._twins()) if whole else ("", "")
        beside = f"; chance {_span(chances)}, facts never trained {_span(floors)}" if chances else ""
        return (
            "Attention correlation and gradient cosine above their controls in the masked models, from 90 % forward on "
            f"(model x dataset x seed): {_counted(_counts(held))}{self._already(held)}{moved}; backwards, the "
            "right answer ranks first among all candidates, where 90 % forward is learned: "
            f"{', '.join(told)}{beside}{twins}."
        )

    def ranked_first(self) -> list[str]:
        """How often the right answer ranks first backwards, in each cell that has learned the forward direction."""
        lines = []
        for trained in DATASETS:
            cells = [cell for cell in self._learned() if cell[2:4] == trained]
            own = [f"{cell.model} {cell_words(self.found, cell, 'reverse', table='ranks')}" for cell in cells]
            if own:
                chance = _span([self._first(cell, of="chance") for cell in cells])
                lines.append(f"Ranked first backwards, {trained.words}: {'; '.join(own)}; chance {chance}.")
        return lines

    def _learned(self) -> list[Cell]:
        """The cells of the main table that answer at least 90 % forward at the last step, the mean over seeds."""
        means = {cell: mean([self.found.last(cell, seed, "forward") for seed in SEEDS]) for cell in _MAIN_CELLS}
        return [cell for cell, value in means.items() if passes(value, ">=", LEARNED)]

    def _first(self, cell: Cell, split: str = "train", of: str = "value") -> float:
        """How often the right answer ranks first backwards, or would by chance: the mean over seeds."""
        rows = seed_rows(self.found, cell, "reverse", split, table="ranks")
        return mean([float(row[of]) for row in rows])

    def _already(self, claims: Iterable[Claim]) -> str:
        """In how many of those that hold both signatures stood above their controls before fine-tuning too."""
        held = [(claim.cell, one.seed) for claim in claims for one in claim.seeds if one.verdict == HOLDS]
        cells = {cell.words: cell for cell in _MAIN_CELLS}
        before = 0
        for words, seed in held:
            firsts = [self._course(cells[words], seed, measure)[:1] for measure in ROUTES]
            before += all(rows and passes(float(rows[0]["excess_low"]), ">", 0.0) for rows in firsts)
        return f"; of the {len(held)} that hold {before} stood there before fine-tuning" if held else ""

    def _moved(self) -> str:
        """In how many runs of masked models each signature ends above or below what it was before, intervals apart."""
        told = []
        for measure, name in ROUTES.items():
            courses = [
                self._course(cell, seed, measure) for cell in _MAIN_CELLS for seed in SEEDS if cell.model in MASKED
            ]
            ends = [(rows[0], rows[-1]) for rows in courses if len(rows) > 1]
            rose = sum(bool(last["low"] > first["high"]) for first, last in ends)  # False where either is undefined
            fell = sum(bool(last["high"] < first["low"]) for first, last in ends)
            told.append(f"the {name} rose in {rose} and fell in {fell} of {len(ends)}")
        return f"; over fine-tuning, intervals apart, {', '.join(told)} masked runs, learned or not"

    def _course(self, cell: Cell, seed: int, measure: str) -> list[dict[str, Any]]:
        """A signature's rows, from before fine-tuning to the last step."""
        return list(self.found.curve(cell, seed, measure, table="signatures").values())

    def _twins(self) -> str:
        """In how many runs of masked models an untrained twin's signature stands above that of the trained model."""
        told = []
        for measure, name in ROUTES.items():
            read = above = 0
            for cell in _MAIN_CELLS:
                for seed in SEEDS if cell.model in MASKED else ():
                    twin, course = self.found.twin(cell, seed, measure), self._course(cell, seed, measure)
                    if twin is None or not course:
                        continue
                    read += 1
                    above += bool(twin["low"] > course[-1]["high"])  # False where either is undefined
            told.append(f"{above} of {read} ({name})")
            if not read:
                return ""
        return f"; untrained twins read higher, intervals apart, in {' and '.join(told)} masked runs"

    # ---- the fourth ----

    def recipe(self, *, named: bool = True) -> str:
        """What each variant of the recipe does to the reverse answer; all `named`, or the highest alone."""
        if self.empty:
            return f"No ablation has been run: {NOTHING}."
        plain = mean([number(self.found, PLAIN, R, seed) for seed in SEEDS])
        beside = "is not run" if math.isnan(plain) else f"answers backwards in {_per_cent(plain)}"
        run = {name: both for name in (*PREDICTIONS, *NOT_PREDICTED) if not math.isnan((both := self._both(name))[0])}
        if not run:
            return f"No ablation has been run; plain mini-llada, P2C, {beside}."
        own = {name: both for name, both in run.items() if name not in NOT_PREDICTED}
        told = self._variants(run) if named or not own else f"of its {len(own)} variants {self._highest(own)}"
        left = [variant for variant in PREDICTIONS if variant not in run]
        missing = f"; not run: {', '.join(left)}" if left else ""
        # A floor decides two kinds of predictions by itself, whatever the recipe does.
        floor = (
            f" Plain itself is at the floor (at most {_per_cent(FLOOR)}): hardly anything can be below it, and a "
            "prediction of the floor holds whatever decides it."
        ) * (passes(plain, "<=", FLOOR) is True)
        return f"Plain mini-llada, P2C, {beside}; {told}{missing}.{floor}"

    def _both(self, variant: str) -> tuple[float, float]:
        """Reverse and forward, means over seeds."""
        reverse, forward = (mean([number(self.found, variant, what, seed) for seed in SEEDS]) for what in (R, F))
        return reverse, forward

    def _variants(self, run: dict[str, tuple[float, float]]) -> str:
        """Each one's reverse and forward; those of another model beside that model's own plain cell."""
        each = {name: f"{name} {per_cent(reverse)} / {per_cent(forward)}" for name, (reverse, forward) in run.items()}
        told = ", ".join(words for name, words in each.items() if name not in NOT_PREDICTED)
        parts = [f"its variants (per cent answered backwards / forwards, means over seeds): {told}"] if told else []
        for model in dict.fromkeys(NOT_PREDICTED[name] for name in each if name in NOT_PREDICTED):
            cell = main_cell(model, DATASETS[0])
            own = " / ".join(per_cent(mean([self.found.last(cell, seed, what) for seed in SEEDS])) for what in (R, F))
            others = ", ".join(words for name, words in each.items() if NOT_PREDICTED.get(name) == model)
            parts.append(f"plain {model} {own}, {others}")
        return "; ".join(parts)

    def _highest(self, run: dict[str, tuple[float, float]]) -> str:
        """The highest reverse, whose it is, and how many of those that must have not learned forward."""
        most = max(reverse for reverse, _ in run.values())
        whose = ", ".join(name for name, (reverse, _) in run.items() if reverse == most > 0)
        low = [name for name, (_, forward) in run.items() if not passes(forward, ">=", LEARNED)]
        lacking = sum(name not in EXEMPT_ABLATIONS for name in low)
        return (
            f"none answers more than {_per_cent(most)}{f' ({whose})' if whose else ''}; below 90 % forward: {lacking}"
        )

    def short(self) -> list[str]:
        """README's few lines: how much has been run and, where anything has, the four sentences."""
        if self.empty:
            return [self.coverage()]
        return [
            self.coverage(),
            self.contradictions(),
            self.table_7(named=False),
            self.routes(whole=False),
            self.recipe(named=False),
        ]

    def coverage(self) -> str:
        """How much of what was planned has been run."""
        runs, made = self.found.runs, self._made()
        finished = runs[runs["status"] == FINISHED]
        planned = len(runs) or sum(PLANNED.values())
        share = f"{len(finished)} of {planned} planned runs are in"
        if self.empty:
            return f"{share}{made}: every number is still to come."
        each = []
        for sweep in DROP_ORDER:
            total = int((runs["sweep"] == sweep).sum())
            each.append(f"{sweep} {int((finished['sweep'] == sweep).sum())} of {total}" if total else f"{sweep} none")
        rest = "" if len(finished) == planned else "; the rest is not run or not finished"
        again = sum(map(len, self.found.from_made_again.values()))
        other = f" {again} runs start from small models made again, to other bytes." if again else ""
        return f"{share} ({', '.join(each)}){made}{rest}.{other}"

    def _made(self) -> str:
        """How many small models there are to start from, once any has been looked for."""
        records = self.found.models.values()
        made = sum(record["status"] == FINISHED for record in records)
        return f", and {made} of {len(records)} small models" if records else ""


_MAIN_CELLS = [main_cell(model, trained) for trained in DATASETS for model in TABLE_MODELS]
_SOURCES = {PAPER: "the paper", ONE_LAYER: "the one-layer results"}


def _counts(claims: Iterable[Claim], settled: str = "") -> dict[str, int]:
    """How many seeds have each verdict, those that fail first; of those that were `settled` by this alone, if given."""
    words = [one.verdict for claim in claims for one in claim.seeds if settled in ("", one.settled)]
    return {word: words.count(word) for word in (FAILS, CANNOT, HOLDS, NOT_RUN) if word in words}


def _contradicting(claim: Claim) -> list[Judged]:
    """The seeds that fail, though they might have held."""
    return [one for one in claim.seeds if one.verdict == FAILS and not one.settled]


def _counted(counts: dict[str, int]) -> str:
    """How many of each verdict: "1 fails, 2 hold"."""
    return ", ".join(f"{count} {word if count == 1 else _COUNT_WORDS[word]}" for word, count in counts.items())


def _without_side(plain: str) -> str:
    return plain.partition(" (forward)")[0].partition(" (reverse)")[0]


def _span(values: Sequence[float]) -> str:
    """Lowest to highest of shares in per cent; how many are missing is said."""
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return NOT_RUN
    low, high = (f"{100 * value:.1f}" for value in (min(defined), max(defined)))
    missing = f" ({len(defined)} of {len(values)} cells)" if len(defined) < len(values) else ""
    return f"{low} %{missing}" if low == high else f"{low} to {high} %{missing}"


def _per_cent(value: float) -> str:
    return NOT_RUN if math.isnan(value) else f"{100 * value:.1f} %"
