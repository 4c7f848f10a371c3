"""What a block sweep returns: one set of pairs read in blocks of many sizes, and the curve over the sizes.

At a smaller size fewer pairs have their evidence in sight. A curve through whatever is visible at each size would mix
the pairs that drop out with what the size does, so the curve, and every difference, is that of the pairs which have a
value at every size at which any has one.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ...arguments import checked, checked_fields
from ...atomic_files import folder_written_whole
from ...errors import RevprobeError, did_you_mean
from ..figures.theme import difference_text, interval_text
from ..statistics.estimators import LATER_BLOCK, STATISTICS_VERSION, Measured, pair_cosines
from ..statistics.intervals import Estimate
from ..statistics.paired import measured_difference, side_of
from ..statistics.partners import PARTNER
from .model_comparison import COMMON, DIFFERENCE, MEASURES
from .parquet import read_reading, write_reading
from .reading import MEASURE_COLUMNS, Reading, summary_row
from .readings import Readings, folder_of_readings

if TYPE_CHECKING:
    import plotly.graph_objects as go

VISIBLE, WHOLE_TEXT = "visible", "whole"
NOT_AT_ALL_SIZES = "without a value at another size"
NO_PAIR = "no pair has a value at every size"
COLUMNS = ["measure", "part", "size", "against", "kind", "visible", *MEASURE_COLUMNS[1:]]
_NUMBERS = "block_sweep.parquet"

Size = int | None  # tokens of a block; None: every token sees every other


def size_text(size: Size) -> str:
    """How a size is written: its number of tokens, or "whole"."""
    return WHOLE_TEXT if size is None else str(size)


@checked_fields
@dataclass(frozen=True, eq=False, repr=False)
class BlockSweep:
    """Readings of one set of pairs at several block sizes, and by how much one size differs from another.

    Args:
        readings: size -> readings of the same pairs; size None: every token sees every other. Ascending, None last.
        seed: of the draws of facts behind the intervals of differences.
    Raises: RevprobeError, without readings, or where sizes were read on different pairs.
    """

    readings: Mapping[Size, Readings]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.readings or not all(len(found) for found in self.readings.values()):
            raise RevprobeError("a block sweep without readings: expected some at each size, as rp.block_sweep makes")
        for name in {reading.name for found in self.readings.values() for reading in found}:
            taken = [found.select(name=name) for found in self.readings.values()]
            digests = {one.meta.get("pairs") for found in taken for one in found}
            if name not in MEASURES or len(digests) > 1 or any(len(found) != 1 for found in taken):
                raise RevprobeError(
                    f"readings of {name!r} of different pairs, or not one of each size: expected those of "
                    "rp.block_sweep, which reads one set of pairs"
                )

    @property
    def sizes(self) -> list[Size]:
        """The sizes, ascending; None (every token sees every other) last."""
        return list(self.readings)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All numbers, tidy.

        Columns: measure; part ("visible": the pairs in sight at that size; "common": those with a value at every size
        at which any has one, which the curve is drawn on; "difference": size less against, the size before it, on the
        common pairs); size, against (tokens; missing: every token sees every other); kind; visible (how many pairs
        have their evidence in sight at that size); then those of `Reading.measures`. Of a difference low and high are
        the paired 95 % interval over facts, control and excess themselves differences.
        """
        rows = [row for measure in self._curves for row in self._rows(measure)]
        return pd.DataFrame(rows, columns=COLUMNS).astype({"size": "Int64", "against": "Int64"})

    @checked
    def difference(self, measure: str, size: Size, against: Size) -> pd.Series:
        """A measure at one size less that at another, on the pairs common to all sizes: a row as those of `frame`.

        Raises: RevprobeError, for a measure or a size that was not read.
        """
        if measure not in self._curves:
            raise RevprobeError(f"no measure {measure!r} in this sweep{did_you_mean(measure, self._curves)}")
        for one in (size, against):
            if one not in self.readings:
                known = ", ".join(map(size_text, self.sizes))
                raise RevprobeError(f"no size {size_text(one)} in this sweep; expected two of {known}")
        return pd.Series(self._difference(measure, size, against))[COLUMNS]

    @cached_property
    def _curves(self) -> dict[str, _Curve]:
        names = {reading.name for found in self.readings.values() for reading in found}
        return {
            measure: _Curve(measure, {size: found[name] for size, found in self.readings.items()})
            for name, measures in MEASURES.items()
            if name in names
            for measure in measures
        }

    def _rows(self, measure: str) -> Iterator[dict[str, Any]]:
        curve = self._curves[measure]
        for size in self.sizes:
            yield curve.row(VISIBLE, size, curve.numbers(curve.readings[size]))
            yield curve.row(COMMON, size, curve.common_numbers(size))
        for before, size in pairwise(self.sizes):
            yield self._difference(measure, size, before)

    def _difference(self, measure: str, size: Size, against: Size) -> dict[str, Any]:
        curve = self._curves[measure]
        if size in curve.common and against in curve.common and len(curve.pairs):
            sides = [side_of(measure, curve.common[one].frame) for one in (size, against)]
            control = all(curve.readings[one].meta.get("control", True) for one in (size, against))
            found = measured_difference(*sides, seed=self.seed, control=control, same_pairs=True)
        else:
            found = Measured(Estimate.undefined())
        left_out = curve.asked - len(curve.pairs)
        why = NOT_AT_ALL_SIZES if len(curve.pairs) and found.estimate.n else NO_PAIR
        undefined = ({why: left_out} if left_out else {}) | found.undefined
        found = replace(found, undefined=undefined)
        return curve.row(DIFFERENCE, size, summary_row(found)) | {"against": against}

    def table(self) -> pd.DataFrame:
        """The curve as text for people, a row for each measure and size.

        Columns: measure, block size, visible (pairs in sight, of all), common pairs (value, interval, control), n /
        facts, from the size before (the paired difference), note.
        """
        rows = self.frame.to_dict("records")
        steps = {(row["measure"], _size(row["size"])): row for row in rows if row["part"] == DIFFERENCE}
        shown = []
        for row in (row for row in rows if row["part"] == COMMON):
            size, curve = _size(row["size"]), self._curves[row["measure"]]
            step = steps.get((row["measure"], size))
            moved = "-" if step is None else difference_text(*(step[key] for key in ("value", "low", "high")))
            shown.append(
                {
                    "measure": str(row["measure"]).replace("_", " "),
                    "block size": size_text(size),
                    "visible": f"{row['visible']:,} of {curve.asked:,}",
                    "common pairs": interval_text(*(row[key] for key in ("value", "low", "high", "control"))),
                    "n / facts": f"{row['n']:,} / {row['facts']:,}",
                    "from the size before": moved,
                    "note": "; ".join(filter(None, [row["reason"], row["caution"]])) or "-",
                }
            )
        return pd.DataFrame(shown)

    def plot(self, *, theme: str = "light") -> go.Figure:
        """Correlation, cosine and probabilities over block sizes on the common pairs, with intervals, controls and n.

        Under each size is how many pairs are in sight there. The accuracies are in `table`.


        Args:
            theme: "light" or "dark".
        """
        from ..figures.block_sweep import block_sweep_figure

        asked = {measure: curve.asked for measure, curve in self._curves.items()}
        return block_sweep_figure(self.frame, self.sizes, asked, theme=theme)

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write readings and numbers as a folder, which appears by rename, whole or not at all.

        An older sweep there is replaced. Raises: RevprobeError, when something else is there.
        """
        header = {"block_sweep": self.sizes, "seed": self.seed, "statistics_version": STATISTICS_VERSION}
        with folder_written_whole(folder, of_a_sweep) as part:
            write_reading(part / _NUMBERS, header, self.frame)
            for size, readings in self.readings.items():
                readings.save(part / size_text(size))
        return Path(folder)

    @classmethod
    @checked
    def load(cls, folder: str | Path) -> BlockSweep:
        """Read what `save` wrote; numbers of other statistics are worked out again from the readings.

        Raises: RevprobeError, when the folder is missing, holds no sweep, or a file in it is damaged.
        """
        folder = Path(folder)
        if not (folder / _NUMBERS).is_file():
            raise RevprobeError(f"no block sweep at {str(folder)!r}; expected a folder written by BlockSweep.save")
        header, frame = read_reading(folder / _NUMBERS)
        if "block_sweep" not in header:
            raise RevprobeError(f"{folder / _NUMBERS} holds one reading, no block sweep; use Reading.load")
        readings = {size: Readings.load(folder / size_text(size)) for size in header["block_sweep"]}
        made = cls(readings, header["seed"])
        if header["statistics_version"] == STATISTICS_VERSION:
            made.__dict__["frame"] = frame.astype({"size": "Int64", "against": "Int64"})
        return made

    def __repr__(self) -> str:
        lines = [
            f"  {row['measure']}, {row['block size']}: {row['common pairs']} (n / facts {row['n / facts']}, visible "
            f"{row['visible']})" + ("" if row["note"] == "-" else f"; {row['note']}")
            for row in self.table().to_dict("records")
        ]
        return f"BlockSweep({', '.join(map(size_text, self.sizes))}):\n" + "\n".join(lines)

    def _repr_html_(self) -> str:
        title = f"BlockSweep({', '.join(map(size_text, self.sizes))})"
        return f"<p><code>{html.escape(title)}</code></p>{self.table().to_html(index=False, escape=True)}"


@dataclass(frozen=True)
class _Curve:
    """One measure over the sizes."""

    measure: str
    readings: Mapping[Size, Reading]

    def _rows(self, size: Size) -> pd.DataFrame:
        """The rows of a reading that the measure rests on: those of its direction."""
        frame, direction = self.readings[size].frame, self.measure.partition("_")[0]
        return frame[frame["direction"] == direction] if "direction" in frame else frame

    @cached_property
    def asked(self) -> int:
        """Pairs asked, whether they are in sight or not."""
        return int(self._rows(next(iter(self.readings)))["pair"].nunique())

    @cached_property
    def visible(self) -> dict[Size, int]:
        """How many pairs have their evidence in sight, at each size."""
        unseen = {size: self._unseen(size) for size in self.readings}
        return {size: self.asked - len(pairs) for size, pairs in unseen.items()}

    def _unseen(self, size: Size) -> np.ndarray:
        rows = self._rows(size)
        return np.unique(rows.loc[rows["reason"] == LATER_BLOCK, "pair"]) if "reason" in rows else np.zeros(0, int)

    def _defined(self, size: Size) -> np.ndarray:
        """The pairs with a value at one size."""
        rows = self._rows(size)
        if self.measure == "gradient_cosine":
            table = pair_cosines(rows)
            return table.index[np.isfinite(table["cosine"])].to_numpy()
        if self.measure == "attention_correlation":
            there = rows["score_forward"].notna() & rows["score_reverse"].notna()
            return np.unique(rows.loc[there, "pair"])
        return np.unique(rows.loc[rows["probability"].notna(), "pair"])

    @cached_property
    def pairs(self) -> np.ndarray:
        """The pairs with a value at every size at which any pair is in sight."""
        defined = [self._defined(size) for size, count in self.visible.items() if count]
        return reduce(np.intersect1d, defined) if defined else np.zeros(0, dtype=int)

    @cached_property
    def common(self) -> dict[Size, Reading]:
        """The reading of the common pairs at each size that has some in sight.

        What one size lacks of them, a control or the score of a single head, all do without.
        """
        frames = {
            size: rows[rows["pair"].isin(self.pairs)].reset_index(drop=True)
            for size, rows in ((size, self._rows(size)) for size, count in self.visible.items() if count)
        }
        first = next(iter(frames.values()), pd.DataFrame())
        own = [name for name in ("score_forward", "score_reverse") if name in first]
        told = ("reason_control", PARTNER)
        beside = [name for name in map(str, first) if name.endswith("_control") and name not in told]
        for columns in (own, beside):
            if columns:
                gone = np.any([frame[columns].isna().any(axis=1) for frame in frames.values()], axis=0)
                if columns is beside:  # of any of a pair's rows
                    gone = np.isin(first["pair"], first.loc[gone, "pair"])
                for frame in frames.values():
                    frame.loc[gone, columns] = np.nan
        return {size: self.readings[size].part(frame) for size, frame in frames.items()}

    def numbers(self, reading: Reading) -> dict[str, Any]:
        """The measure's row of a reading."""
        measures = reading.measures()
        return dict(measures[measures["measure"] == self.measure].iloc[0])

    def common_numbers(self, size: Size) -> dict[str, Any]:
        """The measure on the common pairs, with what was left out, by reason."""
        unseen = self.asked - self.visible[size]
        elsewhere = self.visible[size] - len(self.pairs) if self.visible[size] else 0
        left_out = {LATER_BLOCK: unseen, NOT_AT_ALL_SIZES: elsewhere}
        left_out = {reason: count for reason, count in left_out.items() if count}
        if size not in self.common or not len(self.pairs):
            return summary_row(Measured(Estimate.undefined(), undefined=left_out))
        found = self.numbers(self.common[size])
        reason = "; ".join(f"{count} {why}" for why, count in left_out.items())
        said = {"reason": "; ".join(filter(None, [reason, found["reason"]]))}
        return found | said | {"undefined": found["undefined"] + sum(left_out.values())}

    def row(self, part: str, size: Size, numbers: Mapping[str, Any]) -> dict[str, Any]:
        kind = str(self.readings[size].meta.get("kind") or "")
        about = {"measure": self.measure, "part": part, "size": size, "against": None, "kind": kind}
        return {**numbers, **about, "visible": self.visible[size]}


def of_a_sweep(entry: Path) -> bool:
    """Whether an entry of a folder is of a saved sweep: its numbers, a picture of them, the readings of a size."""
    named = entry.name == WHOLE_TEXT or entry.name.isdecimal()
    return (entry.stem == "block_sweep" and entry.is_file()) or (named and folder_of_readings(entry))


def _size(value: Any) -> Size:
    return None if pd.isna(value) else int(value)
