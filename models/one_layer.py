"""What the one-layer experiments need besides RADD: GPT-2 at their size, and the tokenizer of the letters."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ..arguments import checked
from ..errors import RevprobeError

PLACEHOLDER = "0"
MASK, BEGIN, PAD = "<mask>", "<bos>", "<pad>"


@checked
def one_layer_gpt2(
    vocab_size: int = 56,
    *,
    d_model: int = 64,
    n_layers: int = 1,
    n_heads: int = 1,
    mlp_ratio: int = 4,
    dropout: float = 0.0,
    max_length: int = 64,
    bos_token_id: int | None = 54,
    pad_token_id: int | None = 55,
) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2 (learned absolute positions, tied unembedding), one layer unless asked otherwise.

    Raises: RevprobeError, for a width that the heads do not divide, or a dropout outside [0, 1].
    Source: the paper's ARM baseline, Sec. 5 and App. D.1.
    """
    if d_model % n_heads or not 0 <= dropout <= 1:
        raise RevprobeError(
            f"d_model={d_model}, n_heads={n_heads}, dropout={dropout}: expected a width that the heads divide, and a "
            "dropout in [0, 1]"
        )
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=max_length,
        n_embd=d_model,
        n_layer=n_layers,
        n_head=n_heads,
        n_inner=mlp_ratio * d_model,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=bos_token_id,
        eos_token_id=None,
        pad_token_id=pad_token_id,
    )
    return GPT2LMHeadModel(config)


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


@checked
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
