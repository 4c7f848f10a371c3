"""One question at a time: a page's later question replaces its earlier one, another page is told to wait."""

import threading
import time
from collections.abc import Callable

import pytest

from revprobe import RevprobeError
from revprobe.report.asking.turns import Cancelled, Turn, Turns

PATIENCE = 20.0


class Asked(threading.Thread):
    """A question that is answered until it is given up, or told to be done."""

    def __init__(self, turns: Turns, page: str) -> None:
        super().__init__(daemon=True)
        self.turns, self.page = turns, page
        self.began, self.done = threading.Event(), threading.Event()
        self.ended = ""
        self.start()

    def run(self) -> None:
        try:
            with self.turns.turn(self.page, f"asked by {self.page}") as turn:
                self.began.set()
                while not self.done.wait(0.005):
                    turn.check()
            self.ended = "answered"
        except RevprobeError as error:
            self.ended = f"{type(error).__name__}: {error}"

    def finished(self) -> str:
        self.join(PATIENCE)
        assert not self.is_alive(), "it hangs"
        return self.ended


def test_another_page_is_told_to_wait_and_may_ask_when_it_is_done() -> None:
    turns = Turns()
    first = Asked(turns, "a")
    assert first.began.wait(PATIENCE)
    assert (
        "another page's question is being answered (asked by a, for 0 s): one at a time" in Asked(turns, "b").finished()
    )
    first.done.set()
    assert first.finished() == "answered"
    second = Asked(turns, "b")
    assert second.began.wait(PATIENCE), "the turn was not handed on"
    second.done.set()
    assert second.finished() == "answered"


def test_a_pages_later_question_takes_the_place_of_its_earlier_ones() -> None:
    """However many came between, the last is the one that is answered."""
    turns = Turns()
    questions = [Asked(turns, "a")]
    assert questions[0].began.wait(PATIENCE)
    questions.append(Asked(turns, "a"))
    assert questions[1].began.wait(PATIENCE) and questions[0].finished().startswith("Cancelled")
    questions[1].done.set()
    assert questions[1].finished() == "answered"


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_what_waits_and_is_no_longer_wanted_is_never_begun() -> None:
    """Two questions wait behind a run that cannot be broken off: the first of them ends at once, the last is asked."""
    turns, slow = Turns(), threading.Event()

    def hold() -> None:
        with turns.turn("a", "slow"):
            slow.wait(PATIENCE)

    threading.Thread(target=hold, daemon=True).start()
    until(lambda: turns._now)
    second = Asked(turns, "a")
    until(lambda: turns._latest["a"] is not turns._now)
    third = Asked(turns, "a")
    assert second.finished().startswith("Cancelled") and not second.began.is_set()
    assert not third.began.is_set(), "two at a time"
    slow.set()
    assert third.began.wait(PATIENCE)
    third.done.set()
    assert third.finished() == "answered" and not turns._latest


def test_cancelling_ends_a_pages_own_question_alone() -> None:
    turns = Turns()
    first = Asked(turns, "a")
    assert first.began.wait(PATIENCE)
    assert not turns.cancel("b") and not first.ended
    assert turns.cancel("a")
    assert first.finished() == "Cancelled: cancelled; ask again, or change the question"
    assert not turns.cancel("a"), "it is done"


def test_a_question_that_fails_hands_the_turn_on() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.turn("a", "fails"):
        1 / 0  # noqa: B018
    with turns.turn("b", "next") as turn:
        assert isinstance(turn, Turn)
        turn.check()
    assert issubclass(Cancelled, RevprobeError)
