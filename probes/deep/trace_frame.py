"""The tidy frame of a causal trace: one row per pair, direction, step and place, each NaN with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..pairs.pairs import ReversalPairs
from ..passes.state_runs import CLEAN, THIRD, Place, StateResult

LEAST_DIFFERENCE = 0.5  # nats between clean and corrupted, below which a share of it is noise
NO_OTHER = "no other fact of the group has evidence of as many tokens where this target is wrong, to corrupt the query"
NO_THIRD = "no third fact of the group has evidence of as many tokens where this target is wrong, for the control"
NO_PART = "the query has no token of this part"
TOO_CLOSE = f"clean and corrupted differ by less than {LEAST_DIFFERENCE} nats"
ZERO_CLEAN, ZERO_CORRUPTED = "probability 0 in the clean query", "probability 0 in the corrupted query"
ZERO_PATCHED, ZERO_CONTROL = "probability 0 with the state put back", "probability 0 with the third fact's state"


class Entry(NamedTuple):
    """The rows of one pair, direction and step, a row for each place.

    reason: why none of them has a number, "" where they have; reason_control: why they have no control.
    own: the trials in which the state is put back; whole: all that make up the target's log-probability.
    """

    pair: int
    direction: str
    reason: str
    reason_control: str
    own: tuple[int, ...]
    whole: tuple[int, ...]
    step: int | None = None
    revealed: int | None = None


def trace_frame(
    pairs: ReversalPairs,
    entries: Sequence[Entry],
    result: StateResult,
    places: Sequence[Place],
    missing: dict[int, str],
    parts: Sequence[str],
) -> pd.DataFrame:
    """The rows of every entry: its places, then the layers without the state (`missing`: layer -> reason).

    Texts are categories: a trace of every head of a deep model has half a million rows.
    """
    everywhere = [*places, *(Place(layer, None, part) for layer in missing for part in parts)]
    clean, corrupted = (_summed(table, [e.whole for e in entries]) for table in (result.clean, result.corrupted))
    patched = np.full((len(entries), len(everywhere), 2), np.nan)
    for row, entry in enumerate(entries):
        if entry.own:
            rest = [trial for trial in entry.whole if trial not in entry.own]
            patched[row, : len(places)] = result.patched[list(entry.own)].sum(0) + result.corrupted[rest].sum()
    absent = np.array([""] * len(places) + [missing[place.layer] for place in everywhere[len(places) :]], dtype=object)
    reason, reason_share, reason_control = _reasons(entries, absent, clean, corrupted, patched)
    with np.errstate(invalid="ignore", divide="ignore"):  # of probability 0
        change = patched - corrupted[:, None, None]
        share = change / (clean - corrupted)[:, None, None]
    effects = [np.where(why == "", change[..., d], np.nan) for d, why in ((CLEAN, reason), (THIRD, reason_control))]
    shared = (reason_share == "", (reason_share == "") & (reason_control == ""))
    shares = [
        np.where(defined, share[..., donor], np.nan) for donor, defined in zip((CLEAN, THIRD), shared, strict=True)
    ]
    of = np.repeat(np.array([entry.pair for entry in entries]), len(everywhere))
    spread = lambda values: values.repeat(len(everywhere))  # noqa: E731
    return pd.DataFrame(
        {
            "pair": of,
            "fact": pd.Categorical(pairs.facts.astype(str)).take(of),
            "kind": pd.Categorical([pairs.kind]).take(np.zeros_like(of)),
            "direction": spread(pd.Categorical([entry.direction for entry in entries])),
            "step": spread(pd.array([entry.step for entry in entries], dtype="Int64")),
            "revealed": spread(pd.array([entry.revealed for entry in entries], dtype="Int64")),
            **_by_place(everywhere, len(entries)),
            "log_probability": spread(clean),
            "log_probability_corrupted": spread(corrupted),
            "log_probability_patched": np.where(reason == "", patched[..., CLEAN], np.nan).reshape(-1),
            "effect": effects[CLEAN].reshape(-1),
            "share": shares[CLEAN].reshape(-1),
            "effect_control": effects[THIRD].reshape(-1),
            "share_control": shares[THIRD].reshape(-1),
            "reason": pd.Categorical(reason.reshape(-1)),
            "reason_share": pd.Categorical(reason_share.reshape(-1)),
            "reason_control": pd.Categorical(reason_control.reshape(-1)),
            **{name: np.asarray(values)[of] for name, values in pairs.flags.items()},
        }
    )


def _by_place(places: Sequence[Place], times: int) -> dict[str, object]:
    each = np.tile(np.arange(len(places)), times)
    part = pd.Categorical([place.part for place in places])
    numbers = {name: pd.array([getattr(place, name) for place in places], dtype="Int64") for name in ("layer", "head")}
    return {"part": part.take(each), **{name: values.take(each) for name, values in numbers.items()}}


def _summed(table: np.ndarray, trials: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The sum over each entry's trials, NaN where it has none."""
    return np.array([table[list(some)].sum() if some else np.nan for some in trials])


def _reasons(
    entries: Sequence[Entry], absent: np.ndarray, clean: np.ndarray, corrupted: np.ndarray, patched: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Why effect, share and control are NaN, "" where they are not; share and control are wherever the effect is.

    Shapes: `absent`: `place`; `clean`, `corrupted`: `entry`; `patched`: `entry place donor`; returns `entry place`
    three times.
    """
    entry = np.array([entry.reason for entry in entries], dtype=object)[:, None]
    control = np.array([entry.reason_control for entry in entries], dtype=object)[:, None]
    shape, lost = patched.shape[:2], np.isneginf(patched)
    wide = lambda values: np.broadcast_to(values, shape)  # noqa: E731
    zero = wide(np.isneginf(corrupted)[:, None])
    conditions = [wide(entry != ""), wide(absent != ""), np.isnan(patched[..., CLEAN]), zero, lost[..., CLEAN]]
    own = np.select(conditions, [wide(entry), wide(absent), NO_PART, ZERO_CORRUPTED, ZERO_PATCHED], "").astype(object)
    with np.errstate(invalid="ignore"):  # of probability 0
        close = ~(np.abs(clean - corrupted) >= LEAST_DIFFERENCE)[:, None]
    never = wide(np.isneginf(clean)[:, None])
    share = np.select([own != "", never, wide(close)], [own, ZERO_CLEAN, TOO_CLOSE], "").astype(object)
    alone = [own != "", wide(control != ""), lost[..., THIRD]]
    return own, share, np.select(alone, [own, wide(control), ZERO_CONTROL], "").astype(object)
