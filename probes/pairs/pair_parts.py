"""Many pairs, so many at a time: of a list in memory, or of a file that is never held whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import RevprobeError
from .pairs import ReversalPairs, read_lines


@dataclass(frozen=True)
class PairParts:
    """Pairs in their order, `size` at a time; the last part has what is left.

    Args:
        source: a list, or a JSONL file of `ReversalPairs.save`, whose lines are read as they are needed.
    Raises: RevprobeError, when there is no such file, when it holds no pairs, or probes have lists of their own.
    """

    source: ReversalPairs | Path
    size: int
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.source, ReversalPairs):
            if self.source.by_probe:
                raise RevprobeError(f"{self.source!r}: {_ONE_LIST}")
        elif not self.source.is_file():
            raise RevprobeError(f"no pairs file at {str(self.source)!r}; write one with ReversalPairs.save")
        if not self.count:
            raise RevprobeError(f"{self.source} holds no pairs; expected one JSON object per line")

    @cached_property
    def count(self) -> int:
        """How many pairs there are."""
        if isinstance(self.source, ReversalPairs):
            return len(self.source)
        with self.source.open("rb") as file:
            head = file.readline()
            return int(bool(head.strip())) - self._begins_with_a_note(head) + sum(1 for _ in file)

    def __iter__(self) -> Iterator[ReversalPairs]:
        """The parts. Raises: RevprobeError, for a line that is no pair, or a part that is not like the one before."""
        like: tuple[Any, ...] | None = None
        for part in self._parts():
            kind = (part.kind, sorted(part.flags))
            if like not in (None, kind):
                raise RevprobeError(f"{self.source}: pairs of kind and flags {kind} after {like}; probe them apart")
            like = kind
            yield part

    def _parts(self) -> Iterator[ReversalPairs]:
        if isinstance(self.source, ReversalPairs):
            for start in range(0, len(self.source), self.size):
                yield self.source[start : start + self.size]
            return
        # A line ends at "\n" alone: names hold separators of their own.
        with self.source.open(encoding="utf-8", newline="\n") as file:
            lines = enumerate((line.removesuffix("\n") for line in file), start=1)
            first = next(lines, (1, ""))
            noted = self._begins_with_a_note(first[1].encode())
            said: dict[str, Any] = read_lines(self.source, [first])[1] if noted else {}
            some = ([] if noted else [first]) + list(islice(lines, self.size - (not noted)))
            while some:
                lists, own = read_lines(self.source, some)
                if {*lists} != {""}:
                    raise RevprobeError(f"{self.source}: {_ONE_LIST}")
                yield lists[""].pairs(tokenizer=self.tokenizer, **(said or own))
                some = list(islice(lines, self.size))

    @staticmethod
    def _begins_with_a_note(line: bytes) -> bool:
        return line.lstrip().startswith(b'{"dropped"')


_ONE_LIST = "some probes have pairs of their own, which are not read in parts; use rp.probe, or save `for_probe(name)`"
