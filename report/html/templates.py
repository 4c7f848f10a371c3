"""The files beside this one that a page is made of, and how text and numbers from data get into them unharmed.

The templates escape once whatever is not HTML of their own (`Markup`), and `tojson` writes data that cannot end the
script element it stands in. plotly draws a subset of HTML: what it shows of data has been through `theme.plain`.
"""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

DIGITS = 5  # significant digits of numbers in figures: finer than any screen, and half the size of full floats


def file_text(name: str) -> str:
    """A file of this folder, wherever the package was imported from."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


TEMPLATES = Environment(
    loader=FunctionLoader(file_text),
    autoescape=True,
    undefined=StrictUndefined,  # a name that is misspelt in a template raises, where it would print nothing
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# A NaN that `compact` has not seen raises: no browser reads it.
TEMPLATES.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}


def unbroken(text: object) -> str:
    """Text whose percent signs stay on the line of their number."""
    return str(text).replace(" %", "\N{NO-BREAK SPACE}%")


TEMPLATES.filters["unbroken"] = unbroken


def macros(name: str) -> Any:
    """The macros of a template, to be called from Python: each returns `Markup`."""
    return TEMPLATES.get_template(name).module


def compact(value: Any) -> Any:
    """Numbers rounded to DIGITS significant ones, NaN as null, whole floats as integers; containers copied."""
    if isinstance(value, dict):
        return {key: compact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [compact(inner) for inner in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() else float(f"{value:.{DIGITS}g}")
    return value
