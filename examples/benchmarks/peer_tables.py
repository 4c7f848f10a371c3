"""The rows of `peers.py` as the README's tables."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GRADIENTS = ("way", "of a training step", "seconds", "peak MB", "parameters", "products", "largest error")
OURS = "revprobe"
BEGIN, END = "<!-- tables of peers.py -->", "<!-- end of the tables of peers.py -->"
READOUTS = ("way", "of a forward", "seconds", "peak MB", "largest error")


def read_rows(path: Path) -> list[Row]:
    """The lines of the file; none where it is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def finished(rows: list[Row]) -> list[Row]:
    """One row for each way: its times and its memory together, and the last word where it was not run.

    A way that was run after all is no longer "not run", nor is a peer any of whose ways was.
    """
    joined: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        one = joined.setdefault((row["task"], row["peer"], row["way"]), {})
        if "not run" not in row:
            one.pop("not run", None)
        one |= row
    ran = {(task, peer) for (task, peer, way) in joined if way != "all"}
    return [row for (task, peer, way), row in joined.items() if way != "all" or (task, peer) not in ran]


def tables(rows: list[Row]) -> str:
    """Markdown: a table for each task, and within it the rows of one process after another."""
    made = []
    for task, held in groupby(finished(rows), lambda row: str(row["task"])):
        of = list(held)
        columns = READOUTS if task.startswith("readout") else GRADIENTS
        lines = [f"| process | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {row['peer']} | {' | '.join(cells(row, columns))} |" for row in of]
        made.append(f"`{task}`\n\n" + "\n".join(lines) + "\n\n" + verdict(of))
    return "\n\n".join(made) or "Not measured yet."


def verdict(rows: list[Row]) -> str:
    """In each process, who is fastest and who takes least memory of what covers everything; behind whom ours is."""
    said = []
    for peer, of in groupby(rows, lambda row: str(row["peer"])):
        whole = [row for row in of if "largest error" in row and covers_all(row)]
        ours = [row for row in whole if row["way"].startswith(OURS)]
        if len(ours) == len(whole):
            said.append(f"beside {peer}, nothing else covers everything")
            continue
        parts = []
        for word, key in (("fastest", "times"), ("least memory", "peak MB")):
            able = [row for row in whole if key in row]
            best = min(able, key=lambda row: float(row[key]), default=None)
            mine = min((float(row[key]) for row in ours if key in row), default=None)
            if best is not None and mine is not None:
                behind = "" if best in ours else f" (ours {mine / max(float(best[key]), 1e-9):.3g} times that)"
                parts.append(f"{word}: {best['way']}{behind}")
        said.append(f"beside {peer}, {', '.join(parts) or 'nothing yet'}")
    return f"Of what covers everything: {'; '.join(said)}."


def covers_all(row: Row) -> bool:
    """All parameters and products, or all heads."""
    given, _, asked = str(row.get("products", "1 of 1")).partition(" of ")
    return bool(row.get("parameters", 1.0) == row.get("heads", 1.0) == 1.0 and given == asked)


def with_tables(readme: str, rows: list[Row]) -> str:
    """The page with its block of tables made anew."""
    before, rest = readme.split(BEGIN)
    return "\n\n".join(filter(None, [before + BEGIN, tables(rows), END + rest.split(END)[1]]))


def replace_tables(page: Path, rows: list[Row]) -> None:
    """Write the tables into the page."""
    page.write_text(with_tables(page.read_text(encoding="utf-8"), rows), encoding="utf-8")


def cells(row: Row, columns: tuple[str, ...]) -> list[str]:
    """One row's cells: three digits of what was measured, a dash for what does not apply."""
    if "seconds" not in row:
        said = row["not run"].removeprefix("not run: ").replace("|", "\\|")
        return [row["way"], f"not run: {said}", *["-"] * (len(columns) - 2)]
    measured = {
        "way": row["way"],
        columns[1]: f"{row['times']:.3g}",
        "seconds": f"{row['seconds']:.3g} ({row['low']:.3g} to {row['high']:.3g})",
        "peak MB": f"{row['peak MB']:,.0f}" if "peak MB" in row else f"not run: {row.get('not run', 'yet')}",
        "parameters": f"{100 * row['parameters']:.3g} %" if "parameters" in row else "-",
        "products": row.get("products", "-"),
        "largest error": f"{row['largest error']:.1e}" if "largest error" in row else "-",
    }
    return [measured[column] for column in columns]
