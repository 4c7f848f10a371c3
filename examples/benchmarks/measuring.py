"""What the benchmark scripts share: interleaved medians, peak extra bytes, the machine's name, one JSON line.

Numbers are compared within one process only: every candidate is run in turn, round after round, and the median of
its rounds is reported as a ratio to another candidate of the same run.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

Candidate = Callable[[], Any]


def medians(candidates: Mapping[str, Candidate], *, rounds: int = 5) -> dict[str, float]:
    """Seconds of each candidate, the median over rounds in which each ran once; one round of warm-up before."""
    return {name: statistics.median(values) for name, values in seconds(candidates, rounds=rounds).items()}


def seconds(candidates: Mapping[str, Candidate], *, rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, in which each runs once; one round of warm-up before."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def peak_extra_bytes(run: Candidate) -> int:
    """The most bytes of tensors alive at once during `run`, beyond those before it, from the allocator's own events."""
    if torch.cuda.is_available():
        _synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def forget_peak() -> int:
    """Set the kernel's peak back to what is resident now, which is returned, in bytes. Linux alone."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_resident()


def peak_resident() -> int:
    """The most bytes of this process that were resident at once, for the kernel (VmHWM), since `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def machine() -> str:
    """Processor, threads and torch of this process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def show(title: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print the rows as a table and the same as one JSON line."""
    table = Table(title=f"{title} ({machine()})", title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=160).print(table)
    plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # JSON has no NaN
    print(json.dumps({"benchmark": title, "machine": machine(), **facts, "rows": plain}))


def megabytes(size: int) -> float:
    """Bytes as MB (10^6)."""
    return round(size / 1e6, 2)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
