"""Other people with other descriptions, in the grammar of a relation whose sentences inflect what they describe.

Person-Description says one description in three forms: "the acclaimed director of the film", "directing the film",
"directed the film". What they end in together is the work, "the film"; what comes before it, form by form, the role.
One person's role with another's work is a third description in all its forms. Each wording is taken in the form that
the relation uses in it for the most people, and in the next where a description has no such form: "known for directing
the film", but "known for being the champion of the race".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...errors import RevprobeError
from ..statements import Statement
from ..text_relation import TextRelation
from .said import Frame, Said, frame_of

_USUAL, _CAPITAL, _DOING, _DONE = "usual", "Usual", "doing", "done"
# What stands in front of the usual form where a wording wants another, which a description lacks.
_INSTEAD = {_DOING: "being ", _DONE: "was "}
_GERUND = re.compile(r"(\w+ly )?\w+ing ")
# What no verb in the past begins with; such a form is another way to say the usual one.
_NO_VERB = re.compile(r"(the|a|an|being|they|they're|were|was|is|are|hold) ")
# Where the name of a thing begins.
_THING = re.compile(r"""(?:the|an?)\b|["A-Z]""")
# "made the tower disappear": what follows the tower belongs to the verb.
_CAUSATIVE = re.compile(r"\b(made|making|makes) ")
# A title's closing mark stands behind the entity, since a tokenizer joins it with what follows.
_CLOSING = re.compile(r"[.,!?]?\"")
_ROUNDS = 100


class _Form(NamedTuple):
    """A description in one form, up to where the entity ends, and the closing mark behind that."""

    text: str
    closing: str


class _Description(NamedTuple):
    """The role by form, and the work that all forms end in."""

    roles: dict[str, str]
    work: _Form


def is_inflected(relation: TextRelation) -> bool:
    """Whether statements say a second entity otherwise than the table writes it."""
    cells = relation.table[relation.columns[1]].tolist()
    return any(
        one.text[slice(*one.spans[_place(relation, direction)])] != cells[one.fact]
        for direction in relation.directions
        for one in relation.statements[direction]
    )


def describe_anew(
    relation: TextRelation, names: Sequence[str], generator: np.random.Generator
) -> list[dict[str, list[Said]]]:
    """For each name a description that is none of the relation's, said in every wording, direction by direction.

    Raises: RevprobeError, when roles and works make too few descriptions.
    """
    forms = _forms(relation)
    chosen = _dealt(relation, [one for one in map(_parted, forms) if one is not None], len(names), generator)
    wordings = {direction: _wordings(relation, direction, forms) for direction in relation.directions}
    return [
        {
            direction: [_say(name, one, wording, place) for wording in wordings[direction]]
            for place, direction in enumerate(relation.directions)
        }
        for name, one in zip(names, chosen, strict=True)
    ]


def _place(relation: TextRelation, direction: str) -> int:
    """Which entity of a statement describes: the second in the first direction, the first in the other."""
    return 1 - relation.directions.index(direction)


def _described(relation: TextRelation, direction: str, one: Statement) -> _Form:
    """How a statement describes, with the mark that closes a title."""
    start, end = one.spans[_place(relation, direction)]
    text = one.text[start:end]
    closing = _CLOSING.match(one.text, end) if text.count('"') % 2 else None
    return _Form(text, closing.group() if closing else "")


def _forms(relation: TextRelation) -> list[dict[str, _Form]]:
    """For each fact its description in the forms that statements have it in."""
    usual = relation.table[relation.columns[1]].tolist()
    said: list[Counter[str]] = [Counter() for _ in usual]
    closings: list[Counter[str]] = [Counter() for _ in usual]
    for direction in relation.directions:
        for one in relation.statements[direction]:
            form = _described(relation, direction, one)
            said[one.fact][form.text] += 1
            closings[one.fact].update([form.closing] if form.text == usual[one.fact] else [])
    found = []
    for text, counts, closed in zip(usual, said, closings, strict=True):
        closing = closed.most_common(1)[0][0] if closed else ""
        others = [one for one, _ in counts.most_common() if _is_another_form(one, text)]
        by_kind = {_USUAL: text}
        for other in others:
            by_kind.setdefault(_DOING if _GERUND.match(other) else _DONE, other)
        found.append({kind: _Form(form, closing) for kind, form in by_kind.items()})
    return found


def _is_another_form(text: str, usual: str) -> bool:
    """Whether a form is a verb's: not the usual one with words around it or taken off, but its "who directed ..."."""
    if text in usual:
        return f" who {text}" in usual
    return usual not in text and not _NO_VERB.match(text.lower())


def _parted(forms: dict[str, _Form]) -> _Description | None:
    """A description as role and work; None where its forms do not end in one and the same thing."""
    split = [form.text.split(" ") for form in forms.values()]
    common = 0
    while common < min(map(len, split)) - 1 and len({words[-1 - common] for words in split}) == 1:
        common += 1
    words = split[0]
    start = next((at for at in range(len(words) - common, len(words)) if _THING.match(words[at])), None)
    if start is None:
        return None
    work = _Form(" ".join(words[start:]), forms[_USUAL].closing)
    roles = {kind: form.text.removesuffix(work.text) for kind, form in forms.items()}
    return None if any(map(_CAUSATIVE.search, roles.values())) else _Description(roles, work)


def _dealt(
    relation: TextRelation, descriptions: Sequence[_Description], count: int, generator: np.random.Generator
) -> list[_Description]:
    """Descriptions of one's role and another's work that are none of the relation's. A round of them has each once."""
    taken = set(relation.table[relation.columns[1]])
    made: dict[str, _Description] = {}
    for _ in range(_ROUNDS):
        works = [descriptions[place].work for place in generator.permutation(len(descriptions))]
        for one, work in zip(descriptions, works, strict=True):
            usual = one.roles[_USUAL] + work.text
            if usual not in taken:
                made.setdefault(usual, _Description(one.roles, work))
        if len(made) >= count:
            return list(made.values())[:count]
    raise RevprobeError(
        f"the descriptions of {relation.name} make {len(made)} others, fewer than the {count} wanted; ask for fewer "
        "facts (model.tiny.pretraining.facts of a tiny model)"
    )


def _wordings(
    relation: TextRelation, direction: str, forms: Sequence[dict[str, _Form]]
) -> list[list[tuple[Frame, str]]]:
    """For each wording of a direction how it stands around a form of a description, the most usual first."""
    place = _place(relation, direction)
    counts: dict[int, Counter[tuple[Frame, str]]] = {}
    for one in relation.statements[direction]:
        form = _described(relation, direction, one)
        of_fact = forms[one.fact]
        kinds = {said.text: kind for kind, said in of_fact.items()}
        usual = of_fact[_USUAL].text
        kinds.setdefault(usual[:1].upper() + usual[1:], _CAPITAL)
        if form.text in kinds:
            frame = frame_of(one)
            if place == 1:
                frame = frame._replace(behind=frame.behind.removeprefix(form.closing))
            else:
                frame = frame._replace(between=frame.between.removeprefix(form.closing))
            counts.setdefault(one.template, Counter())[frame, kinds[form.text]] += 1
    return [[found for found, _ in counts[template].most_common()] for template in sorted(counts)]


def _say(name: str, description: _Description, wording: Sequence[tuple[Frame, str]], place: int) -> Said:
    """A person and a description in a wording, in the first of its forms that the description has."""
    work, usual = description.work, description.roles[_USUAL]
    roles = description.roles | {_CAPITAL: usual[:1].upper() + usual[1:]}
    frame, kind = next(((frame, kind) for frame, kind in wording if kind in roles), wording[0])
    if kind not in roles:
        frame = _with_words(frame, _INSTEAD[kind], place)
    text = roles.get(kind, usual) + work.text
    if place == 0:
        return Said(frame._replace(behind=work.closing + frame.behind), name, text)
    return Said(frame._replace(between=work.closing + frame.between), text, name)


def _with_words(frame: Frame, words: str, place: int) -> Frame:
    """A frame with words in front of the description."""
    if place == 0:
        return frame._replace(between=frame.between + words, lead=frame.lead + len(words))
    return frame._replace(before=frame.before + words)
