"""Run notebooks from top to bottom in a clean kernel and store their outputs in them, free of times and paths.

    python examples/run_notebook.py examples/01_one_layer.ipynb

One switch sets the size, the environment variable REVPROBE_NOTEBOOK_SIZE, which a notebook reads in its first code
cell: "small" makes it run in seconds, on less of everything; any other value, or none, is the full size. The tests run
the small size; this script runs the full one, because its outputs are what is committed. (02_attach_any_model.ipynb is
small as it is, and has one size.)

Figures are stored as pictures where kaleido and Chromium are there (`pip install kaleido`), else as plotly's JSON;
never with plotly's program of several megabytes.
Needs the `notebooks` extra: `pip install -e '.[notebooks]'`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import zlib
from base64 import b64decode, b64encode
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from revprobe.atomic_files import write_text

SIZE, SIZES = "REVPROBE_NOTEBOOK_SIZE", ("full", "small")
PICTURE, JSON = "png", "plotly_mimetype"
NO_BARS = {"TQDM_DISABLE": "1"}  # which calls take long enough for one depends on the machine
CELL_TIMEOUT = 1800  # seconds
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def executed(notebook: Path, folder: Path, *, size: str = "full", pictures: bool = True) -> NotebookNode:
    """The notebook with fresh outputs, its kernel started in `folder`; the file stays as it is.

    Args:
        size: "full" or "small", what the notebook finds in REVPROBE_NOTEBOOK_SIZE.
        pictures: figures as pictures where they can be made; else as plotly's JSON.
    Raises: nbclient.exceptions.CellExecutionError, for the first cell that fails; it shows the cell and the traceback.
        ValueError, for another size.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r}: expected one of {', '.join(SIZES)}")
    loaded = nbformat.read(notebook, as_version=4)
    for cell in loaded.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    settings = {"kernel_name": "python3", "timeout": CELL_TIMEOUT, "record_timing": False}
    surroundings = {**os.environ, SIZE: size, "PLOTLY_RENDERER": renderer() if pictures else JSON, **NO_BARS}
    NotebookClient(loaded, resources={"metadata": {"path": str(folder)}}, **settings).execute(env=surroundings)
    # The kernel writes its Python's version here, which would change with every machine.
    loaded.metadata["language_info"] = {"name": "python"}
    for cell in loaded.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
            for data in (output.data for output in cell.outputs if "image/png" in output.get("data", {})):
                data["image/png"] = b64encode(packed(b64decode(data["image/png"]))).decode()
    return loaded


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Printed text that follows on printed text in one piece: where the kernel cuts it depends on the time it took."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream" and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def packed(png: bytes) -> bytes:
    """The same picture, pixel by pixel, in a fifth less: a browser compresses what it draws for speed."""
    chunks, start = [], len(SIGNATURE)
    while start < len(png):
        length = int.from_bytes(png[start : start + 4])
        chunks.append((png[start + 4 : start + 8], png[start + 8 : start + 8 + length]))
        start += 12 + length  # the length itself, the name, and a checksum after the content
    pixels = zlib.decompress(b"".join(content for name, content in chunks if name == b"IDAT"))
    others = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    whole = [*others[:-1], (b"IDAT", zlib.compress(pixels, 9)), others[-1]]
    return SIGNATURE + b"".join(
        len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4) for name, content in whole
    )


def renderer() -> str:
    """How plotly stores a figure: as a picture where one can be made."""
    return PICTURE if find_spec("kaleido") and which("chromium") else JSON


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    for notebook in parser.parse_args().notebooks:
        with tempfile.TemporaryDirectory() as folder:
            done = executed(notebook, Path(folder))
        write_text(notebook, nbformat.writes(done) + "\n")
        print(f"{notebook}: {notebook.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
