"""The tokenizer of the letters relation: one character is one token.

The vocabulary is the placeholder `0`, the lowercase letters (targets of the masked model), their uppercase
partners (evidence), and the special tokens. Alphabets beyond a-z go on through Unicode's cased pairs, so that
a sequence stays one character per token at any size.
"""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import RevprobeError

PLACEHOLDER = "0"
MASK, BEGIN, PAD = "<mask>", "<bos>", "<pad>"


@lru_cache(maxsize=1)
def _cased_pairs() -> tuple[tuple[str, str], ...]:
    """Every character of Unicode's basic plane that is one half of a one-to-one lowercase-uppercase pair."""
    lower = (chr(code) for code in range(0x61, 0x10000))
    return tuple(
        (c, c.upper()) for c in lower if c.islower() and len(c.upper()) == 1 and c.upper().lower() == c != c.upper()
    )


def letter_alphabet(size: int = 26) -> list[tuple[str, str]]:
    """The first `size` (lowercase, uppercase) pairs: a-z first, then the other cased letters of Unicode.

    >>> letter_alphabet(2)
    [('a', 'A'), ('b', 'B')]

    Raises: RevprobeError, when `size` is below 2 (a derangement needs two facts) or beyond what Unicode has.
    """
    pairs = _cased_pairs()
    if not 2 <= size <= len(pairs):
        raise RevprobeError(f"alphabet of {size!r} letters: expected 2 to {len(pairs)}; 26 is a to z")
    return list(pairs[:size])


def letter_tokenizer(alphabet: int = 26) -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token per character; `d000D` becomes five tokens.

    Ids: the placeholder is 0, lowercase letters are 1..n, uppercase n+1..2n, then `<mask>`, `<bos>`, `<pad>`.
    A character outside the vocabulary raises while encoding; nothing is mapped to an unknown token in silence.
    """
    letters = letter_alphabet(alphabet)
    tokens = [PLACEHOLDER, *(lower for lower, _ in letters), *(upper for _, upper in letters), MASK, BEGIN, PAD]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token=MASK, bos_token=BEGIN, pad_token=PAD)
