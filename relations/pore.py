"""PORE's datasets as published: two JSON files of sentences that say the same facts in the two directions.

`standard_positive_train_dataset.json` has {"prompt": "Aramco's CEO is Amin Nasser.", "completion": ""}, and
`standard_negative_train_dataset.json` in the same place {"prompt": "Amin Nasser's company is Aramco.", ...}. No file
names the entities: they are what makes both sentences of a place come out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from ..errors import RevprobeError
from .cells import shown
from .tables import require_file
from .text_files import read_records

FILES = {direction: f"standard_{direction}_train_dataset.json" for direction in ("positive", "negative")}
COLUMNS = ("first", "second")
TEMPLATES = {
    "positive": (
        "{first}'s {relation} is {second}",
        "The {relation} of {first} is {second}",
        "As for {first}, the {relation} is {second}",
    ),
    "negative": (
        "{second}'s {inverse} is {first}",
        "The {inverse} of {second} is {first}",
        "As for {second}, the {inverse} is {first}",
    ),
}
_SAYS = re.compile(r"'s (\w+) is ")


def pore_table(folder: Path, encoding: str) -> pd.DataFrame:
    """The facts of a dataset: first, relation, second, inverse.

    Raises: RevprobeError, naming the row, for files that are not of this layout or do not say the same facts.
    """
    if not folder.is_dir():
        raise RevprobeError(
            f"{folder} is a file; expected the folder of one dataset, with {' and '.join(FILES.values())}"
        )
    sentences = {direction: _sentences(folder / name, encoding) for direction, name in FILES.items()}
    counts = {direction: len(listed) for direction, listed in sentences.items()}
    if counts["positive"] != counts["negative"]:
        raise RevprobeError(f"{folder}: its files have {counts} sentences; expected one of each for every fact")
    pairs = zip(sentences["positive"], sentences["negative"], strict=True)
    rows = [_fact(said, turned, f"{folder.name}, row {row}") for row, (said, turned) in enumerate(pairs)]
    return pd.DataFrame(rows, columns=["first", "relation", "second", "inverse"], dtype=object)


def _sentences(path: Path, encoding: str) -> list[str]:
    require_file(path)
    records, labels, _ = read_records(path, encoding)
    for record, label in zip(records, labels, strict=True):
        if not isinstance(record.get("prompt"), str):
            raise RevprobeError(f"{label}: no text under 'prompt', expected a sentence; it has {shown(sorted(record))}")
    return [record["prompt"].strip() for record in records]


def _fact(said: str, turned: str, label: str) -> tuple[str, str, str, str]:
    """The entities and the two words of a fact, from "A's CEO is B." and "B's company is A."."""
    for found in _SAYS.finditer(said):
        first, second = said[: found.start()].strip(), said[found.end() :].removesuffix(".").strip()
        other = re.fullmatch(f"{re.escape(second)}\\s*'s (\\w+) is\\s+{re.escape(first)}\\s*\\.?", turned)
        if first and second and other:
            return first, found[1], second, other[1]
    raise RevprobeError(
        f'{label}: {shown(said)} and {shown(turned)} do not say one fact as "A\'s CEO is B." and "B\'s company is A."; '
        "check that the two files belong together"
    )
