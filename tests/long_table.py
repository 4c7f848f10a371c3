"""The table of the long tests, from the XML that pytest writes: `python tests/long_table.py RESULTS.xml LONG.md`."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

HEAD = """# Long tests

What `make test` leaves out, as `make test-long` found it last: {found}, {cores} cores, Python {python}, torch {torch},
transformers {transformers}. Seconds are of this run, side by side with others.

| test | seconds | outcome |
|---|---:|---|
"""
_BAD = ("failure", "error", "skipped")


def long_table(results: Path) -> str:
    """The table as Markdown. The XML is pytest's own, of this machine."""
    cases = list(ElementTree.parse(results).iter("testcase"))
    rows, bad = [], 0
    for case in sorted(cases, key=lambda one: -float(one.get("time", "0"))):
        outcome = next((kind for kind in _BAD if case.find(kind) is not None), "passed")
        bad += outcome in ("failure", "error")
        path = str(case.get("classname")).replace(".", "/")
        rows.append(f"| `{path}.py::{case.get('name')}` | {float(case.get('time', '0')):.0f} | {outcome} |\n")
    found = f"{len(cases)} tests, {bad} failed"
    versions = {name: version(name) for name in ("torch", "transformers")}
    return HEAD.format(found=found, cores=os.cpu_count(), python=platform.python_version(), **versions) + "".join(rows)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(long_table(source), encoding="utf-8")
