"""Workers on a Ray cluster: actors that hold a model and answer for parts of the pairs.

An actor that is lost has its part asked again of another, and is replaced as soon as there is room for one: anywhere,
since for a while after it died a node is still listed as alive. What tells a loss is the kind of error.
"""

from __future__ import annotations

import os
import pickle
import platform
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..arguments import checked
from ..errors import RevprobeError, first_line
from .ray_cluster import connected, lost_errors, passed_on, require_like_nodes
from .workers import Found, Told

_PATIENCE = 1.0  # seconds until the cluster is looked at, where nobody has anything to say
_TRIES = 3  # losses of one part, or of workers that load, before the fault is taken to be theirs


@checked
def ray_workers(
    count: int | None = None,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int = 1,
    address: str | None = None,
    **load: Any,
) -> RayWorkers:
    """Processes on a Ray cluster that share the pairs of a probe: `rp.probe(name, pairs, workers=rp.ray_workers(4))`.

    Nothing is started until a probe is given them. They end with it.

    Args:
        count: how many; as many as the cluster has room for when None. Each loads the model.
        device: "cuda" gives each a GPU of its own.
        threads: what each computes with, which is as many CPUs of the cluster.
        address: of a cluster that is there, HOST:PORT or "auto"; one is started on this machine when None.
        load: options of `load_model`: step, weights, dtype, ...
    Raises: RevprobeError, for a count or threads below 1.
    """
    for name, number in (("count", count), ("threads", threads)):
        if number is not None and number < 1:
            raise RevprobeError(f"{name}={number}: expected a whole number of at least 1")
    return RayWorkers(count, device, threads, address, load)


@dataclass(frozen=True)
class RayWorkers:
    """What `ray_workers` was asked for."""

    count: int | None
    device: str
    threads: int
    address: str | None
    load: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def holding(self, make: Callable[[], Any]) -> Iterator[RayTeam]:
        """As `Workers.holding`.

        Raises: RevprobeError, when there is no cluster, its nodes are not alike or do not see this folder, or it has
            not room for so many.
        """
        with connected(self.address) as ray:
            require_like_nodes(ray, [Path.cwd()])
            needs = {"num_cpus": self.threads, "num_gpus": int(self.device == "cuda")}
            room = room_for(needs, ray.nodes())
            if room < (self.count or 1):
                each = " and ".join(f"{n} {kind[4:-1].upper()}{'s' * (n > 1)}" for kind, n in needs.items() if n)
                raise RevprobeError(
                    f"{self.count or 1} workers of {each} each: the cluster has room for {room}; ask for fewer (or "
                    "fewer threads), or add nodes"
                )
            team = RayTeam(ray, self.count or room, needs, [ray.put(_packed(ray, make))])
            try:
                team.start()
                yield team
            finally:
                team.end()


def room_for(needs: Mapping[str, int], nodes: Sequence[Mapping[str, Any]]) -> int:
    """How many workers fit on the nodes that are alive, were they idle."""
    kinds = {name[4:-1].upper(): need for name, need in needs.items() if need}
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return sum(min(int(has.get(kind, 0.0) // need) for kind, need in kinds.items()) for has in alive)


def _packed(ray: Any, make: Callable[[], Any]) -> bytes:
    """What is made, as bytes, read by a worker that has its environment. Raises: RevprobeError, when it cannot be."""
    try:
        return bytes(ray.cloudpickle.dumps(make))
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise RevprobeError(
            f"this model cannot be sent to other processes ({first_line(error)[:160]}); pass the name or folder that "
            "it was loaded from, which each worker loads by itself"
        ) from error


class Worker:
    """An actor. It imports nothing heavy before it has its environment, which libraries read when they are imported."""

    def __init__(self, place: str, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        os.chdir(place)
        self._question: tuple[int, Any] = (-1, None)

    def hold(self, make: list[Any]) -> str:
        """Make what is asked about; returns the name of the machine. `make` holds a reference, as questions do."""
        import ray

        self._held = pickle.loads(ray.get(make[0]))()
        return platform.node()

    def answer(self, number: int, question: list[Any], part: int) -> Any:
        """Answer a question for one part. `question` holds the reference of one, which is fetched once."""
        if self._question[0] != number:
            import ray

            self._question = (number, ray.get(question[0]))
        return self._question[1](self._held, part)


class _Task(NamedTuple):
    """What an actor is busy with: a part of the question of this number; None while it makes what it holds."""

    actor: Any
    number: int | None = None
    part: int = -1


@dataclass
class RayTeam:
    """The actors of one block, heard in one loop."""

    ray: Any
    size: int
    needs: dict[str, int]
    make: list[Any]
    busy: dict[Any, _Task] = field(default_factory=dict)
    free: list[Any] = field(default_factory=list)
    hosts: dict[Any, str] = field(default_factory=dict)
    lost_loading: int = 0
    asked: int = 0

    def start(self) -> None:
        """Ask for the actors; they load side by side."""
        for _ in range(self.size):
            self._start_one()

    def end(self) -> None:
        """End the actors, whatever they are busy with."""
        for actor in [*self.free, *(task.actor for task in self.busy.values())]:
            self.ray.kill(actor)

    def ask(self, question: Callable[[Any, int], Found], parts: int, told: Told | None = None) -> list[Found]:
        """As `Team.ask`."""
        self.asked += 1
        reference, waiting = [self.ray.put(question)], deque(range(parts))
        found: dict[int, Found] = {}
        losses: Counter[int] = Counter()
        while len(found) < parts:
            while waiting and self.free:
                actor, part = self.free.pop(), waiting.popleft()
                self.busy[actor.answer.remote(self.asked, reference, part)] = _Task(actor, self.asked, part)
            ready, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=_PATIENCE, fetch_local=False)
            if not ready:
                self._require_room()
            for one in ready:
                task = self.busy.pop(one)
                try:
                    answer = self._hear(one, task)
                except _Lost as loss:
                    if task.number == self.asked:
                        losses[task.part] += 1
                        waiting.appendleft(task.part)
                    self._replace(task, losses[task.part], parts, loss)
                else:
                    if task.number == self.asked:
                        found[task.part] = answer
                        if told is not None:
                            told(len(found), parts)
        return [found[part] for part in range(parts)]

    def _start_one(self) -> None:
        actor = self.ray.remote(Worker).options(**self.needs, max_restarts=0).remote(os.getcwd(), passed_on())
        self.busy[actor.hold.remote(self.make)] = _Task(actor)

    def _hear(self, one: Any, task: _Task) -> Any:
        """What an actor answers, which is free then. Raises: what it raised; _Lost, when it is gone."""
        try:
            answer = self.ray.get(one)
        except lost_errors(self.ray) as error:
            raise _Lost(type(error).__name__) from error
        except self.ray.exceptions.RayError as error:
            self.free.append(task.actor)
            raise getattr(error, "cause", None) or RevprobeError(f"a worker failed: {first_line(error)}") from error
        self.free.append(task.actor)
        if task.number is None:
            self.hosts[task.actor], self.lost_loading = str(answer), 0
        return answer

    def _replace(self, task: _Task, losses: int, parts: int, loss: _Lost) -> None:
        """Another actor for one that is lost, placed anywhere. Raises: RevprobeError, when that did not help before."""
        self.ray.kill(task.actor)  # one that is only out of reach would go on, unheard
        host = self.hosts.pop(task.actor, None)
        where = f"on {host} " if host else ""
        self.lost_loading += task.number is None
        what = f"part {task.part + 1} of {parts}" if task.number is not None else "loading the model"
        if max(losses, self.lost_loading) >= _TRIES:
            raise RevprobeError(
                f"{what} was lost with its worker {_TRIES} times, last {where}({loss}); its node may lack memory: ask "
                "for fewer workers, or a smaller batch_size"
            ) from loss
        warnings.warn(f"a worker {where}was lost ({loss}); {what} is done again on another", stacklevel=3)
        self._start_one()

    def _require_room(self) -> None:
        """Raises: RevprobeError, when no actor is left but such as wait for a node that is not there."""
        loading = all(task.number is None for task in self.busy.values())
        if loading and not self.free and not room_for(self.needs, self.ray.nodes()):
            raise RevprobeError("no node of the cluster that has room for a worker is left; add one and ask again")


class _Lost(Exception):
    """An actor, or what it answered, is gone."""
