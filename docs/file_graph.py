"""Which file of the package imports which, read from the code; and the drawing of the rooms made from it.

    python docs/file_graph.py      draws docs/architecture.svg, which docs/architecture.md shows

`tests/test_layers.py` holds the graph against ROOMS, and the drawing against the graph.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRAWING = ROOT / "docs" / "architecture.svg"
HEAD, STEP = 12, 28  # pixels above the first room, and from room to room
TINTS = {
    "errors": "#eeeeee",
    "arguments": "#eeeeee",
    "atomic_files": "#eeeeee",
    "progress": "#eeeeee",
    "engines": "#f2ecd9",
    "hooks": "#dbe9f6",
    "models": "#d9f0e3",
    "probes": "#fdf0d5",
}
TINTS |= {"relations": "#f6dfe4", "finetune": "#e6e0f3", "report": "#dff1f1", "cli": "#eeeeee", "__main__": "#eeeeee"}
BESIDE_THE_PACKAGE = {"tests", "examples", "docs", "runs", "build", "dist", "site"}
# From the ground up: a file imports from its own room and from those before it. A new folder needs a place here.
ROOMS = (
    "errors.py",
    "arguments.py",
    "atomic_files.py",
    "progress.py",
    "engines",
    "hooks/gradients",
    "hooks",
    "models/contract",
    "models/bases",
    "models/canvas",
    "models/families",
    "models",
    "probes/pairs",
    "probes/statistics",
    "probes/passes",
    "probes/figures",
    "probes/readings",
    "probes/theory",
    "probes/decoding",
    "probes",
    "probes/deep",
    "relations",
    "relations/invented",
    "finetune/config",
    "finetune/training",
    "finetune/pretraining",
    "finetune/runs",
    "finetune/memory",
    "finetune/analysis",
    "report/summary",
    "report/paper",
    "report/paper/section6",
    "report/html",
    "report/asking",
    "report/dashboard",
    "report",
    "report/bundle",
    "cli",
    "__main__.py",
)

Graph = dict[str, dict[str, int]]  # file -> imported file -> the line that does it


def package_paths(root: Path) -> list[str]:
    """The package's Python files but the root's `__init__.py`, by their path from the root."""
    # Not into the environment beside it, which holds a hundred times as many.
    tops = [top for top in root.iterdir() if top.name not in BESIDE_THE_PACKAGE and not top.name.startswith(".")]
    found = [path for top in tops for path in (top.rglob("*.py") if top.is_dir() else [top]) if path.suffix == ".py"]
    return sorted(path.relative_to(root).as_posix() for path in found if path != root / "__init__.py")


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


def arrows(graph: Graph) -> Counter[tuple[str, str]]:
    """How many imports lead from one room to another, without the pairs that others imply (a -> b -> c)."""
    counts = Counter(
        (room_of(path), room_of(file)) for path in graph for file in graph[path] if room_of(path) != room_of(file)
    )
    below = {room: {b for a, b in counts if a == room} for room in ROOMS}
    reach: dict[str, set[str]] = {}
    for room in ROOMS:  # from the ground up, so that what is below is complete
        reach[room] = below[room].union(*(reach[low] for low in below[room]))
    implied = {(a, c) for a, low in below.items() for b in low for c in reach[b]}
    return Counter({pair: count for pair, count in counts.items() if pair not in implied})


def drawing(graph: Graph) -> str:
    """The rooms as an SVG, ground at the bottom: an arc for the imports between two rooms, thicker for more of them."""
    counts = Counter(room_of(path) for path in graph if not path.endswith("__init__.py"))
    y = {room: HEAD + STEP * place for place, room in enumerate(reversed(ROOMS))}
    width, height = 460, HEAD + STEP * len(ROOMS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto" '
        'markerUnits="userSpaceOnUse"><path d="M0 0 8 4 0 8z" fill="#5b7fa6"/></marker></defs>',
    ]
    for room in ROOMS:
        indent = 24 * room.count("/")
        fill = TINTS[room.split("/")[0].removesuffix(".py")]
        files = "" if room.endswith(".py") else f"{counts[room]} file{'s' * (counts[room] != 1)}"
        parts += [
            f'<rect x="{10 + indent}" y="{y[room]}" width="{250 - indent}" height="{STEP - 6}" rx="4" fill="{fill}"/>',
            f'<text x="{20 + indent}" y="{y[room] + 16}">{room}</text>',
            f'<text x="250" y="{y[room] + 16}" text-anchor="end" fill="#555555">{files}</text>',
        ]
    for (above, low), count in sorted(arrows(graph).items(), key=lambda pair: (y[pair[0][0]], y[pair[0][1]])):
        start, end = y[above] + 15, y[low] + 9
        reach = 262 + 0.62 * (end - start)
        parts += [
            f'<path d="M262 {start} C{reach:.0f} {start} {reach:.0f} {end} 264 {end}" fill="none" stroke="#5b7fa6" '
            f'stroke-width="{1 + min(count, 16) / 8:.1f}" opacity="0.75" marker-end="url(#tip)">'
            f"<title>{above} imports {low}: {count}</title></path>"
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    DRAWING.write_text(drawing(file_graph()), encoding="utf-8")
