"""A Ray cluster: one started on this machine for the works, or one that is there; and whether its nodes are alike.

What is started here listens on the loopback interface alone, asks for a token that only its own processes have, and
says nothing on the console. Ray reads both settings when it is imported, so they are made before.
"""

from __future__ import annotations

import importlib
import os
import platform
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RevprobeError, first_line

# It selects 127.0.0.1 for every listener, whatever its name says.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# What is used is kept to itself; and no pages about a node that died, of which the engine has a line of its own.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
_OBJECT_STORE = 80 * 2**20  # bytes; what is sent is small, and by default Ray takes a third of the memory
_PATIENCE = 180.0  # seconds for a node to answer; its first worker may have to start
_ANSWER = 10.0  # seconds for the head's port
_START = "`ray start --head` starts a cluster, and `ray status` on one of its machines shows it"
_SHOWN = 3
# What the one who starts the work has set goes along, but for what opens doors.
_PASSED_ON = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "REVPROBE_", "CUBLAS_")
_KEPT = "TOKEN"


class About(NamedTuple):
    """What a node says of itself: the versions that can move bits, and which folders it does not see."""

    versions: dict[str, str]
    unseen: list[str]


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or to one that is started here and ends with the block.

    A process that is connected already stays so, and is used.
    Raises: RevprobeError, when Ray is not installed, no cluster answers, or one here would listen to other machines.
    """
    ray = _imported(address)
    if ray.is_initialized():
        yield ray
        return
    if address is not None:
        _require_answer(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE, "_node_ip_address": "127.0.0.1"}
    # Ray puts a handler of its own in the place of SIGTERM's.
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if here else None
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise RevprobeError(f"{_nobody(address)}: {first_line(error)[:200]}; {_START}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
        if here:
            signal.signal(signal.SIGTERM, before)


def _require_answer(address: str) -> None:
    """Ray itself asks for minutes. Raises: RevprobeError, when nobody answers there."""
    host, colon, port = address.rpartition(":")
    if not colon:  # auto: Ray looks in the environment and in its own files
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER):
            pass
    except (OSError, ValueError) as error:
        raise RevprobeError(f"{_nobody(address)}: {first_line(error)[:200]}; {_START}") from error


def _nobody(address: str | None) -> str:
    return f"no Ray cluster to be used at {address!r}" if address else "Ray could not be started here"


def _imported(address: str | None) -> Any:
    """Ray, imported with the settings that it reads then."""
    if address is not None and "://" in address:
        raise RevprobeError(
            f"address {address!r}: Ray's client protocol does not carry progress; give HOST:PORT of the cluster's "
            "head, or auto, from one of its machines"
        )
    alone = address is None or address.rpartition(":")[0] in ("127.0.0.1", "localhost")
    if "ray" not in sys.modules:
        for name, value in (QUIET | (LOOPBACK if alone else {})).items():
            os.environ.setdefault(name, value)
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        # Otherwise Ray would make a token and keep it in the home folder.
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise RevprobeError(
            f"Ray cannot be imported ({first_line(error)}); run `pip install '.[ray]'` in the checkout, or leave the "
            "cluster out (--on local)"
        ) from error
    if address is None and not ray.is_initialized() and _listens_to_others(ray):
        name, value = next(iter(LOOPBACK.items()))
        raise RevprobeError(
            f"Ray was imported before, without {name}={value}: a cluster started now would listen to other machines; "
            "set it before Ray is imported, or give the address of a cluster"
        )
    return ray


def _listens_to_others(ray: Any) -> bool:
    constants = importlib.import_module("ray._private.ray_constants")
    return bool(constants.ENABLE_RAY_CLUSTER)


def own_versions() -> dict[str, str]:
    """The versions of this process that can move a run's bits."""
    revprobe = importlib.import_module(__name__.split(".")[0])
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    return {"revprobe": revprobe.__version__, "torch": torch, "Python": platform.python_version()}


def about_node(folders: list[str]) -> About:
    """What the node that this runs on says of itself."""
    return About(own_versions(), [folder for folder in folders if not Path(folder).is_dir()])


def require_like_nodes(ray: Any, folders: list[Path]) -> None:
    """Ask every node of the cluster, before any work is begun on one.

    Raises: RevprobeError, when a node does not answer, has other versions than this process, or lacks a folder.
    """
    affinity = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    asking = ray.remote(num_cpus=0, max_retries=0)(about_node)
    asked = {
        node_name(node): asking.options(scheduling_strategy=affinity(node["NodeID"], soft=False)).remote(
            [str(folder) for folder in folders]
        )
        for node in ray.nodes()
        if node["Alive"]
    }
    mine, wrong = own_versions(), []
    for name, answer in asked.items():
        try:
            about = ray.get(answer, timeout=_PATIENCE)
        except ray.exceptions.GetTimeoutError:
            wrong.append(f"{name} does not answer")
            continue
        except ray.exceptions.RayError as error:
            wrong.append(f"{name} cannot run revprobe ({first_line(getattr(error, 'cause', None) or error)[:160]})")
            continue
        other = [
            f"{what} {about.versions.get(what)}" for what, have in mine.items() if about.versions.get(what) != have
        ]
        wrong += [f"{name} has {' and '.join(other)}"] * bool(other)
        wrong += [f"{name} does not see {folder!r}" for folder in about.unseen]
    if wrong:
        here = ", ".join(f"{what} {have}" for what, have in mine.items())
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise RevprobeError(
            f"the cluster's nodes are not alike: {'; '.join(wrong[:_SHOWN])}{more}; expected {here} as here on each, "
            "and storage that all of them see (--out); nothing was begun"
        )


def node_name(node: dict[str, Any]) -> str:
    """A node as messages call it."""
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


def lost_errors(ray: Any) -> tuple[type[Exception], ...]:
    """What Ray raises when a node, a worker or an actor is gone, and not the code that ran there.

    By these a loss is told: for a while after it died, a node is still listed as alive.
    """
    kinds = ray.exceptions
    return (
        kinds.NodeDiedError,
        kinds.WorkerCrashedError,
        kinds.LocalRayletDiedError,
        kinds.RayActorError,
        kinds.ObjectLostError,
    )


def passed_on() -> dict[str, str]:
    """The variables of this process that go along to what is done elsewhere."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON) and _KEPT not in name}
