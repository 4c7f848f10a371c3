"""Published relation files: where they are, and T-REx triples in the three layouts they come in.

Person-Description's files are read by `person_description`; Parent-Child's is a plain table.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import RevprobeError, did_you_mean
from .build import Options
from .cells import FactTable, Problem, clean, shown
from .statements import TemplateLists
from .tables import SUFFIXES, open_table, require_column
from .text_files import read_records, table_of

_BERGLUND = "https://github.com/lukasberglund/reversal_curse"
PUBLISHED = {
    "parent_child": f"parent_child_pairs.csv in {_BERGLUND}/tree/main/data/celebrity_relations",
    "person_description": (
        f"the p2d and d2p JSON lines files in {_BERGLUND}/tree/main/data/reverse_experiments/june_version_7921032488"
    ),
    "pore": "a folder of Data.zip in https://github.com/lzc-nazarite/PORE, such as Data/Company_Ceo",
    "trex": (
        "T-REx at https://hadyelsahar.github.io/t-rex, or its relations P*.jsonl in the data of "
        "https://github.com/facebookresearch/LAMA"
    ),
}
TRIPLE = ("subject", "relation", "object")
_LAMA = {"sub_label": "subject", "predicate_id": "relation", "obj_label": "object"}
# T-REx's aligners take what "Simple_Coreference" found ("He", "It") for a mention; it is nobody's name.
_COREFERENCE = "coreference"
_PRONOUNS = frozenset(
    [
        "he",
        "she",
        "it",
        "they",
        "him",
        "her",
        "them",
        "his",
        "hers",
        "its",
        "their",
        "theirs",
        "this",
        "that",
        "these",
        "those",
        "who",
        "which",
    ]
)


def require_published(name: str, path: str | Path | None) -> Path:
    """The path, if something is there. Raises: RevprobeError, saying where the files are published."""
    where = (
        f"{name} needs a file that does not come with revprobe: download {PUBLISHED[name]}, and pass its path, path=..."
    )
    if path is None:
        raise RevprobeError(where)
    found = Path(path).expanduser()
    if not found.exists():
        raise RevprobeError(f"there is no {found}; {where}")
    return found


def trex_table(
    path: Path, relation: str | Sequence[str] | None, templates: Mapping[str, TemplateLists] | None, options: Options
) -> FactTable:
    """The triples of a file or folder whose relation is wanted and worded.

    Raises: RevprobeError, for a file without triples, a cell that cannot be used, and a relation that is not there.
    """
    files = [path]
    if not path.is_file():
        inside = (file for file in path.iterdir() if file.name != "relations.jsonl")
        files = sorted(file for file in inside if file.suffix.lower() in SUFFIXES)
        if not files:
            raise RevprobeError(f"the folder {path} holds no file that ends in one of {', '.join(SUFFIXES)}")
    tables = [_triples(file, options) for file in files]
    frame = pd.concat([table.frame for table in tables], ignore_index=True).astype(object)
    labels = [label for table in tables for label in table.labels]
    table = FactTable(frame, labels, [problem for table in tables for problem in table.problems])
    if not labels:
        skipped = sum(problem.reason == "skipped_coreference" for problem in table.problems)
        why = f"all {skipped} triples name an entity by coreference" if skipped else "no triple is in it"
        raise RevprobeError(f"{path}: {why}; expected triples with the names of both entities")
    if options.rows is not None:
        raise RevprobeError(
            f"rows={options.rows!r}: a T-REx relation is chosen by relation=, not by rows; leave it out"
        )
    table = clean(table, TRIPLE, options.bad_rows)
    found = table.frame["relation"]
    wanted = found.map(_is_wanted(list(dict.fromkeys(found)), relation, path)).to_numpy(dtype=bool)
    table = table.take(np.flatnonzero(wanted))
    worded = table.frame["relation"].map(lambda name: find_templates(name, templates) is not None).to_numpy(dtype=bool)
    if relation is not None and not worded.all():
        place = int(np.flatnonzero(~worded)[0])
        name = table.frame["relation"][place]
        raise RevprobeError(
            f"{table.labels[place]}: column 'relation' holds {shown(name)}, for which there is no template; pass "
            f"templates={{{shown(name)}: {{'s2o': [...], 'o2s': [...]}}}}, with the slots {{subject}} and {{object}}"
        )
    table.flag(~worded, "relation", "skipped_no_template")
    if not worded.any():
        raise RevprobeError(
            f"{path}: no relation has a template; there are {shown(sorted(set(found)))}; pass templates=..."
        )
    return table.take(np.flatnonzero(worded))


def trex_groups(
    relations: Sequence[str], templates: Mapping[str, TemplateLists] | None
) -> list[tuple[str, TemplateLists]]:
    """Each relation of the table with its templates."""
    found = ((name, find_templates(name, templates)) for name in dict.fromkeys(relations))
    return [(name, lists) for name, lists in found if lists is not None]


def find_templates(name: str, templates: Mapping[str, TemplateLists] | None) -> TemplateLists | None:
    """The caller's templates of a relation, or the built-in ones by id or label, or None."""
    if templates is not None and name in templates:
        return templates[name]
    built_in, id_of = _built_in()
    return built_in.get(id_of.get(name, name))


@cache
def _built_in() -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
    """relation id -> direction -> templates, and label -> id."""
    templates: dict[str, dict[str, list[str]]] = {}
    id_of: dict[str, str] = {}
    with (Path(__file__).parent / "data" / "trex_templates.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            templates.setdefault(row["relation"], {}).setdefault(row["direction"], []).append(row["template"])
            id_of[row["label"]] = row["relation"]
    return templates, id_of


def _is_wanted(found: list[str], relation: str | Sequence[str] | None, path: Path) -> Any:
    """For each relation of the file whether it was asked for, by its name there, its id or its label."""
    if relation is None:
        return {name: True for name in found}
    id_of = _built_in()[1]
    asked = [relation] if isinstance(relation, str) else list(relation)
    wanted = {name for name in found for one in asked if id_of.get(one, one) in (name, id_of.get(name))}
    for one in asked:
        if one not in wanted and not {id_of.get(one), *(n for n in found if id_of.get(n) == one)} & wanted:
            raise RevprobeError(f"{path} has no relation {one!r}{did_you_mean(one, [*found, *id_of])}")
    return {name: name in wanted for name in found}


def _triples(path: Path, options: Options) -> FactTable:
    """One file's triples, whatever its layout, in the columns subject, relation, object."""
    if path.suffix.lower() in (".json", ".jsonl"):
        records, labels, problems = read_records(path, options.encoding)
        if any("triples" in record for record in records):
            return _documents(path, records, labels, problems)
        table = table_of(records, labels, problems)
    else:
        table = open_table(path, options.encoding)
    given = set(map(str, table.frame.columns))
    named = _LAMA if set(_LAMA) <= given else dict(zip(TRIPLE, TRIPLE, strict=True))
    missing = [column for column in named if column not in given]
    if missing:
        raise RevprobeError(
            f"{path} has no column {missing[0]!r}{did_you_mean(missing[0], given)}; expected subject, relation, "
            "object, LAMA's sub_label, predicate_id, obj_label, or T-REx documents with 'triples'"
        )
    for column in named:
        require_column(table.frame, column, str(path))
    return replace(table, frame=table.frame[list(named)].set_axis(list(TRIPLE), axis=1))


def _documents(path: Path, records: list[dict[str, Any]], labels: list[str], problems: list[Problem]) -> FactTable:
    """T-REx's own layout: documents, each with `triples`; those that name an entity by a pronoun are skipped."""
    rows, named, skipped = [], [], []
    for number, (document, label) in enumerate(zip(records, labels, strict=True)):
        triples = document.get("triples")
        if not isinstance(triples, list):
            raise RevprobeError(f"{label} has no list of 'triples', which other documents of {path.name} have")
        for place, triple in enumerate(triples):
            where = f"{path.name}, document {number}, triple {place}"
            referring = next((part for part in ("subject", "object") if _is_coreference(triple, part)), None)
            if referring is not None:
                said = repr(_part(triple, referring))
                skipped.append(Problem(where, referring, "skipped_coreference", said))
                continue
            rows.append([_part(triple, part) for part in ("subject", "predicate", "object")])
            named.append(where)
    return FactTable(pd.DataFrame(rows, columns=list(TRIPLE), dtype=object), named, [*problems, *skipped])


def _is_coreference(triple: Any, part: str) -> bool:
    """Whether an entity of a triple was found by what refers to it; a pronoun, where no annotator is told."""
    value = triple.get(part) if isinstance(triple, dict) else None
    if not isinstance(value, dict):
        return False
    annotator = value.get("annotator")
    if annotator:
        return _COREFERENCE in str(annotator).casefold()
    return str(value.get("surfaceform")).strip().casefold() in _PRONOUNS


def _part(triple: Any, part: str) -> Any:
    """The words of an entity, or the id of a predicate, the end of its address; None, an empty cell, when missing."""
    value = triple.get(part) if isinstance(triple, dict) else None
    if not isinstance(value, dict):
        return None
    found = str(value.get("uri") or "").rsplit("/", 1)[-1] if part == "predicate" else value.get("surfaceform")
    return found or None
