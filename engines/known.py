"""The engines by name."""

from __future__ import annotations

from ..errors import RevprobeError, did_you_mean
from .launcher import Launcher

LOCAL, RAY = "local", "ray"
ENGINES = (LOCAL, RAY)


def launcher(on: str, *, jobs: int | None = None, address: str | None = None) -> Launcher:
    """The engine of that name; only its own packages are imported.

    Args:
        jobs: works side by side; one locally where it is None, and as many as there is room for on a cluster.
        address: of a cluster that is there; on one that is started for the works where it is None.
    Raises: RevprobeError, for an unknown name, and an address that the engine has no use for.
    """
    if on not in ENGINES:
        raise RevprobeError(f"no engine {on!r} to run on{did_you_mean(on, ENGINES)}")
    if on == LOCAL:
        if address is not None:
            raise RevprobeError(f"address {address!r}: local runs have none; add --on ray (on='ray'), or leave it out")
        from .local import LocalLauncher

        return LocalLauncher(jobs or 1)
    from .ray import RayLauncher

    return RayLauncher(jobs, address)
