"""What the paper and the one-layer results say that these runs can contradict, judged as the predictions are.

A cell that has not learned the forward direction says neither for nor against them.

Nothing here was predicted of the small models: the paper's are 8B, and the one-layer results are of letters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .frames import KINDS, Section6
from .main_claims import learned, missing
from .plan import (
    CAUSAL,
    DATASETS,
    DIFFUSION,
    FLOOR,
    PAPER_NAMES,
    SEEDS,
    TABLE_7,
    Cell,
    Trained,
    ablation_cell,
    main_cell,
)
from .verdicts import CANNOT, FAILS, HOLDS, NOT_RUN, Claim, Judged, of_parts, passes, per_cent, probability

PAPER, ONE_LAYER = "paper", "one layer"
# Predictions that say what another source says.
SAID_BY = {"T1": PAPER, "T2": PAPER, "T4": PAPER, "absolute": PAPER}
SAID_BY |= dict.fromkeys(("bare-keep", "bare-drop-right", "bare-mirror"), ONE_LAYER)
# Of these the source speaks of some cells alone: what it prints is above the floor elsewhere, or has no counterpart.
SAID_OF = {
    "T2": {
        main_cell(model, trained).words for trained in DATASETS for model in CAUSAL
        if TABLE_7[trained][model][1] <= 100 * FLOOR
    },
    "T4": {main_cell(model, trained).words for trained in DATASETS for model in DIFFUSION},
}  # fmt: skip
SIDE = "the side that the paper's Table 7 has higher is higher"
ORDER = "both diffusion models answer backwards more often than both causal ones (Table 7)"
RISES = (
    "reverse probability is higher at the end than before fine-tuning (Fig. 4): told where the two intervals are apart"
)
BELOW = "reverse probability stays below forward probability (Fig. 4)"
OUTVOTED = (
    "outvoted, not forgotten: bare-keep's right answer ranks first in 95 %, and 95 % of its errors are an empty answer"
)
SHARE = 0.95

Rule = Callable[[Section6, Cell, int], tuple[str, str]]


def other_claims(found: Section6) -> list[Claim]:
    """Each statement of the paper and of the one-layer results, with a verdict per seed."""
    claims = []
    for trained in DATASETS:
        claims += [
            _of(found, "side", PAPER, f"{SIDE} ({_side(*printed)})", main_cell(model, trained), _same_side(printed))
            for model, printed in TABLE_7[trained].items()
        ]
    claims += [_order(found, trained) for trained in DATASETS[2:]]
    for name, plain, rule in (("rises", RISES, _rises), ("below", BELOW, _below)):
        claims += [
            _of(found, name, PAPER, plain, main_cell(model, trained), rule)
            for trained in DATASETS
            for model in DIFFUSION
        ]
    return [*claims, _of(found, "outvoted", ONE_LAYER, OUTVOTED, ablation_cell("bare-keep"), _outvoted)]


def _of(found: Section6, name: str, source: str, plain: str, cell: Cell, rule: Rule) -> Claim:
    def judged(seed: int) -> Judged:
        if found.steps(cell, seed) is None:
            return Judged(seed, NOT_RUN, found.status(cell, seed))
        return _where_learned(found, [cell], seed, *rule(found, cell, seed))

    return Claim(name, source, plain, cell.words, [judged(seed) for seed in SEEDS])


def _where_learned(found: Section6, cells: Sequence[Cell], seed: int, verdict: str, numbers: str) -> Judged:
    """The verdict; that it cannot be told, and of which cells, where forward is below 90 % or undefined."""
    low = [cell for cell in cells if not learned(found, [cell], seed)]
    if not low:
        return Judged(seed, verdict, numbers)
    told = ", ".join(f"{cell.model} {per_cent(_last(found, cell, seed, 'forward'))}" for cell in low)
    return Judged(seed, CANNOT, f"{numbers}; forward at the last step: {told}")


def _side(forward: float, reverse: float) -> str:
    return "forward" if forward > reverse else "reverse"


def _same_side(printed: tuple[float, float]) -> Rule:
    sign = 1 if printed[0] > printed[1] else -1

    def rule(found: Section6, cell: Cell, seed: int) -> tuple[str, str]:
        forward, reverse = (_last(found, cell, seed, asked) for asked in ("forward", "reverse"))
        numbers = f"forward {per_cent(forward)}, reverse {per_cent(reverse)}"
        return of_parts([passes(sign * (forward - reverse), ">", 0.0)]), numbers

    return rule


def _order(found: Section6, trained: Trained) -> Claim:
    cells = {model: main_cell(model, trained) for model in (*DIFFUSION, *CAUSAL)}

    def judged(seed: int) -> Judged:
        if left := missing(found, cells.values(), seed):
            return Judged(seed, NOT_RUN, left)
        values = {model: _last(found, cell, seed, "reverse") for model, cell in cells.items()}
        pairs = [passes(values[a] - values[b], ">", 0.0) for a in DIFFUSION for b in CAUSAL]
        numbers = ", ".join(f"{model} {per_cent(value)}" for model, value in values.items())
        return _where_learned(found, list(cells.values()), seed, of_parts(pairs), numbers)

    return Claim("order", PAPER, ORDER, trained.words, [judged(seed) for seed in SEEDS])


def _rises(found: Section6, cell: Cell, seed: int) -> tuple[str, str]:
    rows = list(found.curve(cell, seed, "reverse_probability", table="signatures").values())
    if len(rows) < 2:
        return of_parts([]), "one reading alone"
    first, last = rows[0], rows[-1]
    value, low, high = (tuple(float(row[key]) for row in (first, last)) for key in ("value", "low", "high"))
    ends = zip(*(map(probability, both) for both in (value, low, high)), strict=True)
    told = " to ".join(f"{one} [{a}, {b}]" for one, a, b in ends)
    # Probabilities of millionths are compared as they are: what `passes` takes for dust is a rise here.
    return FAILS if high[1] < low[0] else HOLDS if low[1] > high[0] else CANNOT, told


def _below(found: Section6, cell: Cell, seed: int) -> tuple[str, str]:
    forward, reverse = (
        _last(found, cell, seed, f"{side}_probability", table="signatures") for side in ("forward", "reverse")
    )
    return of_parts(
        [passes(reverse - forward, "<", 0.0)]
    ), f"reverse {probability(reverse)}, forward {probability(forward)}"


def _outvoted(found: Section6, cell: Cell, seed: int) -> tuple[str, str]:
    """Both shares; without a wrong answer there is no error to be the empty one."""
    first = _last(found, cell, seed, "reverse", table="ranks")
    steps = found.steps(cell, seed)
    row = found.curve(cell, seed, "reverse").get(-1 if steps is None else steps, {})
    counts = {kind: float(value) for kind in KINDS if (value := row.get(kind)) is not None and value == value}
    errors = sum(counts.values())
    empty = math.nan if not counts else counts["end"] / errors if errors else 1.0
    numbers = f"ranked first {per_cent(first)}, empty {per_cent(empty)} of {errors:.0f} errors"
    return of_parts([passes(first, ">=", SHARE), passes(empty, ">=", SHARE)]), numbers


def _last(found: Section6, cell: Cell, seed: int, asked: str, table: str = "answers") -> float:
    value = found.last(cell, seed, asked, table=table)
    return math.nan if value is None else value


def repeats(claim: Claim, source: str) -> bool:
    """Whether a prediction says of its cell what the source says of it."""
    return SAID_BY.get(claim.name) == source and claim.cell in SAID_OF.get(claim.name, {claim.cell})


def counterpart(model: str) -> str:
    """The paper's model that a small one stands for."""
    return PAPER_NAMES.get(model, "none")
