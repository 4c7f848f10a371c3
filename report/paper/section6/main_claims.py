"""The main table's predictions T1 to T5, as examples/section6.yaml words them, judged seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .frames import Section6
from .plan import CAUSAL, DATASETS, DIFFUSION, EXEMPT_MODELS, FLOOR, LEARNED, MASKED, SEEDS, Cell, Trained, main_cell
from .verdicts import CANNOT, FAILS, HOLDS, NOT_RUN, Claim, Judged, of_parts, passes, per_cent

T1 = "the lower reverse of mini-llada and mini-dream is above the higher of mini-llama and mini-qwen2"
T2 = "reverse at the floor"
T3 = "mini-mlm's reverse is at least half of mini-llada's"
T4 = "attention correlation and gradient cosine above their control once 90 % forward is reached"
T5 = "reverse falls nowhere by more than 20 points once 90 % forward is reached"
ROUTES = {"attention_correlation": "correlation", "gradient_cosine": "cosine"}
HALF, FALL = 0.5, 0.20
TOO_LOW = f"never above {100 * FALL:.0f} %, from where no fall is so deep"


def main_claims(found: Section6) -> list[Claim]:
    """T1 to T5, each with the cells that it speaks of."""
    claims = [_t1(found, trained) for trained in DATASETS[:2]]
    for trained in DATASETS:
        claims += [_of(found, "T2", T2, main_cell(model, trained)) for model in CAUSAL]
    claims += [_t3(found, trained) for trained in DATASETS]
    for name, plain, models in (("T4", T4, MASKED), ("T5", T5, (*MASKED, *CAUSAL))):
        claims += [_of(found, name, plain, main_cell(model, trained)) for trained in DATASETS for model in models]
    return claims


def learned(found: Section6, cells: Iterable[Cell], seed: int) -> bool:
    """Whether all cells that must are at least 90 % forward at the last step."""
    need = [cell for cell in cells if cell.model not in EXEMPT_MODELS]
    values = [found.last(cell, seed, "forward") for cell in need]
    return all(value is not None and passes(value, ">=", LEARNED) for value in values)


def missing(found: Section6, cells: Iterable[Cell], seed: int) -> str:
    """Which of the cells are not finished, and why; empty where all are."""
    left = [(cell.model, found.status(cell, seed)) for cell in cells if found.steps(cell, seed) is None]
    return ", ".join(f"{model} {status}" for model, status in left)


def _t1(found: Section6, trained: Trained) -> Claim:
    cells = {model: main_cell(model, trained) for model in (*DIFFUSION, *CAUSAL)}

    def judged(seed: int) -> Judged:
        if left := missing(found, cells.values(), seed):
            return Judged(seed, NOT_RUN, left)
        values = {model: _value(found, cell, seed) for model, cell in cells.items()}
        numbers = ", ".join(f"{model} {per_cent(value)}" for model, value in values.items())
        # min and max would lose a NaN, which decides: the order cannot be told.
        pairs = [passes(values[a] - values[b], ">", 0.0) for a in DIFFUSION for b in CAUSAL]
        verdict = of_parts(pairs) if learned(found, cells.values(), seed) else CANNOT
        tie = "; a tie is not above" if verdict == FAILS and len(set(values.values())) == 1 else ""
        return Judged(seed, verdict, numbers + tie)

    return Claim("T1", "prediction", T1, trained.words, [judged(seed) for seed in SEEDS])


def _t3(found: Section6, trained: Trained) -> Claim:
    mlm, llada = main_cell("mini-mlm", trained), main_cell("mini-llada", trained)

    def judged(seed: int) -> Judged:
        if left := missing(found, (mlm, llada), seed):
            return Judged(seed, NOT_RUN, left)
        own, other = _value(found, mlm, seed), _value(found, llada, seed)
        numbers = f"mini-mlm {per_cent(own)}, mini-llada {per_cent(other)}"
        if not learned(found, (mlm, llada), seed) or passes(other, ">", FLOOR) is not True:
            return Judged(seed, CANNOT, numbers)
        return Judged(seed, of_parts([passes(own - HALF * other, ">=", 0.0)]), numbers)

    return Claim("T3", "prediction", T3, trained.words, [judged(seed) for seed in SEEDS])


def _of(found: Section6, name: str, plain: str, cell: Cell) -> Claim:
    """A claim about one cell."""
    rule = {"T2": _at_floor, "T4": _above_control, "T5": _falls_nowhere}[name]

    def judged(seed: int) -> Judged:
        if left := missing(found, [cell], seed):
            return Judged(seed, NOT_RUN, left.removeprefix(f"{cell.model} "))
        judged = rule(found, cell, seed)
        return judged if learned(found, [cell], seed) else Judged(seed, CANNOT, judged.numbers)

    return Claim(name, "prediction", plain, cell.words, [judged(seed) for seed in SEEDS])


def _at_floor(found: Section6, cell: Cell, seed: int) -> Judged:
    value = _value(found, cell, seed)
    return Judged(seed, of_parts([passes(value, "<=", FLOOR)]), f"reverse {per_cent(value)}")


def _above_control(found: Section6, cell: Cell, seed: int) -> Judged:
    """At every checkpoint from the one where forward is reached on: the excess's interval above 0, or its value not."""
    reached = found.reached(cell, seed)
    if reached is None:
        return Judged(seed, CANNOT, "90 % forward never reached")
    words, told = [], []
    for measure, name in ROUTES.items():
        rows = [row for step, row in found.curve(cell, seed, measure, table="signatures").items() if step >= reached]
        excesses = [float(row["excess"]) for row in rows]
        if any(passes(excess, "<=", 0.0) for excess in excesses):
            words.append(FAILS)
        else:
            clear = [passes(float(row["excess_low"]), ">", 0.0) for row in rows]
            words.append(HOLDS if clear and all(clear) else CANNOT)
        lowest = min((excess for excess in excesses if not math.isnan(excess)), default=math.nan)
        told.append(f"{name} less control at least {lowest:.2f} ({len(rows)} checkpoint{'s' * (len(rows) != 1)})")
    return Judged(seed, next(word for word in (FAILS, CANNOT, HOLDS) if word in words), ", ".join(told))


def _falls_nowhere(found: Section6, cell: Cell, seed: int) -> Judged:
    """The deepest fall below what reverse was before, from the checkpoint where forward is reached on.

    Settled where it never stood high enough to fall so far.
    """
    reached = found.reached(cell, seed)
    if reached is None:
        return Judged(seed, CANNOT, "90 % forward never reached")
    values = [float(row["value"]) for step, row in found.curve(cell, seed, "reverse").items() if step >= reached]
    if len(values) < 2:
        return Judged(seed, CANNOT, "one checkpoint alone")
    falls = [before - after for at, after in enumerate(values) for before in values[:at]]
    defined = [fall for fall in falls if not math.isnan(fall)]
    deepest = max(defined, default=math.nan)
    held = passes(deepest, "<=", FALL)
    # What is undefined may have been a fall.
    verdict = of_parts([held if len(defined) == len(falls) or held is False else None])
    low = verdict == HOLDS and all(passes(value, "<=", FALL) for value in values[:-1])
    told = f"deepest fall {per_cent(max(deepest, 0.0) if defined else math.nan)} points"
    return Judged(seed, verdict, told, TOO_LOW if low else "")


def _value(found: Section6, cell: Cell, seed: int) -> float:
    value = found.last(cell, seed, "reverse")
    return math.nan if value is None else value
