"""Where a run is: a callback that tells a listener, and three listeners (a bar, plain lines, JSON lines).

A listener is any callable `(step, steps, loss)`; it is called about once a second. The sweep reads the JSON lines of
its child processes and draws one bar for each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...engines.launcher import Listener
from ...progress import without_bars

EVERY_SECONDS = 1.0
_PLAIN_SECONDS = 15.0


class ProgressCallback(TrainerCallback):
    """Tell `listener` the step, the number of steps and the last logged loss, about once a second and at the end."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self._loss: float | None = None
        self._told = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.listener(state.global_step, state.max_steps, None)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        self._loss = at["logs"].get("loss", self._loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        if now - self._told >= EVERY_SECONDS or state.global_step == state.max_steps:
            self._told = now
            self.listener(state.global_step, state.max_steps, self._loss)


@contextmanager
def bars(console: Console | None = None) -> Iterator[Progress]:
    """The look of every progress bar here: name, bar, steps, loss, time left. What is called inside draws none."""
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )
    with without_bars(), shown:
        yield shown


@contextmanager
def shown_progress(name: str, console: Console, unit: str = "step") -> Iterator[Listener]:
    """A listener that suits the terminal: a bar, or a short line now and then where output goes to a file."""
    if not console.is_terminal:
        yield PlainLines(name, console, unit)
        return
    with bars(console) as progress:
        task = progress.add_task(name, total=None, note="")

        def update(step: int, steps: int, loss: float | None) -> None:
            progress.update(task, completed=step, total=steps, note=loss_note(loss))

        yield update


@contextmanager
def shown_probes(names: list[str], console: Console) -> Iterator[Callable[[str, int, int], None] | None]:
    """A listener for `take_readings` that draws a bar per probe; None where output is no terminal."""
    if not console.is_terminal:
        yield None
        return
    with bars(console) as progress:
        tasks = {name: progress.add_task(name, total=None, note="queries") for name in names}
        yield lambda name, done, total: progress.update(tasks[name], completed=done, total=total)


class PlainLines:
    """A line about every fifteen seconds and at the end, for logs: "rope: step 500/5000, loss 0.41, 0:01:10 left"."""

    def __init__(self, name: str, console: Console, unit: str = "step") -> None:
        self.name, self.console, self.unit = name, console, unit
        self._start: tuple[float, int] | None = None
        self._last = 0.0

    def __call__(self, step: int, steps: int, loss: float | None) -> None:
        now = time.monotonic()
        self._start = self._start or (now, step)
        if now - self._last < _PLAIN_SECONDS and step < steps:
            return
        self._last = now
        began, first = self._start
        seconds = (now - began) * (steps - step) / max(step - first, 1)
        left = f", {timedelta(seconds=round(seconds))} left" if first < step < steps else ""
        note = f", {loss_note(loss)}" if loss is not None else ""
        self.console.print(f"{self.name}: {self.unit} {step}/{steps}{note}{left}", soft_wrap=True)


class ListenerAtFirstNews:
    """A listener that is made when its run first has news, and told when it ends: runs of a batch wait their turn."""

    def __init__(self, make: Callable[[], Listener], done: Callable[[], None]) -> None:
        self.make, self.done = make, done
        self._tell: Listener | None = None

    def __call__(self, step: int, steps: int, loss: float | None) -> None:
        self._tell = self._tell or self.make()
        self._tell(step, steps, loss)
        if step == steps:
            self.done()


def json_lines(step: int, steps: int, loss: float | None) -> None:
    """One JSON object per line on stdout, for the sweep that started this process.

    Raises: KeyboardInterrupt, when the sweep is gone; a run must not go on unseen beside its own resumption.
    """
    try:
        print(json.dumps({"step": step, "steps": steps, "loss": loss}), flush=True)
    except BrokenPipeError:
        raise KeyboardInterrupt from None


def step_told(step: int, steps: int, loss: float | None) -> tuple[int, int, str]:
    """What a listener is told, as a bar of `rp.train` shows it."""
    return step, steps, loss_note(loss)


def loss_note(loss: float | None) -> str:
    """The loss as the bars show it; empty before the first one is known."""
    return "" if loss is None else f"loss {loss:.3f}"
