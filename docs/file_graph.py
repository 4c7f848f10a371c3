"""Which file of the package imports which, read from the code; and the drawing of the rooms made from it.

    python docs/file_graph.py      writes the drawing into docs/architecture.md

`tests/test_layers.py` holds the graph against ROOMS, and the page against the graph.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BESIDE_THE_PACKAGE = {"tests", "examples", "docs", "runs", "build", "dist", "site"}
# From the ground up: a file imports from its own room and from those before it. A new folder needs a place here.
ROOMS = (
    "errors.py",
    "atomic_files.py",
    "hooks/gradients",
    "hooks",
    "models",
    "probes/pairs",
    "probes/statistics",
    "probes/passes",
    "probes/figures",
    "probes/readings",
    "probes/theory",
    "probes/decoding",
    "probes",
    "relations",
    "finetune/config",
    "finetune/training",
    "finetune/runs",
    "finetune/memory",
    "finetune/analysis",
    "report/summary",
    "report/paper",
    "report/html",
    "report/dashboard",
    "report",
    "cli",
    "__main__.py",
)

Graph = dict[str, dict[str, int]]  # file -> imported file -> the line that does it


def package_paths(root: Path) -> list[str]:
    """The package's Python files but the root's `__init__.py`, by their path from the root."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    inside = (p for p in found if p.parts[0] not in BESIDE_THE_PACKAGE and not any(d.startswith(".") for d in p.parts))
    return sorted(path.as_posix() for path in inside if path.as_posix() != "__init__.py")


@lru_cache(maxsize=1024)
def imports(source: str, package: str) -> tuple[tuple[int, str, bool], ...]:
    """Each import of a source text as (line, absolute dotted target, written relatively).

    Imports inside functions, under TYPE_CHECKING and through `import_module("...")` count like any other.
    """
    return tuple(_imports(ast.parse(source), package))


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str, bool]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{base}.{alias.name}", node.level > 0) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                name = node.args[0].value
                yield node.lineno, resolve_name(name, package), name.startswith(".")


def package_of(path: str) -> str:
    """The dotted package a file's relative imports start from."""
    return ".".join(["revprobe", *path.split("/")[:-1]])


def file_of(target: str, paths: set[str]) -> str | None:
    """The package's file that `revprobe.a.b.name` comes from; the root's own names come from `__init__.py`."""
    parts = target.split(".")[1:]
    while parts:
        for file in ("/".join(parts) + ".py", "/".join(parts) + "/__init__.py"):
            if file in paths:
                return file
        parts.pop()
    return "__init__.py"


def file_graph(root: Path = ROOT, changed: dict[str, str] | None = None) -> Graph:
    """The package's files and what each imports of it. `changed`: sources that stand in for files, or are added."""
    sources = {path: (root / path).read_text(encoding="utf-8") for path in package_paths(root)} | (changed or {})
    graph: Graph = {}
    for path, source in sources.items():
        graph[path] = {}
        for line, target, _ in imports(source, package_of(path)):
            file = file_of(target, set(sources)) if target.split(".")[0] == "revprobe" else None
            if file is not None and file != path:
                graph[path].setdefault(file, line)
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Sets of files that import each other, directly or by way of others."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for file in graph.get(waiting.pop(), {}):
                if file not in seen:
                    seen.add(file)
                    waiting.append(file)
        reach[start] = seen
    found = {tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in graph if a in reach[a]}
    return [list(circle) for circle in sorted(found)]


def room_of(file: str) -> str:
    """The folder of a file; files at the root are rooms of their own."""
    return file.rpartition("/")[0] or file


def upward(graph: Graph) -> list[str]:
    """The imports that lead to a room further up, a line for each."""
    found = []
    for path, imported in graph.items():
        for file, line in imported.items():
            if file == "__init__.py" or ROOMS.index(room_of(file)) > ROOMS.index(room_of(path)):
                found.append(f"{path}:{line} imports {file}, which stands above it")
    return found


def drawing(graph: Graph) -> str:
    """The rooms as a Mermaid flowchart: an arrow for the imports between two rooms, with their number.

    An arrow that others already imply (a -> b -> c) is left out, so that the order can be seen.
    """
    arrows: Counter[tuple[str, str]] = Counter()
    for path, imported in graph.items():
        for file in imported:
            if room_of(file) != room_of(path):
                arrows[room_of(path), room_of(file)] += 1
    rooms = [room for room in ROOMS if any(room in arrow for arrow in arrows)]
    below = {room: {b for a, b in arrows if a == room} for room in rooms}
    reach = {room: set(below[room]) for room in rooms}
    for room in rooms:  # from the ground up, so that what is below is complete
        reach[room] |= {deep for low in below[room] for deep in reach[low]}
    name = lambda room: re.sub(r"\W", "_", room.removesuffix(".py")).strip("_")  # noqa: E731
    counts = Counter(room_of(path) for path in graph if not path.endswith("__init__.py"))
    size = lambda room: "" if room.endswith(".py") else f"<br/>{counts[room]} files"  # noqa: E731
    lines = ["flowchart BT", *(f'    {name(room)}["{room}{size(room)}"]' for room in rooms)]
    for room in reversed(rooms):
        direct = [b for b in below[room] if not any(b in reach[other] for other in below[room] - {b})]
        lines += [f"    {name(room)} -->|{arrows[room, b]}| {name(b)}" for b in sorted(direct, key=ROOMS.index)]
    return "\n".join(lines) + "\n"


def page_with(page: str, drawn: str) -> str:
    """The page with the drawing in its Mermaid block. Raises: ValueError, when it has none."""
    block = re.compile(r"(```mermaid\n).*?(```)", re.S)
    if not block.search(page):
        raise ValueError(f"{PAGE} has no mermaid block to draw in; put one there")
    return block.sub(lambda found: found[1] + drawn + found[2], page, count=1)


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), drawing(file_graph())), encoding="utf-8")
