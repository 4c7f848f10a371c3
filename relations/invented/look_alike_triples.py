"""T-REx's look-alike: documents of a sentence or two, each with the triples that its sentences state.

Some documents go on with a pronoun ("She works for ..."), whose triple stems from coreference: readers skip it.
"""

from __future__ import annotations

import re
from random import Random
from typing import Any

from .words import Names, shuffled, words

_FACTS = 40
# Facts of a relation that share an object with another one.
_SHARED = 8
_ENTITY, _PREDICATE = "http://www.wikidata.org/entity/Q", "http://www.wikidata.org/prop/direct/"
# No entity of Wikidata has a number as high.
_FIRST_ID = 900_000_000
_LINKER, _COREFERENCE = "Wikidata_Spotlight_Entity_Linker", "Simple_Coreference"
# relation -> the sentence of a document, which names the subject first.
_SENTENCES = {
    "P19": "{subject} was born in {object}.",
    "P36": "{subject} is governed from its capital {object}.",
    "P57": "{subject} is a film that {object} directed.",
    "P108": "{subject} is on the staff of {object}.",
    "P159": "{subject} is a company with headquarters in {object}.",
}
_WORD = re.compile(r"\w+|[^\w\s]")
Entity = tuple[str, str]  # its name and its address


def documents(names: Names, draw: Random) -> list[dict[str, Any]]:
    """The documents, in an order of their own."""
    made: dict[str, Entity] = {}

    def entity(name: str) -> Entity:
        return made.setdefault(name, (name, f"{_ENTITY}{_FIRST_ID + len(made)}"))

    pools = _pools(names, draw)
    facts = []
    for relation, (subjects, objects) in _sides(pools).items():
        chosen = objects[: len(subjects) - (0 if relation == "P36" else _SHARED)]
        chosen = chosen + shuffled(chosen, draw)[: len(subjects) - len(chosen)]
        facts += [(relation, entity(one), entity(other)) for one, other in zip(subjects, chosen, strict=True)]
    draw.shuffle(facts)
    employers = pools["company"]
    return [
        _document(fact, entity(employers[draw.randrange(len(employers))]) if _is_followed(fact, draw) else None, draw)
        for fact in facts
    ]


def _pools(names: Names, draw: Random) -> dict[str, list[str]]:
    """The entities of each kind, every name once."""
    listed = words("words")

    def joined(first: str, second: str, between: str = "") -> list[str]:
        pairs = [one + between + other for one in listed[first] for other in listed[second]]
        return shuffled(pairs, draw)

    heads = [head + end for head in listed["place_head"] for end in ("", "en", "in")]
    companies = [f"{head} {end}" for head in heads for end in listed["company_end"]]
    return {
        "person": [names.person() for _ in range(3 * _FACTS)],
        "town": joined("place_head", "town_end"),
        # One of each head: countries that differ in their ends alone would be hard to tell apart.
        "country": [head + shuffled(listed["country_end"], draw)[0] for head in shuffled(listed["place_head"], draw)],
        "film": joined("film_first", "film_second", " "),
        "company": shuffled(companies, draw)[:_FACTS],
    }


def _sides(pools: dict[str, list[str]]) -> dict[str, tuple[list[str], list[str]]]:
    """For each relation its subjects, and objects in the order in which they are given out."""
    people, towns = pools["person"], pools["town"]
    return {
        "P19": (people[:_FACTS], towns[:_FACTS]),
        "P36": (pools["country"][:_FACTS], towns[_FACTS : 2 * _FACTS]),
        "P57": (pools["film"][:_FACTS], people[_FACTS : 2 * _FACTS]),
        "P108": (people[2 * _FACTS :], pools["company"]),
        "P159": (pools["company"], towns[2 * _FACTS : 3 * _FACTS]),
    }


def _is_followed(fact: tuple[str, Entity, Entity], draw: Random) -> bool:
    """Whether the document goes on: one in two of those about a person's birth."""
    return fact[0] == "P19" and draw.random() < 0.5


def _document(fact: tuple[str, Entity, Entity], employer: Entity | None, draw: Random) -> dict[str, Any]:
    relation, subject, other = fact
    text = _SENTENCES[relation].format(subject=subject[0], object=other[0])
    triples = [_triple(relation, 0, _mention(subject, text, 0), _mention(other, text, len(subject[0])))]
    sentences = [[0, len(text)]]
    if employer is not None:
        start, pronoun = len(text) + 1, ("She", "He")[draw.random() < 0.5]
        text = f"{text} {pronoun} works for {employer[0]}."
        sentences.append([start, len(text)])
        mentioned = _mention((pronoun, subject[1]), text, start) | {"annotator": _COREFERENCE}
        triples.append(_triple("P108", 1, mentioned, _mention(employer, text, start)))
    return {
        "docid": subject[1],
        "title": subject[0],
        "uri": subject[1],
        "text": text,
        "words_boundaries": [list(word.span()) for word in _WORD.finditer(text)],
        "sentences_boundaries": sentences,
        "entities": [triple[part] for triple in triples for part in ("subject", "object")],
        "triples": triples,
    }


def _mention(entity: Entity, text: str, after: int) -> dict[str, Any]:
    """An entity where a text names it."""
    name, uri = entity
    start = text.index(name, after)
    return {"boundaries": [start, start + len(name)], "surfaceform": name, "uri": uri, "annotator": _LINKER}


def _triple(relation: str, sentence: int, subject: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    predicate = {"boundaries": None, "surfaceform": None, "uri": f"{_PREDICATE}{relation}", "annotator": None}
    return {
        "sentence_id": sentence,
        "subject": subject,
        "predicate": predicate,
        "object": other,
        "dependency_path": None,
        "confidence": None,
        "annotator": "Simple-Aligner" if subject["annotator"] == _LINKER else "NoSubject-Triple-aligner",
    }
