"""One error type for everything a caller can fix, and the search for the nearest valid name.

`RevprobeError` texts are one line: the value, what was expected, how to fix it. The command line prints that
line and exits with 1; a notebook shows it as the last line of its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class RevprobeError(ValueError):
    """A problem the caller can fix; the text says what was wrong, what was expected and what to do."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The `count` choices most like `name`, best first; empty when nothing is similar."""
    return get_close_matches(str(name), [str(choice) for choice in choices], n=count, cutoff=0.5)


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
    """
    text, name = str(error).strip().splitlines(), type(error).__name__
    if not text:
        return name
    return f"{name}: {text[0]}" if with_type else text[0]
