"""What token ids are called: pairs carry the strings of the ids they use, so that another vocabulary cannot take them.

An id alone says nothing: 17 is one word to one tokenizer and another to the next, and a model asked in the wrong
vocabulary answers with a number all the same. The strings are the tokenizer's own ("Ġthe", "▁the", "##ing").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import RevprobeError

UNSAID: Mapping[int, str] = {}  # by identity: not said, so the tokenizer is asked


def token_strings(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """The tokenizer's own string of each id; ids it has none for are left out, all of them without a tokenizer."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return {}
    known = list(ids)
    found = _converted(tokenizer, known)
    return {token: _as_text(text) for token, text in zip(known, found, strict=True) if text is not None}


def joined_strings(parts: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """The strings of several lists of pairs as one.

    Raises: RevprobeError, when an id has two strings: the lists were made with different tokenizers.
    """
    joined: dict[int, str] = {}
    for part in {id(part): part for part in parts}.values():  # pairs of one list share one mapping
        for token, text in part.items():
            if joined.setdefault(token, text) != text:
                raise RevprobeError(
                    f"token id {token} is {joined[token]!r} in some of these pairs and {text!r} in others: they were "
                    "made with different tokenizers; put together only pairs made for one model"
                )
    return joined


def first_difference(said: Mapping[int, str], tokenizer: Any, ids: Sequence[int]) -> tuple[int, str, str | None] | None:
    """The first of the ids that the tokenizer calls otherwise: (id, as said, as the tokenizer says); None for none."""
    claimed = [token for token in ids if token in said]
    found = token_strings(tokenizer, claimed)
    return next(((t, said[t], found.get(t)) for t in claimed if found.get(t) != said[t]), None)


def _converted(tokenizer: Any, ids: list[int]) -> list[Any]:
    try:
        return list(tokenizer.convert_ids_to_tokens(ids))
    except (IndexError, KeyError, OverflowError, ValueError):  # some know no way to say that an id is not theirs
        return [_one(tokenizer, token) for token in ids]


def _one(tokenizer: Any, token: int) -> Any:
    try:
        return tokenizer.convert_ids_to_tokens(token)
    except (IndexError, KeyError, OverflowError, ValueError):
        return None


def _as_text(token: Any) -> str:
    """Some byte-level tokenizers name their tokens in bytes, which latin-1 keeps one by one."""
    return token.decode("latin-1") if isinstance(token, bytes) else str(token)
