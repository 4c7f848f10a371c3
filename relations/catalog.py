"""Relations: the facts a model is trained on in one direction, and the questions and pairs that test it in both.

`letters` is the synthetic relation; the others are told in text and come from a table or from published files, each
as a `TextRelation`. `load_relation` makes any of them by name, for config files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Unpack

import pandas as pd

from ..arguments import checked
from ..errors import RevprobeError, did_you_mean
from .build import RelationOptions, build_relation, read_facts, read_options
from .letters import LettersRelation, letter_pairs, letters
from .person_description import person_description_relation
from .pore import COLUMNS as PORE_COLUMNS
from .pore import TEMPLATES as PORE
from .pore import pore_table
from .published import require_published, trex_groups, trex_table
from .statements import TemplateLists
from .text_relation import Question, TextRelation, TrainingText

__all__ = [
    "RELATIONS",
    "LettersRelation",
    "Question",
    "TextRelation",
    "TrainingText",
    "from_table",
    "invented_names",
    "letter_pairs",
    "letters",
    "load_relation",
    "parent_child",
    "person_description",
    "pore",
    "trex",
]

# Several per direction, the last of each held out from training. {parent_type} is "mother" or "father"; "parent" where
# the file says both of one and the same person.
PARENT_CHILD = {
    "P2C": (
        "{parent}'s child is {child}",
        "The child of {parent} is {child}",
        "{parent} is the {parent_type} of {child}",
        "{parent} has a child named {child}",
    ),
    "C2P": (
        "{child}'s parent is {parent}",
        "{child}'s {parent_type} is {parent}",
        "The {parent_type} of {child} is {parent}",
        "{child} has a parent named {parent}",
    ),
}


@checked
def from_table(
    source: str | Path | pd.DataFrame,
    columns: Sequence[str],
    templates: TemplateLists,
    *,
    name: str | None = None,
    **options: Unpack[RelationOptions],
) -> TextRelation:
    """A relation from any table, one fact per row.

        from_table("capitals.csv", ("country", "city"), {
            "C2T": ["The capital of {country} is {city}", "{country} is governed from {city}"],
            "T2C": ["{city} is the capital of {country}", "{city} governs {country}"],
        })

    Args:
        source: a .csv, .tsv, .jsonl, .json or .parquet path, a DataFrame, or the name of a dataset of the `datasets`
            library (its data files are read; no code of its repository is run).
        columns: the two entity columns.
        templates: for each of the two directions its templates; the first direction's name the first column first,
            the second's the second. Slots are the columns in braces, any further column among them.
        name: what the relation is called; the source's own name by default.
        options: `RelationOptions`: heldout (share of facts held out, 0.1), seed (0), heldout_templates (the last 1 of
            each direction), carrier ("Fact: "), duplicates ("error", or "merge"), ignore_case (False), bad_rows
            ("error", or "skip"), rows, encoding, dataset_split, dataset_config.
    Raises: RevprobeError, naming row and column, for a missing column, an empty or unreadable cell and a repeated
        fact; naming the template, for one that lacks a slot or names the entities in the other order.
    """
    chosen = read_options(options)
    if not isinstance(templates, Mapping):
        raise RevprobeError(f"templates={templates!r}: expected two directions, each with a template or a list of them")
    table = read_facts(source, columns, templates.values(), chosen)
    called = name or ("table" if isinstance(source, pd.DataFrame) else Path(source).stem)
    return build_relation(called, table, columns, [(None, templates)], chosen)


@checked
def parent_child(path: str | Path | None = None, **options: Unpack[RelationOptions]) -> TextRelation:
    """Parent-Child (Berglund et al., 2024): the published `parent_child_pairs.csv`, directions P2C and C2P.

    The columns child, parent and parent_type are used. `child_prediction` and `can_reverse` record what another model
    answered; they stay as columns of `facts` and decide nothing. A parent that the file calls mother and father of the
    same child becomes one fact with the parent_type "parent"; repeated rows become one. Both are counted in `report`
    (conflicting_parent_type, duplicate_fact) and listed in `problem_table`. Of a child with two trained parents no
    model can give each a probability above 1/2 after "{child}'s parent is"; exact match accepts either.

    Args:
        path: the CSV file.
        options: as in `from_table`, but duplicates="merge" unless given.
    Raises: RevprobeError, as `from_table`; without the file it says where that is published.
    """
    file = require_published("parent_child", path)
    return _parent_child("parent_child", file, options)


@checked
def invented_names(**options: Unpack[RelationOptions]) -> TextRelation:
    """A small Parent-Child relation of invented names that comes with the package: no model can know its facts.

    Options are those of `from_table`; rows=(0, 60) and rows=(60, 120) are two relations without a common name.
    """
    return _parent_child("invented_names", Path(__file__).parent / "data" / "invented_names.csv", options)


def _parent_child(name: str, path: Path, options: Mapping[str, Any]) -> TextRelation:
    chosen = read_options({"duplicates": "merge", **options})
    columns = ("parent", "child")
    table = read_facts(path, columns, PARENT_CHILD.values(), chosen)
    types = table.frame["parent_type"]
    wrong = next((place for place, value in enumerate(types) if value not in ("mother", "father", "parent")), None)
    if wrong is not None:
        raise RevprobeError(f"{table.labels[wrong]}: column 'parent_type' holds {types[wrong]!r}, not mother or father")
    # One person cannot be both; which of the two is wrong the file does not say.
    kinds = table.frame.groupby(list(columns))["parent_type"].transform("nunique")
    table.flag(kinds > 1, "parent_type", "conflicting_parent_type")
    table.frame.loc[kinds > 1, "parent_type"] = "parent"
    return build_relation(name, table, columns, [(None, PARENT_CHILD)], chosen)


@checked
def person_description(
    path: str | Path | None = None,
    *,
    heldout: float | None = None,
    seed: int = 0,
    carrier: str = "Fact: ",
    encoding: str = "utf-8",
) -> TextRelation:
    """Person-Description (Berglund et al., 2024): the published folder of p2d and d2p JSON lines files.

    The files are two sets of facts about different people, each with prompts in its own direction (`*_prompts_train`,
    and `*_prompts_test` in other wordings) and in the other (`*_reverse_prompts_test`). So training in "P2D" reads
    p2d_prompts_train, is asked forward by p2d_prompts_test and in reverse by p2d_reverse_prompts_test, and its floor
    are the same questions about the people of the d2p files, of whom it reads nothing. "D2P" the other way round. With
    `heldout` the floor is drawn from the 30 people of the set itself, and the other set is left out.

    There is no column of names: completions of the prompts that ask for a person are the names, and a prompt belongs
    to the person it names. A description comes in several inflections ("directing ...", "the director of ..."); the
    pairs use the statements that hold the most frequent one. `report` counts the statements that do not.

    Right as a description is every form of it that the files have, whichever the prompt calls for ("led the band" after
    "known for"), with or without the marks that close a title and the sentence; right as a person is the name, with or
    without a full stop, and the completion as the file has it. `TextRelation.accepted` lists them.

    Args:
        path: the folder.
        heldout: share of the set's own people to hold out from training, the floor; None for the other set's people.
        seed: draws them.
        carrier: text before every text and question. The published texts have none, and names start some of them.
    Raises: RevprobeError, naming file, line and column, for what does not have this structure; without the folder it
        says where that is published.
    """
    return person_description_relation(require_published("person_description", path), carrier, encoding, heldout, seed)


@checked
def trex(
    path: str | Path | None = None,
    relation: str | Sequence[str] | None = None,
    *,
    templates: Mapping[str, TemplateLists] | None = None,
    **options: Unpack[RelationOptions],
) -> TextRelation:
    """T-REx triples (Elsahar et al., 2018) in the directions s2o (subject first) and o2s.

    Args:
        path: a .csv, .tsv, .jsonl, .json or .parquet table with the columns subject, relation, object; LAMA's JSON
            lines (sub_label, predicate_id, obj_label); T-REx's own JSON documents with `triples`; or a folder of these.
        relation: the relations to keep, by the name the file gives them ("P19") or by label ("place of birth"); all
            that have templates by default.
        templates: relation -> {"s2o": [...], "o2s": [...]} with the slots {subject} and {object}, before the built-in
            ones, which word common relations of LAMA.
        options: as in `from_table`, but duplicates="merge" unless given; `rows` does not apply.
    Raises: RevprobeError, as `from_table`, and for a relation that is not in the file or has no template.
    """
    chosen = read_options({"duplicates": "merge", **options})
    table = trex_table(require_published("trex", path), relation, templates, chosen)
    groups = trex_groups(table.frame["relation"].tolist(), templates)
    return build_relation("trex", table, ("subject", "object"), groups, chosen, by="relation")


@checked
def pore(path: str | Path | None = None, **options: Unpack[RelationOptions]) -> TextRelation:
    """A dataset of PORE (Lu et al., 2024) in the directions "positive" ("Aramco's CEO is ...") and "negative".

    Its company and CEO, work and author, or child and parent come from standard_positive_train_dataset.json and
    standard_negative_train_dataset.json, which say the same facts in the same order. The first wording of a direction
    is the files'; the others are ours. Names stay as the files write them ("Q &amp; A"); a few works were decoded
    wrongly before they were saved, and bad_rows="skip" leaves them out.

    Args:
        path: the folder of one dataset, such as Data/Company_Ceo.
        options: as in `from_table`, but duplicates="merge" unless given.
    Raises: RevprobeError, as `from_table`, and naming the row where the two files do not say one fact.
    """
    chosen = read_options({"duplicates": "merge", **options})
    frame = pore_table(require_published("pore", path), chosen.encoding)
    table = read_facts(frame, PORE_COLUMNS, PORE.values(), chosen)
    return build_relation("pore", table, PORE_COLUMNS, [(None, PORE)], chosen)


RELATIONS: dict[str, Callable[..., TextRelation | LettersRelation]] = {
    "letters": letters,
    "parent_child": parent_child,
    "person_description": person_description,
    "pore": pore,
    "trex": trex,
    "table": from_table,
    "invented_names": invented_names,
}


def load_relation(name: str, path: str | Path | None = None, **options: Any) -> TextRelation | LettersRelation:
    """A relation by name, with the options of the function of that name ("table" is `from_table`).

    Args:
        path: the file or folder; None for "letters" and "invented_names", which need none.
    Raises: RevprobeError, for an unknown name, a missing or unneeded path, and options the relation does not take.
    """
    if name not in RELATIONS:
        raise RevprobeError(f"unknown relation {name!r}{did_you_mean(str(name), RELATIONS)}")
    reads_file = name not in ("letters", "invented_names")
    if path is not None and not reads_file:
        raise RevprobeError(f"relation {name!r} reads no file, got path={str(path)!r}; leave it out")
    if path is None and name == "table":
        raise RevprobeError(
            "relation 'table' needs path=: a .csv, .tsv, .jsonl, .json or .parquet file, or a dataset's name"
        )
    arguments = (path,) if reads_file else ()
    make = RELATIONS[name]
    try:
        signature(make).bind(*arguments, **options)
    except TypeError as error:
        raise RevprobeError(f"relation {name!r}: {error}; see help(revprobe.{make.__name__})") from None
    return make(*arguments, **options)
