"""From characters to tokens: which tokens of an encoded text are an entity, and refusing to guess.

A token may carry the blank before the entity (byte-level BPE's `Ġ`, SentencePiece's `▁`); any other template
character in an entity's token makes the span straddle, which is an error. What the offsets say is then read back:
the tokens found must decode to the entity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import RevprobeError
from ...models.probed import ProbedModel
from .templates import Filled, Span
from .words import holds

# The blank marks of SentencePiece and byte-level BPE; alone at the start of a text they mark nothing of the entity.
_BLANK_MARKS = ("▁", "Ġ")
REFUSALS = ("ambiguous_span", "straddling_span", "unreadable_span", "special_token", "different_tokens")


class SpanError(RevprobeError):
    """An entity whose tokens cannot be told; `reason` is one of `REFUSALS`, the names that `drop=` takes."""

    def __init__(self, reason: str, text: str) -> None:
        assert reason in REFUSALS, f"unlisted reason {reason!r}"
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Encoded:
    """One text as the model's tokenizer sees it.

    Shapes: `token_ids, pieces, offsets, is_added: token`; offsets are characters (first, one past the last), and
    `is_added` marks what the tokenizer put around the text ([CLS], <s>).
    """

    text: str
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    offsets: tuple[Span, ...]
    is_added: tuple[bool, ...]


def require_fast_tokenizer(model: ProbedModel, *, can_be_given: bool = False) -> Any:
    """A model's tokenizer, if it has character offsets.

    Args:
        can_be_given: whether the call that asks takes `tokenizer=`, for the error.
    Raises: RevprobeError, when it has none or is not there.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        source = model.tokenizer_source
        given = "load_model(..., tokenizer=FOLDER_OR_NAME) or ProbedModel(module, tokenizer, objective=...)"
        named = f"load_model(..., tokenizer={source!r}), which its family uses, or a folder that holds it"
        here = ", or tokenizer= to this call" if can_be_given else ""
        raise RevprobeError(
            f"{model.name} has no tokenizer, so text cannot become tokens; pass {named if source else given}{here}"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise RevprobeError(
            f"{type(tokenizer).__name__} has no character offsets; expected a fast tokenizer of transformers "
            "(AutoTokenizer, or PreTrainedTokenizerFast(tokenizer_object=...) around a tokenizers.Tokenizer)"
        )
    return tokenizer


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """Encode every text with its offsets, special tokens of the model included, nothing cut off.

    Raises: RevprobeError, naming the text, when the tokenizer fails on one.
    """
    try:
        return _encode(tokenizer, list(texts))
    except Exception:
        for text in texts:
            try:
                _encode(tokenizer, [text])
            except Exception as error:
                raise RevprobeError(f"the tokenizer fails on {text!r}: {error}") from error
        raise


def entity_positions(tokenizer: Any, encoded: Encoded, filled: Filled, role: str) -> list[int]:
    """The positions of an entity's tokens, in order and without a gap.

    Raises: SpanError, when the entity stands in the text twice, shares a token with the template, leaves a character
        uncovered, holds a special or unknown token, or its tokens do not decode to it.
    """
    start, end = filled.spans[role]
    entity = encoded.text[start:end]
    _require_once(tokenizer, encoded, (start, end), role)
    found = []
    for position, added in enumerate(encoded.is_added):
        first, last = _without_blank(encoded, position, start)
        if not added and first < min(last, end) and last > start:
            found.append(position)
    while found and _is_blank_mark(encoded, found[0]):
        found = found[1:]
    for position in found:
        first, last = _without_blank(encoded, position, start)
        if first < start or last > end:
            raise SpanError(
                "straddling_span",
                f"token {encoded.pieces[position]!r} covers part of the {role} {entity!r} and part of the text around "
                f"it; tokens {list(encoded.pieces)}; put a space between the slot and the text beside it",
            )
    covered = {c for i in found for c in range(*encoded.offsets[i])}
    bare = [encoded.text[c] for c in range(start, end) if c not in covered and not encoded.text[c].isspace()]
    if bare or not found:
        raise SpanError(
            "unreadable_span",
            f"no token covers {''.join(bare)!r} of the {role} {entity!r} (the tokenizer drops it); tokens "
            f"{list(encoded.pieces)}; clean the text",
        )
    positions = list(range(found[0], found[-1] + 1))
    _require_readable(tokenizer, encoded, positions, entity, role)
    return positions


def _encode(tokenizer: Any, texts: list[str]) -> list[Encoded]:
    batch = tokenizer(
        texts,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    columns = (batch[key] for key in ("input_ids", "offset_mapping", "special_tokens_mask"))
    return [
        Encoded(
            text,
            tuple(ids),
            tuple(tokenizer.convert_ids_to_tokens(ids)),
            tuple((first, last) for first, last in offsets),
            tuple(map(bool, added)),
        )
        for text, ids, offsets, added in zip(texts, *columns, strict=True)
    ]


def _without_blank(encoded: Encoded, position: int, start: int) -> Span:
    """A token's characters, less the blanks it carries from before the entity."""
    first, last = encoded.offsets[position]
    while first < min(last, start) and encoded.text[first].isspace():
        first += 1
    return first, last


def _is_blank_mark(encoded: Encoded, position: int) -> bool:
    """A mark put before the text's first character, whose offsets claim that character."""
    first, last = encoded.offsets[position]
    piece = encoded.pieces[position]
    return any(set(piece) == {mark} and mark not in encoded.text[first:last] for mark in _BLANK_MARKS)


def _require_once(tokenizer: Any, encoded: Encoded, span: Span, role: str) -> None:
    """The entity stands nowhere else in the text as a word of its own, compared as the tokenizer normalizes it."""
    entity = _normalized(tokenizer, encoded.text[slice(*span)]).strip()
    for around in (encoded.text[: span[0]], encoded.text[span[1] :]):
        if entity and holds(_normalized(tokenizer, around), entity):
            raise SpanError(
                "ambiguous_span",
                f"the {role} {encoded.text[slice(*span)]!r} stands twice in {encoded.text!r}, so it is ambiguous and "
                f"the question contains its answer; tokens {list(encoded.pieces)}; change the template or leave it out",
            )


def _require_readable(tokenizer: Any, encoded: Encoded, positions: list[int], entity: str, role: str) -> None:
    """No token stands for anything, and read back the tokens are the entity: offsets are believed, then checked."""
    ids = [encoded.token_ids[p] for p in positions]
    pieces = [encoded.pieces[p] for p in positions]
    special = next((p for i, p in zip(ids, pieces, strict=True) if i in tokenizer.all_special_ids), None)
    if special is not None:
        raise SpanError(
            "special_token",
            f"the {role} {entity!r} holds the special or unknown token {special!r} (tokens {pieces}), which stands for "
            "more than this text; clean the text or leave the fact out",
        )
    read = _decoded(tokenizer, ids)
    if read == _no_blanks(entity):
        return
    # Some tokenizers change text (lower case, accents, compatibility forms): as they do, so may the entity read.
    alone = _decoded(tokenizer, tokenizer(entity, add_special_tokens=False, verbose=False)["input_ids"])
    if read in (_no_blanks(_normalized(tokenizer, entity)), alone):
        return
    raise SpanError(
        "unreadable_span",
        f"the tokens {pieces} of the {role} {entity!r} decode to {read!r}; all tokens {list(encoded.pieces)}; the "
        "tokenizer joins the entity with the text around it, or has no decoder",
    )


def _normalized(tokenizer: Any, text: str) -> str:
    """Text as the tokenizer normalizes it, with blanks as blanks."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None:
        return text
    shown = normalizer.normalize_str(text)
    return shown if "▁" in text else shown.replace("▁", " ")


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return _no_blanks(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _no_blanks(text: str) -> str:
    return "".join(text.split())
