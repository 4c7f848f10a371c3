"""What came out, in four sentences and in README's few lines: filled from the tables, what contradicts first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .ablations import NOT_PREDICTED, PREDICTIONS, R, ablation_claims, number
from .cells import mean
from .frames import FINISHED, Section6
from .main_claims import main_claims
from .other_claims import ONE_LAYER, PAPER, SAID_BY, other_claims
from .plan import CAUSAL, DATASETS, DROP_ORDER, FLOOR, MASKED, PLAIN, PLANNED, SEEDS, TABLE_MODELS, main_cell
from .verdicts import CANNOT, FAILS, HOLDS, NOT_RUN, Claim, passes

NOTHING = "no run has been collected"
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
        against = [f"against {what}: {self._against(source)}" for source, what in _SOURCES.items()]
        return f"Of {sum(counts.values())} verdicts (prediction x cell x seed), {told}{named}; {'; '.join(against)}."

    def _against(self, source: str) -> str:
        names = list(dict.fromkeys(claim.name for claim in self.said_by(source) if FAILS in claim.verdicts))
        return ", ".join(names) if names else "none"

    def said_by(self, source: str) -> list[Claim]:
        """The claims that a source makes, predictions that repeat it among them."""
        own = [claim for claim in (*self.main, *self.ablations) if SAID_BY.get(claim.name) == source]
        return [*own, *(claim for claim in self.others if claim.source == source)]

    def failures(self) -> list[str]:
        """Each claim of the paper or the one-layer results that some seed contradicts, cell by cell."""
        lines = []
        for source, what in _SOURCES.items():
            by_claim: dict[tuple[str, str], list[str]] = {}
            for claim in self.said_by(source):
                bad = [one for one in claim.seeds if one.verdict == FAILS]
                if bad:
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
            for trained in DATASETS
            for model in TABLE_MODELS
            for seed in SEEDS
            if (value := self.found.last(main_cell(model, trained), seed, "reverse", "heldout")) is not None
        ]
        floor = max((value for value in floors if not math.isnan(value)), default=math.nan)
        low = self._below()
        told_low = ", ".join(low) if named else f"{len(low)} of {len(DATASETS) * len(TABLE_MODELS)} cells"
        marked = f"; below 90 % forward in a seed: {told_low}" if low else ""
        return (
            f"Reverse exact match on trained facts at the last step, lowest to highest dataset: {', '.join(told)}; "
            f"facts never trained at most {_per_cent(floor)}{marked}."
        )

    def _mean(self, model: str, place: int) -> float:
        return mean([self.found.last(main_cell(model, DATASETS[place]), seed, "reverse") for seed in SEEDS])

    def _below(self) -> list[str]:
        """The cells of the main table in which a seed is below 90 % forward at the last step."""
        low = []
        for trained in DATASETS:
            for model in TABLE_MODELS:
                values = [self.found.last(main_cell(model, trained), seed, "forward") for seed in SEEDS]
                if any(value is not None and passes(value, ">=", 0.9) is not True for value in values):
                    low.append(f"{model} {trained.direction} ({_per_cent(mean(values))})")
        return low

    # ---- the third ----

    def routes(self) -> str:
        """Whether the signatures stand above their controls, and how often the right answer ranks first."""
        if self.empty:
            return f"No signature has been read: {NOTHING}."
        held = _counted(_counts([claim for claim in self.main if claim.name == "T4"]))
        told = []
        for models, words in ((MASKED, "masked, by cell"), (CAUSAL, "causal")):
            trained, floor = self._ranked(models, "train"), self._ranked(models, "heldout")
            told.append(f"{_span(trained)} ({words}; never trained {_span(floor)})")
        return (
            "Attention correlation and gradient cosine above their controls in the masked models, from 90 % forward on "
            f"(model x dataset x seed): {held}; backwards, the right answer ranks first among all candidates in "
            f"{' and '.join(told)}{self._twins()}."
        )

    def _ranked(self, models: Iterable[str], split: str) -> list[float]:
        """How often the right answer ranks first backwards in each cell of the main table, the mean over seeds."""
        return [
            mean([self.found.last(main_cell(model, one), seed, "reverse", split, table="ranks") for seed in SEEDS])
            for model in models
            for one in DATASETS
        ]

    def _twins(self) -> str:
        """In how many runs of masked models an untrained twin's signature stands above that of the trained model."""
        told = []
        for measure in ("attention_correlation", "gradient_cosine"):
            read = above = 0
            for cell in (main_cell(model, trained) for model in MASKED for trained in DATASETS):
                for seed in SEEDS:
                    twin = self.found.twin(cell, seed, measure)
                    curve = list(self.found.curve(cell, seed, measure, table="signatures").values())
                    if twin is None or not curve:
                        continue
                    read += 1
                    above += bool(twin["low"] > curve[-1]["high"])  # False where either is undefined
            told.append(f"{above} of {read} ({measure.replace('_', ' ')})")
            if not read:
                return ""
        return f"; an untrained twin of a masked model reads higher, intervals apart, in {' and '.join(told)} runs"

    # ---- the fourth ----

    def recipe(self) -> str:
        """What each ablation does to the reverse answer."""
        if self.empty:
            return f"No ablation has been run: {NOTHING}."
        plain = mean([number(self.found, PLAIN, R, seed) for seed in SEEDS])
        beside = "is not run" if math.isnan(plain) else f"answers backwards in {_per_cent(plain)}"
        told = []
        for variant in (*PREDICTIONS, *NOT_PREDICTED):
            value = mean([number(self.found, variant, R, seed) for seed in SEEDS])
            if not math.isnan(value):
                told.append(f"{variant} {100 * value:.0f}")
        if not told:
            return f"No ablation has been run; plain mini-llada, P2C, {beside}."
        left = [variant for variant in PREDICTIONS if not any(word.startswith(f"{variant} ") for word in told)]
        missing = f"; not run: {', '.join(left)}" if left else ""
        # A floor decides two kinds of predictions by itself, whatever the recipe does.
        floor = (
            f" Plain itself is at the floor (at most {_per_cent(FLOOR)}): hardly anything can be below it, and a "
            "prediction of the floor holds whatever decides it."
        ) * (plain <= FLOOR)
        return (
            f"Plain mini-llada, P2C, {beside}; changed alone (per cent answered backwards, mean over seeds): "
            f"{', '.join(told)}{missing}.{floor}"
        )

    def short(self) -> list[str]:
        """README's few lines: how much has been run and, where anything has, the four sentences."""
        if self.empty:
            return [self.coverage()]
        return [self.coverage(), self.contradictions(), self.table_7(named=False), self.routes(), self.recipe()]

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


_SOURCES = {PAPER: "the paper", ONE_LAYER: "the one-layer results"}


def _counts(claims: Iterable[Claim]) -> dict[str, int]:
    """How many seeds have each verdict, those that fail first."""
    words = [word for claim in claims for word in claim.verdicts]
    return {word: words.count(word) for word in (FAILS, CANNOT, HOLDS, NOT_RUN) if word in words}


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
    low, high = (f"{100 * value:.0f}" for value in (min(defined), max(defined)))
    missing = f" ({len(defined)} of {len(values)} cells)" if len(defined) < len(values) else ""
    return f"{low} %{missing}" if low == high else f"{low} to {high} %{missing}"


def _per_cent(value: float) -> str:
    return NOT_RUN if math.isnan(value) else f"{100 * value:.0f} %"
