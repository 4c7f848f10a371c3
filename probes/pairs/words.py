"""Where a name stands in a text as a word of its own, whether its script puts blanks between words or not.

A name stands where its characters do, unless a longer word goes on beside them: "Ann" is not in "Anna". That can be
told only where both characters at an edge are of scripts that part words by blanks. Of Chinese, Japanese, Thai, Lao,
Khmer and their like no edge can be told, so a name stands wherever its characters do, in a longer name too: a leak is
found at the cost of some that are none. Korean has blanks, but its particles follow a name without one ("안나의"):
what goes on in Hangul does not make a name another, what stands before it does. A combining mark (an accent, a vowel
sign of Hindi) belongs to its letter, in every script: "राम" is not in "रामा".

Source: Unicode. Scripts without blanks are the letters that UAX 29 keeps out of the class ALetter since their words
need a dictionary, Han and Bopomofo whole, and those between which UAX 14 breaks lines (Aksara). To the letter before
it belong marks (category M, Grapheme_Extend), vowels and ends of Hangul syllables, and dependent vowels; those of
Logical_Order_Exception belong to the letter behind them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import regex

_MARK = (
    r"[[\p{M}\p{Grapheme_Extend}\p{Hangul_Syllable_Type=V}\p{Hangul_Syllable_Type=T}"
    r"\p{Indic_Syllabic_Category=Vowel_Dependent}]--[\p{Default_Ignorable_Code_Point}\p{Logical_Order_Exception}]]"
)
_UNSPACED = (
    r"[[\p{L}\p{Nl}]&&[[^\p{Word_Break=ALetter}\p{Word_Break=Hebrew_Letter}]\p{Han}\p{Bopomofo}"
    r"\p{Line_Break=Aksara}\p{Line_Break=Aksara_Start}]]"
)
# The first that holds of a character; what none does (blanks, signs, the underscore) is of no word.
_KINDS = {
    kind: regex.compile(pattern, regex.V1)
    for kind, pattern in {
        "leading vowel": r"\p{Logical_Order_Exception}",
        "mark": _MARK,
        "unspaced": _UNSPACED,
        "hangul": r"[\p{Hangul}&&\p{L}]",
        "spaced": r"[\p{L}\p{N}]",
    }.items()
}


class _Apart(dict[int, str]):
    """For `str.translate`: a blank around what no blank parts from the next word, none for marks, one for signs."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = _kind(character)
        found = {"": " ", "mark": "", "spaced": character}.get(kind, f" {character} ")
        return self.setdefault(code, found)


_APART = _Apart()


def holds(text: str, name: str) -> bool:
    """Whether a name stands in a text as words of its own.

    >>> holds("Anna's child is Bo", "Ann"), holds("Ann's child is Bo", "Ann")
    (False, True)
    >>> holds("安娜的孩子是波波", "波波"), holds("안나의 아이", "안나"), holds("조안나", "안나"), holds("रामा", "राम")
    (True, True, False, False)
    """
    return any(True for _ in places(text, name))


def places(text: str, name: str) -> Iterator[int]:
    """Where a name stands in a text as words of its own: the first character of each, ascending."""
    at = text.find(name)
    while at >= 0:
        if not name or not _is_part(text, at, at + len(name)):
            yield at
        at = text.find(name, at + 1)


def units(text: str) -> set[str]:
    """What an index of texts holds of one: words without their marks, and each letter of Hangul and of what no blanks
    part.

    Where a text holds a name (`holds`), its units hold those of the name.
    """
    return set(text.translate(_APART).split())


def goes_on(text: str, at: int) -> bool:
    """Whether the word before a place goes on behind it; where its script cannot tell, it does not."""
    after = _kind(text[at : at + 1])
    if after == "spaced":
        return _kind_before(text, at) != "unspaced"
    return after == "mark" and _kind_before(text, at) != ""


def has_begun(text: str, at: int) -> bool:
    """Whether the word behind a place began before it; where its script cannot tell, it did not."""
    before, first = _kind_before(text, at), _kind(text[at : at + 1])
    if before == "leading vowel" or first == "mark":
        return before != ""
    return before in ("spaced", "hangul") and first != "unspaced"


def _is_part(text: str, start: int, end: int) -> bool:
    """Whether characters of a text are a part of a longer word. An underscore joins letters, and parts itself."""
    first, last = _kind(text[start : start + 1]), _kind_before(text, end)
    joined_before = text[start - 1 : start] == "_" and first != "unspaced"
    joined_after = text[end : end + 1] == "_" and last != "unspaced"
    return bool(
        (first and (joined_before or has_begun(text, start))) or (last and (joined_after or goes_on(text, end)))
    )


def _kind_before(text: str, at: int) -> str:
    """The kind of the letter before a place, past its marks; of marks without a letter "", which is of no word."""
    while at > 0:
        at -= 1
        kind = _kind(text[at])
        if kind != "mark":
            return kind
    return ""


@cache
def _kind(character: str) -> str:
    return next((kind for kind, one in _KINDS.items() if one.fullmatch(character)), "")
