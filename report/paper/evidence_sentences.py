"""What came out, in four sentences and in README's few lines: filled from the verdicts, what contradicts first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from .comparisons import DUST
from .evidence_runs import FINISHED
from .prediction_parts import Cell
from .predictions import CHANGE, NARROWED, RECIPES, SUFFICES, counted, judged, overall
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
    SUFFICES: "the answer fades too and stays without those terms: negative evidence suffices",
    NARROWED: "the negatives are fitted and the answer stays: RoPE's content-dependent rotation is needed, and the "
    "claim is narrowed",
    CANNOT: "cannot tell",
    NOT_RUN: "not run",
    GATE: "gate not met",
}
SHORT = {
    SUFFICES: "the answer fades too, and not without those terms: negative evidence suffices",
    NARROWED: "negatives fitted, and it stays: RoPE's rotation is needed, the claim is narrowed",
}
LETTERS = 26


@dataclass(frozen=True)
class Told:
    """The tables that sentences are made of; None where a sweep has not been collected."""

    runs: pd.DataFrame | None = None
    answers: pd.DataFrame | None = None
    published_runs: pd.DataFrame | None = None
    published_answers: pd.DataFrame | None = None

    def four(self) -> list[str]:
        """What contradicts the predictions, in words; Table 1; what was claimed; the open test and the price."""
        first = [self.contradictions(short=False), *self.failures(), self.of_causal()]
        rest = [self.table_1(short=False), self.outvoted(short=False), self.open_and_price(short=False)]
        return ["\n".join(part for part in first if part), *rest]

    def short(self) -> list[str]:
        """The same for README, in at most two lines each."""
        return [self.contradictions(True), self.table_1(True), self.outvoted(True), self.open_and_price(True)]

    @cached_property
    def parts(self) -> pd.DataFrame:
        assert self.runs is not None and self.answers is not None, "asked only where there are both"
        return judged(self.runs, self.answers)

    # ---- the first ----

    def contradictions(self, short: bool) -> str:
        if self.runs is None or self.answers is None:
            return "No prediction has been judged: the sweep has not been collected."
        table = counted(overall(self.parts))
        by_word = {
            word: [f"{row['recipe']}{row['prediction']}" for row in records(table) if row["verdict"] == word]
            for word in (FAILS, CANNOT, GATE, NOT_RUN, HOLDS)
        }
        words = {CANNOT: "cannot be told", GATE: "not at their gate", NOT_RUN: "not run", HOLDS: "hold"}
        failed = by_word.pop(FAILS)
        fail = f"{len(failed)} {'fails' if len(failed) == 1 else 'fail'}" if failed else "none fails"
        fail += f" ({', '.join(failed)})" if failed and short else ""
        rest = [
            f"{len(names)} {words[word]}" + ("" if short else f" ({', '.join(names)})")
            for word, names in by_word.items()
            if names
        ]
        told = ", ".join([fail, *rest])
        if short:
            return f"Of {len(table)} predictions written before the runs (W, P), {told}."
        start = "written before the runs ([0 to 7](#which-predictions-hold), under recipe W, a plain one, and where "
        start += "planned P, RADD's published one scaled down)"
        end = " What fails ([words](#words)), lowest to highest seed:\n" if failed else ""
        return f"**Predictions.** Of {len(table)} {start}, {told}.{end}"

    def failures(self) -> list[str]:
        """Each claim that fails, told once, with what was found under each recipe, on averaged and on raw weights."""
        if self.runs is None or self.answers is None:
            return []
        parts = self.parts[self.parts["prediction"] != "open"]
        failed = parts[(parts["weights"] == "ema") & (parts["verdict"] == FAILS)]
        lines = []
        for (prediction, plain), own in failed.sort_values("prediction", kind="stable").groupby(
            ["prediction", "plain"], sort=False
        ):
            told = []
            for recipe, rows in own.groupby("recipe", sort=False):
                beside = (parts["weights"] == "raw") & (parts["recipe"] == recipe) & parts["cell"].isin(rows["cell"])
                averaged, raw = _found(rows), _found(parts[beside & (parts["plain"] == plain)])
                n = rows[["n", "planned"]].sum()
                count = f" ({n['n']} of {n['planned']} seeds count)" if n["n"] < n["planned"] else ""
                told.append(
                    f"{averaged}{count}" if raw == averaged else f"averaged weights {averaged}{count}, raw {raw}"
                )
            recipes = list(own["recipe"].unique())
            names = ", ".join(f"{recipe}{str(prediction).split()[0]}" for recipe in recipes)
            each = "; ".join(f"{recipe} {said}" for recipe, said in zip(recipes, told, strict=True))
            lines.append(f"- **{names}**: {plain}; found {each if len(told) > 1 else told[0]}.")
        return lines

    def of_causal(self) -> str:
        """What it means where a causal model fails; empty where none does."""
        if self.runs is None or self.answers is None:
            return ""
        failed = self.parts[(self.parts["weights"] == "ema") & (self.parts["verdict"] == FAILS)]
        if not set(failed["prediction"]) & {"0 (causal)", "7"}:
            return ""
        own = self.runs[(self.runs["objective"] == "causal") & (self.runs["status"] == FINISHED)]
        keep, after = (own[own["dial"] == dial] for dial in ("keep", "drop-after"))
        told = (
            "So the causal model is not merely outvoted. Asked in reverse for the last letter, after its uppercase "
            f"partner (by chance {_per_cent(1 / LETTERS)}), it puts the right one ahead of the others in "
            f"{_range(keep['letters_only'])}."
        )
        if len(after):
            answered = ", ".join(
                f"{_range(rows['reverse'])} ({recipe}, at a mean probability of {_range(rows['reverse_answer'])})"
                for recipe, rows in after.groupby("recipe", sort=False)
            )
            told += f" With that place unpriced it is right in {answered}: nothing trains what stands there."
        return f"\n{told}"

    # ---- the second ----

    def table_1(self, short: bool) -> str:
        head = "" if short else "**Table 1.** "
        if self.published_runs is None or self.published_answers is None:
            older = "[the older recipe](#decayed-rate-tables-1-and-2-under-the-older-recipe)"
            beside = "the decayed rate" if short else older
            return f"{head}RADD's published recipe has not been collected, so Table 1 stands against {beside} alone."
        found = places(self.published_runs, self.published_answers)
        joint = joint_test(self.published_runs, found)
        verdict = joint[(joint["weights"] == "ema") & (joint["scope"] == SECOND)]["verdict"].iloc[0]
        rope = found[(found["position_encoding"] == "rope") & (found["weights"] == "ema") & (found["scope"] == SECOND)]
        ours, paper = [], []
        for row in records(rope.sort_values("length")):
            ends = dict.fromkeys(f"{row[end]:.0f}" for end in ("lowest", "highest"))
            ours.append(" to ".join(ends) if row["n"] else NOT_RUN)
            paper.append(f"{row['paper']:.1f}")
        lengths = ", ".join(str(row["length"]) for row in records(rope.sort_values("length")))
        blind = int(joint[(joint["weights"] == "ema") & (joint["scope"] == SECOND)]["not_informative"].iloc[0])
        note = f"; {blind} of the four distributions too wide to inform" if blind and not short else ""
        scaled = "RADD's recipe (P)" if short else "RADD's published recipe, scaled to two cores (P),"
        return (
            f"{head}Under {scaled} the paper's Table 1 {REPRODUCED[verdict]}: RoPE answers {', '.join(ours)} % "
            f"backwards at lengths {lengths} (paper: {', '.join(paper)}){note}."
        )

    # ---- the third ----

    def outvoted(self, short: bool) -> str:
        head = "" if short else "**Outvoted.** "
        if self.runs is None or self.answers is None:
            return f"{head}What fades has not been measured."
        told, counts = [], [self._counts(Cell(encoding), recipe) for encoding in NAMES for recipe in RECIPES]
        alike = len(set(counts)) == 1 and counts[0][0] == counts[0][1]
        for encoding, name in NAMES.items():
            by_recipe = []
            for recipe in RECIPES:
                change = _change([self._mean(Cell(encoding, dial=dial), recipe, "reverse") for dial in DIALS])
                n = "" if alike or short else _n(self._counts(Cell(encoding), recipe))
                by_recipe.append(f"{change} ({recipe}{n})")
            told.append(f"{name} {', '.join(by_recipe)}")
        letters, share = _lowest(self.runs, "ema")
        raw = _lowest(self.runs, "raw")
        longer = np.nan if self.published_runs is None else _lowest(self.published_runs, "ema")[0]
        verdicts = [str(row["verdict"]) for row in records(overall(self.parts)) if row["prediction"] == "0 (masked)"]
        holds = set(verdicts) == {HOLDS}
        of = "" if short else " on masked models"
        word = ": outvoted, not forgotten" if holds else f" (verdict{of}: {_mixed(verdicts)})"
        each = f" (n = {counts[0][0]} each)" if alike and counts[0][0] and not short else ""
        changes = f"{'; '.join(told)}{each}"
        if short:
            start = f"Reverse accuracy, placeholders right of the evidence priced → not: {changes}"
            beside = "" if np.isnan(longer) else f", in P's longer runs {_at_least(longer)}"
            return f"{start}; letters alone at least {_at_least(letters)}{beside}{word}."
        beside = (
            ""
            if np.isnan(longer)
            else f". Table 1's longer runs: the right letter leads in {_at_least(longer)} or more"
        )
        return (
            f"{head}*Keep* prices the placeholders (tokens that are no letter) right of the uppercase letter, "
            f"*drop-right* does not ([words](#words)). Reverse accuracy at length 10, keep → drop-right: {changes}.\n\n"
            f"In every masked run of this sweep (averaged weights; raw {_at_least(raw[0])} and {_at_least(raw[1])}) "
            f"the right letter leads the {LETTERS} in {_at_least(letters)} or more, and {_at_least(share)} or more of "
            f"errors are the placeholder{word}{beside}."
        )

    # ---- the fourth ----

    def open_and_price(self, short: bool) -> str:
        head = "" if short else "**Open test and price.** "
        if self.runs is None or self.answers is None:
            return f"{head}The open test has not been run."
        table = overall(self.parts)
        row = records(table[(table["prediction"] == "open") & (table["recipe"] == "W")])[0]
        word = str(row["verdict"])
        reverse = self._mean(Cell("scalar"), "W", "reverse")
        stays = self._mean(Cell("scalar", dial="drop-right"), "W", "reverse")
        told = f"reverse {_per_cent(reverse)} under keep, {_per_cent(stays)} under drop-right"
        raw = "" if row["raw"] == word else f"; on raw weights: {row['raw']}"
        numbers = "" if short or np.isnan(reverse) else f" ({told}{raw})"
        prices = "; ".join(f"{self._price(recipe, short)} ({recipe})" for recipe in RECIPES)
        if short:
            return f"Scalar positions (W): {SHORT.get(word, word)}. Not pricing them costs RoPE {prices}."
        n = _n(self._counts(Cell("scalar"), "W"))
        named = f"With scalar positions, a learned bias per signed distance (W{n}),"
        return f"{head}{named} {OPEN[word]}{numbers}. Drop-right costs RoPE {prices}."

    def _price(self, recipe: str, short: bool) -> str:
        loss, ill = (
            [self._mean(Cell(dial=dial), recipe, name) for dial in DIALS] for name in ("keep_loss", "ill_formed")
        )
        if np.isnan([*loss, *ill]).any():
            return NOT_RUN
        nats = f"{loss[1] - loss[0]:+.3f} nats"
        samples = f"{_change(ill)} ill-formed"
        return f"{nats}, {samples}" if short else f"{nats} per token and {samples} samples"

    def _counts(self, cell: Cell, recipe: str) -> tuple[int, int]:
        """How many runs each end of a change rests on, those of keep and of drop-right."""
        assert self.runs is not None
        own = self.runs[(self.runs["recipe"] == recipe) & (self.runs["weights"] == "ema")]
        keep, dropped = (int((replace(cell, dial=dial).among(own)["status"] == FINISHED).sum()) for dial in DIALS)
        return keep, dropped

    def _mean(self, cell: Cell, recipe: str, column: str) -> float:
        """Of a cell's finished runs on averaged weights; NaN without one."""
        assert self.runs is not None
        own = cell.among(self.runs[(self.runs["recipe"] == recipe) & (self.runs["weights"] == "ema")])
        done = own[own["status"] == FINISHED]
        return float(done[column].mean()) if len(done) else float("nan")


def _found(rows: pd.DataFrame) -> str:
    """The lowest and the highest of the parts' spans, by name; what decides where there is none."""
    spans: dict[str, tuple[float, float]] = {}
    for name, low, high in (span for own in rows["spans"] for span in own):
        before = spans.get(name, (np.inf, -np.inf))
        spans[name] = (min(before[0], low), max(before[1], high))
    if not spans:
        return "; ".join(dict.fromkeys(rows["why"])) or HOLDS
    return ", ".join(
        f"{100 * low:+.0f} to {100 * high:+.0f} points" if name == CHANGE else f"{name} {_range([low, high])}".strip()
        for name, (low, high) in spans.items()
    )


def _range(values: Any) -> str:
    """Lowest to highest of shares, in per cent; one number where they are alike to its digits."""
    found = np.asarray(list(values), dtype=float)
    if not len(found) or np.isnan(found).all():
        return NOT_RUN
    low, high = (_digits(100 * value) for value in (np.nanmin(found), np.nanmax(found)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _digits(value: float) -> str:
    """Whole per cent; next to 0 and 100, which alone are told as such, the digits that tell it from them.

    >>> _digits(42.4), _digits(0.04), _digits(99.96)
    ('42', '0.04', '99.96')
    """
    if 1 <= value <= 99 or value in (0.0, 100.0):
        return f"{value:.0f}"
    if value < 1:
        return f"{value:.1g}"
    told = (f"{value:.{places}f}" for places in range(1, 15))
    return next((text for text in told if float(text) < 100), "100")


def _lowest(runs: pd.DataFrame, weights: str) -> tuple[float, float]:
    """The lowest letters-only accuracy and placeholder's share of errors of any finished masked run."""
    own = runs[(runs["objective"] == "masked") & (runs["weights"] == weights) & (runs["status"] == FINISHED)]
    lowest = own.reindex(columns=["letters_only", "placeholder_share"]).min()
    return float(lowest["letters_only"]), float(lowest["placeholder_share"])


def _at_least(share: float) -> str:
    """Rounded down, since no value lies below."""
    return NOT_RUN if np.isnan(share) else f"{np.floor(100 * (share + DUST)):.0f} %"


def _n(counts: tuple[int, int]) -> str:
    if not any(counts):
        return ""
    return f", n = {counts[0]}" if counts[0] == counts[1] else f", n = {counts[0]} and {counts[1]}"


def _mixed(verdicts: list[str]) -> str:
    """What prediction 0 says where it does not simply hold."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return ", ".join(f"{recipe} {word}" for recipe, word in zip(RECIPES, verdicts, strict=True))


def _per_cent(share: float) -> str:
    return NOT_RUN if np.isnan(share) else f"{100 * share:.0f} %"


def _change(shares: list[float]) -> str:
    """From one share to the next."""
    return NOT_RUN if np.isnan(shares).any() else f"{100 * shares[0]:.0f} → {100 * shares[1]:.0f} %"
