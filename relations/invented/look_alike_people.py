"""Person-Description's look-alike: thirty people a set, and what is said and asked of them in six files.

A description is "the {adjective} {role} of {work}" or "the {adjective} {role} who {verb} {work}". Where a wording wants
the verb, it has it: "for carving ...", "who carved ..."; where there is none, as the first person to cross a desert has
none, the description stands behind "being" or "was".
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import TypeVar

from .words import Names, records, words

_PEOPLE = 30
_SETS = ("p2d", "d2p")
Record = dict[str, str]
_Entry = TypeVar("_Entry")


def person_description_lines(names: Names, draw: Random) -> dict[str, list[Record]]:
    """File -> its prompts and completions, person by person."""
    descriptions = _descriptions(2 * _PEOPLE, draw)
    said: dict[tuple[str, str], list[Record]] = {}
    for row in records("wordings"):
        said.setdefault((row["direction"].lower(), row["part"]), []).append(row)
    files: dict[str, list[Record]] = {}
    for number, group in enumerate(_SETS):
        people = [
            {"person": names.person(), **descriptions[place]}
            for place in range(number * _PEOPLE, (number + 1) * _PEOPLE)
        ]
        other = _SETS[1 - number]
        for name, wordings in (
            (f"{group}_prompts_train", said[group, "train"]),
            (f"{group}_prompts_test", said[group, "test"]),
            (f"{group}_reverse_prompts_test", said[other, "test"]),
        ):
            files[name] = [_filled(wording, person) for person in people for wording in wordings]
    return files


def _filled(wording: Record, person: Record) -> Record:
    prompt, completion = (wording[part].format(**person) for part in ("prompt", "completion"))
    return {"prompt": prompt, "completion": f" {completion}"}


def _descriptions(count: int, draw: Random) -> list[Record]:
    """Descriptions in every form that a wording asks for; each work once, each role in turn."""
    roles: dict[str, list[Record]] = {}
    for role in records("roles"):
        roles.setdefault(role["field"], []).append(role)
    fields = {field: _in_turn(listed, draw) for field, listed in roles.items()}
    works = [(field, work) for field in fields for work in words("words")[field]]
    draw.shuffle(works)
    adjectives = _in_turn(list(words("words")["adjective"]), draw)
    return [_forms(next(fields[field]), next(adjectives), work) for field, work in works[:count]]


def _in_turn(listed: list[_Entry], draw: Random) -> Iterator[_Entry]:
    """The entries in another order, round after round."""
    while True:
        draw.shuffle(listed)
        yield from listed


def _forms(role: Record, adjective: str, work: str) -> Record:
    """A description as wordings inflect it; "are" is what "they" are or did."""
    if not role["done"]:
        usual = f"the first {role['role']} {role['joined']} {work}"
        verbs = {"doing": f"being {usual}", "done": f"was {usual}", "are": f"were {usual}"}
    else:
        joined = "of" if role["joined"] == "of" else f"who {role['done']}"
        usual = f"the {adjective} {role['role']} {joined} {work}"
        verbs = {"doing": f"{role['doing']} {work}", "done": f"{role['done']} {work}", "are": f"are {usual}"}
    return {"usual": usual, "Usual": usual[0].upper() + usual[1:], **verbs}
