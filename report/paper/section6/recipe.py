"""The fourth sentence: what the recipe decides, by exact match and by rank, and what recipes of others do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .ablations import NOT_PREDICTED, PREDICTIONS, F, R, number
from .cells import cell_words, mean
from .frames import Section6
from .plan import (
    DATASETS,
    EXEMPT_ABLATIONS,
    FLOOR,
    LEARNED,
    METHODS,
    PLAIN,
    SEEDS,
    Cell,
    ablation_cell,
    main_cell,
)
from .verdicts import passes, per_cent, share


@dataclass(frozen=True)
class Recipe:
    """What is told of the ablations and the methods."""

    found: Section6

    def sentence(self, *, named: bool = True) -> str:
        """What each variant of the recipe does to the reverse answer; all `named`, or the highest alone."""
        plain = mean([number(self.found, PLAIN, R, seed) for seed in SEEDS])
        beside = "is not run" if math.isnan(plain) else f"answers backwards in {share(plain)}"
        run = {name: both for name in (*PREDICTIONS, *NOT_PREDICTED) if not math.isnan((both := self._both(name))[0])}
        if not run:
            return f"No ablation has been run; plain mini-llada, P2C, {beside}."
        own = {name: both for name, both in run.items() if name not in NOT_PREDICTED}
        told = self._variants(run) if named or not own else f"of its {len(own)} variants {self._highest(own)}"
        told += self._by_rank(list(own), named=named)
        left = [variant for variant in PREDICTIONS if variant not in run]
        missing = f"; not run: {', '.join(left)}" if left else ""
        # A floor decides two kinds of predictions by itself, whatever the recipe does.
        floor = (
            f" Plain itself is at the floor (at most {share(FLOOR)}): hardly anything can be below it"
            f"{', and a prediction of the floor holds whatever decides it' * named}."
        ) * (passes(plain, "<=", FLOOR) is True)
        methods = self._methods() if named else ""
        return f"Plain mini-llada, P2C, {beside}; {told}{missing}.{floor}{methods}"

    def _by_rank(self, variants: Sequence[str], *, named: bool) -> str:
        """Where each variant ranks the right answer first, against plain: what exact match at its floor cannot tell."""
        plain, own = self._ranks(PLAIN), {name: self._ranks(name) for name in variants}
        apart = {
            name: [a - b for a, b in zip(ranks, plain, strict=True) if not math.isnan(a - b)]
            for name, ranks in own.items()
        }
        if not any(apart.values()):
            return ""
        told = {name: f"{name} {per_cent(mean(own[name]))}" for name, gaps in apart.items() if gaps}
        if not named:
            ordered = sorted(told, key=lambda name: mean(own[name]))
            plain_words, low, high = (
                self._words(ablation_cell(name), "ranks") for name in (PLAIN, ordered[0], ordered[-1])
            )
            return f"; by rank, per cent: plain {plain_words}, highest {ordered[-1]} {high}, lowest {ordered[0]} {low}"
        begin = f"; by rank (the right answer first among the candidates), plain {share(mean(plain))},"
        # Of as many coins as there are seeds, all fall on one given side so often, and where there are ties less.
        by_chance = f" (by chance at most one variant in {2 ** len(SEEDS)} on either side; intervals are in the table)"
        whole = {name: gaps for name, gaps in apart.items() if len(gaps) == len(SEEDS)}
        higher, lower = (
            [name for name, gaps in whole.items() if all(gap * sign > 0 for gap in gaps)] for sign in (1, -1)
        )
        foretold = {name: _foretold(name) for name in whole}
        against = [name for name, side in foretold.items() if side and all(gap * side < 0 for gap in whole[name])]
        sides = {
            "higher in every seed": [told[name] for name in higher],
            "lower in every seed": [told[name] for name in lower],
            "against what was predicted of exact match": against,
            "neither": [words for name, words in told.items() if name in whole and name not in (*higher, *lower)],
        }
        if len(whole) < len(told):
            sides["some seeds not in"] = [words for name, words in told.items() if name not in whole]
        words = "; ".join(f"{side}: {', '.join(names) if names else 'none'}" for side, names in sides.items())
        return f"{begin} {words}{by_chance}"

    def _words(self, cell: Cell, table: str) -> str:
        """Value and interval of the reverse answers over seeds, per cent; in `table`, "ranks" or "answers"."""
        value, _, interval = cell_words(self.found, cell, R, table=table).partition(" ")
        return f"{value} {interval[interval.find('[') : interval.find(']') + 1]}"

    def _ranks(self, variant: str) -> list[float]:
        """By seed, how often the right answer ranks first backwards at the last step; NaN where it is not known."""
        values = [self.found.last(ablation_cell(variant), seed, R, table="ranks") for seed in SEEDS]
        return [math.nan if value is None else value for value in values]

    def _methods(self) -> str:
        """What all weights and the recipes of others answer backwards at most."""
        cells = list(self.found.cells(METHODS))
        known = {cell: mean([self.found.last(cell, seed, R) for seed in SEEDS]) for cell in cells}
        known = {cell: value for cell, value in known.items() if not math.isnan(value)}
        if not known:
            return " All weights and recipes of others (methods): not run."
        cell = max(known, key=known.__getitem__)
        low = sum(
            any(passes(value, ">=", LEARNED) is not True for value in self._forward(cell) if value is not None)
            for cell in known
        )
        return (
            f" All weights and recipes of others ({len(known)} of {len(cells)} cells): reverse, means over seeds, at "
            f"most {self._words(cell, 'answers')} % ({cell.words}), below 90 % forward in a seed: {low}."
        )

    def _forward(self, cell: Cell) -> list[float | None]:
        return [self.found.last(cell, seed, F) for seed in SEEDS]

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
        highest = [name for name, (reverse, _) in run.items() if reverse == most > 0]
        whose = ", ".join(f"{name} {self._words(ablation_cell(name), 'answers')}" for name in highest)
        low = [name for name, (_, forward) in run.items() if not passes(forward, ">=", LEARNED)]
        lacking = sum(name not in EXEMPT_ABLATIONS for name in low)
        told = f"more on average than {whose} %" if highest else "anything"
        return f"none answers {told}; below 90 % forward: {lacking}"


def _foretold(variant: str) -> int:
    """1 where reverse was predicted above plain's, -1 where below it, else 0."""
    for one in PREDICTIONS[variant][1]:
        if one.less == PLAIN and not one.apart:
            return {">": 1, ">=": 1, "<": -1, "<=": -1}[one.sign] if one.limit >= 0 else 0
    return 0
