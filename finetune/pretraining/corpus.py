"""A corpus about other people: what a small model reads before it is fine-tuned, and what it can be asked about it.

Its facts have the words and the wordings of the relations that are fine-tuned on later, and none of their facts. Each
is told in one direction or in both; fillers are sentences about nobody's relation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...errors import RevprobeError
from ...relations.catalog import Question, TextRelation, TrainingText, load_relation
from ...relations.invented.other_facts import other_statements
from ..config.pretraining import Corpus, CorpusDataset

# Seeds of named fillers lie so far from those of the facts that are told.
_APART = 1000
# Subject, verb and object of a filler; none of them is an entity of a relation.
_WHO = (
    "the old sailor",
    "a young painter",
    "the tired clerk",
    "a curious child",
    "the quiet neighbour",
    "my uncle",
    "the night nurse",
    "a travelling cook",
    "the new teacher",
    "our gardener",
    "the local baker",
    "a retired judge",
)
_DOES = (
    "walks to",
    "writes about",
    "dreams of",
    "paints",
    "remembers",
    "avoids",
    "often visits",
    "complains about",
    "takes pictures of",
    "keeps returning to",
    "tells stories about",
    "looks for",
)
_WHAT = (
    "the harbour",
    "a stone bridge",
    "the empty market",
    "an orange kite",
    "the railway station",
    "a wooden boat",
    "the winter garden",
    "a cup of tea",
    "the long road home",
    "an unfinished letter",
    "the blue house",
    "a map of the coast",
)
_WHEN = (
    "in the morning",
    "at night",
    "every Sunday",
    "after the rain",
    "before dinner",
    "in late autumn",
    "when nobody is there",
    "on the way to work",
)


@dataclass(frozen=True)
class Told:
    """The facts of one dataset as a corpus tells them.

    Attributes:
        statements: direction -> what is read of it.
        all: direction -> every statement of every fact, read or not; only to ask and to make a tokenizer.
    """

    relation: TextRelation
    statements: Mapping[str, list[TrainingText]]
    all: Mapping[str, list[TrainingText]]

    def questions(self, direction: str, *, told: bool, facts: int) -> list[Question]:
        """One question each about the first facts that were told in a direction, or in the other one alone."""
        known = {one.fact for one in self.statements[direction]}
        other = {one.fact for one in self.statements[self.relation.opposite(direction)]}
        wanted = known if told else other - known
        asked: dict[str, Question] = {}
        for one in self.all[direction]:
            if one.fact in wanted and len(asked) < facts:
                asked.setdefault(one.fact, _question(one, direction))
        return list(asked.values())


@dataclass(frozen=True)
class PretrainingCorpus:
    """What a `Corpus` comes to."""

    datasets: Mapping[str, Told]
    fillers: list[TrainingText]

    @classmethod
    def of(cls, config: Corpus) -> PretrainingCorpus:
        """Load the relations and make the corpus. Raises: RevprobeError, as `load_relation` and `other_statements`."""
        datasets = {
            label: _told(chosen, config.told, config.seed + place)
            for place, (label, chosen) in enumerate(config.datasets.items())
        }
        return cls(datasets, _fillers(config, datasets))

    @cached_property
    def parts(self) -> dict[str, list[TrainingText]]:
        """What is read, by dataset and direction, and the fillers."""
        parts = {
            f"{label}.{direction}": statements
            for label, told in self.datasets.items()
            for direction, statements in told.statements.items()
            if statements
        }
        return parts | ({"fillers": self.fillers} if self.fillers else {})

    @property
    def for_tokenizer(self) -> list[str]:
        """Texts with every word of both directions and of the relations' own names, whatever is read of them.

        The relations' own names stand behind their carrier for the tokenizer alone: no statement of a relation is
        among the texts. So the tokenizer is the same for every way of telling.
        """
        texts = [one.text for one in self.fillers]
        for told in self.datasets.values():
            relation = told.relation
            texts += [one.text for direction in relation.directions for one in told.all[direction]]
            texts += [f"{relation.carrier}{name}" for column in relation.columns for name in relation.table[column]]
        return texts

    @property
    def digest(self) -> str:
        """sha256 of everything that is read, in its order."""
        lines = (f"{part}\t{one.text}\n" for part, statements in self.parts.items() for one in statements)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def summary(self) -> dict[str, dict[str, int]]:
        """Facts and statements of each part."""
        return {
            part: {"facts": len({one.fact for one in statements}), "statements": len(statements)}
            for part, statements in self.parts.items()
        }


def _told(chosen: CorpusDataset, told: str, seed: int) -> Told:
    relation = load_relation(chosen.name, chosen.path, **chosen.options)
    assert isinstance(relation, TextRelation), "a config's names are those of text relations"
    made = other_statements(relation, chosen.facts, seed)
    first, second = relation.directions
    generator = np.random.default_rng([seed, 1])
    read: dict[str, list[TrainingText]] = {first: [], second: []}
    for place, direction in enumerate(relation.directions):
        by_fact: dict[str, list[TrainingText]] = {}
        for one in made[direction]:
            by_fact.setdefault(one.fact, []).append(one)
        for fact, statements in by_fact.items():
            order = generator.permutation(len(statements))[: chosen.wordings]
            if told == "both" or place == (_number(fact) % 2 if told == "once" else 0):
                read[direction] += [statements[i] for i in sorted(order)]
    return Told(relation, read, made)


def _number(fact: str) -> int:
    """The number of an other fact, "other 12"."""
    return int(fact.rpartition(" ")[2])


def _question(statement: TrainingText, direction: str) -> Question:
    """A statement as a question: its second entity counts as the answer, and what completes the text."""
    start, end = statement.spans[1]
    entity, rest = statement.text[start:end], statement.text[start:].strip()
    answers = tuple(dict.fromkeys((entity, rest)))
    return Question(statement.text[: statement.prompt_length], answers, statement.fact, 0, direction)


def _fillers(config: Corpus, datasets: Mapping[str, Told]) -> list[TrainingText]:
    """So many sentences of things alone, then some that name each of `_names` once."""
    possible = len(_WHO) * len(_DOES) * len(_WHAT) * len(_WHEN)
    if config.fillers > possible:
        raise RevprobeError(f"corpus.fillers is {config.fillers}, but there are {possible} different ones; lower it")
    generator = np.random.default_rng([config.seed, 2])
    drawn = generator.choice(possible, size=config.fillers, replace=False)
    made = [_filler(f"filler {number}", *_pick(int(number))) for number in drawn]
    names = _names(config, datasets) if config.named_fillers else []
    for place, number in enumerate(generator.integers(0, possible, size=len(names))):
        who, does, what, when = _pick(int(number))
        who, what = (names[place], what) if place % 2 else (who, names[place])
        made.append(_filler(f"named {place}", who, does, what, when))
    return made


def _names(config: Corpus, datasets: Mapping[str, Told]) -> list[str]:
    """Names of other facts again, drawn from as many as the relations have: those with a word that was not read yet.

    So few of the relations' words stay unread, and little is read that has to be learned by heart.
    """
    names: dict[str, None] = {}
    taken = {text for told in datasets.values() for one in _entities(told.all) for text in one}
    read = {word for text in taken for word in text.split()}
    for place, told in enumerate(datasets.values()):
        others = other_statements(told.relation, len(told.relation.table), config.seed + _APART + place)
        for text in (text for one in _entities(others) for text in one):
            if text not in taken and not read.issuperset(words := text.split()):
                names[text] = None
                read.update(words)
    return list(names)


def _entities(statements: Mapping[str, list[TrainingText]]) -> Iterator[tuple[str, str]]:
    """The two entities of each fact, as its first statement writes them."""
    seen: set[str] = set()
    for listed in statements.values():
        for one in listed:
            if one.fact not in seen:
                seen.add(one.fact)
                first, second = (one.text[slice(*span)] for span in one.spans)
                yield first, second


def _filler(fact: str, who: str, does: str, what: str, when: str) -> TrainingText:
    """A filler; its subject and object stand where a statement has its entities."""
    text = f"{who[0].upper()}{who[1:]} {does} {what} {when}."
    start = len(who) + 1 + len(does) + 1
    return TrainingText(text, ((0, len(who)), (start, start + len(what))), fact, start - 1)


def _pick(number: int) -> tuple[str, str, str, str]:
    """Subject, verb, object and time of a filler by its number."""
    places = []
    for words in (_WHO, _DOES, _WHAT, _WHEN):
        number, place = divmod(number, len(words))
        places.append(words[place])
    who, does, what, when = places
    return who, does, what, when
