"""The shape of the code: imports point one way by room, no circle, no file twice, no drawer, nothing too long."""

import ast
import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest

from tiny import ROOT, module_at

FOLDER, FILE, FUNCTION = 18, 400, 60  # at most: files in a folder, lines of a file, lines of a function
FAMILIES = "models/families"  # as many files as there are families
DRAWERS = {"utils.py", "helpers.py", "common.py", "misc.py"}


file_graph = module_at(ROOT / "docs" / "file_graph.py")  # reads the graph and draws the page


def misspelt(source: str, path: str) -> list[str]:
    """The imports of the package's file `path` that are not relative, a line for each."""
    tops = {room.split("/")[0].removesuffix(".py") for room in file_graph.ROOMS}
    found = []
    for line, target, relative in file_graph.imports(source, file_graph.package_of(path)):
        first = target.split(".")[0]
        if first in tops:
            found.append(f"{path}:{line}: {target} is a bare name; write `from ..{first} import`")
        elif first == "revprobe" and not relative:
            found.append(f"{path}:{line}: {target} is absolute; imports inside the package are relative")
    return found


def test_the_graph_is_that_of_the_package(package_files: dict[str, str]) -> None:
    """A walk that misses a folder would find it in order whatever it imports."""
    graph = file_graph.file_graph()
    assert set(graph) == set(package_files) - {"__init__.py"}
    rooms = {file_graph.room_of(path) for path in graph}
    unplaced = {room for room in rooms if room not in file_graph.ROOMS and room != "finetune"}  # only its __init__.py
    assert not unplaced, f"no place is stated for {unplaced}: give it one"
    assert sum(map(len, graph.values())) > 400, "hardly any import was seen"


def test_no_file_imports_itself_by_way_of_others() -> None:
    found = file_graph.circles(file_graph.file_graph())
    assert not found, f"circles: {found}"


def test_no_import_points_to_a_room_above() -> None:
    found = file_graph.upward(file_graph.file_graph())
    assert not found, "\n".join(found)


def test_imports_inside_the_package_are_relative(root: Path, package_files: dict[str, str]) -> None:
    found = [fault for path in package_files for fault in misspelt((root / path).read_text(), path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "planted", "words"),
    [
        ("hooks/gradients/new.py", "from ..attention import tap_attention", "hooks/attention.py"),
        ("hooks/new.py", "from ..models.bases.radd import RaddConfig", "models/bases/radd.py"),
        ("models/new.py", "from ..probes.pairs import query", "probes/pairs/query.py"),
        ("probes/statistics/new.py", "from ..readings.reading import Reading", "probes/readings/reading.py"),
        ("probes/figures/new.py", "from ..attention import attention_reading", "probes/attention.py"),
        ("probes/new.py", "from .. import relations", "relations/__init__.py"),
        ("probes/new.py", "from .. import train", "__init__.py"),
        ("probes/new.py", "from .. import __version__", "__init__.py"),
        ("probes/new.py", "def late():\n    from ..finetune.runs.open import open_run", "new.py:2 imports finetune"),
        ("probes/new.py", "import importlib\nimportlib.import_module('..relations.letters', __package__)", "new.py:2"),
        ("relations/new.py", "from ..finetune.config import one_layer", "finetune/config/one_layer.py"),
        ("finetune/training/new.py", "from ..runs.run import Run", "finetune/runs/run.py"),
        ("finetune/runs/new.py", "from ...report.html.page import page", "report/html/page.py"),
        ("report/summary/new.py", "from ..html import page", "report/html/page.py"),
        ("errors.py", "from .hooks import attention", "hooks/attention.py"),
        ("cli/new.py", "from ..__main__ import main", "__main__.py"),
    ],
)
def test_a_planted_import_against_the_direction_is_named(path: str, planted: str, words: str) -> None:
    """The checker itself: each of these must be seen, with its line, or the test above proves nothing."""
    found = file_graph.upward(file_graph.file_graph(changed={path: planted}))
    assert len(found) == 1, f"{planted!r} in {path} gave {found}"
    assert found[0].startswith(f"{path}:") and words in found[0], found[0]


@pytest.mark.parametrize(
    "planted",
    [
        {"hooks/a.py": "from .b import x", "hooks/b.py": "from .a import y"},
        {
            "hooks/a.py": "from . import b",
            "hooks/b.py": "def late():\n    from .c import z",
            "hooks/c.py": "from .a import y",
        },
        {"models/a.py": "if TYPE_CHECKING:\n    from .b import x", "models/b.py": "from .a import y"},
    ],
)
def test_a_planted_circle_is_named(planted: dict[str, str]) -> None:
    """Imports in functions and under TYPE_CHECKING tie files together as well: neither can be read alone."""
    assert file_graph.circles(file_graph.file_graph(changed=planted)) == [sorted(planted)]


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ("import revprobe.probes", "is absolute"),
        ("from revprobe import probe", "is absolute"),
        ("from probes.pairs import Query", "is a bare name"),
    ],
)
def test_a_planted_absolute_import_is_named(planted: str, words: str) -> None:
    found = misspelt(planted, "cli/main.py")
    assert len(found) == 1 and words in found[0], found


def test_imports_along_the_direction_are_left_alone() -> None:
    """A checker that refuses everything would pass the planted cases as well."""
    along = "import torch\nfrom .pairs.query import Query\nfrom ..errors import nearest\nfrom ..models import probed"
    changed = {"probes/new.py": along, "cli/new.py": "from ..report.html import page"}
    graph = file_graph.file_graph(changed=changed)
    assert not file_graph.upward(graph) and not file_graph.circles(graph)
    assert set(graph["probes/new.py"]) == {"probes/pairs/query.py", "errors.py", "models/probed.py"}


def test_the_drawing_of_the_rooms_is_that_of_the_code(root: Path) -> None:
    """`python docs/file_graph.py` draws it anew."""
    drawn = (root / "docs" / "architecture.svg").read_text()
    assert file_graph.drawing(file_graph.file_graph()) == drawn, "rooms have changed: run `python docs/file_graph.py`"
    other = file_graph.file_graph(changed={"hooks/new.py": "from ..errors import nearest"})
    assert file_graph.drawing(other) != drawn, "a new file does not show"


def test_every_room_is_described(root: Path) -> None:
    page = (root / "docs" / "architecture.md").read_text()
    missing = [room for room in file_graph.ROOMS if f"`{room.removesuffix('/')}" not in page and room != "__main__.py"]
    below_report = {room for room in file_graph.ROOMS if room.startswith("report/")}
    assert not set(missing) - below_report - {"hooks/gradients"}, missing


def test_an_arrow_that_others_imply_is_left_out() -> None:
    planted = {"relations/new.py": "from ..errors import nearest\nfrom ..probes.decoding import decode"}
    before, after = (file_graph.arrows(file_graph.file_graph(changed=change)) for change in (None, planted))
    assert after["relations", "probes/decoding"] == before["relations", "probes/decoding"] + 1
    assert ("relations", "errors.py") not in after


def functions(source: str) -> list[tuple[str, int]]:
    """Every function of a source text with its length in lines, docstring included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in found]


def test_nothing_is_too_long_to_read(root: Path, package_files: dict[str, str]) -> None:
    folders = Counter(path.rpartition("/")[0] for path in package_files if not path.endswith("__init__.py"))
    crowded = {folder: count for folder, count in folders.items() if count > FOLDER and folder != FAMILIES}
    assert not crowded, f"more than {FOLDER} files: {crowded}; make a room of its own for what belongs together"
    sources = {path: (root / path).read_text() for path in package_files}
    long = {path: lines for path, source in sources.items() if (lines := source.count("\n")) > FILE}
    assert not long, f"files of more than {FILE} lines: {long}"
    wide = [(path, *one) for path, source in sources.items() for one in functions(source) if one[1] > FUNCTION]
    assert not wide, f"functions of more than {FUNCTION} lines: {wide}"


def test_the_length_of_a_function_is_told() -> None:
    source = "def short():\n    pass\n\nclass A:\n    async def long(self):\n" + "        x = 1\n" * 61
    assert functions(source) == [("short", 2), ("long", 62)]


def test_tests_and_examples_import_the_package_by_its_name(root: Path) -> None:
    """`import models` works when the checkout is on sys.path, and makes a second copy of every class in it."""
    tops = {room.split("/")[0].removesuffix(".py") for room in file_graph.ROOMS} - {"__main__"}
    files = [*root.glob("tests/**/*.py"), *root.glob("examples/**/*.py")]
    found = [
        f"{path.relative_to(root)}:{line}: {target}"
        for path in files
        for line, target, relative in file_graph.imports(path.read_text(), path.parent.name)
        if relative or target.split(".")[0] in tops
    ]
    assert not found, "write `from revprobe. ... import` in:\n" + "\n".join(found)


def test_each_file_is_one_module_object(root: Path, package_files: dict[str, str]) -> None:
    """A file imported as `models.radd` too has two classes RaddConfig, and isinstance fails between them."""
    for name in package_files.values():
        importlib.import_module(name)
    names_of: dict[Path, set[str]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")
        if file:
            names_of.setdefault(Path(file).resolve(), set()).add(name)
    wrong = [names for path, name in package_files.items() if (names := names_of.get(root / path)) != {name}]
    assert not wrong, f"each of these sets is the names of one file: {wrong}"


def test_no_file_is_a_drawer(package_files: dict[str, str]) -> None:
    """A file is named after its idea; these four names say that it has none."""
    found = [path for path in package_files if path.split("/")[-1] in DRAWERS]
    assert not found, f"name these after what they hold: {found}"
