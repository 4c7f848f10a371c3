"""What came out, in four sentences and in README's few lines: filled from the tables, what contradicts first."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .ablations import COMPARED, ablation_claims
from .cells import cell_words, mean, seed_rows
from .frames import FINISHED, Section6
from .main_claims import ROUTES, TOO_LOW, main_claims
from .other_claims import ONE_LAYER, PAPER, other_claims, repeats
from .plan import (
    CAUSAL,
    DATASETS,
    DROP_ORDER,
    LEARNED,
    MASKED,
    PLANNED,
    SEEDS,
    TABLE_MODELS,
    Cell,
    main_cell,
)
from .recipe import Recipe
from .verdicts import CANNOT, FAILS, HOLDS, NOT_RUN, Claim, Judged, passes, per_cent, share, span

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

    def contradictions(self, *, whole: bool = True) -> str:
        """How the predictions fared, and what is against the paper or the one-layer results."""
        if self.empty:
            return f"No prediction has been judged: {NOTHING}."
        predicted = [*self.main, *self.ablations]
        counts = _counts(predicted)
        failed = list(dict.fromkeys(claim.name for claim in predicted if FAILS in claim.verdicts))
        named = f"; some seed fails {', '.join(failed)}" if failed else ""
        sure, low = (_counts(predicted, why) for why in (COMPARED, TOO_LOW))
        told = [
            f"of those that {_COUNT_WORDS[word]} {sure[word]} could not {instead}"
            for word, instead in ((FAILS, "hold"), (HOLDS, "fail"))
            if sure.get(word)
        ]
        without = f"; whatever the cell answers, {' and '.join(told)}" if told else ""
        if low.get(HOLDS):
            why = f" (reverse {TOO_LOW.partition(',')[0]})" * whole
            without += f"; {low[HOLDS]} that hold had nothing to fall from{why}"
        against = ", ".join(f"{what}: {self._against(source)}" for source, what in _SOURCES.items())
        each = " (prediction x cell x seed)" * whole
        return f"Of {sum(counts.values())} verdicts{each}, {_counted(counts)}{without}{named}; against {against}."

    def _against(self, source: str) -> str:
        """The names of what is contradicted, and how many of the source's verdicts could be told at all."""
        claims = self.said_by(source)
        names = list(dict.fromkeys(claim.name for claim in claims if _contradicting(claim)))
        verdicts = [one for claim in claims for one in claim.seeds]
        told = sum(one.verdict in (FAILS, HOLDS) and not one.settled for one in verdicts)
        return f"{', '.join(names) if names else 'none'} ({told} of {len(verdicts)} told)"

    def said_by(self, source: str) -> list[Claim]:
        """The claims that a source makes, predictions that repeat it among them."""
        own = [claim for claim in (*self.main, *self.ablations) if repeats(claim, source)]
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
            told.append(f"{model} {span(means)}")
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
            f"of facts never trained {'none' if floor == 0 else f'at most {share(floor)}'}{marked}"
            f"{self._going_on() if named else ''}."
        )

    def _going_on(self) -> str:
        """The cells whose decodings begin with the right answer much more often than they are it."""
        told, backwards = [], []
        for cell in _MAIN_CELLS:
            rows = seed_rows(self.found, cell, "forward", table="begins")
            looser, exact = (mean([float(row[name]) for row in rows]) for name in ("value", "exact"))
            if passes(looser - exact, ">=", GOES_ON):
                told.append(f"{cell.model} {cell.direction} {share(looser)}")
                own = seed_rows(self.found, cell, "reverse", table="begins")
                backwards.append(mean([float(row["value"]) for row in own]))
        if not told:
            return ""
        return (
            f"; scored by how the decoding begins, on which no verdict rests, forward is {', '.join(told)}, "
            f"reverse {span(backwards)}"
        )

    def _mean(self, model: str, place: int) -> float:
        return mean([self.found.last(main_cell(model, DATASETS[place]), seed, "reverse") for seed in SEEDS])

    def _below(self) -> list[str]:
        """The cells of the main table in which a seed is below 90 % forward at the last step, with the lowest seed."""
        low = []
        for cell in _MAIN_CELLS:
            values = [one for seed in SEEDS if (one := self.found.last(cell, seed, "forward")) is not None]
            if any(passes(value, ">=", LEARNED) is not True for value in values):
                known = [value for value in values if not math.isnan(value)]
                lowest = share(min(known)) if known else "undefined"
                low.append(f"{cell.model} {cell.direction} ({lowest})")
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
            trained = ", ".join(dict.fromkeys(cell.direction for cell in cells))
            of = f" ({len(cells)} cell{'s' if len(cells) > 1 else ''}: {trained})" if cells else ""
            told.append(f"{words} {span([self._first(cell) for cell in cells]) if cells else 'no cell'}{of}")
        chances = [self._first(cell, of="chance") for cell in self._learned()]
        floors = [self._first(cell, "heldout") for cell in self._learned()]
        moved, twins = (self._moved(), self._twins()) if whole else ("", "")
        beside = f"; chance {span(chances)}, facts never trained {span(floors)}" if chances else ""
        return (
            "Attention correlation and gradient cosine above their controls in the masked models, from 90 % forward on"
            f"{' (model x dataset x seed)' * whole}: {_counted(_counts(held))}{self._already(held)}{moved}; backwards, "
            "the right answer ranks first among all candidates, where 90 % forward is learned: "
            f"{', '.join(told)}{beside}{self._unlearned() if whole else ''}{twins}."
        )

    def _unlearned(self) -> str:
        """The highest rank among the cells that have not learned the forward direction, with their forward answers."""
        others = {cell: self._first(cell) for cell in _MAIN_CELLS if cell not in self._learned()}
        known = {cell: value for cell, value in others.items() if not math.isnan(value)}
        if not known:
            return ""
        cell = max(known, key=known.__getitem__)
        forward = mean([self.found.last(cell, seed, "forward") for seed in SEEDS])
        highest = f"{cell.model} {cell.direction} {share(known[cell])} (forward {per_cent(forward)})"
        return f"; of the cells below it the highest is {highest}"

    def ranked_first(self) -> list[str]:
        """How often the right answer ranks first backwards, in each cell that has learned the forward direction."""
        lines = []
        for trained in DATASETS:
            cells = [cell for cell in self._learned() if cell[2:4] == trained]
            own = [f"{cell.model} {cell_words(self.found, cell, 'reverse', table='ranks')}" for cell in cells]
            if own:
                chance = span([self._first(cell, of="chance") for cell in cells])
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
        return f"No ablation has been run: {NOTHING}." if self.empty else Recipe(self.found).sentence(named=named)

    def short(self) -> list[str]:
        """README's few lines: how much has been run and, where anything has, the four sentences."""
        if self.empty:
            return [self.coverage()]
        return [
            self.coverage(),
            self.contradictions(whole=False),
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
