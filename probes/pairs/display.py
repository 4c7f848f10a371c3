"""How a query is shown: its tokens as text, and coloured for a notebook.

Every token stands for itself. A blank that belongs to a token is shown as `␣`, since " Ann" and "Ann" are different
tokens that would otherwise look alike; a character made of several byte-level tokens shows as `é(1/2) é(2/2)`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from .query import Query

STYLES = {"target": "background:#E69F00;color:#000", "evidence": "background:#56B4E9;color:#000"}
_BROKEN = "�"  # what a decoder writes for bytes that are no whole character
_MOST_BYTES = 4  # of one character in UTF-8


def token_texts(token_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Each token as a reader should see it; the ids themselves without a tokenizer."""
    if tokenizer is None:
        return [str(token) for token in token_ids]
    texts = []
    for token in token_ids:
        text = tokenizer.decode([token])
        piece = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else ""
        # SentencePiece decoders drop the blank of a first token, which here would be every token.
        texts.append(_visible(f" {text}" if piece and piece.startswith("▁") and not text.startswith(" ") else text))
    start = 0
    while start < len(texts):
        width = _width(token_ids, texts, start, tokenizer)
        if width > 1:
            character = _visible(tokenizer.decode(list(token_ids[start : start + width])))
            texts[start : start + width] = [f"{character}({k + 1}/{width})" for k in range(width)]
        start += width
    return texts


def _width(token_ids: Sequence[int], texts: list[str], start: int, tokenizer: Any) -> int:
    """How many tokens from `start` on make whole characters: 1 unless single bytes must be joined to read."""
    if _BROKEN not in texts[start]:
        return 1
    # A token may end one character and begin the next, so a run can be longer than the bytes of one.
    for width in range(2, 2 * _MOST_BYTES + 1):
        if start + width <= len(texts) and _BROKEN not in tokenizer.decode(list(token_ids[start : start + width])):
            return width
    return 1


def _visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎")


def shown_query(query: Query, tokenizer: Any) -> dict[str, str]:
    """The query token by token, target in [brackets], evidence in {braces}; target and evidence as text."""
    tokens = token_texts(query.token_ids, tokenizer)
    marked = [
        f"[{t}]" if i in query.target_positions else f"{{{t}}}" if i in query.evidence_positions else t
        for i, t in enumerate(tokens)
    ]
    texts = {
        part: " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(list(ids))).strip()
        for part, ids in (("target", query.target), ("evidence", query.evidence))
    }
    return {"query": " ".join(marked), **texts}


def tokens_html(query: Query, tokenizer: Any) -> str:
    parts = dict.fromkeys(query.target_positions, "target") | dict.fromkeys(query.evidence_positions, "evidence")
    return " ".join(
        f'<span style="{STYLES.get(parts.get(i, ""), "")}">{html.escape(token)}</span>'
        for i, token in enumerate(token_texts(query.token_ids, tokenizer))
    )
