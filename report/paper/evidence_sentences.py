"""What came out, in four sentences and in README's few lines: filled from the verdicts, what contradicts first."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
NAMES, DIALS = {"rope": "RoPE", "absolute": "absolute"}, ("keep", "drop-right")
OPEN = {
    SUFFICES: "its answer fades too, and stays without those terms, so negative evidence suffices",
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
        table = overall(self.parts)
        table = table[(table["prediction"] != "open") & (table["planned"] > 0)]
        by_word = {
            word: [f"{row['recipe']}{row['prediction']}" for row in records(table) if row["verdict"] == word]
            for word in (FAILS, CANNOT, GATE, NOT_RUN, HOLDS)
        }
        failed = by_word[FAILS]
        fail = f"{len(failed)} {'fails' if len(failed) == 1 else 'fail'}" if failed else "none fails"
        if failed:
            fail += f" ({', '.join(failed)})" if short else f": {'; '.join(_why(self.parts, name) for name in failed)}"
        words = {CANNOT: "cannot be told", GATE: "not at their gate", NOT_RUN: "not run", HOLDS: "hold"}
        rest = [
            f"{len(by_word[word])} {said}" + ("" if short else f" ({', '.join(by_word[word])})")
            for word, said in words.items()
            if by_word[word]
        ]
        start = f"of {len(table)} predictions (each under recipe W or P) written before the runs, "
        return f"{start}{', '.join([fail, *rest])}."

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
        scaled = "RADD's recipe (P)" if short else "RADD's published recipe, scaled to two cores (P),"
        return (
            f"under {scaled} the paper's Table 1 {REPRODUCED[verdict]}: RoPE answers {', '.join(ours)} % backwards at "
            f"lengths {lengths} (paper: {', '.join(paper)}){note}."
        )

    # ---- the third ----

    def outvoted(self, short: bool) -> str:
        if self.runs is None or self.answers is None:
            return "what fades has not been measured."
        told = []
        for encoding, name in NAMES.items():
            by_recipe = [
                f"{_change([self._mean(Cell(encoding, dial=dial), recipe, 'reverse') for dial in DIALS])} "
                f"({recipe}{self._seeds(Cell(encoding), recipe)})"
                for recipe in RECIPES
            ]
            told.append(f"{name} {', '.join(by_recipe)}")
        own = self.runs[(self.runs["objective"] == "masked") & (self.runs["weights"] == "ema")]
        own = own[own["status"] == FINISHED]
        letters = own["letters_only"].min() if len(own) else np.nan
        share = own["placeholder_share"].min() if len(own) else np.nan
        verdicts = [str(row["verdict"]) for row in records(overall(self.parts)) if row["prediction"] == "0"]
        word = "outvoted, not forgotten" if set(verdicts) == {HOLDS} else _mixed(verdicts)
        start = "reverse accuracy at length 10, placeholders right of the evidence priced → not priced"
        end = f"letters-only in any masked run at the lowest {_per_cent(letters)}"
        end += "" if short else f", the placeholder's share of a run's errors at the lowest {_per_cent(share)}"
        return f"{start}: {'; '.join(told)}; {end}: {word}."

    # ---- the fourth ----

    def open_and_price(self, short: bool) -> str:
        if self.runs is None or self.answers is None:
            return "the open test has not been run."
        table = overall(self.parts)
        word = str(table[(table["prediction"] == "open") & (table["recipe"] == "W")]["verdict"].iloc[0])
        reverse, fitted = (self._mean(Cell("scalar"), "W", name) for name in ("reverse", "negative_probability"))
        stays = self._mean(Cell("scalar", dial="drop-right"), "W", "reverse")
        told = f"reverse {_per_cent(reverse)} under keep, {_per_cent(stays)} under drop-right"
        numbers = "" if short or np.isnan(reverse) else f" ({told}; keep's p(placeholder) {fitted:.2f})"
        prices = [f"{self._price(recipe, short)} ({recipe})" for recipe in RECIPES]
        named = "scalar positions" if short else "scalar positions, the test between this account and the paper's"
        named = f"{named} (W{self._seeds(Cell('scalar'), 'W')})"
        return f"{named}: {OPEN[word]}{numbers}; drop-right costs RoPE {'; '.join(prices)}."

    def _price(self, recipe: str, short: bool) -> str:
        loss, ill, believed = (
            [self._mean(Cell(dial=dial), recipe, name) for dial in DIALS]
            for name in ("keep_loss", "ill_formed", "negative_probability")
        )
        if np.isnan([*loss, *ill]).any():
            return NOT_RUN
        told = f"{loss[1] - loss[0]:+.3f} nats per token and {_change(ill)} ill-formed samples"
        return told if short else f"{told}, p(placeholder) where it is dropped {believed[0]:.2f} → {believed[1]:.2f}"

    def _seeds(self, cell: Cell, recipe: str) -> str:
        """How many runs each end of a change rests on, those of keep and of drop-right."""
        assert self.runs is not None
        own = self.runs[(self.runs["recipe"] == recipe) & (self.runs["weights"] == "ema")]
        counts = [int((replace(cell, dial=dial).among(own)["status"] == FINISHED).sum()) for dial in DIALS]
        if not any(counts):
            return ""
        return f", n = {counts[0]}" if counts[0] == counts[1] else f", n = {counts[0]} and {counts[1]}"

    def _mean(self, cell: Cell, recipe: str, column: str) -> float:
        """Of a cell's finished runs on averaged weights; NaN without one."""
        assert self.runs is not None
        own = cell.among(self.runs[(self.runs["recipe"] == recipe) & (self.runs["weights"] == "ema")])
        done = own[own["status"] == FINISHED]
        return float(done[column].mean()) if len(done) else float("nan")


def _why(parts: pd.DataFrame, name: str) -> str:
    """What a prediction's first failing part claimed, and the numbers against it."""
    recipe, prediction = name[0], name[1:]
    chosen = (parts["recipe"] == recipe) & (parts["prediction"] == prediction) & (parts["weights"] == "ema")
    failed = records(parts[chosen & (parts["verdict"] == FAILS)])
    table = overall(parts)
    raw = table[(table["recipe"] == recipe) & (table["prediction"] == prediction)]["raw"].iloc[0]
    more = f", and {len(failed) - 1} more of its parts" if len(failed) > 1 else ""
    found = f"{failed[0]['numbers']}{more}; on raw weights: {raw}"
    return f"**{name}** ({failed[0]['cell']}, claimed *{failed[0]['claim']}*, found {found})"


def _mixed(verdicts: list[str]) -> str:
    """What prediction 0 says where it does not simply hold."""
    return f"prediction 0 reads {', '.join(f'{word} ({name})' for word, name in zip(verdicts, RECIPES, strict=True))}"


def _per_cent(share: float) -> str:
    return NOT_RUN if np.isnan(share) else f"{100 * share:.0f} %"


def _change(shares: list[float]) -> str:
    """From one share to the next."""
    return NOT_RUN if np.isnan(shares).any() else f"{100 * shares[0]:.0f} → {100 * shares[1]:.0f} %"
