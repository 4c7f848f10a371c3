"""Runs side by side, each `revprobe train -` in a process of its own with its own pinned threads.

Neither the number of jobs nor the company changes a run's bits; a run that fails does not stop the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from ..config.finetuning import FinetuneConfig
from ..config.loading import dump_config
from .progress import JSON_PROGRESS, Listener
from .sweeps import AnyRun

# How long a child gets to end by itself after Ctrl-C before it is killed; nothing is lost either way.
_GRACE_SECONDS = 5.0


@dataclass
class Display:
    """Where running runs are shown. `listen(name)` starts one's line; `say` prints above the bars."""

    listen: Callable[[AnyRun], Listener]
    say: Callable[[str], None]
    done: Callable[[AnyRun], None] = field(default=lambda run: None)


def run_all(runs: Sequence[AnyRun], folder: Path, jobs: int, display: Display) -> dict[str, str]:
    """Run the children, `jobs` at a time; returns the problem of each that failed. Ctrl-C stops them all."""
    children: set[subprocess.Popen[str]] = set()
    stopping = threading.Event()
    problems: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[str | None], AnyRun] = {
            pool.submit(_run_child, run, folder, display, children, stopping): run for run in runs
        }
        try:
            for future in as_completed(futures):
                if problem := future.result():
                    problems[futures[future].name] = problem
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            # Ask, wait, then kill. What a child had completed stays, the rest is redone on resume.
            for child in list(children):
                child.terminate()
            deadline = time.monotonic() + _GRACE_SECONDS
            for child in list(children):
                try:
                    child.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    child.kill()
            raise
    return problems


def _run_child(
    run: AnyRun, folder: Path, display: Display, children: set[subprocess.Popen[str]], stopping: threading.Event
) -> str | None:
    """Train one run in a process of its own and pass on its progress; returns what went wrong, if anything."""
    if stopping.is_set():
        return None
    threads = str(run.training.threads)
    environment = {**os.environ, JSON_PROGRESS: "1", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    verb = "finetune" if isinstance(run, FinetuneConfig) else "train"
    command = [sys.executable, "-P", "-m", "revprobe", verb, "-", "--out", str(folder)]
    began, tell = time.monotonic(), display.listen(run)
    display.say(f"{run.name}: started")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        # A session of its own: Ctrl-C reaches the sweep alone, which then stops its children in order.
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        children.add(child)
        _converse(child, dump_config(run), tell)
        code = child.wait()
        children.discard(child)
        errors.seek(0)
        said = errors.read().strip()
    display.done(run)
    for note in (line for line in said.splitlines() if line.startswith("note: ")):
        display.say(f"{run.name}: {note}")
    if code == 0:
        display.say(f"{run.name}: finished in {timedelta(seconds=round(time.monotonic() - began))}")
        return None
    problem = _problem(code, said)
    if not stopping.is_set():
        display.say(f"{run.name}: failed: {said if os.environ.get('REVPROBE_DEBUG') else problem}")
    return problem


def _converse(child: subprocess.Popen[str], config: str, tell: Listener) -> None:
    """Hand the child its config and read its progress until it ends."""
    assert child.stdin is not None and child.stdout is not None, "the child was started without pipes"
    try:
        child.stdin.write(config)
        child.stdin.close()
    except BrokenPipeError:
        pass  # it died at once; its exit code and stderr say why
    for line in child.stdout:
        try:
            news = json.loads(line)
            tell(news["step"], news["steps"], news["loss"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that some library printed


def _problem(code: int, said: str) -> str:
    """One line about a child that failed: its error line, how it ended, or the last it said."""
    errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if code < 0:
        return f"killed by signal {-code}; run the same command again to go on"
    return said.splitlines()[-1] if said else f"ended with code {code} and no message"
