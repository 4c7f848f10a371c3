"""Several readings: of one pass, over checkpoints, or over models; a step's readings as a folder of files."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import pandas as pd
import plotly.graph_objects as go

from ...arguments import checked
from ...atomic_files import folder_written_whole
from ...errors import RevprobeError, did_you_mean
from ...models.checkpoints import step_of
from ...progress import Progress, counted, shows_progress
from ..figures.plot import plot_readings
from .reading import MEASURE_COLUMNS, Reading, compact_table

LEAD = ("reading", "model", "step", "weights")  # what stands before a frame's own columns


def own_apart(frame: pd.DataFrame, taken: Iterable[str] = LEAD) -> pd.DataFrame:
    """A reading's own columns that are called as those before them, as `own_step` and the like: no column is lost.

    The `step` of a denoising trace counts denoising steps, and stands beside the training step of its model.
    """
    return frame.rename(columns={name: f"own_{name}" for name in taken if name in frame})


class Readings(Sequence[Reading]):
    """Several readings: of one pass, over checkpoints, or over models."""

    @checked
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

    @checked
    def select(self, *, name: str | None = None, step: int | None = None, weights: str | None = None) -> Readings:
        """The readings that match; a negative step counts back from the last."""
        if step is not None and step < 0:
            if -step > len(self.steps):
                raise RevprobeError(f"step={step}: these readings are of {len(self.steps)} steps, {self.steps}")
            step = self.steps[step]
        wanted = {"step": step, "weights": weights}
        return Readings(
            r
            for r in self
            if name in (None, r.name)
            and all(value is None or r.meta.get(key) == value for key, value in wanted.items())
        )

    @property
    def frame(self) -> pd.DataFrame:
        """`to_frame()`."""
        return self.to_frame()

    @checked
    @shows_progress("readings")
    def to_frame(self, *, progress: Progress | bool | None = None) -> pd.DataFrame:
        """The rows of all readings: reading (the probe's name), model, step, weights, then the frames' own columns.

        Probes have different columns; what one does not have is missing in its rows. `step` is the training step; a
        frame's own, the denoising step of a trace, is `own_step`.
        Args:
            progress: called with (readings done, readings in all); None shows a bar, False nothing.
        """
        parts = []
        for one in counted(self, progress):
            about = {"reading": one.name} | {key: one.meta.get(key) for key in ("model", "step", "weights")}
            own = own_apart(one.frame)
            lead = pd.DataFrame({name: [value] * len(own) for name, value in about.items()}, index=own.index)
            parts.append(pd.concat([lead.astype({"step": "Int64"}), own], axis=1))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(LEAD))

    @checked
    @shows_progress("readings")
    def summary(
        self,
        by: str | list[str] | None = None,
        *,
        compact: bool = False,
        progress: Progress | bool | None = None,
    ) -> pd.DataFrame:
        """`Reading.summary` of each, one below the other: reading, model, step and weights before its columns.

        `by="step"` is the frames' own step, which then is the column `own_step`, as in `to_frame`.
        Args:
            compact: numbers with their intervals as text; columns that say the same of every reading are left out.
            progress: called with (readings done, readings in all); None shows a bar, False nothing.
        Raises: RevprobeError, for a column that one of the frames lacks.
        """
        parts = []
        for one in counted(self, progress):
            part = own_apart(one.summary(by, compact=compact))
            for place, (name, value) in enumerate(
                [("reading", one.name), *((key, one.meta.get(key)) for key in ("model", "step", "weights"))]
            ):
                part.insert(place, name, value)
            parts.append(part)
        table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
        same = [
            name for name in ("model", "step", "weights") if name in table and table[name].nunique(dropna=False) < 2
        ]
        return table.drop(columns=same) if compact else table

    @checked
    @shows_progress("readings")
    def measures(self, *, progress: Progress | bool | None = None) -> pd.DataFrame:
        """All numbers, tidy: step, weights, kind, then the columns of `Reading.measures`.

        Args:
            progress: as in `summary`.
        """
        frames = [
            r.measures().assign(step=r.meta.get("step"), weights=r.meta.get("weights"), kind=r.meta.get("kind"))
            for r in counted(self, progress)
        ]
        columns = ["step", "weights", "kind", *MEASURE_COLUMNS]
        return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)

    @shows_progress("readings")
    def plot(self, *, progress: Progress | bool | None = None, **options: Any) -> go.Figure:
        """The readings over training steps; see `probes.figures.plot.plot_readings`.

        Args:
            progress: as in `summary`; counted are the readings whose numbers are worked out.
        """
        for one in counted(self, progress):
            one.measures()  # what takes the time, kept by the reading
        return plot_readings(self, **options)

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write all readings as `folder/<name>.<weights>.parquet`; the folder appears by rename, whole or not at all.

        Older readings there are replaced. Raises: RevprobeError, when two readings would share a file, or something
            else is there.
        """
        with folder_written_whole(folder, of_readings) as part:
            for reading in self:
                path = part / f"{reading.name}.{reading.meta.get('weights') or 'raw'}.parquet"
                if path.exists():
                    raise RevprobeError(
                        f"two readings would be written to {path.name}; save one step at a time (select(step=...))"
                    )
                reading.save(path)
        return Path(folder)

    @classmethod
    @checked
    @shows_progress("readings")
    def load(cls, folder: str | Path, *, progress: Progress | bool | None = None) -> Readings:
        """All readings under `folder`: its own parquet files, or those of its step folders in order.

        Args:
            progress: called with (files read, files in all); None shows a bar, False nothing.
        Raises: RevprobeError, when the folder is missing or a file in it is damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise RevprobeError(
                f"no readings at {str(folder)!r}; expected a folder written by a run or by Readings.save"
            )
        steps = sorted((p for p in folder.iterdir() if step_of(p) is not None), key=lambda p: step_of(p) or 0)
        files = [
            path
            for part in [folder, *steps]
            for path in sorted(part.glob("*.parquet"), key=_raw_first)
            if not path.name.startswith(".")
        ]
        return cls(Reading.load(path) for path in counted(files, progress))

    def __repr__(self) -> str:
        return (
            f"Readings({len(self)}):\n"
            + "\n".join(f"  {self._of(reading)}{reading!r}" for reading in self[:12])
            + ("\n  ..." if len(self) > 12 else "")
        )

    def _of(self, reading: Reading) -> str:
        """The model before a reading, where the readings are of several."""
        several = len({one.meta.get("model") for one in self}) > 1
        return f"{reading.meta.get('model')}: " if several else ""

    def _repr_html_(self) -> str:
        """A line a number, with interval, control, pairs and facts; above it what is the same of all."""
        rows = self.measures()
        keys = ["step", "weights", "kind"]
        models = [str(one.meta.get("model")) for one in self for _ in range(len(one.measures()))]
        if len(set(models)) > 1:
            rows, keys = rows.assign(model=models), ["model", *keys]
        same = {key: rows[key].iloc[0] for key in keys if len(rows) and rows[key].nunique(dropna=False) == 1}
        about = [f"{key} {html.escape(str(value))}" for key, value in same.items() if not pd.isna(value)]
        shown = [*(key for key in keys if key not in same), "measure"]
        table = compact_table(({str(k): v for k, v in row.items()} for row in rows.to_dict("records")), shown).to_html(
            index=False, escape=True
        )
        return f"<p>{', '.join([f'{len(self)} readings', *about])}</p>{table}"


def _raw_first(path: Path) -> tuple[str, bool]:
    """Order of a step's files: by probe, the weights as they are before their average."""
    name, _, weights = path.stem.partition(".")
    return name, weights != "raw"


def of_readings(entry: Path) -> bool:
    """Whether an entry of a folder is what `Readings.save` writes there."""
    return entry.is_file() and entry.suffix == ".parquet"


def folder_of_readings(entry: Path) -> bool:
    """Whether an entry is a folder that holds readings and nothing else."""
    return entry.is_dir() and any(entry.iterdir()) and all(map(of_readings, entry.iterdir()))
