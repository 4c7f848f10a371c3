"""What counts as a right answer: texts compared after minimal normalization, and how many tokens they take."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ...errors import RevprobeError
from ...models.probed import ProbedModel
from ..pairs.spans import Encoded, encode_texts
from .causal import end_tokens


class Asked(Protocol):
    """What a question must say; `relations.Question` does.

    `fact` labels the fact it is about, `template` its wording, `direction` that of the statement asked for.
    """

    @property
    def prompt(self) -> str: ...
    @property
    def answers(self) -> tuple[str, ...]: ...
    @property
    def fact(self) -> str: ...
    @property
    def template(self) -> int: ...
    @property
    def direction(self) -> str: ...


def normalized(text: str) -> str:
    """Lower case, one blank between words and none around them, composed Unicode.

    >>> normalized("  Alma  BRENT ")
    'alma brent'
    """
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


class AnswerBook:
    """What counts as right for each question, and how many tokens it takes.

    `accepted[i]`: the answers normalized, and as the tokenizer reads them back (one that takes "O'Neil" apart and
    joins it with blanks could never write the original). `lengths[i]`: token counts of the answers, ascending; `limit`:
    tokens that hold the longest answer and an end token, where there is one.
    """

    def __init__(self, model: ProbedModel, questions: Sequence[Asked]) -> None:
        asked = list(dict.fromkeys((q.prompt, answer) for q in questions for answer in q.answers))
        tails = dict(zip(asked, _answer_tokens(model.tokenizer, asked), strict=True))
        self.accepted = [
            {normalized(form) for a in q.answers for form in (a, *_read_back(model.tokenizer, tails[q.prompt, a]))}
            for q in questions
        ]
        self.lengths = [sorted({max(1, len(tails[q.prompt, a])) for a in q.answers}) for q in questions]
        self.limit = max(lengths[-1] for lengths in self.lengths) + (1 if end_tokens(model) else 0)


def _answer_tokens(tokenizer: Any, asked: Sequence[tuple[str, str]]) -> list[tuple[int, ...]]:
    """The tokens of each answer after its prompt: with a blank between, or none where the tokenizer has no blank."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in asked))
    before = {text: len(_own(e)) for text, e in zip(prompts, encode_texts(tokenizer, prompts), strict=True)}
    blank = "" if _has_no_blank(tokenizer, *asked[0]) else " "
    whole = encode_texts(tokenizer, [f"{prompt}{blank}{answer.strip()}" for prompt, answer in asked])
    return [_own(text)[before[prompt] :] for (prompt, _), text in zip(asked, whole, strict=True)]


def _has_no_blank(tokenizer: Any, prompt: str, answer: str) -> bool:
    """Whether a blank before the answer cannot be encoded, as in a vocabulary of letters."""
    try:
        (encoded,) = encode_texts(tokenizer, [f"{prompt} {answer.strip()}"])
        (alone,) = encode_texts(tokenizer, [f"{prompt}{answer.strip()}"])
    except RevprobeError:
        return True
    unknown = tokenizer.unk_token_id
    return unknown is not None and encoded.token_ids.count(unknown) > alone.token_ids.count(unknown)


def begins_with(text: str, answer: str) -> bool:
    """Whether a text is an answer with anything after it but the rest of a word."""
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def _own(encoded: Encoded) -> tuple[int, ...]:
    return tuple(token for token, added in zip(encoded.token_ids, encoded.is_added, strict=True) if not added)


def _read_back(tokenizer: Any, tokens: tuple[int, ...]) -> list[str]:
    """An answer as its tokens decode; nothing where one of them is unknown and stands for any text."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [text] if text.strip() and tokenizer.unk_token_id not in tokens else []


def families(facts: np.ndarray, accepted: list[set[str]]) -> np.ndarray:
    """Labels of facts, equal where they share an answer, directly or through others. Shapes: `question -> question`."""
    fact = np.unique(facts, return_inverse=True)[1]
    row = np.repeat(fact, [len(answers) for answers in accepted])
    told = [answer for answers in accepted for answer in answers]
    column = np.unique(told, return_inverse=True)[1] + fact.max() + 1
    size = int(column.max()) + 1
    graph = coo_array((np.ones(len(row)), (row, column)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1])[fact]
