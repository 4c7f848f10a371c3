"""The engines by name."""

from __future__ import annotations

from typing import Any

from ..errors import RevprobeError, did_you_mean
from .launcher import Launcher
from .workers import Workers

LOCAL, RAY = "local", "ray"
ENGINES = (LOCAL, RAY)


def launcher(on: str, *, jobs: int | None = None, address: str | None = None) -> Launcher:
    """The engine of that name; only its own packages are imported.

    Args:
        jobs: works side by side; one locally where it is None, and as many as there is room for on a cluster.
        address: of a cluster that is there; on one that is started for the works where it is None.
    Raises: RevprobeError, for an unknown name, and an address that the engine has no use for.
    """
    _require_engine(on, address=address)
    if on == LOCAL:
        from .local import LocalLauncher

        return LocalLauncher(jobs or 1)
    from .ray import RayLauncher

    return RayLauncher(jobs, address)


def workers(on: str, *, count: int | None = None, address: str | None = None, **asked: Any) -> Workers | None:
    """The processes of the engine of that name; none locally, where a call is done by the process it is made in.

    Args:
        count: how many; as many as there is room for where it is None.
        asked: as `ray_workers`.
    Raises: RevprobeError, for an unknown name, a count or an address that the engine has no use for.
    """
    _require_engine(on, address=address, workers=count)
    if on == LOCAL:
        return None
    from .ray_workers import ray_workers

    return ray_workers(count, address=address, **asked)


def _require_engine(on: str, **clusters: Any) -> None:
    """Raises: RevprobeError, for an unknown engine, and for the local one with what clusters alone have."""
    if on not in ENGINES:
        raise RevprobeError(f"no engine {on!r} to run on{did_you_mean(on, ENGINES)}")
    for name, value in clusters.items():
        if on == LOCAL and value is not None:
            raise RevprobeError(f"{name} {value!r}: local runs have none; add --on ray (on='ray'), or leave it out")
