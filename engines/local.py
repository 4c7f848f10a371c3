"""Works side by side on this machine, each in a process of its own with its own pinned threads.

Neither the number of jobs nor the company changes a run's bits; a run that fails does not stop the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path

from .child import GRACE_SECONDS, Child, Ending, not_started
from .launcher import Display, Work


class LocalLauncher:
    """Processes of this machine, `jobs` at a time."""

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs

    def run_all(self, works: Sequence[Work], folder: Path, display: Display) -> dict[str, str]:
        """As `Launcher.run_all`."""
        children: set[Child] = set()
        stopping = threading.Event()
        problems: dict[str, str] = {}
        with ThreadPoolExecutor(min(self.jobs, max(len(works), 1))) as pool:
            futures: dict[Future[str | None], Work] = {
                pool.submit(_run_child, work, folder, display, children, stopping): work for work in works
            }
            try:
                for future in as_completed(futures):
                    if problem := future.result():
                        problems[futures[future].name] = problem
            except BaseException:
                stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                # All are asked before any is waited for.
                for child in list(children):
                    child.process.terminate()
                deadline = time.monotonic() + GRACE_SECONDS
                for child in list(children):
                    child.stop(deadline - time.monotonic())
                raise
        return problems


def _run_child(
    work: Work, folder: Path, display: Display, children: set[Child], stopping: threading.Event
) -> str | None:
    """Do one work in a process of its own and pass on its progress; returns what went wrong, if anything."""
    if stopping.is_set():
        return None
    began, tell = time.monotonic(), display.listen(work)
    display.say(f"{work.name}: started")
    try:
        child = Child(work, folder)
    except OSError as error:  # this work's own problem: the others go on
        ending = not_started(error)
    else:
        children.add(child)
        for news in child.news():
            tell(*news)
        ending = child.ended()
        children.discard(child)
    display.done(work)
    if not stopping.is_set() or ending.code == 0:
        say_ending(work, ending, time.monotonic() - began, display)
    return ending.problem


def say_ending(work: Work, ending: Ending, seconds: float, display: Display) -> None:
    """What a work noted by the way, and how it came out."""
    for note in ending.notes:
        display.say(f"{work.name}: {note}")
    if ending.problem is None:
        display.say(f"{work.name}: finished in {timedelta(seconds=round(seconds))}")
    else:
        display.say(f"{work.name}: failed: {ending.said if os.environ.get('REVPROBE_DEBUG') else ending.problem}")
