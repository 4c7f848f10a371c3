"""What a prediction is made of: which runs it speaks of, and its parts, each with a verdict and what decides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .rules import FAILS, HOLDS, NOT_RUN, Seed

NAMES = {"rope": "RoPE", "absolute": "the absolute encoding", "scalar": "scalar positions"}


@dataclass(frozen=True)
class Cell:
    """Which runs; all that is not named is as in the base."""

    encoding: str = "rope"
    length: int = 10
    dial: str = "keep"
    masks: str = "rate"
    dose: float | None = None
    switch: str | None = None
    objective: str = "masked"

    @property
    def words(self) -> str:
        """The model, for a reader who knows no cell's name."""
        name = "the causal model" if self.objective == "causal" else NAMES[self.encoding]
        return f"{name} at length {self.length}"

    def among(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Their rows, by seed."""
        dose = self.dose if self.dose is not None else float(self.dial == "keep")
        chosen = (runs["objective"] == self.objective) & (runs["length"] == self.length)
        chosen &= (runs["dial"] == self.dial) & (runs["masks"] == self.masks)
        chosen &= np.isclose(runs["dose"].astype(float), dose) & np.isclose(runs["clip"].astype(float), 1.0)
        chosen &= runs["switch_dial"].isna() if self.switch is None else runs["switch_dial"] == self.switch
        if self.objective == "masked":
            chosen &= runs["position_encoding"] == self.encoding
        return runs[chosen].sort_values("seed")


Span = tuple[str, float, float]


@dataclass(frozen=True)
class Part:
    """One part of a prediction: what is claimed of which cell, the verdict, and the numbers that decide.

    Args:
        plain: the claim in words, "RoPE ... was to ...".
        spans: what was found over the seeds that count: name ("" for the claim's own number), lowest, highest.
        found: what decides instead of the spans where no number of a seed does.
    """

    claim: str
    cell: str
    verdict: str
    seeds: Sequence[Seed]
    numbers: str
    plain: str
    spans: Sequence[Span]
    found: str = ""

    def row(self, prediction: str) -> dict[str, object]:
        counted = sum(one.ran and one.counts for one in self.seeds)
        row: dict[str, object] = {"prediction": prediction, "claim": self.claim, "cell": self.cell}
        row |= {"verdict": self.verdict, "n": counted, "planned": len(self.seeds), "numbers": self.numbers}
        return row | {"plain": self.plain, "spans": tuple(self.spans), "why": self.why()}

    def why(self) -> str:
        """What keeps it from holding; empty where it holds."""
        if self.verdict == HOLDS:
            return ""
        found = self.found or ", ".join(f"{name} {_between(low, high)}".strip() for name, low, high in self.spans)
        missing = [one.seed for one in self.seeds if not one.ran and one.seed >= 0]
        out = [one.seed for one in self.seeds if one.ran and not one.counts]
        if self.verdict == FAILS or not (missing or out):
            return found or NOT_RUN
        told = [NOT_RUN if len(missing) == len(self.seeds) else f"{listed(missing)} {NOT_RUN}"] if missing else []
        if out:
            told.append(f"{listed(out)} {'does' if len(out) == 1 else 'do'} not count")
        return ", ".join(told)


def cell_name(rows: pd.DataFrame, cell: Cell) -> str:
    """The cell's runs by their name; what was asked for where there is none."""
    if len(rows):
        return " ".join(pd.unique(rows["cell"]))
    where = "causal" if cell.objective == "causal" else cell.encoding
    masks = "" if cell.masks == "rate" else f", {cell.masks} masks"
    return f"no cell ({where}, L = {cell.length}, {cell.dial}{f' then {cell.switch}' if cell.switch else ''}{masks})"


def mark(one: Seed) -> str:
    return "" if one.counts else " (does not count)"


def numbers_of(seeds: Sequence[Seed], *, signed: bool = False) -> str:
    """Of each seed; told once where all are alike to three digits."""
    form = "+.3f" if signed else ".3f"
    told = [f"{format(one.value, form)}{mark(one)}" if one.ran else NOT_RUN for one in seeds]
    if len(told) > 1 and len(set(told)) == 1:
        return f"all {len(told)} {told[0]}"
    return ", ".join(f"s{one.seed} {said}" for one, said in zip(seeds, told, strict=True))


def spans_of(seeds: Sequence[Seed], name: str = "") -> list[Span]:
    """Lowest and highest of the seeds that count; nothing without one."""
    values = [one.value for one in seeds if one.ran and one.counts]
    return [(name, min(values), max(values))] if values else []


def _between(low: float, high: float) -> str:
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def listed(seeds: Sequence[int]) -> str:
    return ", ".join(f"s{seed}" for seed in seeds)


def time_text(step: float) -> str:
    return "not run" if np.isnan(step) else "not by the end" if np.isinf(step) else f"{step:.0f}"
