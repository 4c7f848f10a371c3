"""The shape of the code: imports point one way, no file is imported twice, no file is a drawer for odds and ends."""

import ast
import importlib
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import revprobe

# Who may import whom; each may import itself. A new folder or root file needs a line here.
BELOW = {
    "errors": set(),
    "atomic_files": set(),
    "hooks": {"errors"},
    "models": {"errors", "hooks"},
    "probes": {"errors", "atomic_files", "hooks", "models"},
    # The last name of these two goes when the circles are opened.
    "relations": {"errors", "atomic_files", "hooks", "models", "probes", "finetune"},
    "finetune": {"errors", "atomic_files", "hooks", "models", "probes", "relations", "report"},
    "report": {"errors", "atomic_files", "hooks", "models", "probes", "relations", "finetune"},
    "cli": {"errors", "hooks", "models", "probes", "relations", "finetune", "report"},
    "__main__": {"cli"},
}


def imports(source: str, package: str) -> Iterator[tuple[int, str, bool]]:
    """Each import of a source text as (line, absolute dotted target, written relatively).

    Imports inside functions, under TYPE_CHECKING and through `import_module("...")` count like any other.
    """
    for node in ast.walk(ast.parse(source)):
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


def layer_of(target: str) -> str:
    """The layer a target `revprobe.x...` lies in; a name the root exports lies where its module does."""
    name = target.removeprefix("revprobe").lstrip(".").split(".")[0]
    return revprobe._EXPORTS.get(name, name).lstrip(".").split(".")[0]


def faults(source: str, path: str) -> list[str]:
    """What is wrong with the imports of the package's file `path`, a line for each."""
    found = []
    layer = path.split("/")[0].removesuffix(".py")
    package = ".".join(["revprobe", *path.split("/")[:-1]])
    for line, target, relative in imports(source, package):
        first, reached = target.split(".")[0], layer_of(target)
        if first in BELOW:
            found.append(f"{path}:{line}: {target} is a bare name; write `from ..{first} import`")
        elif first == "revprobe" and not relative:
            found.append(f"{path}:{line}: {target} is absolute; imports inside the package are relative")
        elif first == "revprobe" and reached not in {layer, *BELOW[layer], "__version__"}:
            found.append(f"{path}:{line}: {layer} imports {target}; it may import {sorted(BELOW[layer])}")
    return found


def test_imports_point_one_way(root: Path, package_files: dict[str, str]) -> None:
    """errors <- hooks <- models <- probes <- relations <- finetune <- report <- cli, and no arrow back."""
    paths = [path for path in package_files if path != "__init__.py"]
    unplaced = [path for path in paths if path.split("/")[0].removesuffix(".py") not in BELOW]
    assert not unplaced, f"no layer is stated for {unplaced}: give each a line in BELOW"
    found = [fault for path in paths for fault in faults((root / path).read_text(), path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "planted", "words"),
    [
        ("hooks/attention.py", "from ..models.radd import RaddConfig", "hooks imports revprobe.models.radd"),
        ("models/registry.py", "from ..probes import pairs", "models imports revprobe.probes"),
        ("probes/fused.py", "from .. import finetune", "probes imports revprobe.finetune"),
        ("probes/fused.py", "from .. import train", "probes imports revprobe.train"),
        ("probes/fused.py", "def late():\n    from ..finetune.runs import train", "fused.py:2: probes imports"),
        ("probes/fused.py", "import importlib\nimportlib.import_module('..finetune', __package__)", "fused.py:2"),
        ("finetune/runs/run.py", "from ..cli import main", "finetune imports revprobe.cli.main"),
        ("finetune/deep/runs.py", "from ...cli import main", "finetune imports revprobe.cli.main"),
        ("errors.py", "from .hooks import attention", "errors imports revprobe.hooks"),
        ("cli/main.py", "from ..__main__ import main", "cli imports revprobe.__main__"),
        ("cli/main.py", "import revprobe.probes", "is absolute"),
        ("cli/main.py", "from revprobe import probe", "is absolute"),
        ("cli/main.py", "from probes.pairs.pairs import Query", "is a bare name"),
    ],
)
def test_a_planted_import_against_the_direction_is_named(path: str, planted: str, words: str) -> None:
    """The checker itself: each of these must be seen, with its line, or the test above proves nothing."""
    found = faults(planted, path)
    assert len(found) == 1, f"{planted!r} in {path} gave {found}"
    assert words in found[0], found[0]


def test_imports_along_the_direction_are_left_alone() -> None:
    """A checker that refuses everything would pass the planted cases as well."""
    source = "import torch\nfrom .pairs import Query\nfrom ..errors import nearest\nfrom .. import __version__, models"
    assert faults(source, "probes/fused.py") == []
    assert faults("from .cli import main", "__main__.py") == []


def test_the_root_imports_radd_and_nothing_else_of_the_package(root: Path) -> None:
    """Everything else the root exports is a string until it is used; TYPE_CHECKING and function bodies do not run."""
    body = ast.parse((root / "__init__.py").read_text()).body
    runs = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    targets = [target for _, target, relative in imports(ast.unparse(ast.Module(runs, [])), "revprobe") if relative]
    assert {target.rpartition(".")[0] for target in targets} == {"revprobe.models.radd"}, targets


def test_tests_and_examples_import_the_package_by_its_name(root: Path) -> None:
    """`import models` works when the checkout is on sys.path, and makes a second copy of every class in it."""
    files = [*root.glob("tests/**/*.py"), *root.glob("examples/**/*.py")]
    found = [
        f"{path.relative_to(root)}:{line}: {target}"
        for path in files
        for line, target, relative in imports(path.read_text(), path.parent.name)
        if relative or target.split(".")[0] in BELOW
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
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py"}
    found = [path for path in package_files if path.split("/")[-1] in drawers]
    assert not found, f"name these after what they hold: {found}"
