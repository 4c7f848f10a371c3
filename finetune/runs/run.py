"""A run: one model trained forward-only in one folder, probed at every snapshot, resumable after any kind of stop.

RUN/config.yaml       what was asked for; a resume with anything else is refused
RUN/versions.json     the software that started it
RUN/readings/step-000500/<probe>.<weights>.parquet
RUN/checkpoints/step-000500/, step-000500/ema/
RUN/problem.txt       why it ended early, until it is taken up again
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel
from transformers import set_seed

from ... import __version__
from ...atomic_files import write_text
from ...errors import RevprobeError, did_you_mean, first_line
from ...models.checkpoints import checkpoint_steps, step_of
from ...models.hub import quiet_transformers
from ...models.probed import ProbedModel
from ...probes.readings.readings import Reading, Readings
from ...relations.catalog import letters
from ..config.finetuning import is_finetuning_text
from ..config.mistakes import differences
from ..config.one_layer import RunConfig, dump_config, load_config
from ..training.checkpointing import READINGS, only_writer, remove_unfinished, resume_from
from ..training.probe_callback import ProbeCallback
from ..training.trainer import ForwardOnlyTrainer, TokenRows
from .building import build_model, probe_pairs, training_arguments
from .missing import describe_missing, missing_readings, retake_missing
from .progress import Listener, ProgressCallback

if TYPE_CHECKING:
    from ...report.html.report import ReportRun

CONFIG, VERSIONS, PROBLEM = "config.yaml", "versions.json", "problem.txt"


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not; `open_run(path)` and `train(...)` return it."""

    path: Path

    @cached_property
    def config(self) -> RunConfig:
        """What the run was asked to be. Raises: RevprobeError, when config.yaml is damaged."""
        return load_config(self.path / CONFIG, RunConfig)

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return checkpoint_steps(self.path)

    @property
    def finished(self) -> bool:
        """Whether the last step's checkpoint is complete and no snapshot lacks a reading."""
        return self.trained and not missing_readings(self.path, self.config)

    @property
    def trained(self) -> bool:
        """Whether the last step's checkpoint is complete; readings may still be missing."""
        return self.config.training.steps in self.steps

    @property
    def axes(self) -> dict[str, Any]:
        """objective, position_encoding, length, seed."""
        return self.config.axes

    @property
    def problem(self) -> str | None:
        """Why the run is not finished; None when it is."""
        if self.finished:
            return None
        if (self.path / PROBLEM).is_file():
            return (self.path / PROBLEM).read_text(encoding="utf-8", errors="replace").strip()
        if self.trained:
            missing = describe_missing(missing_readings(self.path, self.config), self.config)
            return f"{missing}; run the same command again to take them from their checkpoints"
        at = self.steps[-1] if self.steps else 0
        return f"stopped at step {at} of {self.config.training.steps}; run the same command again to go on"

    def readings(self) -> Readings:
        """The readings of every snapshot. Raises: RevprobeError, when there are none yet or a file is damaged."""
        return Readings.load(self.path / READINGS)

    def report_sections(self) -> list[str]:
        """What a report shows besides its own sections; nothing for a run like this."""
        return []

    def for_report(self) -> ReportRun:
        """The run as a report takes it; one without readings, or with damaged ones, says so as its problem."""
        from ...report.html.report import ReportRun  # plotly, which training does without

        readings, damaged = self._sound_readings()
        problem = "; ".join(filter(None, (damaged, self.problem))) or None
        return ReportRun(self.path.name, self.axes, self.config.model_dump(mode="json"), readings, problem)

    def _sound_readings(self) -> tuple[Readings, str]:
        """The readings that are whole, and what is wrong with the others."""
        if not (self.path / READINGS).is_dir():
            return Readings([]), ""
        try:
            return self.readings(), ""
        except RevprobeError as error:
            first = first_line(error, with_type=False)
        sound, files = [], [file for file in sorted((self.path / READINGS).rglob("*.parquet")) if file.name[0] != "."]
        for file in files:
            with suppress(RevprobeError):
                sound.append(Reading.load(file))
        return Readings(sound), f"{len(files) - len(sound)} of {len(files)} files of readings are left out: {first}"


def is_run(path: str | Path) -> bool:
    """Whether a folder belongs to a run: holds its config, be there checkpoints yet or not."""
    return (Path(path) / CONFIG).is_file()


def is_finished(path: str | Path, config: BaseModel) -> bool:
    """Whether a folder holds this very run, complete. Raises: RevprobeError, when its config.yaml is damaged."""
    return is_run(path) and open_run(path).config == config and open_run(path).finished


def open_run(path: str | Path) -> Run:
    """Open a run folder. Raises: RevprobeError, when it is none; it names the nearest run beside it."""
    path = Path(path)
    if not is_run(path):
        beside = [str(p) for p in path.parent.glob("*") if is_run(p)] if path.parent.is_dir() else []
        hint = did_you_mean(str(path), beside) if beside else "; expected a folder written by `revprobe train`"
        raise RevprobeError(f"no run at {str(path)!r}{hint}")
    if is_finetuning_text(path / CONFIG):
        from .finetuning import FinetuneRun  # it imports this module

        return FinetuneRun(path)
    return Run(path)


def train(config: RunConfig | str | Path, folder: str | Path | None = None, *, listener: Listener | None = None) -> Run:
    """Train one run, or take it up where it stopped; a finished one is returned as it is.

    Readings that have gone missing are taken again from their checkpoints.
    Seeds torch, numpy and random from the config: they do not come out as they went in.

    Args:
        config: a RunConfig, a YAML file, or the name of an example.
        folder: the run's folder; `runs/<name>` when None.
        listener: called with (step, steps, loss) about once a second.
    Raises: RevprobeError, when the folder belongs to another config (the difference is shown), is being written by
        another process, or holds a damaged checkpoint; OSError, when it cannot be written.
    Warns: when it goes on from an earlier checkpoint than the last, takes readings again, or its software changed.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, RunConfig)
    folder = Path("runs") / config.name if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        run = claim_run(folder, config)
        if run.finished:
            return run
        with noting_problems(folder), pinned_threads(config.training.threads), quiet_transformers():
            if not run.trained:
                _train(run, listener)
            taken = retake_missing(folder, config)
        if taken:
            warnings.warn(f"{folder}: {len(taken)} missing readings were taken from their checkpoints", stacklevel=2)
    return run


def claim_run(folder: Path, config: BaseModel, kind: type[Run] | None = None) -> Run:
    """Make `folder` this config's run, or check that it is. Raises: RevprobeError, when it is another's."""
    run = (kind or Run)(folder)
    if not (folder / CONFIG).is_file():
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
    newer = _newer_software(folder / VERSIONS)
    if newer and not run.finished:
        warnings.warn(
            f"{folder} was started with other versions ({', '.join(newer)}): its bits may differ", stacklevel=3
        )
    return run


def _newer_software(file: Path) -> list[str]:
    """What has been installed since `file` was written, as "torch 2.1 -> 2.2"."""
    try:
        started = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RevprobeError(
            f"{file} is damaged ({first_line(error)}); delete it to go on with the software installed now"
        ) from error
    return [f"{name} {was} -> {now}" for name, now in software().items() if (was := started.get(name, now)) != now]


def software() -> dict[str, str]:
    """Versions that can move bits."""
    names = ("torch", "transformers", "accelerate", "numpy")
    return {"revprobe": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def _train(run: Run, listener: Listener | None) -> None:
    """Train from the newest checkpoint with its state, or from step 0."""
    remove_unfinished(run.path)
    checkpoint = resume_from(run.path)
    trainer, probes = build_trainer(run, checkpoint)
    trainer.add_callback(probes)
    if listener is not None:
        trainer.add_callback(ProgressCallback(listener))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def build_trainer(run: Run, checkpoint: Path | None) -> tuple[ForwardOnlyTrainer, ProbeCallback]:
    """A run's trainer and the callback that takes its readings, from its config alone; the model is untrained.

    Args:
        checkpoint: where training will go on from; its readings are there and not taken again.
    """
    config, folder = run.config, run.path
    arguments = training_arguments(config, folder)
    set_seed(config.training.seed)
    model, tokenizer = build_model(config)
    relation = letters(config.relation.length, config.relation.alphabet)
    token_ids = torch.tensor(tokenizer(relation.training_texts())["input_ids"])
    trainer = ForwardOnlyTrainer(
        model=model,
        args=arguments,
        train_dataset=TokenRows(token_ids),
        processing_class=tokenizer,
        objective=config.model.objective,
        ema_decay=config.training.ema_decay,
        snapshots=config.snapshot_steps,
    )
    wrapping: dict[str, Any] = {
        "tokenizer": tokenizer,
        "objective": config.model.objective,
        "name": folder.resolve().name,
    }
    pairs = probe_pairs(relation, ProbedModel(model, **wrapping))
    wrapping["check"] = False  # it was, just now
    done = () if checkpoint is None else (step_of(checkpoint) or 0,)
    probes = ProbeCallback(
        pairs, folder / READINGS, steps=config.snapshot_steps, ema=trainer.ema, done=done, **wrapping
    )
    return trainer, probes


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
