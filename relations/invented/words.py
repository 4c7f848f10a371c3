"""The words that look-alikes are made of, and people's names drawn from them."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from random import Random

_DATA = Path(__file__).parents[1] / "data"


def records(name: str) -> list[dict[str, str]]:
    """The rows of a file of words."""
    with (_DATA / f"look_alike_{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache
def words(name: str) -> dict[str, tuple[str, ...]]:
    """A file's words by their kind, the first column; the second has the word."""
    found: dict[str, list[str]] = {}
    for kind, word in (row.values() for row in records(name)):
        found.setdefault(kind, []).append(word)
    return {kind: tuple(listed) for kind, listed in found.items()}


def shuffled(listed: tuple[str, ...] | list[str], draw: Random) -> list[str]:
    """A list in another order."""
    ordered = list(listed)
    draw.shuffle(ordered)
    return ordered


class Names:
    """People, each name drawn once; first names and surnames come round after all others have had their turn."""

    def __init__(self, draw: Random) -> None:
        self._draw = draw
        self._waiting: dict[str, list[str]] = {}
        self._given: set[str] = set()

    def _next(self, kind: str) -> str:
        if not self._waiting.get(kind):
            self._waiting[kind] = shuffled(words("names")[kind], self._draw)
        return self._waiting[kind].pop()

    def last(self) -> str:
        """A surname."""
        return self._next("last")

    def person(self, last: str | None = None, kind: str | None = None) -> str:
        """A full name, of two words or three, for a "female" or a "male" person, or for either."""
        surname = last or self.last()
        while True:
            middle = [self._next("middle")] if self._draw.random() < 0.14 else []
            first = self._next(kind or ("female", "male")[self._draw.random() < 0.5])
            name = " ".join([first, *middle, surname])
            if name not in self._given:
                self._given.add(name)
                return name
