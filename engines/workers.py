"""The other interface of engines: processes that make something large once, and are then asked about it, part by part.

`launcher` does whole runs; here a call is shared out while it waits for the answers. Another engine is one file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

Found = TypeVar("Found")
Told = Callable[[int, int], None]  # parts that are answered, parts in all


class Team(Protocol):
    """Workers that hold what they made."""

    size: int

    def ask(self, question: Callable[[Any, int], Found], parts: int, told: Told | None = None) -> list[Found]:
        """`question(held, part)` for every part, by whichever worker is free; the answers in the order of parts.

        Raises: what the question raises; RevprobeError, when a part is lost with its worker again and again.
        Warns: when a worker is lost; what it was asked is asked again.
        """


class Workers(Protocol):
    """So many processes, asked for and not yet started."""

    @property
    def device(self) -> str:
        """Where each computes."""

    @property
    def threads(self) -> int:
        """With how many each computes."""

    @property
    def load(self) -> Mapping[str, Any]:
        """How each loads its model, besides."""

    def holding(self, make: Callable[[], Any]) -> AbstractContextManager[Team]:
        """Start them, each with what `make()` returns there; they end with the block."""
