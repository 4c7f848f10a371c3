"""What mkdocs does besides: it shows mkdocstrings the package, and links public names to the reference.

The repository root is the package `revprobe`, and its folder may have any name. The reader of sources behind
mkdocstrings names a package after its folder and walks all that lies in it, environments included, so it is given a
folder of links instead: `revprobe/` with the modules at the root and the subpackages that pyproject.toml lists.
"""

from __future__ import annotations

import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parents[1]
_ENTRY = re.compile(r"^::: revprobe\.([\w.]+)$", re.M)
# A code span that is nothing but a name, and is not the text of a link already.
_NAME = re.compile(r'(?<!">)<code>(\w+)</code>')
_views: list[tempfile.TemporaryDirectory[str]] = []
_homes: dict[str, str] = {}


def make_view(folder: Path, root: Path = ROOT) -> Path:
    """Fill `folder` with `revprobe/`, links to the package's files under `root`; returns `folder`."""
    packages = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    package = folder / "revprobe"
    package.mkdir()
    for path in sorted(root.glob("*.py*")):  # the stub too: it says where the public names are
        (package / path.name).symlink_to(path)
    for name in (name.removeprefix("revprobe.") for name in packages if name.count(".") == 1):
        (package / name).symlink_to(root / name)
    return folder


def reference_homes(docs: Path) -> dict[str, str]:
    """Where each documented name stands: the last part of its name -> page and anchor, from the site's root."""
    return {
        name.rpartition(".")[2]: f"reference/{page.stem}.html#revprobe.{name}"
        for page in sorted((docs / "reference").glob("*.md"))
        for name in _ENTRY.findall(page.read_text(encoding="utf-8"))
    }


@event_priority(100)  # before mkdocstrings reads its own settings
def on_config(config: Any) -> Any:
    view = tempfile.TemporaryDirectory(prefix="revprobe-docs-")
    _views.append(view)
    handlers = config.plugins["mkdocstrings"].config["handlers"]
    handlers["python"]["paths"] = [str(make_view(Path(view.name)))]
    _homes.update(reference_homes(Path(config.docs_dir)))
    return config


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    return _NAME.sub(
        lambda found: (
            f'<a href="{get_relative_url(_homes[found[1]], page.url)}">{found[0]}</a>'
            if found[1] in _homes
            else found[0]
        ),
        html,
    )


def on_shutdown() -> None:
    while _views:
        _views.pop().cleanup()
