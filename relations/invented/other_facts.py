"""Other facts than a relation's, said as it says its own: what a model can be taught before it is fine-tuned.

They have the relation's words and wordings, and none of its facts. A name is made of words that names of the relation
have at the same place; a description, which its sentences inflect, as `other_descriptions` tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd

from ...arguments import checked
from ...errors import RevprobeError
from ..text_relation import TextRelation, TrainingText
from .other_descriptions import describe_anew, is_inflected
from .said import Frame, Said, frame_of

# How often the words are dealt out anew before they are said to be too few.
_ROUNDS = 100
# A kind of fewer facts takes its names from all kinds.
_FEWEST = 4
# A word's first syllable: letters up to and with its first vowels, something being left of it.
_HEAD = re.compile(r"(\w*?[aeiouy]+)(?=\w\w)", re.IGNORECASE)


@checked
def other_statements(
    relation: TextRelation, count: int, seed: int = 0, *, mixed: bool = False, avoid: Iterable[str] = ()
) -> dict[str, list[TrainingText]]:
    """Statements of `count` facts that are none of the relation's, in both directions and every wording.

    Each is modelled on a fact of the relation, as many on mothers or on places of birth as it has, and said in all
    wordings of its kind, those that are held out from training included. `TrainingText.fact` numbers them ("other 0"),
    so that some can be kept in one direction only. No name of the relation is among theirs, and none stands in two of
    them; a name of one word is made of two such words. A description has the role of one person and the work of
    another, inflected as each wording wants.

    Args:
        count: of facts.
        seed: draws the names.
        mixed: say each fact in the wordings of every kind ("the mother of" and "the father of" one person), as the
            pretraining of tiny models does; a relation with inflected descriptions has one kind.
        avoid: further names that are not to be used, such as those of another relation that is trained as well.
    Returns: direction -> statements, fact by fact; a text stands once.
    Raises: RevprobeError, when the words are too few for so many names.
    """
    if count < 1:
        raise RevprobeError(f"count={count!r}: expected how many other facts to make, at least 1")
    generator = np.random.default_rng(seed)
    taken = {*avoid, *(name for column in relation.columns for name in relation.table[column])}
    if is_inflected(relation):
        person = relation.columns[0]
        names = _new_names(relation, person, relation.table, count, generator, taken)
        facts = describe_anew(relation, names, generator)
    else:
        facts = _renamed(relation, count, generator, taken, mixed)
    found: dict[str, TrainingText] = {}
    statements: dict[str, list[TrainingText]] = {direction: [] for direction in relation.directions}
    for direction, listed in statements.items():
        for number, fact in enumerate(facts):
            for one in fact[direction]:
                made = one.text(f"other {number}", relation.carrier)
                if found.setdefault(made.text, made) is made:
                    listed.append(made)
    return statements


def _renamed(
    relation: TextRelation, count: int, generator: np.random.Generator, taken: set[str], mixed: bool
) -> list[dict[str, list[Said]]]:
    """Facts of two other names, kind by kind: for each direction what is said of them."""
    kinds = _kinds(relation, mixed)
    # As many of each kind as the relation has.
    kind_of = np.repeat(np.arange(len(kinds)), [len(places) for places, _ in kinds])
    modelled = kind_of[((np.arange(count) + 0.5) * len(kind_of) / count).astype(int)]
    facts = []
    for number, (places, frames) in enumerate(kinds):
        alike = relation.table.iloc[places] if len(places) >= _FEWEST else relation.table
        wanted = int((modelled == number).sum())
        columns = [
            _new_names(relation, column, alike, wanted, generator, taken, halves=not mixed)
            for column in relation.columns
        ]
        for pair in zip(*columns, strict=True):
            named = zip(relation.directions, (pair, pair[::-1]), strict=True)
            facts.append(
                {direction: [Said(frame, *names) for frame in frames[direction]] for direction, names in named}
            )
    return facts


def _kinds(relation: TextRelation, mixed: bool) -> list[tuple[list[int], dict[str, list[Frame]]]]:
    """The kinds of fact, told apart by the text around the names: the places of its facts, and its wordings."""
    framed: dict[int, dict[str, dict[tuple[str, ...], Frame]]] = {}
    for direction in relation.directions:
        for one in relation.statements[direction]:
            frame = frame_of(one)
            of_fact = framed.setdefault(0 if mixed else one.fact, {name: {} for name in relation.directions})
            of_fact[direction].setdefault(frame[:3], frame)
    if mixed:
        return [(list(range(len(relation.table))), {name: list(said.values()) for name, said in framed[0].items()})]
    kinds: dict[tuple[tuple[Frame, ...], ...], list[int]] = {}
    for place, said in sorted(framed.items()):
        kinds.setdefault(tuple(tuple(said[name].values()) for name in relation.directions), []).append(place)
    listed = [(places, zip(relation.directions, map(list, frames), strict=True)) for frames, places in kinds.items()]
    return [(places, dict(frames)) for places, frames in listed]


def _new_names(
    relation: TextRelation,
    column: str,
    facts: pd.DataFrame,
    count: int,
    generator: np.random.Generator,
    taken: set[str],
    *,
    halves: bool = True,
) -> list[str]:
    """Names that are not taken yet, and then are. A round of them uses every word once: none stays unlearned."""
    names = list(dict.fromkeys(facts[column]))
    made: dict[str, None] = {}
    for _ in range(_ROUNDS):
        dealt = [name for name in _reshuffled(names, generator, halves) if name not in taken]
        # Names of one word come first; the few that are wanted are of every length.
        made.update(dict.fromkeys([dealt[i] for i in generator.permutation(len(dealt))] if halves else dealt))
        if len(made) >= count:
            chosen = list(made)[:count]
            taken.update(chosen)
            return chosen
    raise RevprobeError(
        f"the words of {relation.name}'s column {column!r} make {len(made)} other names, fewer than the {count} "
        "wanted; ask for fewer facts (model.tiny.pretraining.facts of a tiny model), or take a relation of more names"
    )


def _reshuffled(names: Sequence[str], generator: np.random.Generator, halves: bool) -> Iterator[str]:
    """The names with the words of each place dealt out anew, among names of as many words."""
    split = [name.split() for name in names]
    for length in sorted({len(words) for words in split}):
        alike = [words for words in split if len(words) == length]
        places = [[words[place] for words in alike] for place in range(length)]
        dealt = [[column[i] for i in generator.permutation(len(alike))] for column in places]
        if length == 1 and halves:
            yield from (_cut(head)[0] + _cut(tail)[1] for head, tail in zip(dealt[0], places[0], strict=True))
        else:
            yield from (" ".join(words) for words in zip(*dealt, strict=True))


def _cut(word: str) -> tuple[str, str]:
    """A word behind its first vowels.

    >>> _cut("Stavoren"), _cut("Oslo"), _cut("Ur")
    (('Sta', 'voren'), ('O', 'slo'), ('U', 'r'))
    """
    head = _HEAD.match(word)
    place = head.end() if head else max(1, len(word) // 2)
    return word[:place], word[place:]
