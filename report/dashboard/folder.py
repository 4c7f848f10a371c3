"""What a folder of runs holds right now, for the dashboard: runs, sweeps, their readings, and what is wrong with them.

Nothing outside the folder is read: every path is resolved before it is opened, and a run with a link that leads out is
shown with that reason and left alone. Nothing here writes. The list opens one file of each run, its config, and no more
of that than a config has; a scan after that costs one `stat` per readings file, and a file is parsed again only when
its size or time changes.
"""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from ...errors import RevprobeError, did_you_mean
from ...finetune.runs.alerts import ALERTS
from ...finetune.runs.finetuning import FinetuneRun
from ...finetune.runs.kept_tables import TABLES, kept_table
from ...finetune.runs.open import open_read_run
from ...finetune.runs.record import family_of
from ...finetune.runs.run import CONFIG, PROBLEM, Run, is_run
from ...finetune.runs.sweeps import CONFIG as SWEEP
from ...finetune.runs.sweeps import open_sweep
from ...finetune.training.checkpointing import READINGS
from ...finetune.training.run_lock import being_written
from ...models.checkpoints import CHECKPOINTS, step_of
from ...probes.figures.training_curves import measures_with_reasons
from ...probes.readings.reading import Reading
from ..html.instruments import SOURCES
from .listed_runs import (
    Listed,
    ReadingFile,
    Stamp,
    last_checkpoint,
    read_bounded,
    reason_of,
    small_model,
    stamp_of,
    state_of,
    total_steps,
)

DEPTH = 3  # folders below RUNS_DIR that are looked into: RUNS_DIR / any / sweep / run
WHOLE = 6  # readings kept with all their rows; those of a large model hold half a million
Whole = TypeVar("Whole", Reading, pd.DataFrame)
_PARTS = {CONFIG, READINGS, CHECKPOINTS}  # a folder with one of these is a run, whole or not
_SMALL = (CONFIG, PROBLEM, "resolved.json", CHECKPOINTS, READINGS, "evaluation", ALERTS, *TABLES.values())


class RunsFolder:
    """A folder of runs and sweeps, read again as it changes; safe to ask from several threads.

    Raises: RevprobeError, when there is no such folder.
    """

    def __init__(self, root: str | Path) -> None:
        if not Path(root).is_dir():
            raise RevprobeError(f"no folder at {str(root)!r}; expected one that holds runs, such as 'runs'")
        self.root = Path(root).resolve()
        self._given = Path(root)
        self._lock = threading.RLock()
        self._looked: tuple[float, list[Listed]] = (-math.inf, [])
        self._described: dict[str, tuple[object, Listed]] = {}
        self._asked: dict[str, tuple[Stamp, list[tuple[str, dict[str, Any]]] | str]] = {}
        self._sweep_names: dict[str, str] = {}
        self._numbers: dict[Path, tuple[Stamp, pd.DataFrame | str]] = {}
        self._whole: OrderedDict[tuple[Path, Stamp], Any] = OrderedDict()

    def scan(self, *, within: float = 0.0) -> list[Listed]:
        """Every run there is, by folder; a sweep's runs in the order of its config, those not begun among them.

        Args:
            within: seconds that an earlier look may be old, to be good enough.
        """
        with self._lock:
            when, seen = self._looked
            if time.monotonic() - when < within:
                return seen
            found = list(self._below(self.root, DEPTH))
            self._looked = (time.monotonic(), found)
            self._described = {one.key: self._described[one.key] for one in found if one.key in self._described}
            return found

    def version(self, runs: Sequence[Listed]) -> str:
        """A short text that changes when anything a page shows of these runs does."""
        files = [[(str(file.path), file.stamp) for file in one.files] + sorted(one.tables.items()) for one in runs]
        state = [(one.key, one.state, one.problem, one.alerted) for one in runs]
        return hashlib.sha256(repr((state, files)).encode()).hexdigest()[:16]

    def run(self, key: str, *, within: float = 0.0) -> Listed:
        """The run of this key. Raises: RevprobeError, for any key that a scan does not give, `../other` among them."""
        runs = {one.key: one for one in self.scan(within=within)}
        if key not in runs:
            raise RevprobeError(f"no run {key!r} in {self.root}{did_you_mean(key, runs)}")
        return runs[key]

    def confined(self, path: Path) -> Path:
        """The path without links. Raises: RevprobeError, when it lies outside the folder."""
        resolved = path.resolve()
        if not resolved.is_relative_to(self.root):
            shown = path.relative_to(self.root) if path.is_relative_to(self.root) else path
            raise RevprobeError(f"{shown} leads out of {self.root}; a dashboard reads nothing outside its folder")
        return resolved

    def folder_of(self, run: Listed) -> Path:
        """Where a run stands. Raises: RevprobeError, as `confined`."""
        return self.confined(self.root / run.key)

    def measures(self, runs: Sequence[Listed]) -> tuple[pd.DataFrame, dict[str, list[str]]]:
        """The numbers of some runs over training, and for each run the files that could not be read, with the reason.

        Returns: tidy rows with the columns of `measures_with_reasons`, the run's axes, its `family`; `run` is its key.
        """
        parts: list[pd.DataFrame] = []
        problems: dict[str, list[str]] = {}
        axes = dict.fromkeys(axis for run in runs for axis in run.axes)
        for run in runs:
            for file in (one for one in run.files if one.name not in SOURCES):
                numbers = self._numbers_of(file)
                if isinstance(numbers, str):
                    problems.setdefault(run.key, []).append(numbers)
                    continue
                labels = {axis: run.axes.get(axis) for axis in axes}  # None and not NaN where a run has no such axis
                if labels.get("objective") is None:  # the config cannot be read; the reading says it too
                    labels.pop("objective", None)
                parts.append(numbers.assign(run=run.key, family=run.family or run.key, **labels))
        return (pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()), problems

    def reading(self, run: Listed, name: str, step: int, weights: str) -> Reading:
        """One reading with its rows. Raises: RevprobeError, when the run has none like it or the file is damaged."""
        for file in run.files:
            if (file.name, file.step, file.weights) == (name, step, weights):
                return self._load(file.path, file.stamp, Reading.load)
        raise RevprobeError(f"{run.key} has no {name} at step {step} on {weights} weights; choose another checkpoint")

    def table(self, run: Listed, name: str) -> pd.DataFrame:
        """A table beside a run's config. Raises: RevprobeError, when the run has none like it or it is damaged."""
        if name not in run.tables:
            raise RevprobeError(f"{run.key} has no {TABLES[name]}")
        file = self.root / run.key / TABLES[name]
        return self._load(file, run.tables[name], kept_table)

    def _load(self, path: Path, stamp: Stamp, read: Callable[[Path], Whole]) -> Whole:
        with self._lock:
            place = (path, stamp)
            if place not in self._whole:
                self._whole[place] = read(self.confined(path))
            self._whole.move_to_end(place)
            while len(self._whole) > WHOLE:
                self._whole.popitem(last=False)
            whole: Whole = self._whole[place]
            return whole

    def _numbers_of(self, file: ReadingFile) -> pd.DataFrame | str:
        with self._lock:
            stamp, numbers = self._numbers.get(file.path, (None, ""))
            if stamp != file.stamp:
                try:
                    numbers = measures_with_reasons([Reading.load(self.confined(file.path))])
                except Exception as error:  # whatever a damaged file raises is a line on the page, not its end
                    numbers = reason_of(error)
                self._numbers[file.path] = (file.stamp, numbers)
            return numbers

    def _below(self, folder: Path, depth: int) -> Iterator[Listed]:
        """The runs in a folder: itself, or those of its subfolders."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            yield self._listed(folder, "damaged", f"cannot be read: {error.strerror}")
            return
        names = {entry.name for entry in entries}
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        if names & _PARTS:
            yield self._run(folder)
            return
        if not visible and folder != self.root:
            yield self._listed(folder, "empty", "an empty folder: no config.yaml yet")
            return
        found = [one for entry in visible for one in self._entry(entry, depth)]
        yield from found if SWEEP not in names else self._in_order(folder, found)

    def _entry(self, entry: os.DirEntry[str], depth: int) -> Iterator[Listed]:
        path = Path(entry.path)
        if entry.is_symlink():
            # A link to something inside is listed where that stands; one that leads out is not even looked at.
            if not path.resolve().is_relative_to(self.root):
                yield self._listed(path, "damaged", f"a link that leads out of {self.root}: not read")
        elif depth and entry.is_dir(follow_symlinks=False):
            yield from self._below(path, depth - 1)

    def _in_order(self, sweep: Path, found: list[Listed]) -> list[Listed]:
        """A sweep's runs as its config orders them, with those that have not begun; others after them."""
        asked = self._asked_of(sweep)
        if isinstance(asked, str):
            return [self._listed(sweep, "damaged", asked), *found]
        there = {one.name: one for one in found}
        ordered = [
            there.pop(name) if name in there else replace(self._listed(sweep / name, "not begun"), axes=axes)
            for name, axes in asked
        ]
        return ordered + list(there.values())

    def _asked_of(self, sweep: Path) -> list[tuple[str, dict[str, Any]]] | str:
        """Name and axes of each run of a sweep's config; the reason, where that cannot be read."""
        try:
            now = stamp_of(os.stat(self.confined(sweep / SWEEP)))
            stamp, asked = self._asked.get(str(sweep), (None, ""))
            if stamp != now:
                config = open_sweep(sweep).config
                asked = [(run.name, run.axes) for run in config.runs()]
                self._sweep_names[str(sweep)] = config.name
                self._asked[str(sweep)] = (now, asked)
            return asked
        except Exception as error:
            return reason_of(error)

    def _run(self, folder: Path) -> Listed:
        """A run's line, worked out again when one of its files changed."""
        key = self._key(folder)
        try:
            files = tuple(self._reading_files(folder))
            small = {}
            for name in _SMALL:
                with suppress(OSError):  # not there, or not yet
                    small[name] = stamp_of(os.lstat(folder / name))
        except (OSError, RevprobeError) as error:
            return self._listed(folder, "damaged", reason_of(error))
        known, listed = self._described.get(key, (None, None))
        if listed is None or known != (small, files):
            tables = {name: small[file] for name, file in TABLES.items() if file in small}
            listed = self._describe(folder, files, tables)
            if listed.alerts and ALERTS in small:  # by its size: the list opens nothing but configs
                listed = replace(listed, alerted=small[ALERTS][1] > 0)
            self._described[key] = ((small, files), listed)
        # Who holds a run changes without any of its files.
        return replace(listed, state="training") if listed.state == "interrupted" and being_written(folder) else listed

    def _describe(self, folder: Path, files: tuple[ReadingFile, ...], tables: dict[str, Stamp]) -> Listed:
        opened = str(self._given / self._key(folder))
        listed = self._listed(folder, "damaged", files=files, tables=tables, opened=opened)
        try:
            self.require_no_way_out(folder)
        except (OSError, RevprobeError) as error:
            return replace(listed, problem=reason_of(error), files=(), tables={})
        text = ""
        try:
            if not is_run(folder):
                return replace(listed, problem="half-written: it has no config.yaml, which a run writes first")
            text = read_bounded(self.confined(folder / CONFIG))
            run = open_read_run(folder, text)
            listed = replace(listed, axes=run.axes, total=total_steps(run), tuned=isinstance(run, FinetuneRun))
            listed = replace(listed, family=family_of(run.config.model_dump(mode="json")), alerts=run.config.alerts)
            state, problem = state_of(run)
            last, written = last_checkpoint(run)
        except Exception as error:  # a damaged folder may raise anything; it is shown beside the sound ones
            if what := small_model(text):
                return replace(listed, state="empty", problem=f"{what}, pretrained: no run, so nothing to draw")
            return replace(listed, problem=reason_of(error))
        resume = "" if state == "finished" else self._resume(run)
        return replace(listed, state=state, problem=problem, last=last, written=written, resume=resume)

    def _resume(self, run: Run) -> str:
        """The command that takes a run up: its sweep's, where it is one's; "" where its folder has another name."""
        finetuned, folder = isinstance(run, FinetuneRun), run.path
        in_sweep = (folder.parent / SWEEP).is_file() and folder != self.root
        command, file = ("sweep", folder.parent / SWEEP) if in_sweep else ("train", folder / CONFIG)
        if in_sweep:
            self._asked_of(folder.parent)
        if file.parent.name != (self._sweep_names.get(str(folder.parent)) if in_sweep else run.config.name):
            return ""
        given = self._given / file.relative_to(self.root)
        out = given.parent.parent if given.parent != Path() else self.root.parent
        return shlex.join(["revprobe", "finetune" if finetuned else command, str(given), "--out", str(out)])

    def _reading_files(self, folder: Path) -> Iterator[ReadingFile]:
        readings = folder / READINGS
        if not self.confined(readings).is_dir():
            return
        steps = [(step, e.path, e) for e in os.scandir(readings) if (step := step_of(Path(e.name))) is not None]
        for step, path, part in sorted(steps, key=lambda one: one[:2]):
            # Only a link can lead out: everything above it has been looked at.
            place = self.confined(Path(path)) if part.is_symlink() else Path(path)
            inside = sorted(os.scandir(place), key=lambda entry: entry.name) if part.is_dir() else []
            for entry in inside:
                name, _, weights = entry.name.removesuffix(".parquet").partition(".")
                if entry.name.endswith(".parquet") and not entry.name.startswith("."):
                    stamp = stamp_of(os.stat(self.confined(Path(entry.path))) if entry.is_symlink() else entry.stat())
                    yield ReadingFile(Path(entry.path), step, name, weights or "raw", stamp)

    def require_no_way_out(self, folder: Path) -> None:
        """Raises: RevprobeError, when a link below `folder` leads out of RUNS_DIR, however many links that takes."""
        seen: set[str] = set()
        for here, inner, names in os.walk(folder, followlinks=True):
            for name in [*inner, *names]:
                if os.path.islink(os.path.join(here, name)):
                    self.confined(Path(here, name))
            new = [name for name in inner if os.path.realpath(os.path.join(here, name)) not in seen]
            seen.update(os.path.realpath(os.path.join(here, name)) for name in new)
            inner[:] = new

    def _listed(self, folder: Path, state: str, problem: str | None = None, **more: Any) -> Listed:
        key = self._key(folder)
        group = "" if key == "." else self._key(folder.parent)
        return Listed(key, "" if group == "." else group, folder.name, state, problem, **more)

    def _key(self, folder: Path) -> str:
        return folder.relative_to(self.root).as_posix()
