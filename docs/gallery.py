"""Run the code of docs/gallery.md, and take a picture of each figure that a block there ends with.

    python docs/gallery.py
    python docs/gallery.py --home runs --only signatures stored

A few minutes on two cores; needs Chromium. The run is trained anew, or read from `--home`; the page is left as it is.
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "gallery.md"
WIDTH, HEIGHT = 900, 450  # of figures that take the page's width
_BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n!\[[^\]]*\]\((\S+)\))?", re.M | re.S)
_RUN = '"runs/small"'


def shown(page: str) -> list[tuple[str, str | None]]:
    """Each block of code of the page, with the picture that stands below it."""
    return [(code, picture or None) for code, picture in _BLOCK.findall(page)]


def figures(page: str, run: Path) -> Iterator[tuple[str, Any]]:
    """Run the page's code on a run; gives each picture's path in docs/ with the figure that its block ends with."""
    names: dict[str, Any] = {}
    for code, picture in shown(page):
        lines = ast.parse(code.replace(_RUN, repr(str(run))))
        last = lines.body.pop() if picture else None
        exec(compile(lines, PAGE.name, "exec"), names)
        if picture:
            assert isinstance(last, ast.Expr), f"the block above {picture} ends with no figure"
            yield picture, eval(compile(ast.Expression(last.value), PAGE.name, "eval"), names)


def small_run(home: Path, steps: int = 600) -> Path:
    """The folder of the run that all figures are of; one that lies there already is not trained again."""
    import revprobe as rp
    from revprobe.finetune.config.one_layer import RunConfig

    training = {"steps": steps, "batch_size": 64, "warmup_steps": 50, "learning_rate": 3e-3, "device": "cpu"}
    config = {"name": "small", "relation": {"length": 5}, "training": training, "snapshots": {"count": 5}}
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2}
    return rp.train(RunConfig(**config, model=sizes), home / "small").path


def save_picture(figure: Any, picture: Path) -> None:
    """A figure as PNG, as a browser shows it."""
    browse = runpy.run_path(str(DOCS.parent / "examples" / "screenshots.py"))["browse"]
    width, height = figure.layout.width or WIDTH, figure.layout.height or HEIGHT
    figure.update_layout(width=width, height=height, autosize=False)
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "figure.html"
        html = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
        there.write_text(html.replace("<body>", '<body style="margin: 0">'), encoding="utf-8")
        browse(there, f"--screenshot={picture}", f"--window-size={width},{height}")


def main() -> None:
    """Train, run, save."""
    parser = argparse.ArgumentParser(description="Take the pictures of docs/gallery.md.")
    parser.add_argument("--home", type=Path, help="a folder that keeps the run, so that it is trained once")
    parser.add_argument("--only", nargs="+", help="names of pictures; the others are left as they are")
    asked = parser.parse_args()
    (DOCS / "gallery").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        run = small_run(asked.home or Path(scratch))
        for picture, figure in figures(PAGE.read_text(encoding="utf-8"), run):
            if not asked.only or Path(picture).stem in asked.only:
                save_picture(figure, DOCS / picture)
                print(picture, file=sys.stderr)


if __name__ == "__main__":
    main()
