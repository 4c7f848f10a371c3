"""Names that are one name however they are spelled: composed or not, with other blanks, with signs that nobody sees.

A model may well read two spellings as different tokens, so names stay as they stand; but facts are told apart, and
kept on one side of the split, by what is compared here.
"""

from __future__ import annotations

import unicodedata

import regex

# Zero-width spaces and joiners, soft hyphens, variation selectors, direction marks: Unicode's own list, which the
# standard library lacks.
_UNSEEN = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u02b9\u2032\u00b4`"), "'")
_DASHES = regex.compile(r"\p{Dash_Punctuation}|\u2212")


def plain_name(text: str, *, ignore_case: bool = False) -> str:
    """A text without the differences of spelling that do not make it another name.

    Compatibility forms are composed (NFKC), invisible signs are left out, runs of blanks are one space, typographic
    apostrophes and dashes are the typewriter's; and letters are folded when `ignore_case`.

    >>> plain_name("Ann\\u00a0O\\u2019Hale\\u200b") == plain_name("Ann  O'Hale")
    True
    >>> plain_name("ANN") == plain_name("Ann"), plain_name("ANN", ignore_case=True)
    (False, 'ann')

    Source: Unicode Standard Annex 15 (NFKC) and DerivedCoreProperties (Default_Ignorable_Code_Point).
    """
    text = text.translate(_APOSTROPHES)
    if not text.isascii():
        # Twice, as Unicode's NFKC_Casefold does: a sign left out may have stood between a letter and its accent.
        text = unicodedata.normalize("NFKC", _UNSEEN.sub("", unicodedata.normalize("NFKC", text)))
        text = _DASHES.sub("-", text)
    text = " ".join(text.split())
    return unicodedata.normalize("NFKC", text.casefold()) if ignore_case else text
