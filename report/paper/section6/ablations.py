"""The ablations' predictions, coded as examples/section6_ablations.yaml words them, judged seed by seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .frames import Section6
from .plan import DATASETS, EXEMPT_ABLATIONS, FLOOR, LEARNED, PLAIN, SEEDS, Cell, ablation_cell, main_cell
from .verdicts import CANNOT, FAILS, HOLDS, NOT_RUN, Claim, Judged, of_parts, passes, per_cent

COMPARED = "beside it no other verdict was possible"
# What is asked of a cell at its last step: reverse and forward exact match, recovery of the first entity in place.
R, F, IN_PLACE = "reverse", "forward", "first entity in place"


@dataclass(frozen=True)
class Condition:
    """A number of a cell, or how far it is from another cell's, against a bound.

    `apart` takes the distance without its sign; points are fractions here.
    """

    what: str
    sign: str
    limit: float
    less: str | None = None
    apart: bool = False


def _floor(what: str) -> Condition:
    return Condition(what, "<=", FLOOR)


def _within(points: float, of: str = PLAIN) -> Condition:
    return Condition(R, "<=", points, of, apart=True)


ABOVE, BELOW = Condition(R, ">", 0.0, PLAIN), Condition(R, "<", 0.0, PLAIN)
# Variant -> its claim in words, and the conditions that must all hold.
PREDICTIONS: dict[str, tuple[str, tuple[Condition, ...]]] = {
    "whole-entity": ("reverse above plain's", (ABOVE,)),
    "one-span": ("reverse above plain's", (ABOVE,)),
    "never-first": ("reverse and recovery of the first entity in place at the floor", (_floor(R), _floor(IN_PLACE))),
    "never-second": ("forward at the floor, reverse within 10 points of plain's", (_floor(F), _within(0.10))),
    "response-only": ("reverse at the floor", (_floor(R),)),
    "end-unpriced": ("reverse within 10 points of plain's", (_within(0.10),)),
    "bare-keep": ("reverse below 20 %", (Condition(R, "<", 0.20),)),
    "bare-drop-right": ("reverse at least 20 points above bare-keep's", (Condition(R, ">=", 0.20, "bare-keep"),)),
    "bare-mirror": ("reverse within 10 points of bare-keep's", (_within(0.10, "bare-keep"),)),
    "absolute": ("reverse below plain's", (BELOW,)),
    "low-rates": ("reverse below plain's", (BELOW,)),
    "high-rates": ("reverse at least plain's less 5 points", (Condition(R, ">=", -0.05, PLAIN),)),
    "read-both": ("reverse at least 20 points above plain's", (Condition(R, ">=", 0.20, PLAIN),)),
    "read-forward": ("reverse at the floor", (_floor(R),)),
}
# Run beside them, to compare with; nothing was predicted. They are of another model, and held against its plain cell.
NOT_PREDICTED = dict.fromkeys(("llama-read-both", "llama-read-forward"), "mini-llama")


def ablation_claims(found: Section6) -> list[Claim]:
    """Each prediction, with its verdict per seed."""
    return [
        Claim(
            variant,
            "prediction",
            plain,
            ablation_cell(variant).words,
            [_judged(found, variant, conditions, seed) for seed in SEEDS],
        )
        for variant, (plain, conditions) in PREDICTIONS.items()
    ]


def plain_cell(variant: str) -> Cell:
    """The cell of the main table that a variant is held against."""
    return main_cell(NOT_PREDICTED.get(variant, ablation_cell(PLAIN).model), DATASETS[0])


def number(found: Section6, variant: str, what: str, seed: int) -> float | None:
    """A cell's number at its last step; None where it is not run, NaN where it is undefined or was not read."""
    cell = ablation_cell(variant)
    if what == IN_PLACE:
        return found.last(cell, seed, "forward_accuracy", table="signatures")
    return found.last(cell, seed, what)


def _judged(found: Section6, variant: str, conditions: tuple[Condition, ...], seed: int) -> Judged:
    if found.steps(ablation_cell(variant), seed) is None:
        return Judged(seed, NOT_RUN, found.status(ablation_cell(variant), seed))
    forward = number(found, variant, F, seed)
    told, parts, settled = [f"forward {per_cent(forward)}"], list[bool | None](), list[bool]()
    for one in conditions:
        own = number(found, variant, one.what, seed)
        beside = None if one.less is None else number(found, one.less, one.what, seed)
        if one.what != F:
            told.append(f"{one.what} {per_cent(own)}")
        if one.less is not None:
            told.append(f"{one.less} {per_cent(beside)}{_unlearned(found, one.less, seed)}")
        parts.append(_holds(one, own, beside))
        settled.append(_is_settled(one, beside))
    verdict = of_parts(parts)
    needs = variant not in EXEMPT_ABLATIONS
    if needs and not (forward is not None and passes(forward, ">=", LEARNED)):
        verdict = CANNOT
    decided = any(part is False and sure for part, sure in zip(parts, settled, strict=True))
    sure = {FAILS: decided, HOLDS: all(settled)}.get(verdict, False)
    return Judged(seed, verdict, ", ".join(told), COMPARED if sure else "")


def _holds(condition: Condition, own: float | None, beside: float | None) -> bool | None:
    """None where either number is missing or undefined."""
    value = math.nan if own is None else own
    if condition.less is not None:
        value -= math.nan if beside is None else beside
    return passes(abs(value) if condition.apart else value, condition.sign, condition.limit)


def _is_settled(condition: Condition, beside: float | None) -> bool:
    """Whether it comes out alike at 0 and at 100 %, beside the number that it is compared with."""
    if condition.less is None or condition.apart:
        return False
    ends = [_holds(condition, own, beside) for own in (0.0, 1.0)]
    return ends[0] is not None and ends[0] == ends[1]


def _unlearned(found: Section6, variant: str, seed: int) -> str:
    """Said of a cell that is compared with and has not learned the forward direction: it decides nothing."""
    forward = number(found, variant, F, seed)
    low = forward is not None and passes(forward, ">=", LEARNED) is False
    return f" (its forward {per_cent(forward)})" if low else ""
