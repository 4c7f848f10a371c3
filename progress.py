"""How far a long call is: a bar with the time left, the caller's own function, or nothing.

`@shows_progress` is the one place where that is decided, for each public function that can take seconds:

    @checked
    @shows_progress("queries")
    def probe(model, pairs, *, progress: Progress | bool | None = None, ...)

    probe(model, pairs)                              # a bar, once two seconds have passed
    probe(model, pairs, progress=False)              # nothing
    probe(model, pairs, progress=lambda done, total: ...)   # called with these, and no bar

A bar is drawn on stderr where that is a terminal, or in the notebook; elsewhere, as in a log, there is none. Calls
inside such a call show none of their own, so there is one bar at most; it is gone when the call ends or raises.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Progress = Callable[[int, int], None]  # done, in all
DELAY = 2.0  # seconds before a bar appears: quick calls show none

_told: ContextVar[bool] = ContextVar("revprobe_progress_told", default=False)  # by a call that this one is a part of


def shows_progress(
    unit: str, *, argument: str = "progress", reads: Callable[..., tuple[int, int, str]] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The function with what it is given as `argument`, keyword-only, made something to call, or None.

    None and True become a bar, where one can be seen; False becomes None; a function is handed on.
    Args:
        unit: what is counted, "queries".
        reads: makes (done, in all, a few words) of what the function tells, where that is not (done, in all).
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        kind = inspect.signature(function).parameters[argument].kind
        assert kind is inspect.Parameter.KEYWORD_ONLY, f"{function.__name__}: {argument} must be keyword-only"

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with _listening(kwargs.get(argument), function.__name__, unit, reads) as listener:
                changed: dict[str, Any] = {**kwargs, argument: listener}
                return function(*args, **changed)

        return call

    return decorate


def counted(items: Collection[T], progress: Progress | bool | None) -> Iterator[T]:
    """The items one after the other; `progress` is called when each has been dealt with."""
    yield from counted_together(len(items), progress)(items)


def counted_together(total: int, progress: Progress | bool | None) -> Callable[[Iterable[T]], Iterator[T]]:
    """As `counted`, of several lists that come one after the other: what is returned passes on the items of each."""
    done = 0

    def watch(items: Iterable[T]) -> Iterator[T]:
        nonlocal done
        for item in items:
            yield item
            done += 1
            if callable(progress):
                progress(done, total)

    return watch


@contextmanager
def without_bars() -> Iterator[None]:
    """No bar inside: for who draws bars of his own."""
    before = _told.set(True)
    try:
        yield
    finally:
        _told.reset(before)


@contextmanager
def _listening(
    asked: Any, name: str, unit: str, reads: Callable[..., tuple[int, int, str]] | None
) -> Iterator[Callable[..., None] | None]:
    """What a call tells; inside it no other call draws a bar."""
    shown = (asked is None or asked is True) and not _told.get() and _can_be_seen()
    bar = _Bar(name, unit, reads) if shown else None
    with without_bars():
        try:
            yield bar or (asked if callable(asked) else None)
        finally:
            if bar is not None:
                bar.close()


def _can_be_seen() -> bool:
    """On a terminal or in a notebook, unless TQDM_DISABLE is set; the first alone of several processes or threads."""
    if os.environ.get("TQDM_DISABLE"):  # tqdm's own kind for notebooks does not ask
        return False
    if os.environ.get("RANK", "0") != "0" or threading.current_thread() is not threading.main_thread():
        return False
    return _in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


class _Bar:
    """A bar of tqdm that is made when the call has taken DELAY, and begins anew where the count does."""

    def __init__(self, name: str, unit: str, reads: Callable[..., tuple[int, int, str]] | None) -> None:
        self.name, self.unit, self.reads = name, unit, reads
        self.began = self.part = time.monotonic()  # the call, and the list that is being counted
        self.at, self.words = 0, ""
        self.bar: Any = None

    def __call__(self, *told: Any) -> None:
        done, total, words = self.reads(*told) if self.reads else (*told, "")
        now = time.monotonic()
        if done < self.at:
            self.part = now
        again, self.at = done < self.at, done
        if now - self.began < DELAY:
            return
        if self.bar is None:
            self.bar, again = _made(self.name, self.unit, total), True
        elif again or total != self.bar.total:
            self.bar.reset(total)  # tells a notebook's widget too
            again = True
        if words != self.words:
            self.words = words
            self.bar.set_postfix_str(words, refresh=False)
        if again:
            self.bar.start_t -= now - self.part  # the time left is told by all that has passed
            self.bar.n = done
            self.bar.refresh()
        else:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Take it off the screen."""
        if self.bar is not None:
            self.bar.close()


def _made(name: str, unit: str, total: int) -> Any:
    from tqdm.auto import tqdm  # when it is needed: a notebook's kind asks for its widgets

    class Bar(tqdm):
        monitor_interval = 0  # no thread that outlives the call

    # smoothing=0: batches differ in size and length, so the mean tells the time left better than the last of them.
    # delay: not shown before its first count is set.
    look: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "smoothing": 0, "delay": 1e-9, "file": sys.stderr}
    return Bar(total=total, desc=name, unit=unit, **look)
