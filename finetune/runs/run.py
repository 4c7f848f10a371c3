"""A run: one model trained forward-only in one folder, probed at every snapshot, resumable after any kind of stop.

RUN/config.yaml       what was asked for; a resume with anything else is refused
RUN/versions.json     the software that started it
RUN/readings/step-000500/<probe>.<weights>.parquet
RUN/checkpoints/step-000500/, step-000500/ema/
RUN/problem.txt       why it ended early, until it is taken up again

What the two kinds of run share; `one_layer` and `finetuning` have what they do not.
"""

from __future__ import annotations

import html
import json
import platform
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import BaseModel

from ...arguments import checked
from ...atomic_files import write_text
from ...errors import RevprobeError, first_line
from ...models.checkpoints import CHECKPOINTS, checkpoint_steps, step_name
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.readings.reading import Reading
from ...probes.readings.readings import Readings
from ...progress import Progress, counted, shows_progress
from ..config.alerts import Alert
from ..config.loading import dump_config
from ..config.mistakes import differences
from ..training.checkpointing import READINGS, changed_file
from .alerts import CROSSED, UNDEFINED, history
from .kept_tables import kept_tables
from .record import RunRecord

CONFIG, VERSIONS, PROBLEM = "config.yaml", "versions.json", "problem.txt"
_SHOWN = 3


class Expected(NamedTuple):
    """A reading that a run should have: at a step, by its name, on weights ("raw" or "ema")."""

    step: int
    name: str
    weights: str

    @property
    def file(self) -> str:
        """Its path from the run's folder."""
        return f"{READINGS}/{step_name(self.step)}/{self.name}.{self.weights}.parquet"


@dataclass(frozen=True, repr=False)
class Run(ABC):
    """A run folder, finished or not; `open_run(path)`, `train(...)` and `fine_tune(...)` return one of its kinds."""

    path: Path

    @property
    @abstractmethod
    def config(self) -> Any:
        """What the run was asked to be. Raises: RevprobeError, when config.yaml is damaged."""

    @property
    @abstractmethod
    def axes(self) -> dict[str, Any]:
        """What a sweep varies, by name: objective, seed and more."""

    @property
    @abstractmethod
    def total_steps(self) -> int | None:
        """The last step; None while it is not known (epochs, before the rows are made)."""

    @property
    @abstractmethod
    def expected_readings(self) -> list[Expected]:
        """Every snapshot x reading x weights."""

    @abstractmethod
    def pairs(self, model: ProbedModel | None = None) -> ReversalPairs:
        """The pairs its readings are taken on, each probe's own: `rp.probe(run.load(), run.pairs())` is its reading.

        Args:
            model: one of the run's models, where it has been loaded; where one is needed, the last checkpoint's is.
        Raises: RevprobeError, for a model of another objective, which would be asked other questions.
        """

    @abstractmethod
    def load(self, step: int = -1, weights: str | None = None) -> ProbedModel:
        """The model of a checkpoint, where and in what dtype it was trained."""

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return checkpoint_steps(self.path)

    @property
    def missing_readings(self) -> list[Expected]:
        """The readings that should be there by the last complete checkpoint, and are not."""
        last = max(self.steps, default=-1)
        return [one for one in self.expected_readings if one.step <= last and not (self.path / one.file).is_file()]

    @property
    def trained(self) -> bool:
        """Whether the last step's checkpoint is complete; readings may still be missing."""
        return self.total_steps in self.steps

    @property
    def lacks(self) -> str | None:
        """What a trained run with all its readings still needs, in words."""
        return None

    @property
    def finished(self) -> bool:
        """Whether the last step's checkpoint is complete and nothing that follows from it is missing."""
        return self.trained and not self.missing_readings and self.lacks is None

    @property
    def problem(self) -> str | None:
        """Why the run is not finished; None when it is."""
        if self.finished:
            return None
        if (self.path / PROBLEM).is_file():
            return (self.path / PROBLEM).read_text(encoding="utf-8", errors="replace").strip()
        if not self.trained:
            at = self.steps[-1] if self.steps else 0
            where = "before training" if self.total_steps is None else f"at step {at} of {self.total_steps}"
            return f"stopped {where}; run the same command again to go on"
        if missing := self.missing_readings:
            return f"{self._named(missing)}; run the same command again to take them from their checkpoints"
        return f"{self.lacks}; run the same command again"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'; '.join(self._told())})"

    def _repr_html_(self) -> str:
        name, *rest = map(html.escape, self._told())
        return f"<table><tr><th>{name}</th></tr>{''.join(f'<tr><td>{one}</td></tr>' for one in rest)}</table>"

    def _told(self) -> list[str]:
        """What a person asks of a run first, read from its folder alone; a damaged config is said and not raised."""
        try:
            objective = str(self.axes.get("objective", ""))
            last, total = max(self.steps, default=0), self.total_steps
            step = f"step {last:,}" + (f" of {total:,}" if total is not None else "")
            state = "finished" if self.finished else f"not finished: {self.problem}"
            there = len(self.expected_readings) - len(self.missing_readings)
            told = [self.path.name, state, step, objective, f"{there:,} of {len(self.expected_readings):,} readings"]
            told += self._alerts()
        except RevprobeError as error:
            told = [self.path.name, f"cannot be read: {first_line(error, with_type=False)}"]
        return [one for one in told if one]

    def _alerts(self) -> list[str]:
        """How many of the config's alerts the last checkpoint crosses, or cannot be held against."""
        alerts: tuple[Alert, ...] = self.config.alerts
        states = [one.state for one in history(alerts, self._sound_readings()[0])] if alerts else []
        counts = [f"{states.count(state)} of {len(states)} alerts {state}" for state in (CROSSED, UNDEFINED)]
        return [words for words in counts if not words.startswith("0 ")] or ["no alert crossed"] * bool(states)

    @checked
    @shows_progress("readings")
    def readings(self, *, progress: Progress | bool | None = None) -> Readings:
        """The readings of every snapshot.

        Args:
            progress: called with (readings read, readings in all); None shows a bar, False nothing.
        Raises: RevprobeError, when there are none yet or a file is damaged.
        """
        return Readings.load(self.path / READINGS, progress=progress)

    @checked
    @shows_progress("readings")
    def record(self, *, progress: Progress | bool | None = None) -> RunRecord:
        """What the run came to so far; one without readings, or with damaged ones, says so as its problem.

        Args:
            progress: as in `readings`.
        """
        readings, damaged = self._sound_readings(progress)
        tables, unread = kept_tables(self.path)
        problem = "; ".join(filter(None, (damaged, *unread, self.problem))) or None
        return RunRecord(self.path.name, self.axes, self.config.model_dump(mode="json"), readings, problem, tables)

    def for_report(self) -> RunRecord:
        """Renamed: `record`. Raises: RevprobeError, saying so."""
        raise RevprobeError("for_report() of a run is now record()")

    def backfill_readings(self, take: Callable[[int, str, set[str]], Iterable[Reading]]) -> list[Expected]:
        """Take the missing readings from the run's checkpoints and write them; the others stay as they are.

        The caller holds the run's lock. A checkpoint holds exactly the weights its readings were taken on, so a reading
        taken again is the one that was lost, byte for byte (on the same software and machine).

        Args:
            take: gives the readings of those names, and maybe others, at (step, weights).
        Returns: the readings taken.
        Raises: RevprobeError, for readings whose checkpoint is missing as well, after all others were taken.
        """
        missing, there = self.missing_readings, self.steps
        taken = [one for one in missing if one.step in there]
        for step, weights in dict.fromkeys((one.step, one.weights) for one in taken):
            wanted = {one.name: one for one in taken if (one.step, one.weights) == (step, weights)}
            checkpoint = self.path / CHECKPOINTS / step_name(step)
            if changed := changed_file(checkpoint):
                raise RevprobeError(
                    f"{checkpoint / changed} is damaged (its bytes are not those that were written), so no reading can "
                    "be taken from it; delete the run's folder to train it anew"
                )
            for reading in take(step, weights, set(wanted)):
                if reading.name in wanted:
                    file = self.path / wanted[reading.name].file
                    file.parent.mkdir(parents=True, exist_ok=True)
                    reading.save(file)
        lost = [one for one in missing if one.step not in there]
        if lost:
            raise RevprobeError(
                f"{self.path}: {self._named(lost)}, and the checkpoint of step {lost[0].step} with them; delete the "
                "run's folder to train it anew"
            )
        return taken

    def _named(self, missing: list[Expected]) -> str:
        """How many readings are missing, and the first of them, for one line."""
        named = ", ".join(one.file for one in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        return f"{len(missing)} of {len(self.expected_readings)} readings are missing ({named}{more})"

    def _sound_readings(self, progress: Progress | bool | None = False) -> tuple[Readings, str]:
        """The readings that are whole, and what is wrong with the others."""
        if not (self.path / READINGS).is_dir():
            return Readings([]), ""
        try:
            return self.readings(progress=progress), ""
        except RevprobeError as error:
            first = first_line(error, with_type=False)
        sound, files = [], [file for file in sorted((self.path / READINGS).rglob("*.parquet")) if file.name[0] != "."]
        for file in counted(files, progress):
            with suppress(RevprobeError):
                sound.append(Reading.load(file))
        return Readings(sound), f"{len(files) - len(sound)} of {len(files)} files of readings are left out: {first}"


def is_run(path: str | Path) -> bool:
    """Whether a folder belongs to a run: holds its config, be there checkpoints yet or not."""
    return (Path(path) / CONFIG).is_file()


class Claimed(Protocol):
    """What a folder is made of that belongs to one config: a run's, or a small model's."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> BaseModel: ...
    @property
    def finished(self) -> bool: ...


def claim_run(run: Claimed, config: BaseModel) -> None:
    """Make the run's folder this config's, or check that it is. Raises: RevprobeError, when it is another's."""
    folder = run.path
    if not is_run(folder):
        foreign = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if foreign:
            raise RevprobeError(f"{folder} is not a run and not empty (it holds {foreign[0]!r}); choose another folder")
        # First of all files: whatever kills this process later, the folder is known as this config's run.
        write_text(folder / CONFIG, dump_config(config))
    changed = differences(run.config, config)
    if changed:
        raise RevprobeError(
            f"{folder} was started with another config: {', '.join(changed)} (old -> new); "
            "restore the old values to resume it, or choose another name or folder"
        )
    if not (folder / VERSIONS).is_file():
        write_text(folder / VERSIONS, json.dumps(software(), indent=2) + "\n")
    newer = other_versions(folder)
    if newer and not run.finished:
        warnings.warn(
            f"{folder} was started with other versions ({', '.join(newer)}): its bits may differ", stacklevel=4
        )


def other_versions(folder: Path) -> list[str]:
    """What a run was started with and is not installed now, each as "name old -> new".

    Raises: RevprobeError, for a versions.json that is damaged.
    """
    try:
        started = dict(json.loads((folder / VERSIONS).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RevprobeError(
            f"{folder / VERSIONS} is damaged ({first_line(error)}); delete it to go on with the software installed now"
        ) from error
    return [f"{name} {was} -> {now}" for name, now in software().items() if (was := started.get(name, now)) != now]


def software() -> dict[str, str]:
    """Versions that can move bits, and the vector instructions that torch's kernels use here, which move them too."""
    names = ("torch", "transformers", "accelerate", "numpy")
    own = {"revprobe": version("revprobe"), "python": platform.python_version()}
    return own | {name: version(name) for name in names} | {"cpu": torch.backends.cpu.get_cpu_capability()}


@contextmanager
def noting_problems(folder: Path) -> Iterator[None]:
    """Leave the first line of an error in the run's problem.txt, until the run is taken up again."""
    (folder / PROBLEM).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        write_text(folder / PROBLEM, f"{first_line(error, with_type=not isinstance(error, RevprobeError))}\n")
        raise


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Compute with so many threads inside: sums of floats depend on how they are split, so bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
