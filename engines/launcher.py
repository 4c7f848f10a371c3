"""The one interface behind `--on`: an engine takes works and does them all, wherever it has room.

A work is one run in its folder, done by `revprobe VERB -` in a process of its own: so the run pins its threads itself,
and its bytes are the same whoever started it. Another engine is one file beside `local`, and a line in `known`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

# Called with (step, steps, loss) about once a second.
Listener = Callable[[int, int, float | None], None]
# Asked for by an engine from the processes it starts: progress as JSON lines on stdout.
JSON_PROGRESS = "REVPROBE_PROGRESS_JSON"
# Set by an engine for the processes it starts: its own process, without which they end.
STARTED_BY = "REVPROBE_STARTED_BY"
# Seconds for which a lease on a run's folder is good, set by an engine whose runs may be taken up on another machine: a
# process that stands still for half of them stops writing.
LEASE_SECONDS = "REVPROBE_LEASE_SECONDS"
# Set for a run that was lost with its place: wait until whoever wrote it surely writes no more, and go on from there.
TAKES_OVER = "REVPROBE_TAKES_OVER"


@dataclass(frozen=True)
class Work:
    """A run to be done.

    Attributes:
        verb: the command that does it, reading its config from stdin.
        config: its config, as YAML.
        threads: what it computes with; an engine that places runs counts as many CPUs for it.
        device: where it computes, as its config says.
        steps: how many it has, where that is known before it begins.
    """

    name: str
    verb: Literal["train", "finetune"]
    config: str
    threads: int
    device: Literal["auto", "cpu", "cuda"]
    steps: int | None


@dataclass
class Display:
    """Where works in progress are shown. `listen(work)` starts one's line; `say` prints above the bars."""

    listen: Callable[[Work], Listener]
    say: Callable[[str], None]
    done: Callable[[Work], None] = field(default=lambda work: None)


class Launcher(Protocol):
    """An engine. A work that fails does not stop the others; neither company nor place changes a work's bytes."""

    def run_all(self, works: Sequence[Work], folder: Path, display: Display) -> dict[str, str]:
        """Do every work, each in its folder `folder/<name>`; returns the problem of each that failed.

        What is raised in here, Ctrl-C above all, ends all of them first.
        """
