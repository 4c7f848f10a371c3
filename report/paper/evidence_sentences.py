"""What came out, in four sentences and in README's few lines: filled from the verdicts, what contradicts first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from .evidence_runs import FINISHED
from .predictions import NARROWED, RECIPES, SUFFICES, Cell, judged, overall
from .published_recipe import SECOND, joint_test, places
from .reproduce import records
from .rules import CANNOT, FAILS, GATE, HOLDS, NOT_RUN

REPRODUCED = {
    HOLDS: "lies among ours",
    FAILS: "is **not reproduced**",
    CANNOT: "is neither reproduced nor refuted",
    NOT_RUN: "has not been run",
}
NAMES = {"rope": "RoPE", "absolute": "the absolute encoding"}
OPEN = {
    SUFFICES: "its answer fades too, so negative evidence suffices",
    NARROWED: "its negatives are fitted and its answer stays, so RoPE's content-dependent rotation is needed and the "
    "claim is narrowed",
    CANNOT: "cannot tell",
    NOT_RUN: "not run",
    GATE: "gate not met",
}


@dataclass(frozen=True)
class Told:
    """The tables that sentences are made of; None where a sweep has not been collected."""

    runs: pd.DataFrame | None = None
    answers: pd.DataFrame | None = None
    published_runs: pd.DataFrame | None = None
    published_answers: pd.DataFrame | None = None

    def four(self) -> list[str]:
        """What contradicts the predictions; Table 1; what was claimed; the open test and the price."""
        return [f"{sentence[0].upper()}{sentence[1:]}" for sentence in self._sentences(short=False)]

    def short(self) -> list[str]:
        """The same for README."""
        return [f"{sentence[0].upper()}{sentence[1:]}" for sentence in self._sentences(short=True)]

    def _sentences(self, *, short: bool) -> list[str]:
        return [self.contradictions(short), self.table_1(short), self.outvoted(short), self.open_and_price(short)]

    @cached_property
    def parts(self) -> pd.DataFrame:
        assert self.runs is not None and self.answers is not None, "asked only where there are both"
        return judged(self.runs, self.answers)

    # ---- the first ----

    def contradictions(self, short: bool) -> str:
        if self.runs is None or self.answers is None:
            return "no prediction has been judged: the sweep has not been collected."
        parts, table = self.parts, overall(self.parts)
        table = table[(table["prediction"] != "open") & (table["planned"] > 0)]
        by_word = {
            word: [f"{row['recipe']} {row['prediction']}" for row in records(table) if row["verdict"] == word]
            for word in (FAILS, CANNOT, GATE, NOT_RUN, HOLDS)
        }
        failed = by_word[FAILS]
        if failed and not short:
            told = "; ".join(f"**{name}** ({_why(parts, name)})" for name in failed)
            first = f"{len(failed)} fail: {told}"
        else:
            first = f"{len(failed)} fail ({', '.join(failed)})" if failed else "none fails"
        words = {CANNOT: "cannot be told", GATE: "do not meet their gate", NOT_RUN: "were not run", HOLDS: "hold"}
        rest = [
            f"{len(by_word[word])} {said}" + ("" if short else f" ({', '.join(by_word[word])})")
            for word, said in words.items()
            if by_word[word]
        ]
        start = f"of {len(table)} predictions (each under recipe W or P) that were written before the runs, "
        return f"{start}{', '.join([first, *rest])}."

    # ---- the second ----

    def table_1(self, short: bool) -> str:
        if self.published_runs is None or self.published_answers is None:
            return "RADD's published recipe has not been collected, so Table 1 stands against the decayed rate alone."
        found = places(self.published_runs, self.published_answers)
        joint = joint_test(self.published_runs, found)
        verdict = joint[(joint["weights"] == "ema") & (joint["scope"] == SECOND)]["verdict"].iloc[0]
        rope = found[(found["position_encoding"] == "rope") & (found["weights"] == "ema") & (found["scope"] == SECOND)]
        ours, paper = [], []
        for row in records(rope.sort_values("length")):
            ours.append(f"{row['lowest']:.0f} to {row['highest']:.0f}" if row["n"] else NOT_RUN)
            paper.append(f"{row['paper']:.1f}")
        lengths = ", ".join(str(row["length"]) for row in records(rope.sort_values("length")))
        blind = int(joint[(joint["weights"] == "ema") & (joint["scope"] == SECOND)]["not_informative"].iloc[0])
        note = f" ({blind} of the four distributions not informative)" if blind and not short else ""
        scaled = "RADD's published recipe (P)" if short else "RADD's published recipe, scaled to two cores (P)"
        return (
            f"under {scaled} the paper's Table 1 {REPRODUCED[verdict]}: RoPE answers {', '.join(ours)} % backwards at "
            f"lengths {lengths}, where the paper prints {', '.join(paper)}{note}."
        )

    # ---- the third ----

    def outvoted(self, short: bool) -> str:
        if self.runs is None or self.answers is None:
            return "what fades has not been measured."
        told = []
        for encoding, name in NAMES.items():
            by_recipe = []
            for recipe in RECIPES:
                keep, drop = (
                    self._mean(Cell(encoding, dial=dial), recipe, "reverse") for dial in ("keep", "drop-right")
                )
                by_recipe.append(f"{_per_cent(keep)} and {_per_cent(drop)} ({recipe})")
            told.append(f"{name} {', '.join(by_recipe)}")
        own = self.runs[(self.runs["objective"] == "masked") & (self.runs["weights"] == "ema")]
        own = own[own["status"] == FINISHED]
        letters = own["letters_only"].min() if len(own) else np.nan
        share = own["placeholder_share"].min() if len(own) else np.nan
        table = overall(self.parts)
        verdicts = [str(row["verdict"]) for row in records(table) if row["prediction"] == "0"]
        word = "outvoted, not forgotten" if set(verdicts) == {HOLDS} else _mixed(verdicts)
        start = "with the placeholders right of the evidence priced and not priced"
        end = f"; among the 26 letters alone at least {_per_cent(letters)} are right in any masked run"
        end += "" if short else f", and at least {_per_cent(share)} of a run's errors are the placeholder"
        return f"{start}, reverse accuracy at length 10 is {'; '.join(told)}{end}: {word}."

    # ---- the fourth ----

    def open_and_price(self, short: bool) -> str:
        if self.runs is None or self.answers is None:
            return "the open test has not been run."
        table = overall(self.parts)
        word = str(table[(table["prediction"] == "open") & (table["recipe"] == "W")]["verdict"].iloc[0])
        reverse = self._mean(Cell("scalar"), "W", "reverse")
        fitted = self._mean(Cell("scalar"), "W", "negative_probability")
        numbers = "" if np.isnan(reverse) else f" (reverse {_per_cent(reverse)}, p(placeholder) {fitted:.2f})"
        prices = []
        for recipe in RECIPES:
            keep, drop = Cell(), Cell(dial="drop-right")
            more = self._mean(drop, recipe, "keep_loss") - self._mean(keep, recipe, "keep_loss")
            if np.isnan(more):
                prices.append(f"{NOT_RUN} ({recipe})")
                continue
            ill = [self._mean(cell, recipe, "ill_formed") for cell in (keep, drop)]
            believed = [self._mean(cell, recipe, "negative_probability") for cell in (keep, drop)]
            told = f"{more:+.3f} nats per token, ill-formed samples {_per_cent(ill[0])} to {_per_cent(ill[1])}"
            told += "" if short else f", p(placeholder) where it is dropped {believed[0]:.2f} to {believed[1]:.2f}"
            prices.append(f"{told} ({recipe})")
        start = f"with scalar positions, the test between this account and the paper's (W): {OPEN[word]}{numbers}"
        return f"{start}; drop-right costs RoPE {'; '.join(prices)}."

    def _mean(self, cell: Cell, recipe: str, column: str) -> float:
        """Of a cell's finished runs on averaged weights; NaN without one."""
        assert self.runs is not None
        own = cell.among(self.runs[(self.runs["recipe"] == recipe) & (self.runs["weights"] == "ema")])
        done = own[own["status"] == FINISHED]
        return float(done[column].mean()) if len(done) else float("nan")


def _why(parts: pd.DataFrame, name: str) -> str:
    """The failing parts of a prediction, by cell."""
    recipe, _, prediction = name.partition(" ")
    chosen = (parts["recipe"] == recipe) & (parts["prediction"] == prediction) & (parts["weights"] == "ema")
    failed = parts[chosen & (parts["verdict"] == FAILS)]
    first = [f"{row['cell']}: {row['claim']}" for row in records(failed.head(2))]
    more = f", and {len(failed) - 2} more parts" if len(failed) > 2 else ""
    return "; ".join(first) + more


def _mixed(verdicts: list[str]) -> str:
    """What prediction 0 says where it does not simply hold."""
    return f"prediction 0 reads {', '.join(f'{word} ({name})' for word, name in zip(verdicts, RECIPES, strict=True))}"


def _per_cent(share: float) -> str:
    return NOT_RUN if np.isnan(share) else f"{100 * share:.0f} %"
