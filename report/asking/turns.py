"""One question at a time: a model has one set of hooks and one memory, and a browser asks from many threads.

A later question of the same page takes the place of its earlier one; another page is told that it has to wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import RevprobeError


class Cancelled(RevprobeError):
    """The question was given up: its page asked another, or cancelled it."""


class Turn:
    """Whose question is being answered, since when, and whether it is still wanted."""

    def __init__(self, page: str, what: str) -> None:
        self.page, self.what, self.since = page, what, time.monotonic()
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """End it at its next look."""
        self._given_up.set()

    @property
    def given_up(self) -> bool:
        return self._given_up.is_set()

    def check(self) -> None:
        """Called between two runs of the model. Raises: Cancelled, when it was given up."""
        if self.given_up:
            raise Cancelled("cancelled; ask again, or change the question")


class Turns:
    """Who may ask now."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._now: Turn | None = None
        self._latest: dict[str, Turn] = {}

    @contextmanager
    def turn(self, page: str, what: str) -> Iterator[Turn]:
        """Hold the turn inside.

        Args:
            page: the page that asks; its question before this one is given up, and waited for.
            what: what is asked, in a few words, for those who are told to wait.
        Raises: RevprobeError, while another page's question is being answered; Cancelled, when this page has asked
            something else meanwhile.
        """
        mine = Turn(page, what)
        with self._free:
            if self._now is not None and self._now.page != page:
                seconds = time.monotonic() - self._now.since
                raise RevprobeError(
                    f"another page's question is being answered ({self._now.what}, for {seconds:.0f} s): one at a "
                    "time; ask again when it is done, or cancel it there"
                )
            self._give_up(page)
            self._latest[page] = mine
            self._free.wait_for(lambda: self._now is None or mine.given_up)
            if mine.given_up:
                self._forget(mine)
                mine.check()
            self._now = mine
        try:
            yield mine
        finally:
            with self._free:
                self._now = None
                self._forget(mine)
                self._free.notify_all()

    def cancel(self, page: str) -> bool:
        """Give up what a page asked; whether there was anything."""
        with self._free:
            return self._give_up(page)

    def _give_up(self, page: str) -> bool:
        turn = self._latest.get(page)
        if turn is not None:
            turn.give_up()
            self._free.notify_all()
        return turn is not None

    def _forget(self, turn: Turn) -> None:
        if self._latest.get(turn.page) is turn:
            del self._latest[turn.page]
