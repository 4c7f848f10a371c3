"""Run a notebook from top to bottom in a clean kernel and store its outputs in it, free of times and paths.

    python examples/run_notebook.py examples/attach_any_model.ipynb

With kaleido and Chromium there, figures get a picture beside their data (`pip install kaleido`).
Needs the `notebooks` extra: `pip install -e '.[notebooks]'`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode


def executed(notebook: Path, folder: Path, *, timeout: int = 300) -> NotebookNode:
    """The notebook with fresh outputs, its kernel started in `folder`; the file stays as it is.

    Raises: nbclient.exceptions.CellExecutionError, for the first cell that fails; it shows the cell and the traceback.
    """
    loaded = nbformat.read(notebook, as_version=4)
    for cell in loaded.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    settings = {"kernel_name": "python3", "timeout": timeout, "record_timing": False}
    NotebookClient(loaded, resources={"metadata": {"path": str(folder)}}, **settings).execute()
    # The kernel writes its Python's version here, which would change with every machine.
    loaded.metadata["language_info"] = {"name": "python"}
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    for notebook in parser.parse_args().notebooks:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(notebook, Path(folder)), notebook)
        print(f"{notebook}: {notebook.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
