"""The candidates of a question: texts, and which of them name one entity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import RevprobeError
from .exact_match import Asked, families, normalized

# A candidate is a text, or the texts that name one entity.
Candidates = Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class ClosedSet:
    """The candidates of a direction: each text once however it is spelled, and the entity it names.

    Shapes: `entity`: `text`, a number for each; `entity_of`: the same by normalized text.
    """

    texts: list[str]
    entity: np.ndarray
    entity_of: dict[str, int]

    def right(self, answers: Iterable[str]) -> frozenset[int]:
        """The candidates that normalized `answers` name."""
        return frozenset(self.entity_of[answer] for answer in answers if answer in self.entity_of)


@dataclass(frozen=True)
class Fitting:
    """The texts of a closed set that have tokens and fit a canvas: candidates are numbered anew, without those of which
    none does.

    Shapes: `tokens`: `text`, a row each; `entity`: `text`, places in `entities`.
    """

    texts: list[str]
    tokens: list[tuple[int, ...]]
    entity: np.ndarray
    entities: np.ndarray

    @classmethod
    def of(cls, closed: ClosedSet, tokens: Mapping[str, tuple[int, ...]], most: int) -> Fitting:
        """Those of at most so many tokens; a text that has none in `tokens` is none that can be written."""
        fits = [place for place, text in enumerate(closed.texts) if text in tokens and len(tokens[text]) <= most]
        entities, entity = np.unique(closed.entity[fits], return_inverse=True)
        texts = [closed.texts[place] for place in fits]
        return cls(texts, [tokens[text] for text in texts], entity, entities)

    def held(self, scores: np.ndarray) -> np.ndarray:
        """The score of each candidate: that of its likeliest text. Shapes: `text -> entity`."""
        found = np.full(len(self.entities), -np.inf)
        np.maximum.at(found, self.entity, scores)
        return found

    def is_right(self, right: Iterable[int]) -> np.ndarray:
        """Which candidates are among the right ones. Shapes: `-> entity`."""
        return np.isin(self.entities, list(right))


def closed_set(
    direction: str, questions: Sequence[Asked], candidates: Mapping[str, Candidates] | Candidates | None
) -> ClosedSet:
    """The candidates of a direction, the questions' own answers first.

    Raises: RevprobeError, for a single text in place of a list.
    """
    given = candidates.get(direction, ()) if isinstance(candidates, Mapping) else candidates or ()
    if isinstance(given, str):
        raise RevprobeError(f"candidates {given!r}: expected a list of texts; put it in brackets")
    own = [answer for question in questions if str(question.direction) == direction for answer in question.answers]
    spelled: dict[str, str] = {}
    groups: list[set[str]] = []
    for named in (*own, *given):
        forms = {normalized(text): text.strip() for text in ([named] if isinstance(named, str) else named)}
        forms.pop("", None)
        for form, text in forms.items():
            spelled.setdefault(form, text)
        groups += [set(forms)] if forms else []
    entities = families(np.arange(len(groups)), groups).tolist()
    entity_of = {form: one for one, forms in zip(entities, groups, strict=True) for form in forms}
    return ClosedSet(list(spelled.values()), np.array([entity_of[form] for form in spelled]), entity_of)


def rank_of(held: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """The rank of the best right candidate, ties against it, and its score; NaN where none is among them.

    Shapes: both `entity`.
    """
    if not right.any():
        return float("nan"), float("nan")
    own = float(held[right].max())
    return float(1 + (held[~right] >= own).sum()), own
