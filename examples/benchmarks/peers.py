"""Gradient products and attention readouts of revprobe beside those of other libraries, each in its own environment.

python examples/benchmarks/peers.py                                  # all that the README's tables have
python examples/benchmarks/peers.py --tasks pairs-30M readout-512    # some of it
python examples/benchmarks/peers.py --prepare                        # only environments, inputs and float64 answers
python examples/benchmarks/peers.py --tables                         # writes what has been measured into README.md

A task is one table: `pairs` and `gram` are products of 64 queries' gradients, within pairs or all with all, `readout`
is one attention weight of every head at so many tokens. Environments are made by `peer_environments.py` where they are
not there. Inputs and their float64 answers are one file a task, made once. Ours is measured again in every process,
beside the peer: times are compared within a process only. Memory is the kernel's, of a new process for each way.

Rows are added to --out as they are measured, and what is there is not measured again; what was not run, is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import show
from peer_environments import PEERS, CannotInstall, environment_of
from peer_inputs import SIZES, write_inputs
from peer_rows import LARGE
from peer_tables import finished, read_rows, replace_tables

Row = dict[str, Any]
HERE = Path(__file__).resolve().parent
SHOWN = ("way", "times", "seconds", "peak MB", "parameters", "products", "largest error")
TASKS = (
    *("pairs-30M", "readout-128", "readout-512", "readout-1024", "readout-2048"),
    *("pairs-110M", "gram-30M", "readout-4096", "gram-110M"),
)


@dataclass(frozen=True)
class Task:
    """One table: its name says what is asked and how large it is."""

    name: str
    queries: int
    tokens: int

    @property
    def kind(self) -> str:
        return self.name.split("-")[0]

    @property
    def peers(self) -> tuple[str, ...]:
        """Who has a way to it: Opacus gives norms of single gradients, which a Gram matrix is not made of."""
        return {"pairs": ("plain", "opacus", "bergson"), "gram": ("plain", "bergson"), "readout": ("plain", "nnsight")}[
            self.kind
        ]

    def inputs(self, folder: Path) -> Path:
        """The file of weights, queries and answers; made where it is not there."""
        path = folder / f"{self.name}-{self.queries}x{self.tokens}.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            size = self.name.split("-")[1]
            if self.kind == "readout":
                told: Row = {"queries": 0, "kind": "pairs", "lengths": [self.tokens], "batch": self.queries}
                size = "30M" if size != "tiny" else size
            else:
                told = {"queries": self.queries, "kind": self.kind, "lengths": [], "batch": 1}
            begun = path.with_suffix(".begun")
            write_inputs(begun, size, tokens=self.tokens, **told)
            begun.replace(path)
        return path

    @classmethod
    def of(cls, name: str, queries: int, tokens: int) -> Task:
        kind, size = name.split("-")
        return cls(name, 1, int(size)) if kind == "readout" else cls(name, queries, tokens)

    @property
    def tiny(self) -> Task:
        """The same question, small: what loads at the first call is loaded with it."""
        return Task(f"{self.kind}-tiny", *((1, 16) if self.kind == "readout" else (4, 8)))


def measured(task: Task, peer: str, asked: argparse.Namespace) -> Iterator[Row]:
    """The rows of one peer that are not there yet: times of all its ways together, then each way's memory."""
    there = {
        row["way"]: row for row in finished(read_rows(asked.out)) if (row["task"], row["peer"]) == (task.name, peer)
    }
    try:
        python = environment_of(peer, asked.folder) if peer in PEERS else Path(sys.executable)
    except CannotInstall as error:
        yield {"way": "all", "not run": str(error)}
        return
    inputs, warm = (one.inputs(asked.folder / "inputs") for one in (task, task.tiny))
    call = [str(python), "-P", str(HERE / "peer_rows.py"), str(inputs), peer, "--threads", str(asked.threads)]
    if not any("seconds" in row for row in there.values()):
        rows = _answers([*call, "--rounds", str(asked.rounds)], "all", peer)
        there |= {row["way"]: row for row in rows}
        yield from rows
    for way, row in there.items():
        if "seconds" in row and "peak MB" not in row:
            yield from _answers([*call, "--peak", way, "--warm", str(warm)], way, peer)


def environment_of_a_process(*, peak: bool) -> dict[str, str]:
    """Variables of a peer's process; one whose memory is measured gives back at once what it frees."""
    own = {"HF_HUB_OFFLINE": "1", "BNB_SKIP_CPU_KERNELS": "1"}
    own["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        **own,
        **({"MALLOC_MMAP_THRESHOLD_": str(LARGE), "MALLOC_TRIM_THRESHOLD_": str(LARGE)} if peak else {}),
    }


def _answers(call: list[str], way: str, peer: str) -> list[Row]:
    """The lines of JSON that a process prints, or one row that says why there are none."""
    environment = environment_of_a_process(peak="--peak" in call)
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        last = said[-1] if said else f"its process ended with {done.returncode}"
        return [{"way": way, "not run": f"{PEERS[peer][0] if peer in PEERS else peer}: {last}"}]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"way"')]


def main() -> None:
    """Measure what is not there yet, a line a row, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--peers", nargs="+", choices=["plain", *PEERS], default=["plain", *PEERS])
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of a query whose gradient is taken")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".peers"), help="of the environments and inputs")
    parser.add_argument("--out", type=Path, default=HERE / "peers.jsonl")
    parser.add_argument("--prepare", action="store_true", help="make environments and inputs, measure nothing")
    parser.add_argument("--tables", action="store_true", help="write what is in --out into README.md, measure nothing")
    asked = parser.parse_args()
    if asked.tables:
        replace_tables(HERE / "README.md", read_rows(asked.out))
        return
    for name in asked.tasks:
        if not re.fullmatch(rf"(pairs|gram)-({'|'.join(SIZES)})|readout-\d+", name):
            parser.error(f"no task {name!r}: expected one of {', '.join(TASKS)}")
    for task in (Task.of(name, asked.queries, asked.tokens) for name in asked.tasks):
        able = [peer for peer in task.peers if peer in asked.peers]
        if asked.prepare:
            print(task.inputs(asked.folder / "inputs"), *(f"{p}: {_prepared(p, asked.folder)}" for p in able), sep="\n")
            continue
        for peer in able:
            for row in measured(task, peer, asked):
                with asked.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"task": task.name, "peer": peer, **row}) + "\n")
        rows = [row for row in finished(read_rows(asked.out)) if row["task"] == task.name]
        if rows:
            show(task.name, [{"peer": row["peer"]} | {key: row.get(key, "") for key in SHOWN} for row in rows])


def _prepared(peer: str, folder: Path) -> str:
    try:
        return str(environment_of(peer, folder) if peer in PEERS else sys.executable)
    except CannotInstall as error:
        return f"not run, {error}"


if __name__ == "__main__":
    main()
