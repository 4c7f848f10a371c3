"""Person-Description as published: six JSON lines files of prompts and completions, and how they belong together.

Two sets of people, p2d and d2p. Of the people of a set there are statements in the set's own direction to train on
(`<set>_prompts_train`), others in the same direction to test with (`<set>_prompts_test`), and statements in the
other direction (`<set>_reverse_prompts_test`). No file names the entities: they are found as told below.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import RevprobeError
from ..probes.pairs.templates import Span, Template
from ..probes.pairs.words import holds
from .cells import Problem, clean, shown
from .splits import hold_out
from .statements import Statement
from .tables import require_column, require_file
from .text_files import read_json_lines
from .text_relation import TextRelation

DIRECTIONS = ("P2D", "D2P")
# file -> (set of people, direction of its statements, whether its wordings are held out from training)
FILES = {
    "p2d_prompts_train": ("P2D", "P2D", False),
    "p2d_prompts_test": ("P2D", "P2D", True),
    "p2d_reverse_prompts_test": ("P2D", "D2P", True),
    "d2p_prompts_train": ("D2P", "D2P", False),
    "d2p_prompts_test": ("D2P", "D2P", True),
    "d2p_reverse_prompts_test": ("D2P", "P2D", True),
}
# The completions of these are names and nothing else.
_NAMING = {"P2D": "p2d_reverse_prompts_test", "D2P": "d2p_prompts_test"}
# What a sentence puts behind a description. A closing quotation mark belongs to the description, and to the answer;
# but a tokenizer joins it with the comma that follows, so the entity ends before it.
_SENTENCE_ENDING = ".?!' "
_ENDING = _SENTENCE_ENDING + '"'
_WORD = re.compile(r"\w+")
Sides = dict[str, np.ndarray]
# How an answer may end: a description whose title is open ends with its closing mark or without.
_ENDINGS = ("", ".")
_OPEN_ENDINGS = ('."', '"', "", '.".', '".')
# What a prompt puts before the words that it has in common with a description, when it has a verb of its own for them.
_DOING = re.compile(r"\b(?:for|of|behind) ((?:\w+ly )?[a-z]+ing (?:[\w'-]+ )*)$")
# A prompt that rewords a description still has this many words of it in a row.
_FEWEST_WORDS = 3


@dataclass(frozen=True)
class Line:
    """A prompt and its completion, in which file and line it stood, and whom it is about."""

    file: str
    label: str
    prompt: str
    completion: str
    person: str = ""

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.completion}"


def person_description_relation(
    folder: Path, carrier: str, encoding: str, heldout: float | None, seed: int
) -> TextRelation:
    """The relation of a folder. Raises: RevprobeError, naming file, line and column, for another structure."""
    if not folder.is_dir():
        raise RevprobeError(
            f"{folder} is a file; expected the folder with {', '.join(f'{name}.jsonl' for name in FILES)}"
        )
    problems: list[Problem] = []
    lines = {name: _read(folder / f"{name}.jsonl", encoding, problems) for name in FILES}
    sets = {name: list(dict.fromkeys(line.completion for line in lines[file])) for name, file in _NAMING.items()}
    both = sorted(set(sets["P2D"]) & set(sets["D2P"]))
    if both:
        raise RevprobeError(f"{folder}: {both[0]!r} is in both sets of people ({len(both)} are), so neither is a floor")
    people = [(person, name) for name in DIRECTIONS for person in sets[name]]
    lines = {file: _assign(listed, sets[FILES[file][0]], FILES[file][1]) for file, listed in lines.items()}
    described = _descriptions([line for listed in lines.values() for line in listed], [person for person, _ in people])
    number = {person: place for place, (person, _) in enumerate(people)}
    statements: dict[str, list[Statement]] = {direction: [] for direction in DIRECTIONS}
    right = _right_descriptions(lines, described)
    for line, place in _numbered(lines):
        answers = right[line.person] if FILES[line.file][1] == "P2D" else (line.person, f"{line.person}.")
        statement, reworded = _statement(line, number[line.person], place, described[line.person], answers)
        statements[statement.direction].append(statement)
        if reworded:
            problems.append(Problem(line.label, "", reworded, line.text))
    held, unused = _split([name for _, name in people], heldout, seed)
    return TextRelation(
        name="person_description",
        directions=("P2D", "D2P"),
        columns=("person", "description"),
        table=_table(people, described),
        statements=statements,
        heldout=held,
        carrier=carrier,
        problems=tuple(problems),
        unused=unused,
    )


def _split(sets: Sequence[str], share: float | None, seed: int) -> tuple[Sides, Sides]:
    """For each direction of training which people are held out, and which it leaves out.

    Training reads one set; of the other it reads nothing, which makes that the floor. With a share the floor is drawn
    from the set itself.
    """
    other = {direction: np.array([name != direction for name in sets]) for direction in DIRECTIONS}
    if share is None:
        return other, {}
    held = {direction: outside.copy() for direction, outside in other.items()}
    for direction, outside in other.items():
        own = np.flatnonzero(~outside)
        held[direction][own] = hold_out([(place,) for place in own], share=share, seed=seed)
    return held, other


def _table(people: Sequence[tuple[str, str]], described: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """One row per person: a person is a fact."""
    names = [person for person, _ in people]
    return pd.DataFrame(
        {
            "fact": names,
            "person": names,
            "description": [described[person][0] for person in names],
            "set": [name for _, name in people],
            "row": [f"person {person!r}" for person in names],
        }
    )


def _read(path: Path, encoding: str, problems: list[Problem]) -> list[Line]:
    require_file(path)
    table = read_json_lines(path, encoding)
    for column in ("prompt", "completion"):
        require_column(table.frame, column, str(path))
    table = clean(table, ["prompt", "completion"])
    # The blank that opens a completion is the file format's, which keeps what joins the two with the completion.
    problems += [problem for problem in table.problems if problem.reason != "stripped_blanks"]
    cells = zip(table.labels, table.frame["prompt"], table.frame["completion"], strict=True)
    return [Line(path.stem, label, prompt, completion) for label, prompt, completion in cells]


def _assign(lines: Sequence[Line], people: Sequence[str], direction: str) -> list[Line]:
    """Each line with the one person it names, in its prompt (P2D) or in its completion (D2P)."""
    column = "prompt" if direction == "P2D" else "completion"
    assigned = []
    for line in lines:
        found = [person for person in people if holds(getattr(line, column), person)]
        if len(found) != 1:
            raise RevprobeError(
                f"{line.label}: column {column!r} names {len(found)} of the {len(people)} people that "
                f"{_NAMING[FILES[line.file][0]]}.jsonl asks for ({shown(getattr(line, column))}); expected one"
            )
        assigned.append(Line(line.file, line.label, line.prompt, line.completion, found[0]))
    return assigned


def _descriptions(lines: Sequence[Line], people: Sequence[str]) -> dict[str, list[str]]:
    """Person -> the inflections of the description, the most frequent first."""
    counts: dict[str, Counter[str]] = {person: Counter() for person in people}
    for line in lines:
        if FILES[line.file][1] == "P2D":
            counts[line.person][line.completion.rstrip(_ENDING)] += 1
    bare = next((person for person in people if not counts[person]), None)
    if bare is not None:
        raise RevprobeError(
            f"no prompt asks for the description of {bare!r}; each person needs statements in both directions"
        )
    return {person: [text for text, _ in found.most_common()] for person, found in counts.items()}


def _right_descriptions(
    lines: Mapping[str, Sequence[Line]], described: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Person -> what counts as the description: every completion that the files have for it, and each of its forms
    with and without the marks that close a title and a sentence.

    Forms are what completions have, and what prompts have after "for" and the like: "masterminding the heist".
    """
    right = {}
    prompted: dict[str, list[str]] = {person: [] for person in described}
    for file, listed in lines.items():
        if FILES[file][1] == "D2P":
            for line in listed:
                prompted[line.person] += _prompted_form(line, described[line.person])
    for person, completed in described.items():
        forms = [*completed, *prompted[person]]
        ends = {form: _OPEN_ENDINGS if form.count('"') % 2 else _ENDINGS for form in forms}
        right[person] = dict.fromkeys(form + end for form in forms for end in ends[form])
    for file, listed in lines.items():
        if FILES[file][1] == "P2D":
            for line in listed:
                right[line.person].setdefault(line.completion)
    return {person: tuple(answers) for person, answers in right.items()}


def _prompted_form(line: Line, described: Sequence[str]) -> list[str]:
    """A form of the description that a prompt alone has; none, where completions have it or it is cut short."""
    (start, end), how = _find_description(line, (0, len(line.prompt)), described)
    common = line.text[start:end]
    verb = _DOING.search(line.text[:start])
    if how != "description_partial" or verb is None:
        return []
    return [verb[1] + common] if any(form.endswith(common) for form in described) else []


def _numbered(lines: Mapping[str, Sequence[Line]]) -> Iterator[tuple[Line, int]]:
    """Every line with the number of its wording within its direction: a person's lines in file order, training ones
    first. The people of both sets have the tests' wordings in common, and so their numbers.
    """
    trained = max(
        count
        for file in ("p2d_prompts_train", "d2p_prompts_train")
        for count in Counter(o.person for o in lines[file]).values()
    )
    for file, listed in lines.items():
        seen: Counter[str] = Counter()
        for line in listed:
            yield line, seen[line.person] + (trained if FILES[file][2] else 0)
            seen[line.person] += 1


def _statement(
    line: Line, fact: int, place: int, described: Sequence[str], right: Sequence[str]
) -> tuple[Statement, str]:
    """A line as a statement, both entities found in it; and why it makes no pair, "" when it does."""
    direction, heldout = FILES[line.file][1:]
    person_first = direction == "P2D"
    split = len(line.prompt)
    start = line.text.index(line.person, 0 if person_first else split)
    person = (start, start + len(line.person))
    within = (split + 1, len(line.text)) if person_first else (0, split)
    description, reworded = _find_description(line, within, described)
    spans = (person, description) if person_first else (description, person)
    entity = line.completion.rstrip(_SENTENCE_ENDING) if person_first else line.person
    # The text as a template, the person its target and the description its evidence.
    roles = ("target", "evidence") if person_first else ("evidence", "target")
    (start, end), (second, last) = spans
    parts = (line.text[:start], roles[0]), (line.text[end:second], roles[1]), (line.text[last:], None)
    statement = Statement(
        fact=fact,
        direction=direction,
        template=place,
        is_heldout=heldout,
        text=line.text,
        spans=spans,
        prompt_length=split,
        answers=tuple(dict.fromkeys((entity, line.completion, *right))),
        wording=None if reworded else Template(line.text, parts),
    )
    return statement, reworded


def _find_description(line: Line, within: Span, described: Sequence[str]) -> tuple[Span, str]:
    """Where the description stands, and how: in its usual form (""), in another one, or the words it has in common."""
    text = line.text[slice(*within)]
    for one in (described[0], *sorted(described[1:], key=len, reverse=True)):
        start = text.casefold().find(one.casefold())
        if start >= 0:
            usual = text[start : start + len(one)] == described[0]
            return (within[0] + start, within[0] + start + len(one)), "" if usual else "description_inflected"
    first, last = max((_common_words(text, one) for one in described), key=lambda span: span[1] - span[0])
    if len(_WORD.findall(text[first:last])) < _FEWEST_WORDS:
        column = "completion" if within[0] else "prompt"
        raise RevprobeError(
            f"{line.label}: column {column!r} holds {shown(text)}, which does not describe {line.person!r} "
            f"({shown(described[0])}); check the pairing of the files"
        )
    return (within[0] + first, within[0] + last), "description_partial"


def _common_words(text: str, other: str) -> Span:
    """The longest run of words that two texts have in common, by its place in the first."""
    words = list(_WORD.finditer(text))
    lists = [word.group().casefold() for word in words], [word.casefold() for word in _WORD.findall(other)]
    run = SequenceMatcher(None, *lists, autojunk=False).find_longest_match()
    return (words[run.a].start(), words[run.a + run.size - 1].end()) if run.size else (0, 0)
