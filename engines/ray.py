"""Works on a Ray cluster: each is a task with its own CPUs and GPUs, placed anywhere.

The task starts the same process as on one machine (`child`) and passes its news on, so the run's threads are its own,
whatever Ray sets in its workers, and its bytes are those of a run done here.
"""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RevprobeError, first_line
from .child import GRACE_SECONDS, Child, Ending, News, not_started
from .launcher import LEASE_SECONDS, TAKES_OVER, Display, Listener, Work
from .local import say_ending
from .ray_cluster import connected, lost_errors, passed_on, require_like_nodes

_POLL = 0.2  # seconds; so soon a cancelled task notices
_TRIES = 3  # losses of one work, before the fault is taken to be its own


class Began(NamedTuple):
    """A task has its place."""

    host: str


class RayLauncher:
    """A Ray cluster, at `address` or started here; as many works side by side as it has room for, or `jobs`."""

    def __init__(self, jobs: int | None = None, address: str | None = None) -> None:
        self.jobs, self.address = jobs, address

    def run_all(self, works: Sequence[Work], folder: Path, display: Display) -> dict[str, str]:
        """As `Launcher.run_all`.

        Raises: RevprobeError, when there is no cluster, its nodes are not alike or do not see `folder`, or none has
            what a work needs.
        """
        if not works:
            return {}
        folder = folder.resolve()
        with connected(self.address) as ray:
            require_like_nodes(ray, [folder, Path.cwd()])
            needs = {work.name: needs_of(work, ray.nodes()) for work in works}
            return _Tasks(ray, folder, display, needs).run(works, self.jobs)


def needs_of(work: Work, nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The CPUs and GPUs of a work's task; no more CPUs than the largest node has, since threads can share one.

    Raises: RevprobeError, when no node has a CPU, or a GPU that the work asks for.
    """
    largest: Callable[[str], float] = lambda kind: max(  # noqa: E731
        (node["Resources"].get(kind, 0.0) for node in nodes if node["Alive"]), default=0.0
    )
    if largest("CPU") < 1:
        raise RevprobeError("no node of the cluster has a CPU to give; start one with `ray start --address=HOST:PORT`")
    if work.device == "cuda" and largest("GPU") < 1:
        raise RevprobeError(f"{work.name} asks for device cuda, and no node of the cluster has a GPU; set device: auto")
    gpus = 1.0 if work.device == "cuda" or (work.device == "auto" and largest("GPU") >= 1) else 0.0
    return {"num_cpus": min(float(work.threads), largest("CPU")), "num_gpus": gpus}


def do_work(work: Work, folder: str, place: str, environment: dict[str, str]) -> Iterator[Began | News | Ending]:
    """A task: do one work in a process of its own, from the folder that the sweep was started in."""
    try:
        child = Child(work, Path(folder), environment, place=Path(place))
    except OSError as error:
        yield Began(platform.node())
        yield not_started(error)
        return
    try:
        yield Began(platform.node())
        yield from (news for news in child.news_or_none(_POLL) if news is not None)
        yield child.ended()
    finally:
        child.stop()  # nothing is left to stop where it has ended; a cancelled task gets here too


@dataclass
class _Running:
    """A task that was asked for, since when it has been doing its work, and how often that was lost before."""

    work: Work
    losses: int = 0
    began: float | None = None
    tell: Listener | None = None


@dataclass
class _Tasks:
    """The works as tasks of a cluster, heard in one loop."""

    ray: Any
    folder: Path
    display: Display
    needs: dict[str, dict[str, float]]
    running: dict[Any, _Running] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def run(self, works: Sequence[Work], jobs: int | None) -> dict[str, str]:
        """Do them all; what is raised in here cancels what runs."""
        waiting = deque(works)
        try:
            while waiting or self.running:
                while waiting and (jobs is None or len(self.running) < jobs):
                    self._submit(_Running(waiting.popleft()))
                ready = self._ready(1.0)
                for stream in ready:
                    self._hear(stream)
                if not ready:
                    self._require_room()
        except BaseException:
            self._cancel()
            raise
        return self.problems

    def _submit(self, one: _Running) -> None:
        work, environment = one.work, {LEASE_SECONDS: "60"} | passed_on() | ({TAKES_OVER: "1"} if one.losses else {})
        task = self.ray.remote(max_retries=0, num_returns="streaming", **self.needs[work.name])(do_work)
        asked = task.options(name=work.name).remote(work, str(self.folder), os.getcwd(), environment)
        self.running[asked] = one

    def _ready(self, seconds: float) -> list[Any]:
        streams = list(self.running)
        ready, _ = self.ray.wait(streams, num_returns=1, timeout=seconds, fetch_local=False)
        return list(ready)

    def _hear(self, stream: Any) -> None:
        """One thing that a task has to say."""
        one = self.running[stream]
        try:
            told = self.ray.get(next(stream))
        except StopIteration:
            self._over(stream, "its task ended without a word; run the same command again to go on")
        except lost_errors(self.ray):
            self._lost(stream)
        except self.ray.exceptions.RayError as error:
            self._over(stream, first_line(getattr(error, "cause", None) or error))
        else:
            if isinstance(told, Began):
                one.began, one.tell = time.monotonic(), one.tell or self.display.listen(one.work)
                self.display.say(f"{one.work.name}: started on {told.host}")
            elif isinstance(told, Ending):
                self._ended(stream, told)
            elif one.tell is not None:
                one.tell(*told)

    def _ended(self, stream: Any, ending: Ending) -> None:
        one = self.running.pop(stream)
        self.display.done(one.work)
        say_ending(one.work, ending, time.monotonic() - (one.began or time.monotonic()), self.display)
        if ending.problem is not None:
            self.problems[one.work.name] = ending.problem

    def _lost(self, stream: Any) -> None:
        """Have a work taken up elsewhere, which the new process does when the old one surely writes no more."""
        one = self.running[stream]
        if one.losses + 1 >= _TRIES:
            again = "run the same command again to go on"
            self._over(stream, f"its node or worker was lost {_TRIES} times; the run may need more memory, {again}")
            return
        del self.running[stream]
        self.display.say(f"{one.work.name}: its node or worker was lost; it is taken up from its last checkpoint")
        self._submit(_Running(one.work, one.losses + 1, tell=one.tell))

    def _require_room(self) -> None:
        """End the works that were lost, for which no node that is left has room: they would wait for ever."""
        lost = [stream for stream, one in self.running.items() if one.losses and one.began is None]
        alive = [node["Resources"] for node in self.ray.nodes() if node["Alive"]] if lost else []
        for stream in lost:
            kinds = {kind[4:-1].upper(): need for kind, need in self.needs[self.running[stream].work.name].items()}
            if not any(all(has.get(kind, 0.0) >= need for kind, need in kinds.items()) for has in alive):
                self._over(stream, "its node was lost, and no other has room for it; run the same command to go on")

    def _over(self, stream: Any, problem: str) -> None:
        """A task that could not say how its work ended."""
        one = self.running.pop(stream)
        if one.tell is not None:
            self.display.done(one.work)
        self.display.say(f"{one.work.name}: failed: {problem}")
        self.problems[one.work.name] = problem

    def _cancel(self) -> None:
        """End all tasks, and wait until their processes have ended: a worker that is killed would leave its own."""
        for stream in self.running:
            self.ray.cancel(stream)
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while self.running and time.monotonic() < deadline:
            for stream in self._ready(deadline - time.monotonic()):
                try:
                    self.ray.get(next(stream))
                except (StopIteration, self.ray.exceptions.RayError):
                    del self.running[stream]
