"""Readings: what a probe returns, and lists of them over checkpoints.

A `Reading` is one number with its interval, its n, its control and the tidy frame it came from. It is stored as
one parquet file, rows and numbers together; a step's readings form a folder that appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ...atomic_files import written_whole
from ...errors import RevprobeError, did_you_mean, first_line
from ...models.checkpoints import step_of
from ..statistics.estimators import Control, Measured, direction_mean, measure
from ..statistics.resampling import Estimate

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["Control", "Reading", "Readings"]

_META, _DIGEST = b"revprobe", b"revprobe.digest"
MEASURE_COLUMNS = ["measure", "value", "n", "low", "high", "control", "control_low", "control_high"]
MEASURE_COLUMNS += ["excess", "excess_low", "excess_high"]


@dataclass(frozen=True, eq=False, repr=False)
class Reading:
    """One probe's result on one model.

    Attributes:
        name: "attention_correlation", "gradient_cosine", "reverse_probability", or "decoded_match" for decoded answers.
        frame: the rows behind the number; its columns are described at the probe.
        meta: model, objective, kind, step, weights ("raw" or "ema"), pairs (digest), statistic, versions, dtype,
            threads.
        cross: the fact x fact matrix of a gradient probe with `cross=True`, else None.
        value, interval, n, control, excess, undefined: see the properties; all are worked out from `frame`.
    """

    name: str
    frame: pd.DataFrame
    meta: dict[str, Any]
    cross: pd.DataFrame | None = None

    @cached_property
    def measured(self) -> Measured:
        """Estimate, control, excess and what was left out, from the frame."""
        return self._measure(self.frame)

    def _measure(self, part: pd.DataFrame) -> Measured:
        return measure(self.name, part, seed=self.seed, control=self.meta.get("control", True))

    def _forward_mean(self, part: pd.DataFrame) -> Measured:
        return direction_mean(part, "forward", "probability", self.seed)

    @property
    def seed(self) -> int:
        """The seed of bootstrap and derangements."""
        return int(self.meta.get("seed", 0))

    @property
    def value(self) -> float:
        """The reading's number; NaN when undefined (see `undefined` for why)."""
        return self.measured.estimate.value

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval, by resampling facts."""
        return self.measured.estimate.low, self.measured.estimate.high

    @property
    def n(self) -> int:
        """Pairs behind the value."""
        return self.measured.estimate.n

    @property
    def control(self) -> Control | None:
        """The same measure with facts shuffled; None when it was not asked for or no group has two facts."""
        return self.measured.control

    @property
    def excess(self) -> Estimate | None:
        """Value minus control, with an interval; the finding is whether it excludes zero."""
        return self.measured.excess

    @property
    def undefined(self) -> dict[str, int]:
        """What is NaN, counted by reason."""
        return self.measured.undefined

    def summary(self, by: str | list[str] | None = None) -> pd.DataFrame:
        """The number for each value of the column(s) `by`, or for all rows.

        Columns: by..., value, n, low, high, control, control_low, control_high, excess, excess_low, excess_high. A
        probability is that of the reverse queries, unless `by` tells the directions apart.
        Raises: RevprobeError, for a column the frame lacks.
        """
        keys = [by] if isinstance(by, str) else list(by or [])
        for key in keys:
            if key not in self.frame.columns:
                raise RevprobeError(
                    f"no column {key!r} in the {self.name} frame{did_you_mean(key, self.frame.columns)}"
                )
        if not keys:
            return pd.DataFrame([_summary_row(self.measured)])
        rows = []
        for value, part in self.frame.groupby(keys, sort=True, dropna=False):
            # A probability is that of the reverse queries, except where the directions are told apart.
            by_direction = self.name == "reverse_probability" and "direction" in keys
            forward = by_direction and set(part["direction"]) == {"forward"}
            measured = self._forward_mean(part) if forward else self._measure(part)
            rows.append(dict(zip(keys, value, strict=True)) | _summary_row(measured))
        return pd.DataFrame(rows)

    def measures(self) -> pd.DataFrame:
        """Everything this reading reports, tidy.

        Columns: measure, value, n, low, high, control, control_low, control_high, excess, excess_low, excess_high.

        The probability reading gives four: forward and reverse, probability and accuracy (fraction of pairs whose
        target is the argmax at every target position).
        """
        return self._measures.copy()

    @cached_property
    def _measures(self) -> pd.DataFrame:
        if self.name != "reverse_probability":
            return pd.DataFrame([_measure_row(self.name, self.measured)])
        asked = [
            (d, column, name)
            for column, name in (("probability", "probability"), ("argmax_match", "accuracy"))
            for d in ("forward", "reverse")
        ]
        return pd.DataFrame(
            [_measure_row(f"{d}_{name}", direction_mean(self.frame, d, column, self.seed)) for d, column, name in asked]
        )

    def plot(self, **options: Any) -> go.Figure:
        """This reading as a plotly figure; see `probes.figures.plot.plot_reading`."""
        from ..figures.plot import plot_reading

        return plot_reading(self, **options)

    def part(self, frame: pd.DataFrame) -> Reading:
        """The reading of some of its rows, every number worked out from them."""
        return Reading(self.name, frame, self.meta)

    def with_columns(self, **columns: Any) -> Reading:
        """This reading with further columns in its frame, on which none of its numbers depends."""
        further = Reading(self.name, self.frame.assign(**columns), self.meta, self.cross)
        further.__dict__["measured"] = self.measured
        return further

    def save(self, path: str | Path) -> Path:
        """Write frame and meta as one parquet file, whole or not at all."""
        path = Path(path)
        header: dict[str, Any] = {"name": self.name, "meta": self.meta, "measured": asdict(self.measured)}
        header["measures"] = self._measures.to_dict("records")
        split = None if self.cross is None else self.cross.to_json(orient="split", double_precision=15)
        header["cross"] = None if split is None else json.loads(split)
        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        stored = {_META: json.dumps(header).encode()}
        stored[_DIGEST] = _digest(stored[_META], self.frame).encode()
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **stored})
        with written_whole(path) as part:
            pq.write_table(table, part, compression="zstd", write_page_checksum=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Reading:
        """Read what `save` wrote. Raises: RevprobeError, when the file is missing, damaged or not a reading."""
        path = Path(path)
        if not path.is_file():
            raise RevprobeError(f"no reading at {str(path)!r}; expected a parquet file written by Reading.save")
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            stored, frame = table.schema.metadata or {}, table.to_pandas()
            if _META not in stored:
                raise RevprobeError(f"{path} is parquet but not a reading of revprobe; use pandas.read_parquet")
            if _digest(stored[_META], frame) != stored.get(_DIGEST, b"").decode():
                raise ValueError("its rows or numbers are not those that were saved")
            header = json.loads(stored[_META])
        except RevprobeError:
            raise
        except Exception as error:  # a flipped byte surfaces anywhere: arrow, json, unicode, pandas
            raise RevprobeError(
                f"{path} is damaged ({first_line(error)}); delete it and run the same command again"
            ) from error
        cross = None if header["cross"] is None else pd.DataFrame(**header["cross"], dtype=float)
        reading = cls(header["name"], frame, header["meta"], cross)
        if header["meta"].get("versions", {}).get("revprobe") == version("revprobe"):
            # The numbers as they were worked out when saved: bootstrapping a run's readings again takes a minute.
            reading.__dict__["measured"] = Measured.from_dict(header["measured"])
            reading.__dict__["_measures"] = pd.DataFrame(header["measures"], columns=MEASURE_COLUMNS)
        return reading

    def _beside(self, number: Control | Estimate, low: float, high: float) -> str:
        """A number with its interval, and its own n where that is not the reading's."""
        own = f" (n={number.n})" if number.n != self.n else ""
        return f"{number.value:.4g} [{low:.4g}, {high:.4g}]{own}"

    def __repr__(self) -> str:
        low, high = self.interval
        null = self.control
        control = f", control={self._beside(null, *null.interval)}" if null else ", control=None"
        if self.excess is not None:
            control += f", excess={self._beside(self.excess, self.excess.low, self.excess.high)}"
        left_out = f", undefined={self.undefined}" if self.undefined else ""
        where = "".join(
            f", {key}={self.meta[key]}" for key in ("kind", "step", "weights") if self.meta.get(key) is not None
        )
        return f"Reading({self.name}={self.value:.4g} [{low:.4g}, {high:.4g}], n={self.n}{control}{left_out}{where})"

    def _repr_html_(self) -> str:
        rows = self.frame.head(8).to_html(index=False, escape=True)
        return f"<p><code>{html.escape(repr(self))}</code></p>{rows}<p>{len(self.frame)} rows</p>"


class Readings(Sequence[Reading]):
    """Several readings: of one pass, over checkpoints, or over models."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._readings = tuple(readings)

    def __len__(self) -> int:
        return len(self._readings)

    @overload
    def __getitem__(self, index: int) -> Reading: ...
    @overload
    def __getitem__(self, index: slice) -> Readings: ...
    @overload
    def __getitem__(self, index: str) -> Reading: ...
    def __getitem__(self, index: int | slice | str) -> Reading | Readings:
        if isinstance(index, str):
            return self._only(index)
        return Readings(self._readings[index]) if isinstance(index, slice) else self._readings[index]

    def __iter__(self) -> Iterator[Reading]:
        return iter(self._readings)

    def _only(self, name: str) -> Reading:
        """The one reading of a probe, for `readings["gradient_cosine"]`."""
        found = self.select(name=name)
        if len(found) != 1:
            names = sorted({r.name for r in self})
            raise RevprobeError(
                f"{len(found)} readings named {name!r} among {len(self)}{did_you_mean(name, names)}; use "
                "select(name=, step=, weights=)"
            )
        return found[0]

    @property
    def steps(self) -> list[int]:
        """The training steps there are readings of, ascending."""
        return sorted({r.meta["step"] for r in self if r.meta.get("step") is not None})

    def select(self, *, name: str | None = None, step: int | None = None, weights: str | None = None) -> Readings:
        """The readings that match; a negative step counts back from the last."""
        if step is not None and step < 0:
            step = self.steps[step]
        wanted = {"step": step, "weights": weights}
        return Readings(
            r
            for r in self
            if name in (None, r.name)
            and all(value is None or r.meta.get(key) == value for key, value in wanted.items())
        )

    def measures(self) -> pd.DataFrame:
        """All numbers, tidy: step, weights, kind, then the columns of `Reading.measures`."""
        frames = [
            r.measures().assign(step=r.meta.get("step"), weights=r.meta.get("weights"), kind=r.meta.get("kind"))
            for r in self
        ]
        columns = ["step", "weights", "kind", *MEASURE_COLUMNS]
        return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)

    def plot(self, **options: Any) -> go.Figure:
        """The readings over training steps; see `probes.figures.plot.plot_readings`."""
        from ..figures.plot import plot_readings

        return plot_readings(self, **options)

    def save(self, folder: str | Path) -> Path:
        """Write all readings as `folder/<name>.<weights>.parquet`; the folder appears by rename, whole or not at all.

        An older folder of that name is replaced. Raises: RevprobeError, when two readings would share a file.
        """
        folder = Path(folder)
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for reading in self:
            path = part / f"{reading.name}.{reading.meta.get('weights') or 'raw'}.parquet"
            if path.exists():
                raise RevprobeError(
                    f"two readings would be written to {path.name}; save one step at a time (select(step=...))"
                )
            reading.save(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Readings:
        """All readings under `folder`: its own parquet files, or those of its step folders in order.

        Raises: RevprobeError, when the folder is missing or a file in it is damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise RevprobeError(
                f"no readings at {str(folder)!r}; expected a folder written by a run or by Readings.save"
            )
        steps = sorted((p for p in folder.iterdir() if step_of(p) is not None), key=lambda p: step_of(p) or 0)
        return cls(
            Reading.load(path)
            for part in [folder, *steps]
            for path in sorted(part.glob("*.parquet"), key=_raw_first)
            if not path.name.startswith(".")
        )

    def __repr__(self) -> str:
        return (
            f"Readings({len(self)}):\n"
            + "\n".join(f"  {reading!r}" for reading in self[:12])
            + ("\n  ..." if len(self) > 12 else "")
        )

    def _repr_html_(self) -> str:
        return str(self.measures().to_html(index=False, escape=True))


def _digest(header: bytes, frame: pd.DataFrame) -> str:
    """What changes when a number or a row of a saved reading does."""
    rows = pd.util.hash_pandas_object(frame, index=False).to_numpy()
    return hashlib.sha256(header + ",".join(map(str, frame.columns)).encode() + rows.tobytes()).hexdigest()


def _raw_first(path: Path) -> tuple[str, bool]:
    """Order of a step's files: by probe, the weights as they are before their average."""
    name, _, weights = path.stem.partition(".")
    return name, weights != "raw"


def _summary_row(measured: Measured) -> dict[str, float]:
    control = measured.control or Control(float("nan"), (float("nan"), float("nan")), 0, "")
    estimate = measured.estimate
    excess = measured.excess or Estimate(float("nan"), float("nan"), float("nan"), 0)
    row: dict[str, float] = {"value": estimate.value, "n": estimate.n, "low": estimate.low, "high": estimate.high}
    row |= {"control": control.value, "control_low": control.interval[0], "control_high": control.interval[1]}
    return row | {"excess": excess.value, "excess_low": excess.low, "excess_high": excess.high}


def _measure_row(name: str, measured: Measured) -> dict[str, Any]:
    row = _summary_row(measured)
    return {"measure": name} | {key: row[key] for key in MEASURE_COLUMNS[1:]}
