"""One error type for everything a caller can fix, and the search for the nearest valid name.

`RevprobeError` texts are one line: the value, what was expected, how to fix it. The command line prints that
line and exits with 1; a notebook shows it as the last line of its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from os import PathLike
from reprlib import Repr
from typing import Any

LONGEST = 1200  # characters of an error; beyond them its middle is left out, and the fix at its end stays
_SHOWN = Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 3, 80, 80


class RevprobeError(ValueError):
    """A problem the caller can fix; the text says what was wrong, what was expected and what to do, on one line."""

    def __init__(self, text: str = "", *further: object) -> None:
        line = str(text).replace("\r", " ").replace("\n", " ")
        kept = line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} ... {line[-LONGEST // 4 :]}"
        super().__init__(kept, *further)


class UnknownArgument(RevprobeError, TypeError):
    """A function was called with a keyword that it does not have."""


def shown(value: Any) -> str:
    """A value as an error shows it: on one line and shortened; a table, tensor or model by its kind alone.

    >>> shown("a" * 5000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    >>> shown(object())
    'an object'
    """
    if isinstance(value, str | bytes | int | float | complex | list | tuple | dict | set | frozenset | type(None)):
        return " ".join(_SHOWN.repr(value).split())
    if isinstance(value, PathLike):
        return _SHOWN.repr(str(value))
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    size = getattr(value, "shape", None)
    of_shape = f" of shape {tuple(size)}" if isinstance(size, tuple) and size else ""
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}{of_shape}"


def nearest(name: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The `count` choices most like `name`, best first; empty when nothing is similar."""
    return get_close_matches(str(name), [str(choice) for choice in choices], n=count, cutoff=0.6)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest valid ones, else all of them.

    >>> did_you_mean("rpoe", ["rope", "alibi"])
    "; the closest is 'rope'"
    >>> did_you_mean("zzz", ["rope", "alibi"])
    '; expected one of alibi, rope'
    """
    choices = sorted(str(choice) for choice in choices)
    near = nearest(name, choices)
    if near:
        return f"; the closest is {near[0]!r}"
    return f"; expected one of {', '.join(choices)}" if choices else "; there are none"


def first_line(error: BaseException, *, with_type: bool = True) -> str:
    """An error on one line: its type and the first line of its text; its type alone where it has no text.

    Args:
        with_type: False for a RevprobeError, whose text says everything.

    >>> first_line(KeyError("no such key"))
    "KeyError: 'no such key'"
    >>> first_line(ValueError("these are wrong:\\n  the first\\n  the second"), with_type=False)
    'these are wrong: the first'
    """
    text, name = str(error).strip().splitlines(), type(error).__name__
    if not text:
        return name
    said = f"{text[0]} {text[1].strip()}" if text[0].endswith(":") and len(text) > 1 else text[0]
    return f"{name}: {said}" if with_type else said
