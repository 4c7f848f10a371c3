"""A figure as a file: a page that opens without a network, or a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import plotly.graph_objects as go

from ...atomic_files import written_whole
from ...errors import RevprobeError, did_you_mean, first_line

PICTURES = (".png", ".svg", ".pdf")


def save_figure(figure: go.Figure, path: str | Path, *, scale: float = 2.0) -> Path:
    """Write a figure by its path's ending: .html (self-contained), .png, .svg or .pdf; whole or not at all.

    Args:
        scale: pixels of a picture per pixel of the figure.
    Raises: RevprobeError, for another ending, a picture without kaleido (`pip install kaleido`; it also needs Chrome
        or Chromium), or a folder that cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".html", *PICTURES):
        raise RevprobeError(f"cannot write a figure as {path.name!r}{did_you_mean(ending, ['.html', *PICTURES])}")
    if ending in PICTURES and find_spec("kaleido") is None:
        raise RevprobeError(
            f"a figure as {ending} needs kaleido, which is not installed; `pip install kaleido`, or save it as .html"
        )
    try:
        with written_whole(path) as part:
            if ending == ".html":
                figure.write_html(part, include_plotlyjs=True)
            else:
                figure.write_image(part, format=ending.removeprefix("."), scale=scale)
    except OSError as error:
        raise RevprobeError(
            f"cannot write the figure {str(path)!r}: {first_line(error)}; expected a writable folder"
        ) from error
    except (ValueError, RuntimeError) as error:  # kaleido without a browser
        raise RevprobeError(f"cannot draw {str(path)!r}: {first_line(error)}; save it as .html instead") from error
    return path
