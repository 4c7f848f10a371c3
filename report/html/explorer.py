"""What a report's page holds of one run, so that its slider and selectors work without a server: small whole numbers.

Correlations, maps over distances, scores, cosines and probabilities of every checkpoint are worked out here, rounded
to 16- or 8-bit integers and written as base64. A run of 50 checkpoints x 32 layers x 32 heads x 500 pairs has 50
million scores, more than a page can carry: maps and scores then stand for each layer, or for all heads, in place of
each head, and `Explored.notes` says so. Values and intervals by head are never left out.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ...errors import RevprobeError, first_line
from ...probes.figures.drawable import sample_of
from ...probes.figures.theme import plain, undefined_text
from ...probes.figures.training_curves import series_words
from ...probes.readings.reading import Reading
from ...probes.statistics.by_distance import DISTANCES, cell_correlations, unit_correlations
from ...probes.statistics.by_head import head_correlations, score_table
from ...probes.statistics.by_role import cell_cosines

ATTENTION, GRADIENT, PROBABILITY = "attention_correlation", "gradient_cosine", "reverse_probability"
LEVELS = {"head": "each head", "layer": "the mean over the heads of each layer", "all": "the mean over all heads"}
BY = {"head": ("layer", "head"), "layer": ("layer",), "all": ()}
FINE, COARSE = 30_000, 100  # steps per unit: 16-bit numbers to 0.00003, the colours of maps to 0.01
UNDEFINED = -32_768
UNMEASURED, FIRST_REASON = -128, -127  # in maps; undefined cells are FIRST_REASON + number of the reason
MOST_REASONS = FIRST_REASON + COARSE + 2
LEAST_POINTS, MOST_POINTS = 100, 500  # of a scatter
BINS = 20
# Bytes of maps and of scores that all runs of a page may take together, before base64 adds a third.
MAP_BYTES, SCORE_BYTES = 2_500_000, 3_500_000


@dataclass(frozen=True)
class Explored:
    """One run's data for the page, and what was aggregated, left out or could not be read."""

    data: dict[str, Any]
    notes: list[str]


@dataclass
class _Entry:
    """One checkpoint of one series (weights, kind of pairs) of attention, worked out."""

    place: int
    reading: Reading
    table: pd.DataFrame  # of `head_correlations`
    cells: dict[str, pd.DataFrame]
    scores: np.ndarray  # `2 pair head`, less their groups' means
    pairs: pd.DataFrame  # pair, fact, distances

    @classmethod
    def of(cls, place: int, reading: Reading) -> _Entry:
        frame = reading.frame
        units = unit_correlations(frame)
        cells = {level: cell_correlations(units, by) for level, by in BY.items()}
        _, scores, _, groups = score_table(frame)
        scores = _less_group_means(scores, groups)
        pairs = frame.drop_duplicates("pair").sort_values("pair")[["pair", "fact", *DISTANCES]].reset_index(drop=True)
        return cls(place, reading, head_correlations(frame), cells, scores, pairs)


def explore(
    readings: Iterable[Reading], *, runs: int = 1, watch: Callable[[Iterable[Any]], Iterator[Any]] = iter
) -> Explored:
    """Work out a run's data.

    Args:
        readings: of one run.
        runs: how many runs share the page's room.
        watch: passes the readings on one by one, such as a progress bar does.
    """
    found = list(readings)
    steps = sorted({_step(reading) for reading in found})
    series = sorted({_series(reading) for reading in found}, key=lambda words: ("raw" in words, words))
    data: dict[str, Any] = {"steps": steps, "series": series}
    notes: list[str] = []
    for name, part in ((ATTENTION, _attention), (GRADIENT, _gradient), (PROBABILITY, _probability)):
        own = [one for one in found if one.name == name]
        placed = [(steps.index(_step(one)) * len(series) + series.index(_series(one)), one) for one in own]
        if not placed:
            continue
        if len({place for place, _ in placed}) < len(placed):
            raise RevprobeError(
                f"two readings of {name} at one step with the same weights: expected one run's, draw each by itself"
            )
        try:
            data[name], said = part(watch(placed), len(steps) * len(series), runs)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            said = [
                f"{name} cannot be drawn: {first_line(error)}; it was written by another version or changed by hand"
            ]
        notes += said
    return Explored(data, notes)


def _step(reading: Reading) -> int:
    return int(reading.meta.get("step") or 0)


def _series(reading: Reading) -> str:
    return series_words(reading.meta.get("weights"), reading.meta.get("kind"))


def packed(values: np.ndarray) -> str:
    """An integer array as base64 of its little-endian bytes."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def _fine(values: Any) -> np.ndarray:
    """Numbers in -1..1 in steps of 1 / FINE; UNDEFINED where they are NaN."""
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(numbers), np.round(np.nan_to_num(numbers) * FINE), UNDEFINED).astype(np.int16)


def _numbers(reading: Reading) -> dict[str, Any]:
    """A reading's value as its panel's heading shows it."""
    low, high = reading.interval
    control = reading.control.value if reading.control else float("nan")
    gone = undefined_text(reading.undefined)
    return {
        "value": reading.value,
        "low": low,
        "high": high,
        "control": control,
        "sample": sample_of(reading),
        "gone": plain(gone),
    }


def _attention(placed: Iterable[tuple[int, Reading]], places: int, runs: int) -> tuple[dict[str, Any], list[str]]:
    entries = [_Entry.of(place, reading) for place, reading in placed]
    layers = sorted({int(layer) for entry in entries for layer in entry.table["layer"].dropna()})
    heads = sorted({int(head) for entry in entries for head in entry.table["head"].dropna()})
    units = {"all": 1, "layer": len(layers), "head": len(layers) * len(heads)}
    index = pd.MultiIndex.from_tuples(_units("head", layers, heads, whole=True))
    values = np.full((places, len(index), 3), UNDEFINED, dtype=np.int16)
    titles: list[dict[str, Any] | None] = [None] * places
    for entry in entries:
        table = entry.table.astype({"layer": object, "head": object})
        table[["layer", "head"]] = table[["layer", "head"]].astype(object).where(table[["layer", "head"]].notna(), -1)
        keyed = table.set_index(["layer", "head"])[["value", "low", "high"]].astype(float)
        values[entry.place] = _fine(keyed.reindex(index))
        titles[entry.place] = _numbers(entry.reading)
    maps, map_level = _maps(entries, units, layers, heads, MAP_BYTES / runs, places)
    scores, score_level, points = _scores(entries, units, layers, heads, SCORE_BYTES / runs, places)
    data = {
        "layers": layers,
        "heads": heads,
        "values": packed(values),
        "titles": titles,
        "maps": maps,
        "scores": scores,
    }
    notes = [
        f"{what} drawn for {LEVELS[level]}: one for each head would not fit in a page"
        for what, level in (("maps over distances are", map_level), ("score scatters are", score_level))
        if level != "head" and units["head"] > units[level]
    ]
    total = max(len(entry.pairs) for entry in entries)
    if points < total:
        notes.append(f"score scatters show {points:,} of {total:,} pairs, drawn at random once for all checkpoints")
    return data, notes


def _units(level: str, layers: Sequence[int], heads: Sequence[int], *, whole: bool) -> list[tuple[int, int]]:
    """(layer, head) of what there is at a level, -1 standing for all; `whole` puts the coarser ones before."""
    listed = {
        "all": [(-1, -1)],
        "layer": [(layer, -1) for layer in layers],
        "head": [(layer, head) for layer in layers for head in heads],
    }
    names = list(listed)
    return [unit for name in names[: names.index(level) + 1] for unit in listed[name]] if whole else listed[level]


def _less_group_means(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Scores less the mean of their group and head, which is a position bias.

    Shapes: `2 pair head, pair -> 2 pair head`.
    """
    group = np.unique(groups, return_inverse=True)[1].reshape(-1)
    # A pair counts where both its scores are defined, as in the correlation.
    sound = np.isfinite(scores).all(0)
    filled = np.where(sound, scores, 0.0)
    sums, counts = np.zeros((2, group.max() + 1, scores.shape[2])), np.zeros((group.max() + 1, scores.shape[2]))
    for side in (0, 1):
        np.add.at(sums[side], group, filled[side])
    np.add.at(counts, group, sound)
    return np.where(sound, scores - (sums / np.maximum(counts, 1))[:, group], np.nan)


def _maps(
    entries: Sequence[_Entry],
    units: dict[str, int],
    layers: Sequence[int],
    heads: Sequence[int],
    room: float,
    places: int,
) -> tuple[dict[str, Any], str]:
    """The maps over distances at the finest level that fits: `entry unit cell` in steps of 0.01."""
    cells = pd.concat([entry.cells["all"][[*DISTANCES, "offsets"]] for entry in entries]).drop_duplicates(DISTANCES)
    cells = cells.sort_values(DISTANCES, ignore_index=True)
    fits = [level for level in ("head", "layer") if places * units[level] * len(cells) <= room]
    level = fits[0] if fits else "all"
    listed = _units(level, layers, heads, whole=True)
    unit_of = {unit: place for place, unit in enumerate(listed)}
    cell_of = {place: index for index, place in enumerate(cells[DISTANCES].itertuples(index=False, name=None))}
    values = np.full((places, len(listed), len(cells)), UNMEASURED, dtype=np.int8)
    counts = np.zeros((places, len(cells)), dtype=np.int32)
    reasons: dict[str, int] = {}
    for entry in entries:
        for name in ("all", "layer", "head")[: ("all", "layer", "head").index(level) + 1]:
            found = entry.cells[name]
            at = [cell_of[place] for place in found[DISTANCES].itertuples(index=False, name=None)]
            layer_head = found.reindex(columns=["layer", "head"], fill_value=-1).astype(int)  # -1: all of them
            row = [unit_of[unit] for unit in layer_head.itertuples(index=False, name=None)]
            codes = [_reason(reasons, text) for text in found["reason"]]
            value = found["value"].to_numpy(dtype=np.float64)
            coarse = np.where(np.isnan(value), codes, np.round(np.nan_to_num(value) * COARSE))
            values[entry.place, row, at] = coarse.astype(np.int8)
            if name == "all":
                counts[entry.place, at] = found["n"].fillna(0).to_numpy(dtype=np.int32)
    places_of = {name: cells[name].astype(int).tolist() for name in DISTANCES}
    data = {"level": level, "cells": places_of | {"offsets": cells["offsets"].tolist()}, "values": packed(values)}
    return data | {"counts": packed(counts), "reasons": [plain(text, limit=200) for text in reasons]}, level


def _reason(reasons: dict[str, int], text: object) -> int:
    """The code of an undefined cell's reason; the page has room for MOST_REASONS different ones."""
    words = str(text) or "no group gives a number"
    if words not in reasons and len(reasons) == MOST_REASONS - 1:
        words = "undefined for one of many reasons, see the reading's frame"
    return FIRST_REASON + reasons.setdefault(words, len(reasons))


def _scores(
    entries: Sequence[_Entry],
    units: dict[str, int],
    layers: Sequence[int],
    heads: Sequence[int],
    room: float,
    places: int,
) -> tuple[dict[str, Any], str, int]:
    """Both scores of each pair at the finest level that fits: `entry unit side pair`, as shares of the largest."""
    pairs = pd.concat([entry.pairs for entry in entries]).drop_duplicates("pair").sort_values("pair", ignore_index=True)
    wanted = min(len(pairs), LEAST_POINTS)
    fits = [level for level in ("head", "layer") if places * units[level] * wanted * 4 <= room]
    level = fits[0] if fits else "all"
    listed = _units(level, layers, heads, whole=True)
    points = min(len(pairs), MOST_POINTS, max(10, int(room / (places * len(listed) * 4))))
    if points < len(pairs):
        pairs = pairs.sample(points, random_state=0).sort_values("pair", ignore_index=True)
    values = np.full((places, len(listed), 2, points), UNDEFINED, dtype=np.int16)
    scale = np.zeros((places, len(listed)))
    for entry in entries:
        row = pd.Index(entry.pairs["pair"]).get_indexer(pairs["pair"])
        table = entry.table.dropna(subset="head")
        own = table[["layer", "head"]].to_numpy(dtype=np.int64)
        for place, (layer, head) in enumerate(listed):
            chosen = ((own[:, 0] == layer) | (layer == -1)) & ((own[:, 1] == head) | (head == -1))
            scores = np.where(row >= 0, _mean_over_heads(entry.scores[:, :, chosen])[:, row], np.nan)
            largest = float(np.nanmax(np.abs(scores), initial=0.0)) if np.isfinite(scores).any() else 0.0
            scale[entry.place, place] = largest
            values[entry.place, place] = _fine(scores / (largest or 1.0))
    names, fact = np.unique(pairs["fact"].astype(str), return_inverse=True)
    about = {"pair": [int(one) for one in pairs["pair"]], "fact": fact.reshape(-1).tolist()}
    about |= {name: pairs[name].astype(int).tolist() for name in DISTANCES}
    data = {"level": level, "values": packed(values), "scale": scale.ravel().tolist(), "pairs": about}
    return data | {"facts": [plain(name, limit=200) for name in names]}, level, points


def _mean_over_heads(scores: np.ndarray) -> np.ndarray:
    """The mean over defined heads; NaN where none is. Shapes: `2 pair head -> 2 pair`."""
    defined = np.isfinite(scores)
    count = defined.sum(-1)
    return np.where(count > 0, np.where(defined, scores, 0.0).sum(-1) / np.maximum(count, 1), np.nan)


def _gradient(placed: Iterable[tuple[int, Reading]], places: int, runs: int) -> tuple[dict[str, Any], list[str]]:
    """Cosines of everything, each role, each layer, and each role of each layer."""
    tables: dict[int, pd.DataFrame] = {}
    titles: list[Any] = [None] * places
    for place, reading in placed:
        parts = [cell_cosines(reading.frame, by) for by in ([], ["role"], ["layer"], ["layer", "role"])]
        table = pd.concat(parts, ignore_index=True)
        tables[place] = table.assign(**{key: table[key].fillna("all").astype(str) for key in ("layer", "role")})
        titles[place] = _numbers(reading)
    keys = pd.concat([table[["layer", "role"]] for table in tables.values()]).drop_duplicates()
    index = pd.MultiIndex.from_frame(keys)
    values = np.full((places, len(index), 4), UNDEFINED, dtype=np.int16)
    counts = np.zeros((places, len(index)), dtype=np.int32)
    for place, table in tables.items():
        rows = table.set_index(["layer", "role"]).reindex(index)
        values[place] = _fine(rows[["value", "low", "high", "control"]])
        counts[place] = rows["n"].fillna(0).to_numpy(dtype=np.int32)
    data = {"layer": keys["layer"].tolist(), "role": [plain(role) for role in keys["role"]], "values": packed(values)}
    return data | {"counts": packed(counts), "titles": titles}, []


def _probability(placed: Iterable[tuple[int, Reading]], places: int, runs: int) -> tuple[dict[str, Any], list[str]]:
    """Shares of pairs by the target's probability, forward, reverse and reverse under the control, and their means."""
    shares = np.zeros((places, 3, BINS), dtype=np.int16)
    titles: list[Any] = [None] * places
    edges = np.linspace(0.0, 1.0, BINS + 1)
    for place, reading in placed:
        sides = {side: part for side, part in reading.frame.groupby("direction")}
        curves = [(sides.get("forward"), "probability"), (sides.get("reverse"), "probability")]
        for row, (part, column) in enumerate([*curves, (sides.get("reverse"), "probability_control")]):
            if part is not None and column in part:
                values = part[column].dropna().to_numpy(dtype=float)
                shares[place, row] = _fine(np.histogram(values, bins=edges)[0] / max(len(values), 1))
        measures = reading.measures().set_index("measure")[["value", "low", "high", "control", "n"]].astype(float)
        titles[place] = _numbers(reading) | {"measures": {str(k): v.tolist() for k, v in measures.iterrows()}}
    return {"shares": packed(shares), "titles": titles}, []
