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
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from .. import __version__
from ..errors import RevprobeError, did_you_mean
from ..models.checkpoints import CHECKPOINTS, checkpoint_steps, step_name
from ..models.probed import ProbedModel
from ..models.registry import quiet_transformers
from ..probes.readings import Readings
from .building import build_model, probe_pairs, training_arguments
from .config import RunConfig, dump_config, load_config
from .mistakes import differences
from .progress import Listener, ProgressCallback
from .relations import letters
from .saving import READINGS, only_writer, remove_unfinished, write_text
from .snapshots import ProbeCallback
from .trainer import ForwardOnlyTrainer, TokenRows

if TYPE_CHECKING:
    from ..probes.report import ReportRun

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
        """Whether the last step's checkpoint is complete; its readings then are, too."""
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
            return (self.path / PROBLEM).read_text(encoding="utf-8").strip()
        at = self.steps[-1] if self.steps else 0
        return f"stopped at step {at} of {self.config.training.steps}; run the same command again to go on"

    def readings(self) -> Readings:
        """The readings of every snapshot. Raises: RevprobeError, when there are none yet or a file is damaged."""
        return Readings.load(self.path / READINGS)

    def for_report(self) -> ReportRun:
        """The run as `probes.report` takes it; a run without readings stands there with its problem."""
        from ..probes.report import ReportRun  # plotly, which training does without

        readings = self.readings() if (self.path / READINGS).is_dir() else Readings([])
        return ReportRun(self.path.name, self.axes, self.config.model_dump(mode="json"), readings, self.problem)


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a run's config."""
    return (Path(path) / CONFIG).is_file()


def is_finished(path: str | Path, config: RunConfig) -> bool:
    """Whether a folder holds this very run, complete. Raises: RevprobeError, when its config.yaml is damaged."""
    return is_run(path) and Run(Path(path)).config == config and Run(Path(path)).finished


def open_run(path: str | Path) -> Run:
    """Open a run folder. Raises: RevprobeError, when it is none; it names the nearest run beside it."""
    path = Path(path)
    if not is_run(path):
        beside = [str(p) for p in path.parent.glob("*") if is_run(p)] if path.parent.is_dir() else []
        hint = did_you_mean(str(path), beside) if beside else "; expected a folder written by `revprobe train`"
        raise RevprobeError(f"no run at {str(path)!r}{hint}")
    return Run(path)


def train(config: RunConfig | str | Path, folder: str | Path | None = None, *, listener: Listener | None = None) -> Run:
    """Train one run, or take it up where it stopped; a finished one is returned as it is.

    Seeds torch, numpy and random from the config: they do not come out as they went in.

    Args:
        config: a RunConfig, a YAML file, or the name of an example.
        folder: the run's folder; `runs/<name>` when None.
        listener: called with (step, steps, loss) about once a second.
    Raises: RevprobeError, when the folder belongs to another config (the difference is shown), is being written by
        another process, or holds a damaged checkpoint; OSError, when it cannot be written.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, RunConfig)
    folder = Path("runs") / config.name if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        run = _claim(folder, config)
        if run.finished:
            return run
        (folder / PROBLEM).unlink(missing_ok=True)
        try:
            with pinned_threads(config.training.threads), quiet_transformers():
                _train(run, listener)
        except Exception as error:
            write_text(folder / PROBLEM, f"{str(error).splitlines()[0] if str(error) else type(error).__name__}\n")
            raise
    return run


def _claim(folder: Path, config: RunConfig) -> Run:
    """Make `folder` this config's run, or check that it is."""
    run = Run(folder)
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
    started = json.loads((folder / VERSIONS).read_text())
    newer = [f"{name} {was} -> {now}" for name, now in software().items() if (was := started.get(name, now)) != now]
    if newer and not run.finished:
        warnings.warn(
            f"{folder} was started with other versions ({', '.join(newer)}): its bits may differ", stacklevel=3
        )
    return run


def software() -> dict[str, str]:
    """Versions that can move bits."""
    names = ("torch", "transformers", "accelerate", "numpy")
    return {"revprobe": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def _train(run: Run, listener: Listener | None) -> None:
    """Build everything from the config alone, then train from the last complete checkpoint or from the start."""
    config, folder = run.config, run.path
    remove_unfinished(folder)
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
    trainer.add_callback(
        ProbeCallback(
            pairs, folder / READINGS, steps=config.snapshot_steps, ema=trainer.ema, done=run.steps, **wrapping
        )
    )
    if listener is not None:
        trainer.add_callback(ProgressCallback(listener))
    last = run.steps[-1:]
    trainer.train(resume_from_checkpoint=str(folder / CHECKPOINTS / step_name(last[0])) if last else None)


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Compute with so many threads inside: sums of floats depend on how they are split, so bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
