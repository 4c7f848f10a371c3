"""Which of a run's alerts its readings cross: at each checkpoint as it comes, and at the last one.

The averaged weights speak where there are some, as in the figures. A measure that is undefined is told as such: it
would pass every rule.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...atomic_files import write_text
from ...engines.launcher import JSON_PROGRESS, Listener
from ...errors import RevprobeError
from ...models.checkpoints import step_of
from ...probes.figures.theme import interval_text
from ...probes.readings.reading import Reading
from ...probes.readings.readings import Readings
from ..config.alerts import Alert
from ..training.checkpointing import READINGS

CROSSED, UNDEFINED = "crossed", "undefined"
ALERTS = "alerts.txt"  # what stands at a run's last checkpoint, a line each; empty where every rule holds


class AlertWarning(UserWarning):
    """A checkpoint's reading crosses one of the run's `alerts`, or is undefined."""


@dataclass(frozen=True)
class Judged:
    """What a checkpoint's reading has to say to a rule.

    Attributes:
        state: CROSSED or UNDEFINED; None where the rule holds.
        since: the first checkpoint of those in a row that came out like this.
    """

    alert: Alert
    row: Mapping[str, Any]
    state: str | None
    since: int

    @property
    def key(self) -> tuple[Alert, object]:
        """The rule, and the kind of pairs that were asked."""
        return self.alert, self.row["kind"]

    @property
    def value(self) -> str:
        """Value, interval, control and n; the reasons of one that is undefined."""
        row = self.row
        if self.state == UNDEFINED:
            return f"undefined ({row['reason'] or 'no reason was kept'})"
        numbers = interval_text(*(float(row[name]) for name in ("value", "low", "high", "control")))
        facts = "" if pd.isna(row["facts"]) else f" of {int(row['facts']):,} facts"
        return f"{numbers}, n = {int(row['n']):,} pairs{facts}"

    @property
    def text(self) -> str:
        """One line: "forward accuracy 0.91 [0.88, 0.94], ... at step 2,500 (ema): alert: below 0.95"."""
        weights = f" ({self.row['weights']} weights)" if isinstance(self.row["weights"], str) else ""
        at = f"at step {int(self.row['step']):,}{weights}"
        outcome = "cannot be held against the alert" if self.state == UNDEFINED else "crosses the alert"
        within = "; the interval holds the threshold" if self._within() else ""
        return f"{self.alert.measure.replace('_', ' ')} {self.value} {at} {outcome} {self.alert.words!r}{within}"

    def _within(self) -> bool:
        threshold = self.alert.below if self.alert.below is not None else self.alert.above
        ends = float(self.row["low"]), float(self.row["high"])
        return self.state == CROSSED and threshold is not None and ends[0] <= threshold <= ends[1]


def judge(alerts: Sequence[Alert], readings: Iterable[Reading], before: Sequence[Judged] = ()) -> list[Judged]:
    """Every rule that has begun against the readings of one checkpoint.

    Args:
        before: what the checkpoint before came to, for `Judged.since`.
    """
    return _judge(alerts, _measures(readings), before)


def _judge(alerts: Sequence[Alert], table: pd.DataFrame, before: Sequence[Judged]) -> list[Judged]:
    measures = _that_speak(table)
    known = {one.key: one for one in before}
    found = []
    for alert in alerts:
        for row in measures[measures["measure"] == alert.measure].to_dict("records"):
            step = int(row["step"] or 0)
            if step < alert.after:
                continue
            value = float(row["value"])
            state = UNDEFINED if math.isnan(value) else CROSSED if alert.crossed(value) else None
            one = Judged(alert, {str(name): cell for name, cell in row.items()}, state, step)
            last = known.get(one.key)
            found.append(Judged(alert, one.row, state, last.since) if last and last.state == state else one)
    return found


def history(alerts: Sequence[Alert], readings: Readings) -> list[Judged]:
    """What the last checkpoint comes to, having gone through all before it."""
    last: list[Judged] = []
    for step in readings.steps if alerts else ():
        last = judge(alerts, readings.select(step=step), last)
    return last


def history_of(alerts: Sequence[Alert], measures: pd.DataFrame) -> list[Judged]:
    """As `history`, of a run's numbers: rows with the columns of `Readings.measures()`."""
    last: list[Judged] = []
    for _, part in measures.groupby("step", sort=True) if alerts and len(measures) else ():
        last = _judge(alerts, part, last)
    return last


def standing(judged: Iterable[Judged]) -> list[str]:
    """A line for each rule that is crossed, or undefined, with the step since which it is."""
    return [f"{one.text} (since step {one.since:,})" for one in judged if one.state]


def alerts_of(config: Mapping[str, Any]) -> tuple[Alert, ...]:
    """The rules of a run's config as plain values."""
    return tuple(Alert.model_validate(one) for one in config.get("alerts") or ())


def _measures(readings: Iterable[Reading]) -> pd.DataFrame:
    """`Readings.measures()` of one checkpoint."""
    parts = [
        reading.measures().assign(**{key: reading.meta.get(key) for key in ("step", "weights", "kind")})
        for reading in readings
    ]
    if not parts:
        return pd.DataFrame(columns=["measure"])
    return pd.concat(parts, ignore_index=True)


def _that_speak(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the averaged weights where a measure has some, else all."""
    if table.empty:
        return table
    averaged = set(table.loc[table["weights"] == "ema", "measure"])
    return table[(table["weights"] == "ema") | ~table["measure"].isin(averaged)]


class Watch:
    """Tells what is new in a run's folder. What is there when it is made has been told, or is told at the end alone."""

    def __init__(self, folder: Path, alerts: Sequence[Alert], say: Callable[[str], None]) -> None:
        self.folder, self.alerts, self.say = folder, alerts, say
        self.seen: set[int] = set()
        self.last: list[Judged] = []
        self.told = 0
        self._go_on(lambda one: None)
        self.new = False

    def look(self) -> None:
        """Tell each rule that a new checkpoint's reading crosses and the one before did not."""
        self._go_on(lambda one: self.say(f"{self.folder.resolve().name}: {one.text}"))

    def end(self) -> None:
        """Tell which rules the last checkpoint crosses; nothing where no checkpoint is new."""
        self.look()
        texts = standing(self.last)
        if self.new and texts:
            told = "; ".join(texts)
            self.say(f"{self.folder.resolve().name}: ended with {len(texts)} of {len(self.last)} alerts: {told}")

    def listening(self, listener: Listener) -> Listener:
        """The listener of a run, looking each time it is told something."""

        def tell(step: int, steps: int, loss: float | None) -> None:
            listener(step, steps, loss)
            self.look()

        return tell

    def _go_on(self, tell: Callable[[Judged], None]) -> None:
        if not self.alerts or not (self.folder / READINGS).is_dir():
            return
        before_looking = len(self.seen)
        there = {step: entry for entry in (self.folder / READINGS).iterdir() if (step := step_of(entry)) is not None}
        for step in sorted(there.keys() - self.seen):
            try:
                before, self.last = self.last, judge(self.alerts, Readings.load(there[step]), self.last)
            except RevprobeError:  # a damaged file is told where the readings are read
                continue
            self.seen.add(step)
            self.new = True
            states = {one.key: one.state for one in before}
            for one in self.last:
                if one.state and states.get(one.key) != one.state:
                    tell(one)
        if len(self.seen) > before_looking:  # for who lists many runs and opens none of their readings
            write_text(self.folder / ALERTS, "".join(f"{line}\n" for line in standing(self.last)))


def warned(folder: Path, alerts: Sequence[Alert]) -> Watch:
    """A run's watch that tells by Python's warnings, which the command line prints as notes.

    In a process that a sweep started it is silent: the sweep watches the folder itself.
    """
    alerts = () if os.environ.get(JSON_PROGRESS) else alerts
    return Watch(folder, alerts, lambda text: warnings.warn(text, AlertWarning, stacklevel=4))


class AlertCallback(TrainerCallback):
    """Looks after each step, once the readings of a snapshot are written; added after what takes them."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.watch.look()
