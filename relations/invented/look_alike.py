"""Files that look like the published ones, of people and things that nobody has heard of.

For those who lack the published files: the same names, columns, keys, numbers and grammar, so that what reads the one
reads the other. The words are in relations/data/look_alike_*.csv; who goes with what is drawn by the seed.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from random import Random

from ...arguments import checked
from ...atomic_files import folder_written_whole, write_text
from .look_alike_people import person_description_lines
from .look_alike_triples import documents
from .words import Names

_COLUMNS = ("child", "parent", "parent_type", "child_prediction", "can_reverse")
_ROWS = 700
_FILES = ("parent_child_pairs.csv", "person_description", "trex")
_A_FILE_OF_TRIPLES = 100


@checked
def look_alike_data(folder: str | Path, seed: int = 0) -> Path:
    """Write look-alikes of the published files: the same seed gives the same bytes.

        parent_child_pairs.csv     about 700 rows, most children with a mother and a father, some parents of two
        person_description/        30 people a set, each said in 30 wordings to train on and 10 others, and asked in 10
        trex/                      T-REx's own documents: 200 facts of five relations, and mentions by a pronoun besides

    `rp.parent_child`, `rp.person_description` and `rp.trex` read them as they read the published ones. No model can
    know these facts, and no name is in the published files.

    Args:
        folder: is made; one that holds other things is refused.
    Returns: the folder.
    Raises: RevprobeError, for a folder that holds anything else.
    """
    draw = Random(seed)
    names = Names(draw)
    with folder_written_whole(folder, lambda entry: entry.name in _FILES) as working:
        write_text(working / "parent_child_pairs.csv", _parent_child(names, draw))
        (working / "person_description").mkdir()
        for name, records in person_description_lines(names, draw).items():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_text(working / "person_description" / f"{name}.jsonl", lines)
        (working / "trex").mkdir()
        listed = documents(names, draw)
        for start in range(0, len(listed), _A_FILE_OF_TRIPLES):
            part = listed[start : start + _A_FILE_OF_TRIPLES]
            write_text(working / "trex" / f"re-nlg_{start}-{start + len(part)}.json", json.dumps(part))
    return Path(folder)


def _parent_child(names: Names, draw: Random) -> str:
    """The table. What another model predicted stays empty, since none was asked."""
    rows: list[tuple[str, str, str, str, str]] = []
    while len(rows) < _ROWS:
        last = names.last()
        mother = names.person(last if draw.random() < 0.6 else None, "female")
        known = [("mother", mother), ("father", names.person(last, "male"))]
        # Some children have one parent in the file, some a brother or sister, some another name than their parents.
        if draw.random() < 0.1:
            known = [known[draw.random() < 0.5]]
        for _ in range(1 + (draw.random() < 0.05)):
            child = names.person(last if draw.random() < 0.8 else None)
            rows += [(child, parent, kind, "", "False") for kind, parent in known]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_COLUMNS, *rows])
    return text.getvalue()
